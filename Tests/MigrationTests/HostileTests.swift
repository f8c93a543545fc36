// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Testing

@testable import Migration

/// A frame with a right checksum, whatever else is wrong with it.
func frame(_ header: FrameHeader, _ payload: [UInt8] = []) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: FrameHeader.size)
    bytes.withUnsafeMutableBytes { header.encode(into: $0.baseAddress!) }
    return bytes + payload
}

/// A frame as an honest source sends it.
func honest(_ type: FrameType, count: UInt32 = 0, _ payload: [UInt8] = []) -> [UInt8] {
    let checksum = payload.isEmpty ? 0 : checksum(payload)
    return frame(
        FrameHeader(type, count: count, payloadBytes: UInt32(payload.count), payloadChecksum: checksum), payload)
}

/// CRC-32C, bit by bit.
private func checksum(_ bytes: [UInt8]) -> UInt32 {
    var crc = ~UInt32(0)
    for byte in bytes {
        crc ^= UInt32(byte)
        for _ in 0..<8 { crc = crc & 1 == 1 ? crc >> 1 ^ 0x82f6_3b78 : crc >> 1 }
    }
    return ~crc
}

func pages(_ first: Int, _ count: Int, byte: UInt8 = 7) -> [UInt8] {
    frame(
        FrameHeader(.pages, pages: first..<first + count, payloadBytes: UInt32(count * pageSize)),
        [UInt8](repeating: byte, count: count * pageSize))
}

@Suite struct HostileTests {
    private let hello = honest(.hello, describe(smallLayout))

    /// Feeds a receiver these bytes and the end of the stream. They fit a socket's buffer, so one thread is enough.
    private func feed(_ bytes: [UInt8]) throws -> (error: MigrationError?, place: MiniPlace) {
        let (near, far) = try ByteChannel.pair()
        try bytes.withUnsafeBytes { try near.writeAll([$0], idleMilliseconds: 1000) }
        near.finishWriting()
        let place = MiniPlace()
        do throws(MigrationError) { _ = try MigrationReceiver(guest: place).run(over: far) } catch { return (error, place) }
        return (nil, place)
    }

    private func expectBad(_ bytes: [UInt8], _ hint: String, sourceLocation: SourceLocation = #_sourceLocation) throws {
        let (error, place) = try feed(bytes)
        guard case .badStream(let what) = error else {
            Issue.record("\(hint): \(String(describing: error))", sourceLocation: sourceLocation)
            return
        }
        #expect(what.contains(hint), sourceLocation: sourceLocation)
        #expect(!place.runs && place.journal.count("discard") == 1, sourceLocation: sourceLocation)
    }

    @Test func anHonestStreamByHandIsTaken() throws {
        let stream =
            hello + pages(3, 2) + frame(FrameHeader(.zero, pages: 4..<5)) + honest(.roundEnd, count: 1)
            + frame(FrameHeader(.discard, pages: 3..<4)) + pages(319, 1) + honest(.roundEnd, count: 2)
            + honest(.state, count: 1, [65, 1, 2]) + honest(.stateEnd, count: 1) + honest(.commit)
        let (error, place) = try feed(stream)
        #expect(error == nil && place.runs)
        let guest = try #require(place.guest)
        #expect(guest.read(page: 3) == 0 && guest.read(page: 4) == 0)
        #expect(guest.read(page: 319, offset: 4088) == 0x0707_0707_0707_0707)
        #expect(place.state.withLock { $0 } == [StateSection(name: "A", bytes: [1, 2])])
        try guest.pause()
    }

    @Test func worstValuesInEachFrame() throws {
        let ready = hello
        let round = ready + honest(.roundEnd, count: 1)
        for type in [FrameType.pages, .zero, .discard] {
            let cases: [(UInt32, UInt64)] = [
                (0, 0), (1, 1), (1, .max), (1, .max << 12), (.max, 0), (.max, .max << 12), (65, 0), (129, 0), (1, 1 << 19),
                (1, (1 << 20) + (1 << 18)), (64, 4096), (2, 319 << 12), (1, 1 << 63), (.max, 1 << 51),
            ]
            for (count, address) in cases {
                let bytes = type == .pages ? count &* 4096 : 0
                let header = FrameHeader(type, count: count, address: address, payloadBytes: bytes)
                try expectBad(ready + frame(header), "not all RAM")
            }
            try expectBad(ready + frame(FrameHeader(type, count: 1, payloadBytes: .max)), "bytes")
            try expectBad(
                ready + frame(FrameHeader(type, count: 1, payloadBytes: type == .pages ? 4096 : 0, payloadChecksum: 1)),
                "bytes")
        }
        let big = try GuestMemory(ranges: [mebibytes(0, 4)])
        var order = StreamOrder()
        try order.accept(FrameHeader(.hello), memory: nil)
        #expect(throws: MigrationError.badStream("a pages frame holds 257 pages, more than 256")) {
            try order.accept(FrameHeader(.pages, count: 257, payloadBytes: 257 * 4096), memory: big)
        }
        try expectBad(frame(FrameHeader(.hello, payloadBytes: 65537)), "hello")
        try expectBad(frame(FrameHeader(.hello, payloadBytes: .max)), "hello")
        try expectBad(frame(FrameHeader(.hello, count: 17)), "17 data connections")
        try expectBad(frame(FrameHeader(.hello, count: .max)), "data connections")
        try expectBad(frame(FrameHeader(.hello, count: 2, address: 4096)), "hello")
        try expectBad(ready + honest(.roundEnd, count: 0), "roundEnd")
        try expectBad(ready + honest(.roundEnd, count: .max), "roundEnd")
        try expectBad(round + frame(FrameHeader(.state, count: 0, payloadBytes: 4)), "name")
        try expectBad(round + frame(FrameHeader(.state, count: 256, payloadBytes: 300)), "name")
        try expectBad(round + frame(FrameHeader(.state, count: 5, payloadBytes: 4)), "name")
        try expectBad(round + frame(FrameHeader(.state, count: 5, payloadBytes: .max)), "a state section has")
        try expectBad(round + honest(.state, count: 1, [0xff, 1]), "UTF-8")
        try expectBad(round + frame(FrameHeader(.state, count: 1, payloadBytes: 2, payloadChecksum: 5), [65, 66]), "checksum")
        try expectBad(round + honest(.stateEnd, count: 1), "stateEnd")
        try expectBad(round + honest(.stateEnd, count: .max), "stateEnd")
        try expectBad(round + honest(.stateEnd) + frame(FrameHeader(.commit, count: 1)), "commit")
        try expectBad(round + honest(.stateEnd) + frame(FrameHeader(.commit, payloadBytes: 1)), "commit")
        try expectBad(ready + frame(FrameHeader(.failure, payloadBytes: 4097)), "failure")
        try expectBad(ready + frame(FrameHeader(.cancel, address: 4096)), "cancel")
    }

    @Test func checksumsWithWorstValues() throws {
        let round = hello + pages(3, 1) + honest(.roundEnd, count: 1)
        func verify(_ first: UInt64, _ count: UInt32, _ bytes: [UInt8], crc: UInt32? = nil) -> [UInt8] {
            frame(
                FrameHeader(
                    .verify, count: count, address: first << 12, payloadBytes: UInt32(bytes.count),
                    payloadChecksum: crc ?? (bytes.isEmpty ? 0 : checksum(bytes))), bytes)
        }
        func sum(_ byte: UInt8) -> [UInt8] {
            withUnsafeBytes(of: checksum([UInt8](repeating: byte, count: pageSize)).littleEndian) { Array($0) }
        }
        let right = verify(2, 2, sum(0) + sum(7))
        let end = honest(.stateEnd) + honest(.commit)
        let (error, place) = try feed(round + right + end)
        #expect(error == nil && place.runs)
        try place.guest?.pause()

        for (first, count) in [(0, 0), (64, 4097), (0, 129), (1 << 19, 1), (319, 2), (1 << 51, .max)] as [(UInt64, UInt32)] {
            try expectBad(round + verify(first, count, [UInt8](repeating: 0, count: 4 * Int(min(count, 5000)))), "a verify frame of")
        }
        try expectBad(round + verify(2, 2, sum(0)), "a verify frame of 2 pages has 4 bytes")
        try expectBad(round + verify(2, 1, sum(0) + [0]), "a verify frame of 1 pages has 5 bytes")
        try expectBad(round + frame(FrameHeader(.verify, count: 1, payloadBytes: .max)), "a verify frame of")
        try expectBad(round + verify(2, 1, sum(0), crc: 1), "checksum")
        // No more than all pages, before a round's end, within a round; and nothing is named after them.
        let whole = verify(0, 64, [UInt8](repeating: 0, count: 256))
        for wrong in [verify(3, 1, sum(6)), verify(2, 2, sum(7) + sum(0)), whole] {
            let (error, place) = try feed(round + wrong + end)
            guard case .notVerified = error else {
                Issue.record("wrong checksums were taken: \(String(describing: error))")
                continue
            }
            #expect(!place.runs)
        }
        try expectBad(hello + right, "a verify frame came in the memory phase")
        try expectBad(hello + pages(3, 1) + right, "a verify frame came in the memory phase, within a round")
        let again = (0..<97).reduce(into: round) { bytes, _ in bytes += right }
        try expectBad(again, "more pages than the machine has")
        for late in [pages(3, 1), frame(FrameHeader(.zero, pages: 3..<4)), frame(FrameHeader(.discard, pages: 3..<4)),
            honest(.roundEnd, count: 2)]
        {
            try expectBad(round + right + late, "after checksums")
        }
        try expectBad(round + honest(.state, count: 1, [65]) + right, "a verify frame came in the state phase")
    }

    @Test func aRoundNamesNoPageTwice() throws {
        let mark = frame(FrameHeader(.zero, pages: 0..<64))
        try expectBad(hello + mark + mark + mark + mark, "more pages than the machine has")
    }

    @Test func stateHasALimitInAll() throws {
        var order = StreamOrder()
        let memory = try GuestMemory(ranges: smallLayout)
        try order.accept(FrameHeader(.hello), memory: nil)
        try order.accept(FrameHeader(.roundEnd, count: 1), memory: memory)
        let section = FrameHeader(.state, count: 1, payloadBytes: UInt32(StreamLimits.sectionBytes))
        for _ in 0..<4 { try order.accept(section, memory: memory) }
        #expect(throws: MigrationError.self) { try order.accept(section, memory: memory) }
        for _ in 0..<3 {
            var order = StreamOrder()
            try order.accept(FrameHeader(.hello), memory: nil)
            try order.accept(FrameHeader(.roundEnd, count: 1), memory: memory)
            let empty = FrameHeader(.state, count: 1, payloadBytes: 1)
            for _ in 0..<StreamLimits.sections { try order.accept(empty, memory: memory) }
            #expect(throws: MigrationError.self) { try order.accept(empty, memory: memory) }
        }
    }

    /// Each frame type in each phase: only the specified ones pass.
    @Test func framesOutOfOrder() throws {
        let memory = try GuestMemory(ranges: smallLayout)
        let allowed: [StreamOrder.Phase: Set<FrameType>] = [
            .hello: [.hello, .cancel, .failure],
            .memory: [.pages, .zero, .discard, .roundEnd, .state, .stateEnd, .cancel, .failure],
            .state: [.state, .stateEnd, .cancel, .failure],
            .decision: [.commit, .cancel, .failure],
            .committed: [], .ended: [],
        ]
        func good(_ type: FrameType, rounds: Int, sections: Int) -> FrameHeader {
            switch type {
            case .pages: FrameHeader(.pages, pages: 0..<1, payloadBytes: 4096)
            case .zero, .discard: FrameHeader(type, pages: 0..<1)
            case .roundEnd: FrameHeader(type, count: UInt32(rounds + 1))
            case .state: FrameHeader(type, count: 1, payloadBytes: 1)
            case .stateEnd: FrameHeader(type, count: UInt32(sections))
            default: FrameHeader(type)
            }
        }
        for (phase, types) in allowed {
            var path: [FrameHeader] = [FrameHeader(.hello), FrameHeader(.roundEnd, count: 1)]
            var sections = 0
            switch phase {
            case .hello: path = []
            case .memory: break
            case .state:
                path.append(FrameHeader(.state, count: 1, payloadBytes: 1))
                sections = 1
            case .decision: path.append(FrameHeader(.stateEnd))
            case .committed: path += [FrameHeader(.stateEnd), FrameHeader(.commit)]
            case .ended: path.append(FrameHeader(.cancel))
            }
            for type in FrameType.allCases {
                var order = StreamOrder()
                for header in path { try order.accept(header, memory: memory) }
                #expect(order.phase == phase)
                let header = good(type, rounds: order.rounds, sections: sections)
                let isTaken = (try? order.accept(header, memory: memory)) != nil
                #expect(isTaken == types.contains(type), "\(type) in \(phase)")
            }
        }
        // State neither before the first round's end nor within a round.
        var order = StreamOrder()
        try order.accept(FrameHeader(.hello), memory: nil)
        #expect(throws: MigrationError.self) { try order.accept(FrameHeader(.stateEnd), memory: memory) }
        try order.accept(FrameHeader(.roundEnd, count: 1), memory: memory)
        try order.accept(FrameHeader(.zero, pages: 0..<1), memory: memory)
        #expect(throws: MigrationError.self) { try order.accept(FrameHeader(.stateEnd), memory: memory) }
    }

    @Test func headersThatAreNone() throws {
        var bytes = honest(.commit)
        for index in bytes.indices {
            bytes[index] ^= 0x10
            #expect(throws: MigrationError.self) { try bytes.withUnsafeBytes { try FrameHeader(decoding: $0.baseAddress!) } }
            bytes[index] ^= 0x10
        }
        bytes[6] = 2
        let sum = checksum(Array(bytes[..<28]))
        for index in 0..<4 { bytes[28 + index] = UInt8(truncatingIfNeeded: sum >> UInt32(8 * index)) }
        let (error, place) = try feed(bytes)
        #expect(error == .wrongVersion(2))
        #expect(!place.runs)
        #expect(checksum(Array("123456789".utf8)) == 0xe306_9283)
    }

    @Test func randomBytesNeverTrap() throws {
        var random = SplitMix(1)
        for _ in 0..<300 {
            let junk = (0..<Int.random(in: 0..<300, using: &random)).map { _ in UInt8.random(in: 0...255, using: &random) }
            let (error, place) = try feed(Bool.random(using: &random) ? hello + junk : junk)
            #expect(error != nil && !place.runs)
        }
    }

    /// Streams of well-formed frames with numbers that a peer made up.
    @Test func inventedFramesNeverTrap() throws {
        var random = SplitMix(2)
        func number() -> UInt64 {
            switch Int.random(in: 0..<6, using: &random) {
            case 0: 0
            case 1: UInt64.random(in: 0...400, using: &random)
            case 2: UInt64.random(in: 0...330, using: &random) << 12
            case 3: 1 << UInt64.random(in: 0...63, using: &random)
            case 4: .max - UInt64.random(in: 0...4096, using: &random)
            default: random.next()
            }
        }
        let memory = try GuestMemory(ranges: smallLayout)
        var taken = 0
        for _ in 0..<20_000 {
            var order = StreamOrder()
            try order.accept(FrameHeader(.hello), memory: nil)
            for _ in 0..<12 {
                let type = FrameType.allCases.randomElement(using: &random)!
                let count = UInt32(truncatingIfNeeded: number())
                var bytes = UInt32(truncatingIfNeeded: number())
                if type == .pages, Bool.random(using: &random) { bytes = count &* 4096 }
                let header = FrameHeader(
                    type, count: count, address: number(), payloadBytes: bytes,
                    payloadChecksum: Bool.random(using: &random) ? 0 : UInt32(truncatingIfNeeded: number()))
                if (try? order.accept(header, memory: memory)) != nil { taken += 1 }
            }
        }
        // Some of them are right by chance, so the state machine was walked through.
        #expect(taken > 200)
        for _ in 0..<500 {
            var stream = hello
            for _ in 0..<6 {
                let type = FrameType.allCases.randomElement(using: &random)!
                let payload = [UInt8](repeating: 1, count: Int.random(in: 0..<64, using: &random))
                stream += frame(
                    FrameHeader(
                        type, count: UInt32(truncatingIfNeeded: number()), address: number(),
                        payloadBytes: UInt32(Bool.random(using: &random) ? UInt64(payload.count) : number() & 0xffff_ffff)),
                    payload)
            }
            let (error, place) = try feed(stream)
            #expect(error != nil && !place.runs)
        }
    }

    @Test func wordsOfThePeerAreMadePrintable() throws {
        #expect(printable([0x1b, 0x5b, 0x41, 0x0a, 0x42, 0xff]) == " [A B\u{fffd}")
        #expect(printable([UInt8](repeating: 65, count: 5000)).count == 1000)
    }

    /// A hostile destination: each frame type with numbers, instead of `ready`.
    @Test func theSourceTrustsTheDestinationAsLittle() throws {
        var random = SplitMix(3)
        for type in FrameType.allCases {
            for _ in 0..<10 {
                let guest = try MiniGuest()
                let (near, far) = try ByteChannel.pair()
                let bytes = frame(
                    FrameHeader(
                        type, count: UInt32.random(in: 1 ... .max, using: &random),
                        payloadBytes: UInt32.random(in: 0 ... .max, using: &random)))
                try bytes.withUnsafeBytes { try far.writeAll([$0], idleMilliseconds: 1000) }
                far.finishWriting()
                let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions())
                #expect(throws: MigrationError.self) { try source.run(over: near) }
                #expect(guest.isRunning)
            }
        }
    }
}
