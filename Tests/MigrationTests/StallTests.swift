// SPDX-License-Identifier: Apache-2.0
import Glibc
import GuestMemory
import Synchronization
import Testing

@testable import Migration

/// Peers that stop answering, trickle, speak another version or go on talking when all is said.
@Suite struct StallTests {
    private typealias SourceEnd = Result<MigrationReport, MigrationError>
    private typealias DestinationEnd = Result<ReceiveReport, MigrationError>

    private static let idle = 500

    private func start(_ source: MigrationSource, over channel: ByteChannel) -> Worker<SourceEnd> {
        Worker { do throws(MigrationError) { return .success(try source.run(over: channel)) } catch { return .failure(error) } }
    }
    private func start(_ receiver: MigrationReceiver, over channel: ByteChannel) -> Worker<DestinationEnd> {
        Worker { do throws(MigrationError) { return .success(try receiver.run(over: channel)) } catch { return .failure(error) } }
    }

    private func isTimeout(_ error: MigrationError) -> Bool {
        switch error {
        case .timedOut, .tooSlow: true
        default: false
        }
    }

    /// The bytes of a whole migration, as a source sends them, and the places where its frames begin.
    private func stream() throws -> (bytes: [UInt8], frames: [(type: FrameType, start: Int)]) {
        let guest = try MiniGuest()
        for page in guest.pages where page % 9 == 0 { guest.fill(page: page, seed: 5) }
        let (near, far) = try ByteChannel.pair()
        let source = start(MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions()), over: near)
        var bytes: [UInt8] = [], frames: [(type: FrameType, start: Int)] = []
        while frames.last?.type != .commit {
            var header = [UInt8](repeating: 0, count: FrameHeader.size)
            try header.withUnsafeMutableBytes { try far.readExactly(into: $0, idleMilliseconds: 10_000) }
            let frame = try header.withUnsafeBytes { try FrameHeader(decoding: $0.baseAddress!) }
            var payload = [UInt8](repeating: 0, count: Int(frame.payloadBytes))
            try payload.withUnsafeMutableBytes { try far.readExactly(into: $0, idleMilliseconds: 10_000) }
            frames.append((frame.type, bytes.count))
            bytes += header + payload
            if frame.type == .hello { try send(.ready, to: far) }
            if frame.type == .stateEnd { try send(.loaded, to: far) }
        }
        try send(.committed, to: far)
        #expect(try source.join().get().outcome == .completed)
        return (bytes, frames)
    }

    private func encode(_ header: FrameHeader) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: FrameHeader.size)
        bytes.withUnsafeMutableBytes { header.encode(into: $0.baseAddress!) }
        return bytes
    }
    private func send(_ type: FrameType, to channel: ByteChannel) throws { try send(encode(FrameHeader(type)), to: channel) }
    private func send(_ bytes: some Collection<UInt8>, to channel: ByteChannel) throws {
        let bytes = Array(bytes)
        try bytes.withUnsafeBytes { try channel.writeAll([$0], idleMilliseconds: 10_000) }
    }

    // MARK: Sources

    /// A source that falls silent at a frame's boundary or within a frame, the connection open.
    @Test func aSilentSourceIsGivenUp() throws {
        let (bytes, frames) = try stream()
        var places: Set<Int> = [0, 1, bytes.count - 1]
        for type in FrameType.allCases {
            guard let frame = frames.last(where: { $0.type == type }) else { continue }
            places.formUnion([frame.start, frame.start + 16, frame.start + 31])
        }
        #expect(places.count > 20)
        let runs = try places.map { place in
            let (near, far) = try ByteChannel.pair()
            var options = ReceiverOptions()
            options.idleTimeoutMilliseconds = Self.idle
            let target = MiniPlace()
            // All at the same time: each only waits.
            return (place, near, target, start(MigrationReceiver(guest: target, options: options), over: far))
        }
        for (place, near, _, _) in runs { try send(bytes[..<place], to: near) }
        for (place, near, target, worker) in runs {
            guard case .failure(let error) = worker.join() else {
                Issue.record("silent after \(place) bytes: received")
                continue
            }
            #expect(isTimeout(error), "silent after \(place) bytes: \(error)")
            #expect(!target.runs && target.journal.count("discard") == 1)
            withExtendedLifetime(near) {}
        }
    }

    /// Slow is not silent: one byte now and then up to the last is a migration.
    @Test func aTricklingSourceIsFollowed() throws {
        let (bytes, frames) = try stream()
        let (near, far) = try ByteChannel.pair()
        let place = MiniPlace()
        var options = ReceiverOptions()
        options.idleTimeoutMilliseconds = 10_000
        let worker = start(MigrationReceiver(guest: place, options: options), over: far)
        // Headers byte by byte and payloads in odd pieces: more than each byte by itself would show nothing.
        for (index, frame) in frames.enumerated() {
            let end = index + 1 < frames.count ? frames[index + 1].start : bytes.count
            for byte in bytes[frame.start..<frame.start + FrameHeader.size] { try send([byte], to: near) }
            var rest = bytes[frame.start + FrameHeader.size..<end]
            while !rest.isEmpty {
                try send(rest.prefix(1021), to: near)
                rest = rest.dropFirst(1021)
            }
        }
        #expect(try worker.join().get().acknowledged && place.runs)
        let guest = try #require(place.guest)
        try guest.pause()
        let last: UInt64 = 5 << 20 | 511 | 1 << 63
        for page in guest.pages { #expect(guest.read(page: page, offset: 4088) == (page % 9 == 0 ? last : 0), "page \(page)") }
    }

    /// What follows the commit is not read, let alone obeyed.
    @Test(arguments: [0, 1, 2]) func nothingCountsAfterTheCommit(kind: Int) throws {
        let (bytes, _) = try stream()
        let garbage: [UInt8] =
            switch kind {
            case 0: [UInt8](repeating: 0xaa, count: 5000)
            case 1: encode(FrameHeader(.cancel)) + encode(FrameHeader(.failure))
            default: bytes
            }
        let (near, far) = try ByteChannel.pair()
        let place = MiniPlace()
        let worker = start(MigrationReceiver(guest: place), over: far)
        try send(bytes + garbage, to: near)
        #expect(try worker.join().get().acknowledged)
        #expect(place.runs && place.journal.count("discard") == 0 && place.journal.count("start") == 1)
        try place.guest?.pause()
    }

    @Test func aSourceOfANewerVersionIsTold() throws {
        let (near, far) = try ByteChannel.pair()
        let place = MiniPlace()
        let worker = start(MigrationReceiver(guest: place), over: far)
        try send(newer(.hello), to: near)
        let reader = FrameReader(near)
        let header = try reader.header(idleMilliseconds: 10_000)
        #expect(header.type == .refused)
        let text = String(decoding: try reader.payload(of: header, idleMilliseconds: 10_000), as: UTF8.self)
        #expect(text.contains("version 2") && text.contains("same release"))
        guard case .failure(.wrongVersion(2)) = worker.join() else {
            Issue.record("no wrongVersion")
            return
        }
        #expect(!place.runs)
    }

    private func newer(_ type: FrameType) -> [UInt8] {
        var bytes = encode(FrameHeader(type))
        bytes[6] = 2
        var crc = ~UInt32(0)
        for byte in bytes[..<28] {
            crc ^= UInt32(byte)
            for _ in 0..<8 { crc = crc & 1 == 1 ? crc >> 1 ^ 0x82f6_3b78 : crc >> 1 }
        }
        for index in 0..<4 { bytes[28 + index] = UInt8(truncatingIfNeeded: ~crc >> UInt32(8 * index)) }
        return bytes
    }

    // MARK: Destinations

    /// A destination that falls silent at `type`, and answers what comes before that.
    private func migrate(
        until type: FrameType, answer: [UInt8] = []
    ) throws -> (guest: MiniGuest, end: SourceEnd) {
        let guest = try MiniGuest([mebibytes(0, 16)])
        for page in guest.pages { guest.fill(page: page, seed: 5) }
        let (near, far) = try ByteChannel.pair()
        var options = quickOptions()
        // Only the silence that is the test's own may take long enough.
        if type == .commit { options.commitTimeoutMilliseconds = Self.idle } else if answer.isEmpty {
            options.idleTimeoutMilliseconds = Self.idle
        }
        let worker = start(MigrationSource(guest: guest, trackers: [guest.tracker], options: options), over: near)
        let reader = FrameReader(far)
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: 1 << 20, alignment: 16)
        defer { buffer.deallocate() }
        while true {
            let header = try reader.header(idleMilliseconds: 10_000)
            if header.payloadBytes > 0 {
                try reader.payload(to: buffer, bytes: Int(header.payloadBytes), idleMilliseconds: 10_000)
            }
            if header.type == type { break }
            if header.type == .hello { try send(.ready, to: far) }
            if header.type == .stateEnd { try send(.loaded, to: far) }
        }
        if !answer.isEmpty { try send(answer, to: far) }
        // The rest is taken, so that the source waits for an answer and not for room.
        let drain = Worker { far.drain(milliseconds: 10_000) }
        let end = worker.join()
        far.shutdown()
        drain.join()
        return (guest, end)
    }

    @Test(arguments: [FrameType.hello, .stateEnd]) func aSilentDestinationIsGivenUp(type: FrameType) throws {
        let (guest, end) = try migrate(until: type)
        guard case .failure(let error) = end else {
            Issue.record("silent at \(type): migrated")
            return
        }
        #expect(isTimeout(error), "silent at \(type): \(error)")
        #expect(guest.isRunning && !guest.tracker.armed)
        try guest.pause()
    }

    /// An answer to the commit that comes a byte at a time: the guest may not stand still for as long as that takes.
    @Test func anAnswerToTheCommitThatTricklesIsGivenUp() throws {
        let guest = try MiniGuest()
        let (near, far) = try ByteChannel.pair()
        var options = quickOptions()
        options.commitTimeoutMilliseconds = Self.idle
        let worker = start(MigrationSource(guest: guest, trackers: [guest.tracker], options: options), over: near)
        let reader = FrameReader(far)
        while true {
            let header = try reader.header(idleMilliseconds: 10_000)
            _ = try reader.payload(of: header, idleMilliseconds: 10_000)
            if header.type == .commit { break }
            if header.type == .hello { try send(.ready, to: far) }
            if header.type == .stateEnd { try send(.loaded, to: far) }
        }
        try send(encode(FrameHeader(.failure, payloadBytes: 4000)), to: far)
        let trickle = Worker {
            // As slow as a peer may be; the source's end of the channel ends it.
            for _ in 0..<4000 {
                guard (try? self.send([0x20], to: far)) != nil else { return true }
                usleep(20_000)
            }
            return false
        }
        let report = try worker.join().get()
        #expect(report.outcome == .unknown)
        #expect(trickle.join(), "the source waited for all of it")
        #expect(!guest.isRunning)
    }

    /// Zero pages take long to look at and nothing to send: the other side hears of them in time all the same.
    @Test func aLongRunOfZeroPagesIsNoSilence() throws {
        let memory = try GuestMemory(ranges: [mebibytes(0, 16)])
        let (near, far) = try ByteChannel.pair()
        let sender = PageSender(
            memory: memory, told: MigrationBitmap(memory, remembersSkipped: false).told,
            writer: FrameWriter(near, idleMilliseconds: 1000), channel: near, bandwidth: Bandwidth(bytesPerSecond: 0))
        sender.silenceNanoseconds = 0
        var round = MigrationRound(number: 1)
        try sender.send(0..<1024, &round)
        let header = try FrameReader(far).header(idleMilliseconds: 1000)
        #expect(header.type == .zero && header.count == 1024 && round.zero == 1024)
    }

    /// Nobody reads: the source waits for room, and not for ever.
    @Test func aDestinationThatTakesNothingIsGivenUp() throws {
        let guest = try MiniGuest([mebibytes(0, 16)])
        for page in guest.pages { guest.fill(page: page, seed: 5) }
        let (near, far) = try ByteChannel.pair()
        var options = quickOptions()
        options.idleTimeoutMilliseconds = Self.idle
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: options)
        try send(.ready, to: far)
        guard case .failure(let error) = start(source, over: near).join() else {
            Issue.record("migrated to nobody")
            return
        }
        #expect(isTimeout(error), "\(error)")
        #expect(guest.isRunning && !guest.tracker.armed)
        try guest.pause()
        withExtendedLifetime(far) {}
    }

    @Test func silenceAfterTheCommitLeavesTheGuestPaused() throws {
        let (guest, end) = try migrate(until: .commit)
        let report = try end.get()
        #expect(report.outcome == .unknown)
        #expect(report.outcomeReason?.contains("nothing happened for \(Self.idle) ms") == true, "\(report.outcomeReason ?? "")")
        #expect(!guest.isRunning)
    }

    /// An answer that comes before its question, and one that nobody asked for.
    @Test(arguments: [FrameType.ready, .loaded, .committed, .hello, .pages, .cancel]) func unaskedAnswersEndIt(
        type: FrameType
    ) throws {
        let guest = try MiniGuest()
        let (near, far) = try ByteChannel.pair()
        try send(encode(FrameHeader(.ready)) + encode(FrameHeader(type)), to: far)
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions())
        let drain = Worker { far.drain(milliseconds: 10_000) }
        guard case .failure(.badStream(let what)) = start(source, over: near).join() else {
            Issue.record("a \(type) frame was taken")
            return
        }
        drain.join()
        #expect(what.contains("\(type)"), "\(what)")
        #expect(guest.isRunning && !guest.tracker.armed)
        try guest.pause()
    }

    @Test func aDestinationOfANewerVersionIsNotUsed() throws {
        let (guest, end) = try migrate(until: .hello, answer: newer(.ready))
        guard case .failure(let error) = end else {
            Issue.record("migrated to another version")
            return
        }
        #expect(error == .wrongVersion(2))
        #expect(guest.isRunning)
        try guest.pause()
    }

    // MARK: Two at once

    /// Two guests do not disturb each other.
    @Test func twoGuestsAtOnceArriveWhole() throws {
        let runs = try (0..<2).map { index in
            let guest = try MiniGuest()
            for page in guest.pages where page % 3 == index { guest.fill(page: page, seed: UInt64(index) + 1) }
            let place = MiniPlace()
            let (near, far) = try ByteChannel.pair()
            let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions())
            return (guest, place, start(MigrationReceiver(guest: place), over: far), start(source, over: near))
        }
        for (guest, place, destination, source) in runs {
            #expect(try source.join().get().outcome == .completed)
            #expect(try destination.join().get().acknowledged && place.runs)
            #expect(try #require(place.guest).differences(guest).isEmpty)
            try place.guest?.pause()
        }
    }

    @Test func aSecondSourceFindsNobody() throws {
        let path = "/tmp/lacuna-\(getpid())-once.sock"
        let listener = try ChannelListener(.unix(path: path))
        let near = try ByteChannel.connect(to: listener.address)
        let far = try listener.accept(timeoutMilliseconds: 5000)
        listener.close()
        #expect(throws: MigrationError.cannotConnect("unix:\(path)", errno: ENOENT)) {
            try ByteChannel.connect(to: .unix(path: path))
        }
        withExtendedLifetime((near, far)) {}
    }
}
