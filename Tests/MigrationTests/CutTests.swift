// SPDX-License-Identifier: Apache-2.0
import Glibc
import GuestMemory
import Synchronization
import Testing

@testable import Migration

/// A line between two channels that breaks after so many bytes in one direction or the other, and keeps a copy.
final class BreakingLine: Sendable {
    let forward = Mutex<[UInt8]>([])
    let backward = Mutex<[UInt8]>([])
    let near: ByteChannel
    let far: ByteChannel
    private let left: Int32
    private let right: Int32
    private let threads = Mutex<[Worker<Void>]>([])

    init(forwardLimit: Int = .max, backwardLimit: Int = .max) throws {
        var ends: [Int32] = [0, 0]
        socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends)
        near = try ByteChannel(adopting: ends[0], name: "near")
        left = ends[1]
        socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends)
        far = try ByteChannel(adopting: ends[0], name: "far")
        right = ends[1]
        let (left, right) = (left, right)
        let workers = [
            Worker { [self] in relay(left, right, forwardLimit) { bytes in forward.withLock { $0 += bytes } } },
            Worker { [self] in relay(right, left, backwardLimit) { bytes in backward.withLock { $0 += bytes } } },
        ]
        threads.withLock { $0 = workers }
    }

    private func relay(_ from: Int32, _ to: Int32, _ limit: Int, _ note: ([UInt8]) -> Void) {
        var passed = 0
        var buffer = [UInt8](repeating: 0, count: 1 << 16)
        while passed < limit {
            let got = read(from, &buffer, min(buffer.count, limit - passed))
            if got <= 0 {
                Glibc.shutdown(to, Int32(SHUT_WR))
                return
            }
            note(Array(buffer[..<got]))
            var sent = 0
            while sent < got {
                let count = buffer.withUnsafeBytes {
                    send(to, $0.baseAddress! + sent, got - sent, Int32(MSG_NOSIGNAL))
                }
                if count <= 0 { break }
                sent += count
            }
            passed += got
        }
        // Both directions, at this very byte.
        Glibc.shutdown(left, Int32(SHUT_RDWR))
        Glibc.shutdown(right, Int32(SHUT_RDWR))
    }

    func end() {
        near.shutdown()
        far.shutdown()
        for thread in threads.withLock({ $0 }) { thread.join() }
        close(left)
        close(right)
    }
}

@Suite struct CutTests {
    private struct Result: CustomTestStringConvertible {
        var sourceRuns: Bool
        var destinationRuns: Bool
        var isUnknown: Bool
        var forward: [UInt8]
        var backward: [UInt8]
        var ends: Ends

        // Without the bytes, which are many.
        var testDescription: String {
            "source runs: \(sourceRuns), destination runs: \(destinationRuns), unknown: \(isUnknown), \(ends)"
        }
    }

    /// One migration of always the same guest, over a line that breaks. Wherever the guest is then, its memory is right,
    /// and if it is still here, the next migration takes it.
    private func run(forwardLimit: Int = .max, backwardLimit: Int = .max) throws -> Result {
        let guest = try MiniGuest()
        for page in guest.pages where page % 9 == 0 { guest.fill(page: page, seed: 5) }
        // Three pages with bytes, which must not arrive, and one without.
        let free = [0, 9, 18, 300]
        let hinter = ScriptedHinter(guest.journal) { report($0, guest.memory, free) }
        var options = quickOptions(skip: true)
        options.verify = true
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], hinter: hinter, options: options)
        let place = MiniPlace()
        let line = try BreakingLine(forwardLimit: forwardLimit, backwardLimit: backwardLimit)
        let ends = try migrate(source, to: MigrationReceiver(guest: place), over: (line.near, line.far))
        line.end()
        var isUnknown = false
        if case .success(let report) = ends.source { isUnknown = report.outcome == .unknown }
        defer {
            try? guest.pause()
            try? place.guest?.pause()
        }
        if place.runs { #expect(place.journal.count("discard") == 0) } else { #expect(place.journal.count("discard") == 1) }
        let result = Result(
            sourceRuns: guest.isRunning, destinationRuns: place.runs, isUnknown: isUnknown,
            forward: line.forward.withLock { $0 }, backward: line.backward.withLock { $0 }, ends: ends)
        #expect(!guest.tracker.armed, "\(result.testDescription)")
        if let arrived = place.guest, place.runs {
            #expect(arrived.differences(guest) == [0, 9, 18] && free.allSatisfy { arrived.read(page: $0) == 0 })
        } else {
            // As the operator does who has looked at the destination.
            if isUnknown { try guest.resume() }
            let next = MiniPlace()
            let again = MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions())
            let report = try migrate(again, to: MigrationReceiver(guest: next)).source.get()
            #expect(report.outcome == .completed && next.runs && !guest.isRunning)
            let differences = try #require(next.guest).differences(guest)
            #expect(differences.isEmpty, "the next attempt: pages \(differences)")
            try next.guest?.pause()
        }
        return result
    }

    /// One guest that writes all the time goes on through many cuts, from one place to the next where a cut comes too
    /// late; no byte is ever lost.
    @Test(arguments: 0..<4) func aBusyGuestSurvivesManyCuts(seed: UInt64) throws {
        var random = SplitMix(seed)
        var guest = try MiniGuest()
        let counter = Mutex<UInt64>(0)
        var moves = 0, stays = 0, unknowns = 0
        for _ in 0..<25 {
            if !guest.isRunning {
                guest.writers.withLock {
                    $0 = [{ guest in
                        let value = counter.withLock { value in
                            value += 1
                            return value
                        }
                        guest.write(value, page: guest.pages[Int(value % 191)], offset: Int(value % 509) * 8)
                    }]
                }
                guest.startWriters()
            }
            // Few bytes of answers, so every cut among them is a different one; and often around the end.
            let isBackward = Int.random(in: 0..<3, using: &random) == 0
            let line = try isBackward
                ? BreakingLine(backwardLimit: Int.random(in: 0...96, using: &random))
                : BreakingLine(forwardLimit: Int.random(in: 0...2_000_000, using: &random))
            var options = quickOptions()
            options.maxRounds = 3
            let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: options)
            let place = MiniPlace()
            let ends = try migrate(source, to: MigrationReceiver(guest: place), over: (line.near, line.far))
            line.end()
            #expect(!guest.isRunning || !place.runs, "both run: \(ends)")
            if place.runs {
                moves += 1
                let arrived = try #require(place.guest)
                let differences = arrived.differences(guest)
                #expect(differences.isEmpty, "pages \(differences)")
                try arrived.pause()
                guest = arrived
            } else if !guest.isRunning {
                unknowns += 1
                #expect(try ends.source.get().outcome == .unknown)
                try guest.resume()
            } else {
                stays += 1
            }
        }
        try guest.pause()
        #expect(moves > 0 && stays > 0, "\(moves) moves, \(stays) stays, \(unknowns) unknown")
    }

    private func check(_ result: Result, _ place: String) {
        if result.isUnknown {
            #expect(!result.sourceRuns, "\(place): the source runs a guest it gave away")
        } else {
            #expect(result.sourceRuns != result.destinationRuns, "\(place): \(result.ends)")
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

    @Test func aStreamCutAnywhereLeavesOneGuestRunning() throws {
        let whole = try run()
        #expect(whole.destinationRuns && !whole.sourceRuns && !whole.isUnknown)
        let total = whole.forward.count
        var random = SplitMix(11)
        var cuts = try boundaries(whole.forward)
        #expect(cuts.last == total && cuts.count > 20)
        cuts += (0..<200).map { _ in Int.random(in: 0...total, using: &random) }
        cuts += (total - 40)..<total
        for cut in cuts {
            let result = try run(forwardLimit: cut)
            check(result, "cut at byte \(cut) of \(total)")
            // Without the whole commit the destination never runs; before it was sent there is no doubt at the source.
            if cut < total { #expect(!result.destinationRuns) } else { #expect(result.destinationRuns) }
            if cut <= total - FrameHeader.size { #expect(result.sourceRuns && !result.isUnknown, "cut at byte \(cut)") }
        }
    }

    @Test func answersCutAnywhereLeaveOneGuestRunning() throws {
        let whole = try run()
        let total = whole.backward.count
        #expect(total == 3 * FrameHeader.size)
        for cut in 0..<total {
            let result = try run(backwardLimit: cut)
            check(result, "answer cut at byte \(cut) of \(total)")
            // A cut right behind `loaded` may come before or after the commit went through; after it there is no doubt.
            if cut < 2 * FrameHeader.size { #expect(result.sourceRuns && !result.destinationRuns) }
            if cut > 2 * FrameHeader.size { #expect(result.isUnknown && result.destinationRuns) }
        }
    }

    /// A destination that says it dropped the guest is believed, also after the commit: it never says so afterwards.
    @Test func aFailureInsteadOfTheAcknowledgementGivesTheGuestBack() throws {
        let guest = try MiniGuest()
        let (near, far) = try ByteChannel.pair()
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions())
        let worker = Worker<Swift.Result<MigrationReport, MigrationError>> {
            do throws(MigrationError) { return .success(try source.run(over: near)) } catch { return .failure(error) }
        }
        let (reader, writer) = (FrameReader(far), FrameWriter(far, idleMilliseconds: 10_000))
        var type = FrameType.hello
        while type != .commit {
            let header = try reader.header(idleMilliseconds: 10_000)
            _ = try reader.payload(of: header, idleMilliseconds: 10_000)
            type = header.type
            if type == .hello { try writer.send(.ready) }
            if type == .stateEnd { try writer.send(.loaded) }
        }
        try writer.send(.failure, payload: Array("too late for me".utf8))
        #expect(throws: MigrationError.peerFailed("too late for me")) { try worker.join().get() }
        #expect(guest.isRunning)
        try guest.pause()
    }

    @Test(arguments: [FrameType.ready, .loaded, .commit, .refused]) func nonsenseInsteadOfTheAcknowledgement(
        type: FrameType
    ) throws {
        let guest = try MiniGuest()
        let (near, far) = try ByteChannel.pair()
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions())
        let worker = Worker<MigrationReport?> { try? source.run(over: near) }
        let (reader, writer) = (FrameReader(far), FrameWriter(far, idleMilliseconds: 10_000))
        var last = FrameType.hello
        while last != .commit {
            let header = try reader.header(idleMilliseconds: 10_000)
            _ = try reader.payload(of: header, idleMilliseconds: 10_000)
            last = header.type
            if last == .hello { try writer.send(.ready) }
            if last == .stateEnd { try writer.send(.loaded) }
        }
        try writer.send(type)
        let report = try #require(worker.join())
        #expect(report.outcome == .unknown && report.outcomeReason != nil)
        #expect(!guest.isRunning)
    }
}
