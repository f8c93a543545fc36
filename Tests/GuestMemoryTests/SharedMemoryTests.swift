// SPDX-License-Identifier: Apache-2.0
import CLinux
@testable import GuestMemory
import TestSupport
import Testing

@Suite struct SharedMemoryTests {
    /// A file in memory, and this test's own view of it.
    final class File {
        let descriptor: Int32
        let bytes: UnsafeMutableRawBufferPointer
        init(_ size: Int, fill: UInt8 = 0, name: String = "test") {
            descriptor = lacuna_memfd(name)
            precondition(descriptor >= 0 && ftruncate(descriptor, off_t(size)) == 0)
            bytes = UnsafeMutableRawBufferPointer(
                start: lacuna_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0), count: size)
            if fill != 0 { memset(bytes.baseAddress!, Int32(fill), size) }
        }
        deinit {
            munmap(bytes.baseAddress!, bytes.count)
            close(descriptor)
        }
        /// Bytes of memory that the file takes.
        var populated: Int {
            var information = stat()
            precondition(fstat(descriptor, &information) == 0)
            return Int(information.st_blocks) * 512
        }
        func mapping(_ start: UInt64, _ size: UInt64, offset: UInt64 = 0) -> SharedMapping {
            SharedMapping(
                range: GuestRange(start: GuestAddress(start), size: size), descriptor: descriptor, offset: offset)
        }
    }

    @Test func bothSidesSeeTheSameBytes() throws {
        let low = File(8 << 20), high = File(4 << 20)
        // In any order, with a hole, at an offset.
        let memory = try GuestMemory(
            sharing: [high.mapping(16 << 20, 2 << 20, offset: 1 << 20), low.mapping(0, 8 << 20)], limit: 1 << 30)
        #expect(memory.regions.map(\.range.start.rawValue) == [0, 16 << 20])
        #expect(memory.ramPages == 10 << 8 && memory.frameCount == 18 << 8)
        try memory.store(UInt32(0x0403_0201), at: GuestAddress(16 << 20 + 4096))
        #expect(Array(high.bytes[(1 << 20 + 4096)..<(1 << 20 + 4100)]) == [1, 2, 3, 4])
        low.bytes[77] = 9
        #expect(try memory.load(GuestAddress(77), as: UInt8.self) == 9)
        #expect(throws: GuestMemoryError.self) { try memory.store(UInt8(1), at: GuestAddress(8 << 20)) }
    }

    @Test func discardMakesHoles() throws {
        let file = File(4 << 20, fill: 0xaa)
        let memory = try GuestMemory(sharing: [file.mapping(1 << 20, 2 << 20, offset: 1 << 20)], limit: 1 << 30)
        let before = file.populated
        try memory.discard(pages: 256 + 16..<256 + 32)
        #expect(before - file.populated == 16 * 4096)
        let base = 1 << 20
        #expect(file.bytes[base + 16 * 4096 - 1] == 0xaa && file.bytes[base + 16 * 4096] == 0)
        #expect(file.bytes[base + 32 * 4096 - 1] == 0 && file.bytes[base + 32 * 4096] == 0xaa)
        #expect(throws: GuestMemoryError.self) { try memory.discard(pages: 255..<257) }
    }

    /// Before Linux 6.0 a hole of less than a huge page changes nothing and says nothing.
    @Test func holesAreWholePages() {
        let huge: UInt64 = 2 << 20, page: UInt64 = 4096
        #expect(SharedFile.wholePages(of: 3 * page..<9 * page, granule: page) == 3 * page..<9 * page)
        #expect(SharedFile.wholePages(of: huge..<3 * huge, granule: huge) == huge..<3 * huge)
        #expect(SharedFile.wholePages(of: huge - page..<3 * huge + page, granule: huge) == huge..<3 * huge)
        #expect(SharedFile.wholePages(of: page..<2 * huge, granule: huge) == huge..<2 * huge)
        #expect(SharedFile.wholePages(of: 0..<2 * huge - page, granule: huge) == 0..<huge)
        for nothing in [0..<huge - page, page..<huge, page..<2 * huge - page, huge..<huge] {
            #expect(SharedFile.wholePages(of: nothing, granule: huge).isEmpty)
        }
    }

    @Test func privateMappingsLeaveTheFileAlone() throws {
        let file = File(2 << 20, fill: 0x55)
        let memory = try GuestMemory(restoring: [file.mapping(0, 1 << 20, offset: 1 << 20)])
        #expect(try memory.load(GuestAddress(8192), as: UInt8.self) == 0x55)
        try memory.store(UInt8(1), at: GuestAddress(8192))
        #expect(try memory.load(GuestAddress(8192), as: UInt8.self) == 1 && file.bytes[1 << 20 + 8192] == 0x55)
        // Discarded means zero (rule W6), not what the file says; before and after a write.
        try memory.discard(pages: 2..<4)
        #expect(try memory.load(GuestAddress(8192), as: UInt16.self) == 0)
        #expect(try memory.load(GuestAddress(3 * 4096 + 5), as: UInt16.self) == 0)
        #expect(try memory.load(GuestAddress(4 * 4096), as: UInt8.self) == 0x55)
        #expect(file.bytes[1 << 20 + 8192] == 0x55)
    }

    @Test func badMappings() {
        let file = File(1 << 20)
        var pipes: [Int32] = [0, 0]
        #expect(pipe(&pipes) == 0)
        defer { pipes.forEach { close($0) } }
        let pipe = SharedMapping(
            range: GuestRange(start: GuestAddress(0), size: 4096), descriptor: pipes[0], offset: 0)
        let none = SharedMapping(range: pipe.range, descriptor: -1, offset: 0)
        let lists: [[SharedMapping]] = [
            [], [pipe], [none], [file.mapping(0, 0)], [file.mapping(0, 100)], [file.mapping(1, 4096)],
            [file.mapping(0, 4096, offset: 1)], [file.mapping(0, 2 << 20)], [file.mapping(0, 4096, offset: 1 << 20)],
            [file.mapping(0, 4096, offset: .max - 4095)], [file.mapping(0, 1 << 20, offset: 4096)],
            [file.mapping(0, 8192), file.mapping(4096, 4096)], [file.mapping(0, 4096), file.mapping(0, 4096)],
            [file.mapping(1 << 30, 4096)], [file.mapping(.max & ~4095, 4096)], [file.mapping(0, .max & ~4095)],
        ]
        for (index, list) in lists.enumerated() {
            #expect(throws: GuestMemoryError.self, "\(index)") { _ = try GuestMemory(sharing: list, limit: 1 << 30) }
        }
    }

    @Test func nothingLeaksAndTheCallersDescriptorStays() throws {
        // By name, since other tests open and close files meanwhile.
        let file = File(1 << 20, name: "lacuna-leaks")
        for _ in 0..<2000 {
            let memory = try GuestMemory(sharing: [file.mapping(0, 1 << 19), file.mapping(1 << 20, 4096)], limit: 1 << 30)
            memory.setSharedLog(try SharedDirtyLog(descriptor: file.descriptor, offset: 0, bytes: 4096))
        }
        #expect(openDescriptors(to: "/memfd:lacuna-leaks (deleted)") == 1)
        #expect(lacuna_fcntl_getfl(file.descriptor) >= 0)
    }

    @Test func writesGoIntoTheSharedLog() throws {
        let file = File(16 << 20), log = File(8192)
        let memory = try GuestMemory(sharing: [file.mapping(0, 16 << 20)], limit: 1 << 30)
        try memory.store(UInt8(1), at: GuestAddress(0))
        memory.setSharedLog(try SharedDirtyLog(descriptor: log.descriptor, offset: 4096, bytes: 100))
        try memory.store(UInt64(1), at: GuestAddress(9 * 4096 - 4))
        try memory.storeRelease16(1, at: GuestAddress(799 * 4096))
        // The log has 800 bits; what is beyond is left out, not written behind it.
        try memory.store(UInt8(1), at: GuestAddress(800 * 4096))
        try memory.store(UInt8(1), at: GuestAddress(1000 * 4096))
        let set = (0..<4096 * 8).filter { log.bytes[4096 + $0 / 8] >> UInt8($0 % 8) & 1 == 1 }
        #expect(set == [8, 9, 799])
        #expect(memory.writeLog.population == 6)
        memory.setSharedLog(nil)
        try memory.store(UInt8(1), at: GuestAddress(5 * 4096))
        #expect(log.bytes[4096] == 0)
        #expect(throws: GuestMemoryError.self) {
            _ = try SharedDirtyLog(descriptor: log.descriptor, offset: 4096, bytes: 4097)
        }
    }

    @Test func aFileCutShortCostsNothingButItsBytes() throws {
        SharedFile.survivesTruncation()
        let file = File(4 << 20, fill: 0x11)
        let memory = try GuestMemory(sharing: [file.mapping(0, 4 << 20)], limit: 1 << 30)
        #expect(ftruncate(file.descriptor, 1 << 20) == 0)
        #expect(try memory.load(GuestAddress(4096), as: UInt8.self) == 0x11 && !memory.wasCutShort)
        #expect(try memory.load(GuestAddress(2 << 20), as: UInt8.self) == 0)
        try memory.store(UInt32(7), at: GuestAddress(3 << 20))
        #expect(try memory.load(GuestAddress(3 << 20), as: UInt32.self) == 7)
        #expect(memory.wasCutShort)
    }
}
