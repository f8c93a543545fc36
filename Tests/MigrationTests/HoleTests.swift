// SPDX-License-Identifier: Apache-2.0
import CLinux
import GuestMemory
import TestSupport
import Testing

@testable import Migration

/// What a balloon gave back to the host stays there, whoever looks at the memory.
@Suite struct HoleTests {
    /// 4 MiB of a file in memory with data in every eighth page up to 1 MiB, pages of zeroes that exist up to 2 MiB, and
    /// holes.
    private final class Place {
        let memory: GuestMemory
        let file: Int32
        let data = Set(stride(from: 0, to: 256, by: 8))
        init() throws {
            file = lacuna_memfd("holes")
            try #require(file >= 0 && ftruncate(file, 4 << 20) == 0)
            let range = GuestRange(start: GuestAddress(0), size: 4 << 20)
            memory = try GuestMemory(sharing: [SharedMapping(range: range, descriptor: file, offset: 0)], limit: 1 << 52)
            for page in 0..<512 { memory.poke([data.contains(page) ? 0x5a : 0], at: UInt64(page) << pageShift) }
            // What the guest had and gave back.
            for page in 512..<700 { memory.poke([0xff], at: UInt64(page) << pageShift) }
            try memory.discard(pages: 512..<700)
        }
        deinit { close(file) }
        var blocks: Int {
            var status = stat()
            return fstat(file, &status) == 0 ? Int(status.st_blocks) : -1
        }
    }

    @Test func zeroScanFillsNoHole() throws {
        let place = try Place(), before = place.blocks
        try #require(before == 512 * 8)
        let (near, far) = try ByteChannel.pair()
        let bitmap = MigrationBitmap(place.memory, remembersSkipped: false)
        let sender = PageSender(
            memory: place.memory, told: bitmap.told, writer: FrameWriter(near, idleMilliseconds: 10_000), channel: near,
            bandwidth: Bandwidth(bytesPerSecond: 0))
        // Runs of all sorts: they begin within what was copied at once, and end there.
        var round = MigrationRound(number: 1)
        let drain = HostThread {
            let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 16, alignment: 16)
            defer { buffer.deallocate() }
            while (try? far.readSome(into: buffer, idleMilliseconds: 10_000)) != nil {}
        }
        for run in [0..<3, 3..<70, 70..<511, 511..<513, 513..<1000, 1000..<1024] { try sender.send(run, &round) }
        try sender.finishRound(1, &round)
        near.finishWriting()
        drain.join()
        #expect(round.sent == place.data.count && round.zero == 1024 - place.data.count)
        #expect(place.blocks == before)
    }

    @Test func checksumsFillNoHole() throws {
        let place = try Place(), before = place.blocks
        let sums = try #require(Verification.checksums(of: 0..<1024, in: place.memory))
        #expect(place.blocks == before)
        // The same as the same bytes in private memory have.
        let plain = try GuestMemory(ranges: [GuestRange(start: GuestAddress(0), size: 4 << 20)])
        for page in place.data { plain.poke([0x5a], at: UInt64(page) << pageShift) }
        #expect(sums == Verification.checksums(of: 0..<1024, in: plain))
        #expect(Verification.checksums(of: 1000..<1025, in: place.memory) == nil)
    }

    /// A page that the guest fills after the last look is seen by the next.
    @Test func eachRunIsLookedAtAnew() throws {
        let place = try Place(), looker = MemoryLooker(place.memory)
        func first(_ page: Int) -> UInt8? { looker.look(at: page, of: 600..<700)?.load(as: UInt8.self) }
        #expect(first(600) == 0)
        place.memory.poke([7], at: 650 << UInt64(pageShift))
        looker.refresh()
        #expect(first(650) == 7)
        #expect(looker.look(at: 700, of: 600..<700) == nil)
    }
}
