// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Synchronization
import Testing

@testable import Migration

/// A guest's page allocator: which pages are free, which are in use. Free pages are cleared when they are freed, and
/// not when they are handed out again, as with `init_on_free=1`; so every page must arrive as it is, free or not.
private final class Allocator: Sendable {
    private let state: Mutex<(free: [Int], used: [Int], random: SplitMix)>

    init(_ pages: [Int], seed: UInt64) {
        state = Mutex((pages, [], SplitMix(seed)))
    }

    func step(_ guest: MiniGuest) {
        state.withLock { state in
            let takes = state.used.isEmpty || (!state.free.isEmpty && Bool.random(using: &state.random))
            if takes {
                let page = state.free.remove(at: Int.random(in: 0..<state.free.count, using: &state.random))
                guest.write(state.random.next() | 1, page: page, offset: 8 * Int.random(in: 0..<512, using: &state.random))
                state.used.append(page)
            } else {
                let page = state.used.remove(at: Int.random(in: 0..<state.used.count, using: &state.random))
                guest.clear(page: page)
                state.free.append(page)
            }
        }
    }

    /// What the guest's free lists say at this moment; stale as soon as it is returned.
    var free: [Int] { state.withLock { $0.free } }
}

@Suite struct WholeTests {
    private let layout = [mebibytes(0, 4), mebibytes(4, 2), mebibytes(8, 4)]

    @Test(arguments: 0..<14) func aBusyGuestArrivesWhole(seed: Int) throws {
        let skip = seed % 3 != 0
        let connections = seed < 6 ? 1 : [2, 3, 4, 16][seed % 4]
        let guest = try MiniGuest(layout)
        let pages = guest.pages
        for page in pages where page % 5 == 0 { guest.fill(page: page, seed: UInt64(seed)) }
        // Not page 7, which a device writes to: the bytes of a page that is free may be lost.
        let allocator = Allocator(pages.filter { $0 % 5 != 0 && $0 != 7 }, seed: UInt64(seed))
        for _ in 0..<2000 { allocator.step(guest) }
        let counter = Atomic<UInt64>(0)
        guest.writers.withLock {
            $0 = [
                { allocator.step($0) },
                { guest in
                    let value = counter.add(1, ordering: .relaxed).newValue
                    guest.write(value, page: Int(value % 40) * 5)
                    // A device's buffer, on a page the allocator does not own: free pages have no device writing to them.
                    try? guest.memory.store(value, at: GuestAddress(UInt64(200) << 12 | 8))
                },
            ]
        }
        guest.startWriters()
        let hinter = ScriptedHinter(guest.journal) { report($0, guest.memory, allocator.free) }
        var options = quickOptions(skip: skip)
        options.downtimeLimitMilliseconds = seed < 3 ? 1 : 50
        options.maxRounds = 6
        options.connections = connections
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], hinter: hinter, options: options)
        let place = MiniPlace(layout)
        let ends = try migrate(source, to: MigrationReceiver(guest: place))
        let result = try ends.source.get()
        let received = try ends.destination.get()
        #expect(result.outcome == .completed && received.acknowledged)
        #expect(!guest.isRunning && place.runs)
        let different = try #require(place.guest).differences(guest)
        #expect(different.isEmpty, "pages \(different)")
        #expect(place.state.withLock { $0 } == guest.sections.withLock { $0 })
        #expect(result.bytes == received.bytes)
        #expect(result.pagesSent == received.pages && result.zeroPages == received.zeroPages)
        #expect(result.rounds.count == received.rounds)
        #expect(result.connections == connections && received.connections == connections && received.strangers == 0)
        #expect(!guest.tracker.armed)
        #expect((result.hintMethod == "script") == skip && (result.skippedPages > 0) == skip)
        #expect(result.rounds.reduce(0) { $0 + $1.sent } == result.pagesSent)
        try place.guest?.pause()
    }

    @Test func zeroPagesCostAlmostNothing() throws {
        let guest = try MiniGuest([mebibytes(0, 64)])
        guest.write(1, page: 77)
        let place = MiniPlace([mebibytes(0, 64)])
        let ends = try migrate(
            MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions()),
            to: MigrationReceiver(guest: place))
        let report = try ends.source.get()
        #expect(report.pagesSent == 1 && report.zeroPages == guest.memory.ramPages - 1)
        #expect(report.bytes < 8192)
        #expect(try #require(place.guest).read(page: 77) == 1)
    }

    @Test func thereAndBackAgain() throws {
        var guest = try MiniGuest()
        for page in guest.pages where page % 2 == 0 { guest.fill(page: page, seed: UInt64(page)) }
        for trip in 0..<6 {
            let here = guest
            here.write(UInt64(trip), page: trip)
            let place = MiniPlace()
            let ends = try migrate(
                MigrationSource(guest: here, trackers: [here.tracker], options: quickOptions()),
                to: MigrationReceiver(guest: place))
            _ = try ends.source.get()
            _ = try ends.destination.get()
            guest = try #require(place.guest)
            #expect(guest.differences(here).isEmpty)
            #expect(guest.isRunning && !here.isRunning)
        }
        try guest.pause()
    }

    @Test func anotherMachineIsRefused() throws {
        let guest = try MiniGuest()
        let place = MiniPlace([mebibytes(0, 1)])
        let ends = try migrate(
            MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions()),
            to: MigrationReceiver(guest: place))
        let why = "this machine has another memory layout"
        #expect(throws: MigrationError.refused(why)) { try ends.source.get() }
        #expect(throws: MigrationError.refused(why)) { try ends.destination.get() }
        #expect(guest.isRunning && guest.journal.count("pause") == 0 && guest.journal.count("arm") == 0)
        #expect(!place.runs && place.journal.count("discard") == 1)
    }

    @Test func hintsThatCannotBeHadAreNamedAndMissed() throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 1) }
        let hinter = ScriptedHinter(guest.journal, refusal: "the driver has no bitmap queue") { _ in nil }
        let place = MiniPlace()
        let ends = try migrate(
            MigrationSource(guest: guest, trackers: [guest.tracker], hinter: hinter, options: quickOptions(skip: true)),
            to: MigrationReceiver(guest: place))
        let report = try ends.source.get()
        #expect(report.hintRefusal == "the driver has no bitmap queue" && report.hintMethod == nil)
        #expect(guest.journal.count("request") == 0)
        #expect(try #require(place.guest).differences(guest).isEmpty)
    }

    @Test func aSilentGuestIsAskedThreeTimesOnly() throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 1) }
        let hinter = ScriptedHinter(guest.journal) { _ in nil }
        var options = quickOptions(skip: true)
        options.downtimeLimitMilliseconds = 0
        options.maxRounds = 8
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], hinter: hinter, options: options) { _, _ in
            guest.write(1, page: 1)
        }
        let ends = try migrate(source, to: MigrationReceiver(guest: MiniPlace()))
        let report = try ends.source.get()
        #expect(report.rounds.count == 9)
        #expect(guest.journal.count("request") == 3)
        #expect(report.hintRefusal == "the guest left 3 requests in a row unanswered")
    }

    @Test func theBandwidthLimitHolds() throws {
        let guest = try MiniGuest([mebibytes(0, 4)])
        for page in guest.pages { guest.fill(page: page, seed: 1) }
        var options = quickOptions()
        options.bandwidthLimit = 32 << 20
        let ends = try migrate(
            MigrationSource(guest: guest, trackers: [guest.tracker], options: options),
            to: MigrationReceiver(guest: MiniPlace([mebibytes(0, 4)])))
        // 4 MiB at 32 MiB/s are 125 ms; what was saved up and the last batch may be free.
        #expect(try ends.source.get().totalMilliseconds > 80)
    }
}

/// What goes wrong on one side, and who has the guest then.
@Suite struct FailureTests {
    private func migrateFailing(
        _ prepare: (MiniGuest, MiniPlace) -> Void
    ) throws -> (guest: MiniGuest, place: MiniPlace, ends: Ends) {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 1) }
        let place = MiniPlace()
        prepare(guest, place)
        let ends = try migrate(
            MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions()),
            to: MigrationReceiver(guest: place))
        return (guest, place, ends)
    }

    @Test func stateThatDoesNotLoadLeavesTheGuestAtTheSource() throws {
        let (guest, place, ends) = try migrateFailing { $1.loadFailure.withLock { $0 = PartFailure("bad registers") } }
        #expect(throws: MigrationError.peerFailed("loading the state failed: bad registers")) { try ends.source.get() }
        #expect(throws: MigrationError.machineFailed(doing: "loading the state", why: "bad registers")) {
            try ends.destination.get()
        }
        #expect(guest.isRunning && !place.runs && place.journal.count("discard") == 1)
        #expect(!guest.tracker.armed)
        try guest.pause()
    }

    @Test func aFailedPauseIsTakenBack() throws {
        let (guest, place, ends) = try migrateFailing { guest, _ in
            guest.onPause.withLock { $0 = { _ in PartFailure("a vCPU does not stop") } }
        }
        #expect(throws: MigrationError.machineFailed(doing: "pausing the guest", why: "a vCPU does not stop")) {
            try ends.source.get()
        }
        #expect(throws: MigrationError.peerFailed("pausing the guest failed: a vCPU does not stop")) {
            try ends.destination.get()
        }
        #expect(guest.isRunning && !place.runs)
    }

    @Test func aGuestThatCannotBeResumedIsSaidToBePaused() throws {
        let (guest, place, ends) = try migrateFailing { guest, place in
            place.loadFailure.withLock { $0 = PartFailure("no") }
            guest.resumeFailure.withLock { $0 = PartFailure("no vCPU") }
        }
        guard case .failure(.notResumed(_, let why)) = ends.source else {
            Issue.record("\(ends.source)")
            return
        }
        #expect(why == "no vCPU" && !guest.isRunning && !place.runs)
    }

    @Test func aGuestThatDoesNotStartStaysWithTheDestination() throws {
        let (guest, place, ends) = try migrateFailing { $1.startFailure.withLock { $0 = PartFailure("no KVM") } }
        #expect(try ends.source.get().outcome == .completed)
        #expect(throws: MigrationError.notStarted(why: "no KVM")) { try ends.destination.get() }
        #expect(!guest.isRunning && place.journal.count("discard") == 0)
    }

    @Test func tooMuchStateIsNotSent() throws {
        let (guest, place, ends) = try migrateFailing { guest, _ in
            let big = [UInt8](repeating: 1, count: StreamLimits.sectionBytes + 1)
            guest.sections.withLock { $0 = [StateSection(name: "big", bytes: big)] }
        }
        #expect(throws: MigrationError.machineFailed(doing: "saving the state", why: "section 'big' is too large")) {
            try ends.source.get()
        }
        #expect(guest.isRunning && !place.runs)
    }

    @Test func cancelInEachPhaseLeavesTheGuestRunningHere() throws {
        for phase in [MigrationProgress.Phase.connecting, .rounds] {
            let guest = try MiniGuest()
            for page in guest.pages { guest.fill(page: page, seed: 1) }
            let place = MiniPlace()
            let held = Mutex<MigrationSource?>(nil)
            let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions()) { progress, _ in
                if progress.phase == phase { #expect(held.withLock { $0 }?.cancel() == true) }
            }
            held.withLock { $0 = source }
            let ends = try migrate(source, to: MigrationReceiver(guest: place))
            #expect(throws: MigrationError.cancelled) { try ends.source.get() }
            #expect(throws: MigrationError.cancelledByPeer) { try ends.destination.get() }
            #expect(guest.isRunning && !place.runs && !guest.tracker.armed)
            held.withLock { $0 = nil }
        }
    }

    @Test func cancelAfterTheCommitComesTooLate() throws {
        let guest = try MiniGuest()
        let held = Mutex<MigrationSource?>(nil)
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions()) { progress, _ in
            if progress.phase == .commit { #expect(held.withLock { $0 }?.cancel() == false) }
        }
        held.withLock { $0 = source }
        let place = MiniPlace()
        let ends = try migrate(source, to: MigrationReceiver(guest: place))
        #expect(try ends.source.get().outcome == .completed)
        #expect(place.runs && !guest.isRunning)
        held.withLock { $0 = nil }
    }

    @Test func cancelWakesASourceThatWaits() throws {
        let guest = try MiniGuest()
        let (near, far) = try ByteChannel.pair()
        let source = MigrationSource(guest: guest, trackers: [], options: quickOptions())
        let worker = Worker<MigrationError?> {
            do throws(MigrationError) { _ = try source.run(over: near) } catch { return error }
            return nil
        }
        // The hello has come: now it waits for a `ready` that never comes.
        _ = try FrameReader(far).header(idleMilliseconds: 10_000)
        source.cancel()
        #expect(worker.join() == .cancelled)
        #expect(guest.isRunning)
    }

    @Test func aDestinationThatIsCancelledTellsTheSource() throws {
        let guest = try MiniGuest()
        let place = MiniPlace()
        let receiver = MigrationReceiver(guest: place)
        #expect(receiver.cancel())
        let ends = try migrate(
            MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions()), to: receiver)
        #expect(throws: MigrationError.cancelled) { try ends.destination.get() }
        guard case .failure(let error) = ends.source else {
            Issue.record("the source succeeded")
            return
        }
        #expect(error == .peerFailed(MigrationError.cancelled.description))
        #expect(guest.isRunning && !place.runs)
    }

    @Test func aSilentPeerDoesNotHangEitherSide() throws {
        var patience = ReceiverOptions()
        patience.idleTimeoutMilliseconds = 30
        let place = MiniPlace()
        let (near, far) = try ByteChannel.pair()
        let receiver = MigrationReceiver(guest: place, options: patience)
        guard case .timedOut = #expect(throws: MigrationError.self, performing: { try receiver.run(over: far) }) else {
            Issue.record("no timeout")
            return
        }
        #expect(place.journal.all == ["discard"])
        withExtendedLifetime(near) {}

        let guest = try MiniGuest()
        var options = quickOptions()
        options.idleTimeoutMilliseconds = 30
        let (mine, other) = try ByteChannel.pair()
        let source = MigrationSource(guest: guest, trackers: [], options: options)
        guard case .timedOut = #expect(throws: MigrationError.self, performing: { try source.run(over: mine) }) else {
            Issue.record("no timeout")
            return
        }
        #expect(guest.isRunning)
        withExtendedLifetime(other) {}
    }
}
