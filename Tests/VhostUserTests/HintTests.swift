// SPDX-License-Identifier: Apache-2.0
import Balloon
import CLinux
import GuestMemory
import TestSupport
import Testing
import VhostUserSupport
import Virtio

/// The driver's side of a report over vhost-user.
extension FrontEnd {
    /// The request the device asks for now: 0 is none.
    var wantedRequest: UInt32? { configuration(16) }

    /// Waits until the device wants something other than `earlier`.
    func nextRequest(after earlier: UInt32 = 0) -> UInt32? {
        while awaitConfigurationChange() {
            guard let wanted = wantedRequest else { return nil }
            if wanted != earlier { return wanted }
        }
        return nil
    }

    /// One report with the bits of `words` from page `start` on.
    func report(_ request: UInt32, start: UInt64, _ words: [UInt64], kind: UInt16 = 1) -> Bool {
        var header = ByteBuilder(), bits = ByteBuilder(), end = ByteBuilder()
        header.put(request)
        header.put(kind)
        header.put(UInt16(1))
        header.put(start)
        header.put(UInt32(words.count * 64))
        header.put(UInt32(0))
        for word in words { bits.put(word) }
        end.put(request)
        end.put(UInt16(2))
        end.put(UInt16(2))
        for word in [0, 0, 11, 22, 33, 44, 55] as [UInt64] { end.put(word) }
        return transfer(2, [header.bytes, bits.bytes]) == 0 && transfer(2, [end.bytes]) == 0
    }
}

@Suite(.serialized) struct HintTests {
    private func words(_ file: Int32, _ bits: UInt64) -> [UInt64] {
        let bytes = Int(bits / 8)
        guard bytes > 0, let map = lacuna_mmap(bytes, PROT_READ, MAP_SHARED, file, 0) else { return [] }
        defer { munmap(map, bytes) }
        return Array(UnsafeBufferPointer(start: map.assumingMemoryBound(to: UInt64.self), count: bytes / 8))
    }

    @Test func aSealedBitmapForEachRequest() throws {
        let running = try RunningService()
        defer { running.stop() }
        let hints = try #require(HintClient(running.hintSocket))
        // Before there is anybody to ask.
        #expect(hints.ask(2)?.status == 1)
        let frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: version1 | bitmapFeature, rings: [0, 1, 2]))
        let hello = try #require(hints.ask(1))
        #expect(hello.status == 0 && hello.word(0) == 4096 && hello.word(1) == 4096)

        var seen: UInt32 = 0
        for round in 0..<3 {
            let opened = try #require(hints.ask(2))
            #expect(opened.status == 0 && opened.request >= 2)
            hints.send(3, argument: 20000, request: opened.request)
            var wanted = try #require(frontEnd.nextRequest(after: seen))
            if wanted == 0 { wanted = try #require(frontEnd.nextRequest(after: 0)) }
            seen = wanted
            #expect(UInt64(seen) == opened.request)
            let pattern: UInt64 = 0xff00_00ff << UInt64(round)
            #expect(frontEnd.report(seen, start: 1024, [pattern, 0, ~0]))
            let report = try #require(hints.receive())
            #expect(report.status == 0 && report.word(0) == 4096 && report.word(1) == 16 + 64)
            #expect(report.word(2) == 1 && report.word(3) == 11 && report.word(7) == 55)
            let file = report.file
            #expect(file >= 0)
            defer { close(file) }
            var expected = [UInt64](repeating: 0, count: 64)
            expected[16] = pattern
            expected[18] = ~0
            #expect(words(file, report.word(0)) == expected)
            // Nobody can change it: not by a mapping, a write, a new size or another seal.
            #expect(lacuna_seals(file) & 0xf == 0xf)
            #expect(lacuna_mmap(512, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) == nil)
            #expect(pwrite(file, expected, 8, 0) < 0 && ftruncate(file, 0) < 0 && ftruncate(file, 4096) < 0)
            // It is handed out once.
            #expect(hints.ask(3, argument: 1, request: opened.request)?.status == 3)
            #expect(hints.ask(4)?.status == 0)
        }
        #expect(hints.ask(7)?.status == 0)
    }

    @Test func waitsEnd() throws {
        let running = try RunningService()
        defer { running.stop() }
        let hints = try #require(HintClient(running.hintSocket)), other = try #require(HintClient(running.hintSocket))
        var frontEnd = FrontEnd(running.socket)
        #expect(frontEnd!.start(features: version1 | bitmapFeature, rings: [0, 1, 2]))
        // In time.
        var opened = try #require(hints.ask(2))
        #expect(hints.ask(3, argument: 5, request: opened.request)?.status == 2)
        // One window at a time; a request that is another's, or none.
        #expect(other.ask(2)?.status == 5)
        #expect(other.ask(3, argument: 5, request: opened.request)?.status == 4)
        #expect(hints.ask(3, argument: 5, request: opened.request + 1)?.status == 4)
        #expect(hints.ask(3, argument: 5, request: opened.request | 1 << 32)?.status == 4)
        // A new request makes the old one void.
        let again = try #require(hints.ask(2))
        #expect(again.status == 0 && again.request != opened.request)
        #expect(hints.ask(3, argument: 5, request: opened.request)?.status == 4)
        // A report that is malformed.
        hints.send(3, argument: 20000, request: again.request)
        #expect(frontEnd!.report(UInt32(again.request), start: 0, [1], kind: 9))
        #expect(hints.receive()?.status == 3)
        // A client that goes takes its window along.
        opened = try #require(hints.ask(2))
        #expect(opened.status == 0)
        var third = HintClient(running.hintSocket)
        #expect(hints.ask(4)?.status == 0 && third!.ask(2)?.status == 0 && hints.ask(2)?.status == 5)
        third = nil
        var status: UInt32 = 5
        for _ in 0..<2000 where status == 5 { status = hints.ask(2)?.status ?? 99 }
        #expect(status == 0)
        #expect(hints.ask(4)?.status == 0)
        // A front end that goes away.
        opened = try #require(hints.ask(2))
        hints.send(3, argument: 20000, request: opened.request)
        #expect(other.ask(5)?.status == 0)
        frontEnd = nil
        #expect(hints.receive()?.status == 3)
        #expect(hints.ask(2)?.status == 1)
    }

    @Test func badPackets() throws {
        let running = try RunningService()
        defer { running.stop() }
        let hints = try #require(HintClient(running.hintSocket))
        let file = MemoryFile(4096)
        for bytes in [1, 15, 17, 100] {
            hints.sendRaw([UInt8](repeating: 0, count: bytes))
            #expect(hints.receive()?.status == 6)
        }
        hints.sendRaw([1, 0, 1, 0] + [UInt8](repeating: 0, count: 12), [file.descriptor])
        #expect(hints.receive()?.status == 6)
        hints.send(1, version: 2)
        #expect(hints.receive()?.status == 6)
        for command in [0, 9, 65535] as [UInt16] { #expect(hints.ask(command)?.status == 6) }
        #expect(hints.ask(3, argument: .max, request: .max)?.status == 4)
        #expect(hints.ask(1)?.status == 0)
    }

    /// W5 over vhost-user: a driver that may have been reset has taken its balloon back.
    @Test func pagesOfTheBalloonDoNotOutliveTheDriver() throws {
        let running = try RunningService()
        defer { running.stop() }
        let hints = try #require(HintClient(running.hintSocket))
        let features = version1 | bitmapFeature | BalloonFeature.mustTellHost
        func population(_ frontEnd: FrontEnd) -> UInt64? {
            guard let opened = hints.ask(2), opened.status == 0 else { return nil }
            hints.send(3, argument: 20000, request: opened.request)
            guard frontEnd.report(UInt32(opened.request), start: 1024, [1]), let report = hints.receive(), report.status == 0
            else { return nil }
            close(report.file)
            _ = hints.ask(4)
            return report.word(1)
        }
        let frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: features, rings: [0, 1, 2]))
        #expect(frontEnd.transfer(0, [pageList([2000, 2001, 2002])]) == 0)
        #expect(population(frontEnd) == 4)
        // More memory, with the driver going on: the balloon stays.
        let more = MemoryFile(1 << 20)
        #expect(frontEnd.acknowledged(37, FrontEnd.words(0, 1 << 30, 1 << 20, 1 << 20, 0), [more.descriptor]) == 0)
        #expect(population(frontEnd) == 4)
        // A reset: it does not.
        #expect(frontEnd.acknowledged(39, FrontEnd.words(0)) == 0)
        for ring in 0..<3 { #expect(frontEnd.setUp(ring)) }
        #expect(frontEnd.acknowledged(39, FrontEnd.words(15)) == 0)
        #expect(population(frontEnd) == 1)
    }

    /// Inflated pages are a hole in the front end's file from the moment the driver hears of it.
    @Test func inflatedPagesLeaveTheFile() throws {
        let running = try RunningService()
        defer { running.stop() }
        let frontEnd = try #require(FrontEnd(running.socket))
        frontEnd.memory.poke([UInt8](repeating: 7, count: 64 * 4096), at: 2048 * 4096)
        #expect(frontEnd.start(features: version1, rings: [0, 1]))
        let before = frontEnd.file.populatedBytes
        #expect(frontEnd.transfer(0, [pageList((2048..<2048 + 48).map { UInt32($0) })]) == 0)
        // The list itself may have needed a page.
        #expect(before - frontEnd.file.populatedBytes >= 47 * 4096)
        #expect(frontEnd.memory.peek(2048 * 4096, as: UInt64.self) == 0)
        #expect(frontEnd.memory.peek((2048 + 48) * 4096, as: UInt8.self) == 7)
    }
}
