// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Synchronization
import Testing

@testable import Migration

/// The rules of the hint window, each with a test that fails if the line that keeps it is taken out.
@Suite struct RuleTests {
    /// Migrates `guest` with hints from `hinter`; `afterRound` runs on the engine's thread when a round was sent.
    private func run(
        _ guest: MiniGuest, _ hinter: ScriptedHinter, trackers: [any DirtyTracker]? = nil,
        options: MigrationOptions = quickOptions(skip: true),
        afterRound: @escaping @Sendable (Int) -> Void = { _ in }
    ) throws -> (report: MigrationReport, arrived: MiniGuest) {
        let seen = Mutex(0)
        let source = MigrationSource(
            guest: guest, trackers: trackers ?? [guest.tracker], hinter: hinter, options: options
        ) { progress, _ in
            // Once for each round that ended with the guest running.
            let isNew = seen.withLock {
                guard progress.phase == .rounds, progress.remainingPages == 0, progress.round > $0 else { return false }
                $0 = progress.round
                return true
            }
            if isNew { afterRound(progress.round) }
        }
        let place = MiniPlace()
        let ends = try migrate(source, to: MigrationReceiver(guest: place))
        let report = try ends.source.get()
        _ = try ends.destination.get()
        return (report, try #require(place.guest))
    }

    /// A window cannot be opened without armed trackers, and a page that is reused right after the guest looked at it
    /// still arrives, whichever tracker sees the write.
    @Test func w1_trackingIsArmedBeforeTheGuestLooks() throws {
        let guest = try MiniGuest()
        let second = SoftwareTracker(guest.memory, journal: guest.journal)
        for page in guest.pages { guest.fill(page: page, seed: 1) }
        let hinter = ScriptedHinter(guest.journal) { request in
            guard request == 2 else { return nil }
            // The guest has looked; now it reuses two of the pages it saw free.
            guest.write(0xaaaa, page: 12)
            guest.write(0xbbbb, page: 13, by: second)
            return report(request, guest.memory, 10..<20)
        }
        let (result, arrived) = try run(guest, hinter, trackers: [guest.tracker, second])
        #expect(result.rounds[0].skipped == 10)
        #expect(arrived.read(page: 12) == 0xaaaa)
        #expect(arrived.read(page: 13) == 0xbbbb)
        #expect(guest.journal.all.prefix(3) == ["arm", "arm", "request"])
    }

    @Test func w1_nothingStaysArmedIfOneTrackerCannotBe() throws {
        let guest = try MiniGuest()
        let broken = SoftwareTracker(guest.memory, armFailure: PartFailure("no log"))
        let source = MigrationSource(guest: guest, trackers: [guest.tracker, broken], options: quickOptions())
        let place = MiniPlace()
        let ends = try migrate(source, to: MigrationReceiver(guest: place))
        #expect(throws: MigrationError.machineFailed(doing: "dirty tracking", why: "no log")) { try ends.source.get() }
        #expect(!guest.tracker.armed)
        #expect(guest.isRunning && !place.runs)
    }

    @Test func w2_aMergeClosesTheWindow() throws {
        let guest = try MiniGuest()
        let bitmap = MigrationBitmap(guest.memory)
        let tracking = try ArmedTracking(arming: [guest.tracker], of: guest.memory)
        bitmap.markAll()
        let hinter = ScriptedHinter(guest.journal) { _ in nil }
        let window = try bitmap.ask(hinter, tracking: tracking)
        let request = window.request
        guest.write(7, page: 5)
        #expect(try bitmap.merge(tracking) == 1)
        let masked = bitmap.mask(report(request, guest.memory, 0..<64), window)
        #expect(!masked.isAccepted && masked.skipped == 0)
        #expect(bitmap.dirtyCount == guest.memory.ramPages)
        #expect(bitmap[5])
        #expect(bitmap.lateReports == 1 && bitmap.droppedPages == 64)
    }

    @Test func w2_onlyTheAnswerToTheCurrentRequestCounts() throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 2) }
        let hinter = ScriptedHinter(guest.journal) { request in report(request &- 1, guest.memory, guest.pages) }
        let (result, arrived) = try run(guest, hinter)
        #expect(result.skippedPages == 0)
        #expect(result.lateReports >= 1)
        #expect(arrived.differences(guest).isEmpty)
    }

    /// The VMM writes a page that the guest gave as free (a used ring, a buffer); no tracker of the machine sees it.
    @Test func w3_theVMMsOwnWritesAreTracked() throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 3) }
        let hinter = ScriptedHinter(guest.journal) { request in
            guard request == 2 else { return nil }
            try? guest.memory.store(UInt64(0xdddd), at: GuestAddress(30 << 12))
            return report(request, guest.memory, 30..<34)
        }
        let (result, arrived) = try run(guest, hinter)
        #expect(result.rounds[0].skipped == 4)
        #expect(arrived.read(page: 30) == 0xdddd)
    }

    /// A page may be in use again by the time its bit is seen: the source's own memory stays as it is.
    @Test func w4_maskingNeverTouchesTheSourcesMemory() throws {
        let guest = try MiniGuest()
        let before = try MiniGuest()
        for page in guest.pages {
            guest.fill(page: page, seed: 4)
            before.fill(page: page, seed: 4)
        }
        let hinter = ScriptedHinter(guest.journal) { report($0, guest.memory, guest.pages) }
        let (result, _) = try run(guest, hinter)
        #expect(result.skippedPages == guest.memory.ramPages)
        #expect(guest.differences(before).isEmpty)
    }

    /// Sent in round 1, dirtied and freed before round 2: the destination must not keep what it got.
    @Test(arguments: [1, 2, 3]) func w6_aPageSentBeforeAndSkippedNowReadsAsZero(connections: Int) throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 6) }
        let hinter = ScriptedHinter(guest.journal) { request in
            report(request, guest.memory, request == 2 ? [] : [9, 10, 60, 61, 62, 63, 64, 65])
        }
        var options = quickOptions(skip: true)
        options.downtimeLimitMilliseconds = 0
        options.connections = connections
        let (result, arrived) = try run(guest, hinter, options: options) { round in
            guard round == 1 else { return }
            // The guest clears what it frees, and trusts it to be zero when it takes it again.
            for page in [9, 10, 60, 61, 62, 63, 64, 65] { guest.clear(page: page) }
            guest.write(1, page: 11)
        }
        #expect(result.rounds[1].skipped == 8)
        #expect(result.rounds[1].discarded == 8)
        #expect(arrived.read(page: 9, offset: 64) == 0)
        #expect(arrived.differences(guest).isEmpty)
    }

    /// A zero mark for a page that was sent before has to reach the memory too.
    @Test(arguments: [1, 2]) func w6_aZeroMarkClearsAnOlderCopy(connections: Int) throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 6) }
        var options = quickOptions()
        options.downtimeLimitMilliseconds = 0
        options.connections = connections
        let (_, arrived) = try run(guest, ScriptedHinter(guest.journal) { _ in nil }, options: options) { round in
            if round == 1 { for page in 3..<90 { guest.clear(page: page) } }
        }
        #expect(arrived.differences(guest).isEmpty)
    }

    @Test func w7_laterRoundsSkipFreedPagesToo() throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 7) }
        let hinter = ScriptedHinter(guest.journal) { request in
            report(request, guest.memory, request == 2 ? 0..<8 : 20..<28)
        }
        var options = quickOptions(skip: true)
        options.downtimeLimitMilliseconds = 0
        let (result, _) = try run(guest, hinter, options: options) { round in
            guard round == 1 else { return }
            for page in 16..<32 { guest.write(8, page: page) }
        }
        #expect(result.rounds[0].asked && result.rounds[0].skipped == 8)
        #expect(result.rounds[1].asked && result.rounds[1].dirtied == 16)
        #expect(result.rounds[1].skipped == 8 && result.rounds[1].sent == 8)
    }

    @Test func w8_theStoppedRoundNeverAsks() throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 8) }
        let hinter = ScriptedHinter(guest.journal) { report($0, guest.memory, 0..<8) }
        guest.onSave.withLock {
            $0 = { guest in
                guest.write(88, page: 41)
                return nil
            }
        }
        var options = quickOptions(skip: true)
        options.downtimeLimitMilliseconds = 100_000
        let (result, arrived) = try run(guest, hinter, options: options) { round in
            for page in 16..<32 { guest.write(UInt64(round), page: page) }
        }
        let journal = guest.journal.all
        let pause = try #require(journal.firstIndex(of: "pause"))
        #expect(journal.contains("request"))
        #expect(!journal[pause...].contains("request") && !journal[pause...].contains("wait"))
        #expect(journal[..<pause].contains("stop"))
        // What saving the state wrote is there as well.
        #expect(result.rounds.last?.stopped == true && result.rounds.last?.sent == 17)
        #expect(arrived.read(page: 41) == 88)
    }
}
