// SPDX-License-Identifier: Apache-2.0
import Glibc
import GuestMemory
import Synchronization
import Testing

@testable import Migration

/// What an operator can say about when and how a migration ends.
@Suite struct ControlTests {
    private final class Number: Sendable { let value = Atomic<Int>(0) }

    /// A guest that has written every page again whenever a round ends, unless it was slowed down enough.
    private final class BusyGuest: OutgoingGuest {
        let inner: MiniGuest
        let throttles = Mutex<[Int]>([])

        init(_ inner: MiniGuest) {
            self.inner = inner
            for page in inner.pages { inner.fill(page: page, seed: 1) }
        }
        var memory: GuestMemory { inner.memory }
        var machineDescription: [UInt8] { inner.machineDescription }
        func pause() throws(PartFailure) { try inner.pause() }
        func resume() throws(PartFailure) { try inner.resume() }
        func saveState() throws(PartFailure) -> [StateSection] { try inner.saveState() }
        func throttle(percent: Int) { throttles.withLock { $0.append(percent) } }

        /// For the source to call with its progress.
        func act(_ progress: MigrationProgress, _ round: MigrationRound?) {
            guard let round, !round.stopped, throttles.withLock({ $0.last ?? 0 }) < 30 else { return }
            for page in inner.pages { inner.write(UInt64(round.number) | 1 << 63, page: page, offset: 8) }
        }
    }

    /// Rounds that never get small: the allowed downtime is next to nothing and the channel is narrow.
    private func narrow() -> MigrationOptions {
        var options = quickOptions()
        options.downtimeLimitMilliseconds = 1
        options.bandwidthLimit = 4 << 20
        return options
    }

    @Test func aBusyGuestConvergesWhenItIsSlowedDown() throws {
        let guest = BusyGuest(try MiniGuest())
        var options = narrow()
        options.autoConverge = true
        let place = MiniPlace()
        let source = MigrationSource(guest: guest, trackers: [guest.inner.tracker], options: options, progress: guest.act)
        let report = try migrate(source, to: MigrationReceiver(guest: place)).source.get()
        #expect(report.throttlePercent >= 30)
        #expect(report.rounds.contains { $0.throttlePercent == 20 })
        // Whatever comes after, the machine is left at full speed.
        #expect(guest.throttles.withLock { $0 }.last == 0)
        let arrived = try #require(place.guest)
        try arrived.pause()
        #expect(guest.inner.differences(arrived).isEmpty)
    }

    @Test func aBusyGuestStaysWhenTheTimeIsOver() throws {
        let guest = BusyGuest(try MiniGuest())
        var options = narrow()
        options.timeoutMilliseconds = 700
        let source = MigrationSource(guest: guest, trackers: [guest.inner.tracker], options: options, progress: guest.act)
        let place = MiniPlace()
        let ends = try migrate(source, to: MigrationReceiver(guest: place))
        guard case .failure(.notConverging(700, let dirtied, _)) = ends.source else {
            Issue.record("the source ended with \(ends.source)")
            return
        }
        #expect(dirtied > 0 && guest.inner.isRunning && !place.runs && !guest.inner.tracker.armed)
        #expect(guest.throttles.withLock { $0 }.isEmpty)
        try guest.inner.pause()
    }

    @Test func aBusyGuestIsForcedWhenTheTimeIsOver() throws {
        let guest = BusyGuest(try MiniGuest())
        var options = narrow()
        options.timeoutMilliseconds = 700
        options.timeoutAction = .force
        let place = MiniPlace()
        let source = MigrationSource(guest: guest, trackers: [guest.inner.tracker], options: options, progress: guest.act)
        let report = try migrate(source, to: MigrationReceiver(guest: place)).source.get()
        #expect(report.rounds.last?.stopped == true)
        let arrived = try #require(place.guest)
        try arrived.pause()
        #expect(guest.inner.differences(arrived).isEmpty)
    }

    @Test func theSwitchOverWaitsUntilItIsAllowed() throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 1) }
        var options = quickOptions()
        options.pauseBeforeSwitchOver = true
        let held = Mutex<MigrationSource?>(nil)
        let waits = Number()
        let place = MiniPlace()
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: options) { progress, _ in
            guard progress.phase == .waiting else { return }
            #expect(guest.isRunning && !place.runs)
            // Dirtied while it waits, and yet part of what arrives.
            guest.write(0x5eed, page: guest.pages[3])
            if waits.value.add(1, ordering: .relaxed).newValue == 3 { held.withLock { $0 }?.allowSwitchOver() }
        }
        held.withLock { $0 = source }
        let report = try migrate(source, to: MigrationReceiver(guest: place)).source.get()
        #expect(report.outcome == .completed && waits.value.load(ordering: .relaxed) == 3)
        // One before and one stopped: waiting makes no rounds.
        #expect(report.rounds.count == 2)
        #expect(guest.differences(try #require(place.guest)).isEmpty)
        held.withLock { $0 = nil }
    }

    /// The destination gives up on a source that is silent for long, and nobody says how long the wait may last.
    @Test func aLongWaitForTheSwitchOverIsNoSilence() throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 1) }
        var options = quickOptions()
        options.pauseBeforeSwitchOver = true
        options.idleTimeoutMilliseconds = 1000
        var patience = ReceiverOptions()
        patience.idleTimeoutMilliseconds = 1000
        let held = Mutex<MigrationSource?>(nil)
        let started = ContinuousClock.now
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: options) { progress, _ in
            if progress.phase == .waiting, ContinuousClock.now - started > .seconds(3) {
                held.withLock { $0 }?.allowSwitchOver()
            }
        }
        held.withLock { $0 = source }
        let ends = try migrate(source, to: MigrationReceiver(guest: MiniPlace(), options: patience))
        #expect(try ends.source.get().outcome == .completed)
        held.withLock { $0 = nil }
    }

    @Test func cancelEndsTheWaitForTheSwitchOver() throws {
        let guest = try MiniGuest()
        var options = quickOptions()
        options.pauseBeforeSwitchOver = true
        let held = Mutex<MigrationSource?>(nil)
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: options) { progress, _ in
            if progress.phase == .waiting { held.withLock { $0 }?.cancel() }
        }
        held.withLock { $0 = source }
        let ends = try migrate(source, to: MigrationReceiver(guest: MiniPlace()))
        #expect(throws: MigrationError.cancelled) { try ends.source.get() }
        #expect(guest.isRunning)
        held.withLock { $0 = nil }
    }

    @Test func everyPageThatWasSentIsVerified() throws {
        let guest = try MiniGuest()
        for page in guest.pages.dropLast(40) { guest.fill(page: page, seed: 1) }
        let free = Array(guest.pages[8..<24])
        let hinter = ScriptedHinter(guest.journal) { request in report(request, guest.memory, free) }
        var options = quickOptions(skip: true)
        options.verify = true
        let place = MiniPlace()
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], hinter: hinter, options: options)
        let ends = try migrate(source, to: MigrationReceiver(guest: place))
        let result = try ends.source.get()
        // Zero pages too, and only what was skipped is left out.
        #expect(result.verifiedPages == guest.memory.ramPages - free.count)
        #expect(guest.differences(try #require(place.guest)) == free)
    }

    /// A tracker that misses a write is the sort of bug that `verify` is there for.
    @Test func aPageThatWasMissedFailsTheMigration() throws {
        let guest = try MiniGuest()
        for page in guest.pages { guest.fill(page: page, seed: 1) }
        guest.onPause.withLock {
            $0 = { guest in
                let address = GuestAddress(UInt64(guest.pages[5]) << pageShift)
                guest.memory.hostPointer(address, bytes: 8)!.storeBytes(of: 0xbad, as: UInt64.self)
                return nil
            }
        }
        var options = quickOptions()
        options.verify = true
        let place = MiniPlace()
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: options)
        let ends = try migrate(source, to: MigrationReceiver(guest: place))
        let expected = MigrationError.notVerified(page: guest.pages[5], count: 1)
        #expect(throws: expected) { try ends.destination.get() }
        #expect(throws: MigrationError.peerFailed(expected.description)) { try ends.source.get() }
        #expect(guest.isRunning && !place.runs)
    }

    @Test func aDestinationThatTricklesDoesNotHoldTheGuest() throws {
        let guest = try MiniGuest([mebibytes(0, 16)])
        for page in guest.pages { guest.fill(page: page, seed: 1) }
        let (near, far) = try ByteChannel.pair()
        var options = quickOptions()
        options.idleTimeoutMilliseconds = 1000
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: options)
        let worker = Worker<Result<MigrationReport, MigrationError>> {
            do throws(MigrationError) { return .success(try source.run(over: near)) } catch { return .failure(error) }
        }
        let (reader, writer) = (FrameReader(far), FrameWriter(far, idleMilliseconds: 10_000))
        let hello = try reader.header(idleMilliseconds: 10_000)
        _ = try reader.payload(of: hello, idleMilliseconds: 10_000)
        try writer.send(.ready)
        // Everything is taken up to the stop; then a byte now and then, always sooner than the idle limit.
        var frames = 0
        while guest.journal.count("pause") == 0 {
            let header = try reader.header(idleMilliseconds: 10_000)
            if header.type == .pages {
                let buffer = UnsafeMutableRawPointer.allocate(byteCount: Int(header.payloadBytes), alignment: 16)
                defer { buffer.deallocate() }
                try reader.payload(to: buffer, bytes: Int(header.payloadBytes), idleMilliseconds: 10_000)
            }
            // Not before the stop: what comes while rounds go on is heard between them, and in another way.
            frames += 1
        }
        // Its answer comes slowly: every byte in time, the whole not.
        var header = [UInt8](repeating: 0, count: FrameHeader.size)
        header.withUnsafeMutableBytes { FrameHeader(.loaded).encode(into: $0.baseAddress!) }
        for byte in header.dropLast() {
            let one = [byte]
            do throws(MigrationError) {
                try one.withUnsafeBytes { bytes -> Result<Void, MigrationError> in
                    do throws(MigrationError) {
                        return .success(try far.writeAll([bytes], idleMilliseconds: 1000))
                    } catch { return .failure(error) }
                }.get()
            } catch { break }
            // In all longer than the idle limit and four times the downtime limit.
            usleep(125_000)
        }
        #expect(throws: MigrationError.tooSlow("waiting for pair")) { try worker.join().get() }
        #expect(guest.isRunning && frames > 0)
        try guest.pause()
    }
}

@Suite struct ConvergenceTests {
    @Test func oneBurstIsForgiven() {
        var convergence = Convergence()
        for dirtied: UInt64 in [90, 10, 90] { _ = convergence.judge(sentBytes: 100, dirtiedBytes: dirtied) }
        #expect(convergence.throttlePercent == 0)
    }

    @Test func stepsGoUpToTheLimitAndNoFurther() {
        var convergence = Convergence()
        var steps: [Int] = []
        for _ in 0..<40 where convergence.judge(sentBytes: 100, dirtiedBytes: 51) { steps.append(convergence.throttlePercent) }
        #expect(steps == [20, 30, 40, 50, 60, 70, 80, 90, 99])
        let hasGrown = convergence.judge(sentBytes: 0, dirtiedBytes: .max)
        #expect(!hasGrown)
    }
}
