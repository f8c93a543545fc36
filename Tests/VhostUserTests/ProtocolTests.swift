// SPDX-License-Identifier: Apache-2.0
import Balloon
import CLinux
import GuestMemory
import TestSupport
import Testing
import VhostUserSupport
import Virtio

let version1 = VirtioFeature.version1
let bitmapFeature = BalloonFeature.freePageBitmap

func pageList(_ pages: [UInt32]) -> [UInt8] {
    var bytes = ByteBuilder()
    for page in pages { bytes.put(page) }
    return bytes.bytes
}

@Suite(.serialized) struct ProtocolTests {
    @Test func aDriverInflatesAndDeflates() throws {
        let running = try RunningService(target: 777)
        defer { running.stop() }
        let frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: version1 | BalloonFeature.mustTellHost, rings: [0, 1]))
        #expect(frontEnd.configuration(0) == 777)
        #expect(frontEnd.transfer(0, [pageList([1024, 1025, 1026])]) == 0)
        #expect(frontEnd.transfer(1, [pageList([1025])]) == 0)
        let hints = try #require(HintClient(running.hintSocket))
        let statistics = try #require(hints.ask(5))
        #expect(statistics.word(6) == 3 && statistics.word(7) == 1)
        // A new target reaches the driver.
        #expect(hints.ask(6, argument: 12345)?.status == 0)
        #expect(frontEnd.awaitConfigurationChange() && frontEnd.configuration(0) == 12345)
        // The driver's own field.
        #expect(frontEnd.acknowledged(25, FrontEnd.halves(4, 4, 0) + [3, 0, 0, 0]) == 0)
        #expect(frontEnd.configuration(4) == 3)
    }

    @Test func ringsStopAndGoOnWhereTheyWere() throws {
        let running = try RunningService()
        defer { running.stop() }
        let frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: version1, rings: [0, 1]))
        for _ in 0..<5 { #expect(frontEnd.transfer(0, [pageList([300])]) == 0) }
        frontEnd.send(11, FrontEnd.halves(0, 0))
        #expect(frontEnd.receive()?.payload == FrontEnd.halves(0, 5))
        // Stopped means stopped: a kick moves nothing.
        frontEnd.queues[0]!.publish(frontEnd.queues[0]!.chain([MockDescriptor(0x8000, 4)]))
        frontEnd.kick(0)
        #expect(frontEnd.ask(40) != nil && frontEnd.queues[0]!.takeUsed().isEmpty)
        // The buffer from that time is served after the start.
        #expect(frontEnd.setUp(0, fresh: false))
        #expect(frontEnd.waitFor(frontEnd.calls[0]!) && frontEnd.queues[0]!.takeUsed().count == 1)
        #expect(frontEnd.transfer(0, [pageList([301])]) == 0)
    }

    @Test func anotherFrontEndTakesOver() throws {
        let running = try RunningService()
        defer { running.stop() }
        let file = MemoryFile(16 << 20, name: "lacuna-takeover")
        var first = FrontEnd(running.socket, file: file)
        #expect(first!.start(features: version1, rings: [0, 1]))
        for _ in 0..<7 { #expect(first!.transfer(0, [pageList([300])]) == 0) }
        #expect(first!.acknowledged(25, FrontEnd.halves(4, 4, 0) + [9, 0, 0, 0]) == 0)
        let queue = first!.queues[0]!, other = first!.queues[1]!
        first = nil
        let second = try #require(FrontEnd(running.socket, file: file))
        second.adopt(queue, 0)
        second.adopt(other, 1)
        #expect(second.start(features: version1, rings: [0, 1], fresh: false))
        #expect(second.transfer(0, [pageList([301])]) == 0)
        #expect(second.configuration(4) == 9)
    }

    @Test func memorySlotsComeAndGo() throws {
        let running = try RunningService()
        defer { running.stop() }
        let frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: version1, rings: [0, 1]))
        #expect(frontEnd.ask(36) == 256)
        let more = MemoryFile(2 << 20)
        let region = FrontEnd.words(0, 1 << 30, 2 << 20, FrontEnd.userBase + 1 << 30, 0)
        #expect(frontEnd.transfer(0, [pageList([1 << 18])]) == 0)
        #expect(frontEnd.acknowledged(37, region, [more.descriptor]) == 0)
        #expect(frontEnd.transfer(0, [pageList([1 << 18])]) == 0)
        let hints = try #require(HintClient(running.hintSocket))
        // The first was for no RAM.
        var statistics = try #require(hints.ask(5))
        #expect(statistics.word(8) == 1 && statistics.word(6) == 1)
        #expect(frontEnd.acknowledged(38, region) == 0 && frontEnd.acknowledged(38, region) == 1)
        #expect(frontEnd.transfer(0, [pageList([1 << 18])]) == 0)
        statistics = try #require(hints.ask(5))
        #expect(statistics.word(8) == 2 && statistics.word(6) == 1)
    }

    @Test func ownWritesGoIntoTheSharedLog() throws {
        let running = try RunningService()
        defer { running.stop() }
        let frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: version1, rings: [0, 1]))
        let log = MemoryFile(4096)
        let words = lacuna_mmap(4096, PROT_READ | PROT_WRITE, MAP_SHARED, log.descriptor, 0)!
            .assumingMemoryBound(to: UInt64.self)
        defer { munmap(words, 4096) }
        frontEnd.send(6, FrontEnd.words(4096, 0), [log.descriptor])
        #expect(frontEnd.receive()?.payload == FrontEnd.words(0))
        #expect(frontEnd.transfer(0, [pageList([300])]) == 0)
        #expect(lacuna_popcount(words, 512) == 0)
        // Logging begins and ends while the device runs.
        #expect(frontEnd.acknowledged(2, FrontEnd.words(version1 | 1 << 26 | 1 << 30)) == 0)
        #expect(frontEnd.transfer(0, [pageList([300])]) == 0)
        let page = frontEnd.queues[0]!.used >> 12
        #expect(words[Int(page >> 6)] >> (page & 63) & 1 == 1)
        memset(words, 0, 4096)
        #expect(frontEnd.acknowledged(2, FrontEnd.words(version1 | 1 << 30)) == 0)
        #expect(frontEnd.transfer(0, [pageList([300])]) == 0)
        #expect(lacuna_popcount(words, 512) == 0)
    }

    @Test func aBrokenRingAsksForAReset() throws {
        let running = try RunningService()
        defer { running.stop() }
        let frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: version1, rings: [0, 1]))
        let error = eventfd(0, lacuna_EFD_FLAGS)
        defer { close(error) }
        #expect(frontEnd.acknowledged(14, FrontEnd.words(0), [error]) == 0)
        frontEnd.queues[0]!.publish(index: 1000)
        frontEnd.kick(0)
        #expect(frontEnd.waitFor(error))
        #expect(frontEnd.ask(40) == 15 | 64)
        #expect(frontEnd.acknowledged(34) == 0 && frontEnd.ask(40) == 0)
        #expect(frontEnd.setUp(0) && frontEnd.setUp(1) && frontEnd.acknowledged(39, FrontEnd.words(15)) == 0)
        #expect(frontEnd.transfer(0, [pageList([300])]) == 0)
    }

    /// Each wrong message is refused with a code, and the same connection goes on.
    @Test func wrongMessagesAreRefused() throws {
        let running = try RunningService()
        defer { running.stop() }
        let frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: version1, rings: [0, 1]))
        let file = frontEnd.file.descriptor, event = eventfd(0, lacuna_EFD_FLAGS)
        defer { close(event) }
        let table = frontEnd.memoryTable()
        let cases: [(String, UInt32, [UInt8], [Int32])] = [
            ("unknown", 99, [], []), ("zero", 0, [], []), ("features not offered", 2, FrontEnd.words(1 << 60), []),
            ("short features", 2, [1, 2], []), ("long features", 2, FrontEnd.words(1, 1), []),
            ("features with a descriptor", 2, FrontEnd.words(version1), [event]),
            ("protocol features", 16, FrontEnd.words(1 << 50), []),
            ("table without descriptors", 5, table, []), ("table with two", 5, table, [file, file]),
            ("table cut short", 5, Array(table.dropLast()), [file]), ("table too long", 5, table + [0], [file]),
            ("table of nothing", 5, FrontEnd.halves(0, 0), []), ("table of an eventfd", 5, table, [event]),
            ("table beyond its file", 5, frontEnd.memoryTable(size: 1 << 30), [file]),
            ("table beyond the limit", 5, FrontEnd.halves(1, 0) + FrontEnd.words(1 << 40, 4096, 0, 0), [file]),
            ("table that wraps", 5, FrontEnd.halves(1, 0) + FrontEnd.words(0, .max, 1, 0), [file]),
            ("overlap", 5, FrontEnd.halves(2, 0) + FrontEnd.words(0, 8192, 0, 0, 4096, 8192, 1 << 20, 0), [file, file]),
            ("overlapping user addresses", 37, FrontEnd.words(0, 1 << 30, 4096, FrontEnd.userBase, 0), [file]),
            ("region without descriptor", 37, FrontEnd.words(0, 1 << 30, 4096, 0, 0), []),
            ("removing what is not there", 38, FrontEnd.words(0, 1 << 30, 4096, 0, 0), []),
            ("no such ring", 8, FrontEnd.halves(77, 32), []), ("ring of nothing", 8, FrontEnd.halves(0, 0), []),
            ("large ring", 8, FrontEnd.halves(0, 1 << 16), []), ("ring beyond the limit", 8, FrontEnd.halves(0, 512), []),
            ("large index", 10, FrontEnd.halves(0, 1 << 16), []),
            ("enable 2", 18, FrontEnd.halves(0, 2), []), ("address flags", 9, FrontEnd.halves(0, 4) + FrontEnd.words(0, 0, 0, 0), []),
            ("short addresses", 9, FrontEnd.halves(0, 0) + FrontEnd.words(0, 0), []),
            ("kick without descriptor", 12, FrontEnd.words(0), []), ("kick of no ring", 12, FrontEnd.words(50), [event]),
            ("polling", 12, FrontEnd.words(0x100), []), ("kick by a file", 12, FrontEnd.words(0), [file]),
            ("call by a file", 13, FrontEnd.words(0), [file]), ("two calls", 13, FrontEnd.words(0), [event, event]),
            ("no call and yet one", 13, FrontEnd.words(0x100), [event]), ("call bits", 13, FrontEnd.words(0x200), [event]),
            ("channel that is no socket", 21, [], [event]), ("no channel", 21, [], []),
            ("configuration write too long", 25, FrontEnd.halves(0, 8, 0) + [1], []),
            ("configuration beyond", 25, FrontEnd.halves(253, 4, 0) + [1, 2, 3, 4], []),
            ("status 256", 39, FrontEnd.words(256), []),
        ]
        for (name, request, payload, files) in cases {
            #expect(frontEnd.acknowledged(request, payload, files) == 1, "\(name)")
        }
        // Those with a reply of their own get an empty one; the log's has a code.
        for (request, payload) in [
            (UInt32(1), [UInt8(0)]), (15, [0]), (17, FrontEnd.words(0)), (24, FrontEnd.halves(0, 4, 0)),
            (24, FrontEnd.halves(0, 300, 0) + [UInt8](repeating: 0, count: 300)), (24, FrontEnd.halves(0, 0, 0)),
            (24, FrontEnd.halves(.max, 4, 0) + [0, 0, 0, 0]), (11, FrontEnd.halves(9, 0)), (11, []), (36, [1]), (40, [1]),
        ] {
            frontEnd.send(request, payload)
            #expect(frontEnd.receive()?.payload == [], "request \(request) \(payload.count)")
        }
        for (payload, files) in [
            (FrontEnd.words(4096, 0), [Int32]()), (FrontEnd.words(0, 0), [file]), (FrontEnd.words(.max, 0), [file]),
            (FrontEnd.words(4096, 1), [file]), (FrontEnd.words(4096, 0), [event]), ([], [file]),
        ] {
            frontEnd.send(6, payload, files)
            #expect(frontEnd.receive()?.payload == FrontEnd.words(1))
        }
        #expect(running.log.value > 0)
        // After all that the device works.
        #expect(frontEnd.transfer(0, [pageList([300])]) == 0)
        let hints = try #require(HintClient(running.hintSocket))
        #expect(hints.ask(5)?.word(2) == UInt64(cases.count + 11 + 6))
    }

    /// What cannot be a message ends the connection, and the next one finds a working service.
    @Test func brokenFramesEndTheConnection() throws {
        let running = try RunningService()
        defer { running.stop() }
        for (name, bytes) in [
            ("version 0", FrontEnd.halves(1, 0, 0)), ("version 2", FrontEnd.halves(1, 2, 0)),
            ("a reply", FrontEnd.halves(1, 5, 0)), ("a long payload", FrontEnd.halves(2, 1, 4097)),
            ("a huge payload", FrontEnd.halves(2, 1, .max)),
        ] {
            let frontEnd = try #require(FrontEnd(running.socket))
            frontEnd.sendRaw(bytes)
            #expect(frontEnd.receive() == nil, "\(name)")
        }
        // Every message of a start, cut short at every byte of its header and at some of its payload.
        for cut in 0..<20 {
            let frontEnd = try #require(FrontEnd(running.socket))
            frontEnd.sendRaw(Array((FrontEnd.halves(2, 1, 8) + FrontEnd.words(version1))[..<cut]), cut > 0 ? [frontEnd.file.descriptor] : [])
        }
        // A byte at a time is a message all the same.
        let frontEnd = try #require(FrontEnd(running.socket))
        for byte in FrontEnd.halves(1, 1, 0) { frontEnd.sendRaw([byte]) }
        #expect(frontEnd.receive()?.payload.count == 8)
        #expect(frontEnd.start(features: version1, rings: [0, 1]) && frontEnd.transfer(0, [pageList([300])]) == 0)
    }

    @Test func aMemoryFileCutShortDoesNotEndTheService() throws {
        SharedFile.survivesTruncation()
        let running = try RunningService()
        defer { running.stop() }
        var frontEnd = FrontEnd(running.socket)
        #expect(frontEnd!.start(features: version1, rings: [0, 1]))
        #expect(frontEnd!.transfer(0, [pageList([300])]) == 0)
        #expect(ftruncate(frontEnd!.file.descriptor, 4096) == 0)
        frontEnd!.kick(0)
        frontEnd!.kick(1)
        #expect(frontEnd!.ask(40) != nil)
        frontEnd = nil
        let next = try #require(FrontEnd(running.socket))
        #expect(next.start(features: version1, rings: [0, 1]) && next.transfer(0, [pageList([300])]) == 0)
    }
}
