// SPDX-License-Identifier: Apache-2.0
import Glibc
import GuestMemory
import Synchronization
import Testing

@testable import Migration

/// Migrations whose memory goes over several connections.
@Suite struct LaneTests {
    /// Ten chunks, so that lanes get different shares.
    private let layout = [mebibytes(0, 4), mebibytes(4, 2), mebibytes(8, 4)]

    private func lanes(_ count: Int, skip: Bool = false) -> MigrationOptions {
        var options = quickOptions(skip: skip)
        options.connections = count
        return options
    }

    private func filledGuest() throws -> MiniGuest {
        let guest = try MiniGuest(layout)
        for page in guest.pages where page % 3 != 0 { guest.fill(page: page, seed: UInt64(page)) }
        return guest
    }

    @Test(arguments: ["unix", "tcp:127.0.0.1:0"]) func realListenersTakeAllConnections(kind: String) throws {
        let address = try ChannelAddress(parsing: kind == "unix" ? "unix:/tmp/lacuna-\(getpid())-lanes.sock" : kind)
        let listener = try ChannelListener(address)
        let guest = try filledGuest()
        let place = MiniPlace(layout)
        let receiver = MigrationReceiver(guest: place)
        let worker = Worker<Result<ReceiveReport, MigrationError>> {
            do throws(MigrationError) {
                return .success(try receiver.run(over: try listener.accept(), joining: listener))
            } catch { return .failure(error) }
        }
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: lanes(4))
        let report = try source.run(over: try ByteChannel.connect(to: listener.address)) { () throws(MigrationError) in
            try ByteChannel.connect(to: listener.address)
        }
        let received = try worker.join().get()
        #expect(report.outcome == .completed && report.connections == 4 && report.bytes == received.bytes)
        #expect(try #require(place.guest).differences(guest).isEmpty)
        // Nobody is let in any more.
        #expect(throws: MigrationError.self) { try ByteChannel.connect(to: listener.address) }
        try place.guest?.pause()
    }

    @Test func theLimitIsSharedByAll() throws {
        let guest = try MiniGuest([mebibytes(0, 4)])
        for page in guest.pages { guest.fill(page: page, seed: 1) }
        var options = lanes(4)
        options.bandwidthLimit = 32 << 20
        let ends = try migrate(
            MigrationSource(guest: guest, trackers: [guest.tracker], options: options),
            to: MigrationReceiver(guest: MiniPlace([mebibytes(0, 4)])))
        // 4 MiB at 32 MiB/s are 125 ms; what was saved up and each lane's last batch may be free.
        #expect(try ends.source.get().totalMilliseconds > 80)
    }

    @Test func checksumsAreComparedOnceEveryLaneHasEnded() throws {
        let guest = try filledGuest()
        let free = Array(guest.pages[100..<900])
        let hinter = ScriptedHinter(guest.journal) { request in report(request, guest.memory, free) }
        var options = lanes(3, skip: true)
        options.verify = true
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], hinter: hinter, options: options)
        let ends = try migrate(source, to: MigrationReceiver(guest: MiniPlace(layout)))
        #expect(try ends.source.get().verifiedPages == guest.memory.ramPages - free.count)
    }

    @Test func whatFailsAtTheDestinationIsSaidOnce() throws {
        let guest = try filledGuest()
        let place = MiniPlace(layout)
        place.loadFailure.withLock { $0 = PartFailure("bad registers") }
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: lanes(3))
        let ends = try migrate(source, to: MigrationReceiver(guest: place))
        #expect(throws: MigrationError.peerFailed("loading the state failed: bad registers")) { try ends.source.get() }
        #expect(guest.isRunning && !place.runs && !guest.tracker.armed)
        try guest.pause()
    }

    @Test func aDestinationForOneConnectionRefuses() throws {
        let guest = try MiniGuest()
        let place = MiniPlace()
        let (near, far) = try ByteChannel.pair()
        let receiver = MigrationReceiver(guest: place)
        let worker = Worker<MigrationError?> {
            do throws(MigrationError) { _ = try receiver.run(over: far) } catch { return error }
            return nil
        }
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: lanes(2))
        let why = "this destination takes one connection only; leave --connections out"
        #expect(throws: MigrationError.refused(why)) {
            try source.run(over: near) { () throws(MigrationError) in throw .cancelled }
        }
        #expect(worker.join() == .refused(why) && guest.isRunning && !place.runs)
    }

    @Test func aSingleChannelIsNotEnough() throws {
        let guest = try MiniGuest()
        let (near, far) = try ByteChannel.pair()
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: lanes(2))
        #expect(throws: MigrationError.self) { try source.run(over: near) }
        #expect(guest.isRunning && guest.journal.all.isEmpty)
        withExtendedLifetime(far) {}
    }

    @Test(arguments: [1, 2, 3]) func aConnectionThatCannotBeMadeEndsTheMigration(broken: Int) throws {
        let guest = try MiniGuest()
        let place = MiniPlace()
        let switchboard = Switchboard { number throws(MigrationError) in
            if number == broken { throw .cannotConnect("there", errno: ECONNREFUSED) }
            return try ByteChannel.pair()
        }
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: lanes(3))
        let ends = try migrate(source, to: MigrationReceiver(guest: place), through: switchboard)
        let cause = MigrationError.cannotConnect("there", errno: ECONNREFUSED)
        #expect(throws: MigrationError.laneFailed(number: broken, cause: cause)) { try ends.source.get() }
        guard case .failure(.peerFailed) = ends.destination else {
            Issue.record("the destination ended with \(ends.destination)")
            return
        }
        #expect(guest.isRunning && !place.runs && switchboard.isClosed)
    }

    @Test func cancelReachesEveryConnection() throws {
        let guest = try filledGuest()
        let place = MiniPlace(layout)
        let held = Mutex<MigrationSource?>(nil)
        var options = lanes(3)
        // So narrow that the lanes sleep when the word comes.
        options.bandwidthLimit = 1 << 20
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: options) { progress, _ in
            if progress.phase == .rounds { #expect(held.withLock { $0 }?.cancel() == true) }
        }
        held.withLock { $0 = source }
        let ends = try migrate(source, to: MigrationReceiver(guest: place))
        #expect(throws: MigrationError.cancelled) { try ends.source.get() }
        #expect(throws: MigrationError.cancelledByPeer) { try ends.destination.get() }
        #expect(guest.isRunning && !place.runs && !guest.tracker.armed)
        held.withLock { $0 = nil }
    }

    @Test func aDestinationThatIsCancelledTellsTheSource() throws {
        let guest = try filledGuest()
        let place = MiniPlace(layout)
        let receiver = Mutex<MigrationReceiver?>(nil)
        var options = lanes(2)
        options.bandwidthLimit = 1 << 20
        let target = MigrationReceiver(guest: place)
        receiver.withLock { $0 = target }
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: options) { progress, _ in
            if progress.phase == .rounds, progress.pagesSent > 0 { receiver.withLock { $0 }?.cancel() }
        }
        let ends = try migrate(source, to: target)
        #expect(throws: MigrationError.cancelled) { try ends.destination.get() }
        #expect(throws: MigrationError.peerFailed(MigrationError.cancelled.description)) { try ends.source.get() }
        #expect(guest.isRunning && !place.runs)
    }

    // MARK: Cuts

    private struct CutResult {
        var sourceRuns: Bool, destinationRuns: Bool
        var stream: [UInt8]
        var ends: Ends
    }

    /// One migration of always the same guest over two lanes, of which number `lane` breaks after `limit` bytes.
    private func run(breaking lane: Int, after limit: Int) throws -> CutResult {
        let guest = try MiniGuest()
        for page in guest.pages where page % 9 == 0 { guest.fill(page: page, seed: 5) }
        let hinter = ScriptedHinter(guest.journal) { report($0, guest.memory, [0, 9, 18, 300]) }
        let source = MigrationSource(
            guest: guest, trackers: [guest.tracker], hinter: hinter, options: lanes(2, skip: true))
        let place = MiniPlace()
        let line = try BreakingLine(forwardLimit: limit)
        let switchboard = Switchboard { number throws(MigrationError) in
            number == lane ? (line.near, line.far) : try ByteChannel.pair()
        }
        // The source's limit, as with the commands: a connection that broke unheard after the source had written
        // everything is missed by the destination alone, which says so before the source gives up waiting.
        var patience = ReceiverOptions()
        patience.idleTimeoutMilliseconds = 10_000
        let ends = try migrate(source, to: MigrationReceiver(guest: place, options: patience), through: switchboard)
        line.end()
        defer {
            try? guest.pause()
            try? place.guest?.pause()
        }
        if place.runs {
            #expect(guest.differences(try #require(place.guest)).allSatisfy { [0, 9, 18, 300].contains($0) })
        }
        return CutResult(
            sourceRuns: guest.isRunning, destinationRuns: place.runs, stream: line.forward.withLock { $0 }, ends: ends)
    }

    @Test(arguments: [1, 2]) func aLaneCutAnywhereLeavesOneGuestRunning(lane: Int) throws {
        let whole = try run(breaking: lane, after: .max)
        #expect(whole.destinationRuns && !whole.sourceRuns)
        let total = whole.stream.count
        var cuts = try boundaries(whole.stream)
        #expect(cuts.last == total && cuts.count > 5)
        var random = SplitMix(UInt64(lane))
        cuts += (0..<24).map { _ in Int.random(in: 0...total, using: &random) }
        cuts += (total - 33)..<total
        for cut in cuts {
            let result = try run(breaking: lane, after: cut)
            #expect(result.sourceRuns != result.destinationRuns, "cut at byte \(cut) of \(total): \(result.ends)")
            // Without the lane's whole last frame the destination never runs.
            #expect(result.destinationRuns == (cut >= total), "cut at byte \(cut) of \(total): \(result.ends)")
            guard cut < total else { continue }
            // Each side says which connection it was, in its own words or in the other's.
            for end in [result.ends.source.map { _ in }, result.ends.destination.map { _ in }] {
                guard case .failure(let error) = end else { continue }
                let text = error.description
                #expect(text.contains("data connection") || error == .peerClosed("pair"), "cut at \(cut): \(text)")
            }
        }
    }

    /// Where frames begin, and where the stream ends.
    private func boundaries(_ stream: [UInt8]) throws -> [Int] {
        var places: [Int] = []
        var position = 0
        while position < stream.count {
            places.append(position)
            let header = try stream.withUnsafeBytes { try FrameHeader(decoding: $0.baseAddress! + position) }
            position += FrameHeader.size + Int(header.payloadBytes)
        }
        return places + [position]
    }

    /// A destination that stops taking bytes on one lane only.
    @Test func aLaneThatStallsEndsTheMigrationAtTheSource() throws {
        let guest = try filledGuest()
        var options = lanes(2)
        options.idleTimeoutMilliseconds = 1000
        let (near, far) = try ByteChannel.pair()
        let others = Mutex<[ByteChannel]>([])
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: options)
        let worker = Worker<Result<MigrationReport, MigrationError>> {
            do throws(MigrationError) {
                return .success(
                    try source.run(over: near) { () throws(MigrationError) in
                        let (mine, other) = try ByteChannel.pair()
                        others.withLock { $0.append(other) }
                        return mine
                    })
            } catch { return .failure(error) }
        }
        _ = try FrameReader(far).header(idleMilliseconds: 10_000)
        try FrameWriter(far, idleMilliseconds: 10_000).send(.ready, payload: [UInt8](repeating: 7, count: 16))
        let result = worker.join()
        // The first lane is drained by nobody either; whichever fails first names itself.
        guard case .failure(.laneFailed(_, .timedOut(_, 1000))) = result else {
            Issue.record("the source ended with \(result)")
            return
        }
        #expect(guest.isRunning && !guest.tracker.armed && guest.journal.count("pause") == 0)
        try guest.pause()
    }
}
