// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Synchronization
import Testing

@testable import Migration

/// A tracker with the kernel's rules of manual protection and `INITIALLY_SET`: a write is seen only if its page is
/// protected, collecting protects nothing, and a bit stands until its page is protected.
private final class LazyTracker: DirtyTracker {
    private struct State {
        var isArmed = false
        /// Pages whose next write will be seen.
        var protected: Set<Int> = []
        var log: Set<Int> = []
        /// Collected, and not protected yet.
        var open: Set<Int> = []
    }
    private let state = Mutex(State())
    private let pages: [Int]
    private let journal: Journal

    init(_ guest: MiniGuest) {
        pages = guest.pages
        journal = guest.journal
    }

    func wrote(_ page: Int) {
        state.withLock { if $0.protected.remove(page) != nil { $0.log.insert(page) } }
    }
    func isProtected(_ page: Int) -> Bool { state.withLock { $0.protected.contains(page) } }

    func arm() throws(PartFailure) {
        state.withLock {
            $0.isArmed = true
            $0.log = Set(pages)
            $0.open = $0.log
        }
    }
    private func protect(_ chosen: (Int) -> Bool) {
        state.withLock {
            for page in $0.open where chosen(page) {
                $0.open.remove(page)
                $0.log.remove(page)
                $0.protected.insert(page)
            }
        }
    }
    func collect(into bitmap: PageBitmap) throws(PartFailure) {
        protect { _ in true }
        state.withLock {
            for page in $0.log { bitmap.set(page..<page + 1) }
            $0.open = $0.log
        }
    }
    func willSend(_ pages: Range<Int>) throws(PartFailure) { protect(pages.contains) }
    func protectAll() throws(PartFailure) {
        journal.note("protect all")
        protect { _ in true }
    }
    func disarm() { state.withLock { $0 = State() } }
}

@Suite struct ProtectionTests {
    /// A page that the guest reuses right after it looked arrives, although nothing was protected when tracking began.
    @Test func w1_pagesAreProtectedBeforeTheGuestLooks() throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 1) }
        let tracker = LazyTracker(guest)
        let hinter = ScriptedHinter(guest.journal) { request in
            guard request == 2 else { return nil }
            guest.write(0xaaaa, page: 12)
            tracker.wrote(12)
            return report(request, guest.memory, 10..<20)
        }
        let place = MiniPlace()
        let ends = try migrate(
            MigrationSource(guest: guest, trackers: [tracker], hinter: hinter, options: quickOptions(skip: true)),
            to: MigrationReceiver(guest: place))
        let result = try ends.source.get()
        _ = try ends.destination.get()
        let arrived = try #require(place.guest)
        #expect(result.rounds[0].skipped == 10)
        #expect(arrived.read(page: 12) == 0xaaaa)
        #expect(guest.journal.all.first { $0 == "request" || $0 == "protect all" } == "protect all")
    }

    /// A page written after it was sent arrives: it was protected before it was read.
    @Test func w1_pagesAreProtectedBeforeTheyAreSent() throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 2) }
        let tracker = LazyTracker(guest)
        let written = Mutex(false)
        let source = MigrationSource(guest: guest, trackers: [tracker], options: quickOptions()) { progress, _ in
            guard progress.phase == .rounds, progress.remainingPages == 0, progress.round == 1 else { return }
            guard !written.withLock({ was in defer { was = true }; return was }) else { return }
            guest.write(0xbbbb, page: 3)
            tracker.wrote(3)
        }
        let place = MiniPlace()
        let ends = try migrate(source, to: MigrationReceiver(guest: place))
        let result = try ends.source.get()
        _ = try ends.destination.get()
        #expect(written.withLock { $0 })
        #expect(try #require(place.guest).read(page: 3) == 0xbbbb)
        // Nobody asked for hints: only what is about to be sent was protected.
        #expect(guest.journal.count("protect all") == 0)
        #expect(result.pagesSent == guest.pages.count + 1)
    }
}
