// SPDX-License-Identifier: Apache-2.0
import Glibc
import GuestMemory
import Synchronization
import Testing

@testable import Migration

/// What a destination with data connections does with what it did not ask for. The source's side is played by hand.
@Suite struct HostileLaneTests {
    /// A destination for two lanes that has said `ready`.
    private final class Target {
        let place = MiniPlace()
        let control: ByteChannel
        let switchboard = Switchboard()
        let token: [UInt8]
        private let worker: Worker<Result<ReceiveReport, MigrationError>>

        init(lanes: UInt32 = 2, idleMilliseconds: Int = 10_000) throws {
            let (near, far) = try ByteChannel.pair()
            control = near
            var options = ReceiverOptions()
            options.idleTimeoutMilliseconds = idleMilliseconds
            let receiver = MigrationReceiver(guest: place, options: options)
            worker = Worker { [switchboard] in
                do throws(MigrationError) { return .success(try receiver.run(over: far, joining: switchboard)) } catch {
                    return .failure(error)
                }
            }
            let hello = honest(.hello, count: lanes, describe(smallLayout))
            try hello.withUnsafeBytes { try near.writeAll([$0], idleMilliseconds: 10_000) }
            let reader = FrameReader(near)
            let header = try reader.header(idleMilliseconds: 10_000)
            #expect(header.type == .ready && header.payloadBytes == 16)
            token = try reader.payload(of: header, idleMilliseconds: 10_000)
        }

        func send(_ bytes: [UInt8], on channel: ByteChannel) throws {
            try bytes.withUnsafeBytes { try channel.writeAll([$0], idleMilliseconds: 10_000) }
        }
        func say(_ bytes: [UInt8]) throws { try send(bytes, on: control) }

        /// A new connection that begins with `bytes`.
        func connect(_ bytes: [UInt8]) throws -> ByteChannel {
            let channel = try switchboard.connect()
            try send(bytes, on: channel)
            return channel
        }
        func join(_ lane: UInt32) throws -> ByteChannel { try connect(honest(.join, count: lane, token)) }
        /// Waits for the end; with `hasFailed` it listens to the reason first, as a source does, so that the destination
        /// need not wait for that.
        func end(hasFailed: Bool = false) -> Result<ReceiveReport, MigrationError> {
            var byte: UInt8 = 0
            while hasFailed {
                let isOpen: Bool = withUnsafeMutableBytes(of: &byte) {
                    (try? control.readExactly(into: $0, idleMilliseconds: 10_000)) != nil
                }
                guard isOpen else {
                    control.shutdown()
                    break
                }
            }
            let result = worker.join()
            try? place.guest?.pause()
            return result
        }
    }

    private let round = honest(.roundEnd, count: 1)
    private let laneEnd = honest(.laneEnd, count: 1)
    /// After it the destination owns the guest.
    private let rest = honest(.roundEnd, count: 1) + honest(.stateEnd) + honest(.commit)

    /// True once the destination has closed `channel`.
    private func isClosed(_ channel: ByteChannel, milliseconds: Int = 10_000) -> Bool {
        var byte: UInt8 = 0
        let result: MigrationError? = withUnsafeMutableBytes(of: &byte) { buffer in
            do throws(MigrationError) { try channel.readExactly(into: buffer, idleMilliseconds: milliseconds) } catch {
                return error
            }
            return nil
        }
        if case .peerClosed = result { return true }
        return false
    }

    @Test func anHonestMigrationByHandIsTaken() throws {
        let target = try Target()
        let first = try target.join(1), second = try target.join(2)
        try target.send(pages(3, 2) + round + laneEnd, on: first)
        try target.send(pages(319, 1) + round + laneEnd, on: second)
        try target.say(rest)
        let received = try target.end().get()
        #expect(target.place.runs && received.pages == 3 && received.connections == 2 && received.strangers == 0)
        #expect(try #require(target.place.guest).read(page: 319) == 0x0707_0707_0707_0707)
        #expect(target.switchboard.isClosed)
    }

    @Test func strangersDoNoHarm() throws {
        let target = try Target()
        var wrong = target.token
        wrong[15] ^= 1
        let strangers: [[UInt8]] = [
            honest(.join, count: 1, wrong), honest(.join, count: 2, [UInt8](repeating: 0, count: 16)),
            honest(.join, count: 0, target.token), honest(.join, count: 3, target.token),
            honest(.join, count: .max, target.token), honest(.join, count: 1, Array(target.token.dropLast())),
            honest(.join, count: 1, target.token + [0]), honest(.join, count: 1),
            frame(FrameHeader(.join, count: 1, payloadBytes: .max)),
            frame(FrameHeader(.join, count: 1, payloadBytes: 16, payloadChecksum: 1), target.token),
            frame(FrameHeader(.join, count: 1, address: 4096, payloadBytes: 16), target.token),
            honest(.hello, describe(smallLayout)), pages(0, 1), [UInt8](repeating: 0x41, count: 64),
        ]
        for bytes in strangers { #expect(isClosed(try target.connect(bytes))) }
        // One that says nothing, and goes.
        try target.switchboard.connect().shutdown()
        // Which of two is heard first is the scheduler's choice. The other one is closed.
        let claims = try [target.join(1), target.join(1)]
        let loser = try #require((0..<1000).first { isClosed(claims[$0 % 2], milliseconds: 10) }) % 2
        let first = claims[1 - loser]
        // Now the lane is taken, and its owner keeps it.
        #expect(isClosed(try target.join(1)))
        // Silent ones, more than are waited for: the oldest have to go, and the honest source is not kept waiting.
        let silent = try (0..<40).map { _ in try target.switchboard.connect() }
        #expect(isClosed(silent[0]))
        let second = try target.join(2)
        for channel in silent { #expect(isClosed(channel)) }
        try target.send(pages(3, 2) + round + laneEnd, on: first)
        try target.send(round + laneEnd, on: second)
        try target.say(rest)
        let received = try target.end().get()
        #expect(target.place.runs && received.pages == 2)
        #expect(received.strangers >= strangers.count + 3)
        #expect(throws: MigrationError.self) { try target.switchboard.connect() }
    }

    @Test func connectionsThatNeverComeAreNotAwaitedForEver() throws {
        let target = try Target(idleMilliseconds: 1000)
        let first = try target.join(1)
        // It has ended, so that its own silence is none.
        try target.send(round + laneEnd, on: first)
        #expect(throws: MigrationError.timedOut("waiting for 1 of 2 data connections", milliseconds: 500)) {
            try target.end().get()
        }
        #expect(!target.place.runs && target.place.journal.count("discard") == 1 && isClosed(first))
        #expect(target.switchboard.isClosed)
    }

    /// Bytes on the second lane, and how the destination then ends.
    private func expectBad(
        _ bytes: [UInt8], _ hint: String, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let target = try Target()
        let first = try target.join(1), second = try target.join(2)
        try? target.send(bytes, on: second)
        let result = target.end(hasFailed: true)
        guard case .failure(.laneFailed(2, .badStream(let what))) = result else {
            Issue.record("\(hint): \(result)", sourceLocation: sourceLocation)
            return
        }
        #expect(what.contains(hint), sourceLocation: sourceLocation)
        #expect(!target.place.runs && target.place.journal.count("discard") == 1, sourceLocation: sourceLocation)
        #expect(isClosed(first), sourceLocation: sourceLocation)
    }

    @Test func worstValuesOnALane() throws {
        for type in [FrameType.pages, .zero, .discard] {
            func one(_ pages: Range<Int>) -> FrameHeader {
                FrameHeader(type, pages: pages, payloadBytes: type == .pages ? UInt32(pages.count * pageSize) : 0)
            }
            // Pages of the first lane, and of both.
            try expectBad(frame(one(3..<4)), "do not belong")
            try expectBad(frame(one(0..<64)), "do not belong")
            for (count, address) in [(0, 0), (1, 1), (1, .max), (.max, 0), (1, 1 << 19), (65, 1 << 20)] as [(UInt32, UInt64)] {
                let bytes = type == .pages ? count &* 4096 : 0
                try expectBad(frame(FrameHeader(type, count: count, address: address, payloadBytes: bytes)), "not all RAM")
            }
            try expectBad(frame(FrameHeader(type, count: 1, address: 1 << 20, payloadBytes: .max)), "bytes")
        }
        let mark = frame(FrameHeader(.zero, pages: 256..<320))
        try expectBad(mark + mark, "more pages than belong")
        try expectBad(honest(.roundEnd, count: 0), "roundEnd")
        try expectBad(honest(.roundEnd, count: 2), "roundEnd")
        try expectBad(honest(.laneEnd), "laneEnd")
        try expectBad(round + honest(.laneEnd, count: 2), "laneEnd")
        try expectBad(round + mark + laneEnd, "within a round")
        for type in [FrameType.hello, .state, .stateEnd, .commit, .cancel, .failure, .verify, .join, .ready, .committed] {
            try expectBad(frame(FrameHeader(type)), "came on a data connection")
        }
        try expectBad([UInt8](repeating: 1, count: 32), "magic")
    }

    @Test func controlFramesKeepToTheirRules() throws {
        let zero = frame(FrameHeader(.zero, pages: 0..<1))
        for bytes in [zero, honest(.laneEnd), honest(.join, count: 1, [UInt8](repeating: 0, count: 16))] {
            let target = try Target()
            try target.say(bytes)
            guard case .failure(.badStream) = target.end() else {
                Issue.record("\(bytes[4])")
                return
            }
            #expect(!target.place.runs)
        }
        // A lane that ended after another number of rounds than the migration.
        let target = try Target()
        let first = try target.join(1), second = try target.join(2)
        try target.send(round + laneEnd, on: first)
        try target.send(round + honest(.roundEnd, count: 2) + honest(.laneEnd, count: 2), on: second)
        try target.say(rest)
        guard case .failure(.laneFailed(2, .badStream(let what))) = target.end() else {
            Issue.record("a lane with one round too many was taken")
            return
        }
        #expect(what.contains("2 rounds"))
    }

    /// The state may be there long before the memory: nothing is loaded until every lane has ended.
    @Test func theStateWaitsForTheLanes() throws {
        let target = try Target()
        let first = try target.join(1), second = try target.join(2)
        try target.send(round + laneEnd, on: first)
        try target.say(rest)
        #expect(isClosed(first))
        #expect(target.place.journal.count("load") == 0)
        try target.send(pages(256, 64) + round + laneEnd, on: second)
        let received = try target.end().get()
        #expect(received.pages == 64 && target.place.runs)
        #expect(try #require(target.place.guest).read(page: 319, offset: 4088) == 0x0707_0707_0707_0707)
    }

    @Test func aLaneThatStallsEndsTheMigration() throws {
        let target = try Target(idleMilliseconds: 1000)
        let first = try target.join(1), second = try target.join(2)
        try target.send(round + laneEnd, on: first)
        // Half a page, and then nothing.
        try target.send(Array(pages(256, 1).prefix(2000)), on: second)
        try target.say(rest)
        let result = target.end()
        guard case .failure(.laneFailed(2, .timedOut(_, 1000))) = result else {
            Issue.record("the destination ended with \(result)")
            return
        }
        #expect(!target.place.runs)
    }

    /// One connection has nothing to say for much longer than the limit, while another has.
    @Test func silenceOnOneConnectionIsNoneWhileAnotherMoves() throws {
        let target = try Target(idleMilliseconds: 1000)
        let first = try target.join(1), second = try target.join(2)
        for round in 1...16 {
            try target.send(honest(.roundEnd, count: UInt32(round)), on: first)
            usleep(100_000)
        }
        let rounds = (1...16).flatMap { honest(.roundEnd, count: UInt32($0)) }
        try target.send(honest(.laneEnd, count: 16), on: first)
        try target.send(rounds + honest(.laneEnd, count: 16), on: second)
        try target.say(rounds + honest(.stateEnd) + honest(.commit))
        #expect(try target.end().get().rounds == 16)
        #expect(target.place.runs)
    }

    @Test func randomBytesOnALaneNeverTrap() throws {
        var random = SplitMix(4)
        for _ in 0..<60 {
            let target = try Target()
            let first = try target.join(1), second = try target.join(2)
            var bytes: [UInt8] = []
            for _ in 0..<4 {
                let type = FrameType.allCases.randomElement(using: &random)!
                let payload = [UInt8](repeating: 1, count: Int.random(in: 0..<64, using: &random))
                let header = FrameHeader(
                    type, count: UInt32(truncatingIfNeeded: random.next() >> UInt64.random(in: 32..<64, using: &random)),
                    address: random.next() >> UInt64.random(in: 0..<64, using: &random),
                    payloadBytes: UInt32(Bool.random(using: &random) ? payload.count : Int.random(in: 0..<5000, using: &random)))
                bytes += frame(header, payload)
            }
            try? target.send(bytes, on: Bool.random(using: &random) ? first : second)
            for channel in [first, second, target.control] { channel.finishWriting() }
            guard case .failure = target.end(hasFailed: true) else {
                Issue.record("noise was taken for a migration")
                return
            }
            #expect(!target.place.runs)
        }
    }

    @Test func theMapSharesEveryPageOnce() throws {
        let memory = try GuestMemory(ranges: [mebibytes(0, 5), mebibytes(5, 2), mebibytes(13, 4)] + [
            GuestRange(start: GuestAddress(40 << 20 | 1 << 18), size: 3 << 18)
        ])
        for lanes in 1...16 {
            let map = LaneMap(lanes: lanes)
            var counts = [Int](repeating: 0, count: lanes)
            for region in memory.regions {
                for page in region.range.pages {
                    let owners = (1...lanes).filter { map.lane($0, owns: page..<page + 1) }
                    #expect(owners == [map.lane(of: page)])
                    counts[owners[0] - 1] += 1
                }
                try LaneMap.chunks(of: region.range.pages) { part throws(MigrationError) in
                    #expect(map.lane(map.lane(of: part.lowerBound), owns: part))
                }
            }
            #expect(counts == (1...lanes).map { map.pages(of: $0, in: memory) })
            #expect(lanes == 1 || !map.lane(1, owns: 255..<257))
        }
    }
}
