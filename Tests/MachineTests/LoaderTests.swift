// SPDX-License-Identifier: Apache-2.0
import CLinux
import GuestMemory
import Testing

@testable import Machine

/// A made-up bzImage header: enough to reach each check of the loader.
@Suite struct LoaderTests {
    private func image(_ change: (inout [UInt8]) -> Void = { _ in }) -> [UInt8] {
        var bytes = [UInt8](repeating: 0x90, count: 0x4000)
        func put(_ value: UInt64, _ offset: Int, _ size: Int) {
            for byte in 0..<size { bytes[offset + byte] = UInt8(truncatingIfNeeded: value >> UInt64(8 * byte)) }
        }
        put(4, 0x1f1, 1)
        put(0x6a, 0x201, 1)
        put(0x5372_6448, 0x202, 4)
        put(0x020f, 0x206, 2)
        put(0x7fff_ffff, 0x22c, 4)
        put(1, 0x236, 2)
        put(2047, 0x238, 4)
        put(0x100_0000, 0x258, 8)
        put(0x10_0000, 0x260, 4)
        change(&bytes)
        return bytes
    }
    private func file(_ bytes: [UInt8]) throws -> String {
        var name = Array("/tmp/lacuna-loader-XXXXXX".utf8CString)
        let descriptor = mkstemp(&name)
        try #require(descriptor >= 0)
        #expect(write(descriptor, bytes, bytes.count) == bytes.count)
        close(descriptor)
        return name.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
    }
    private func load(_ bytes: [UInt8], initramfs: [UInt8]? = nil, line: String = "x", size: UInt64 = 64 << 20) throws
        -> (memory: GuestMemory, entry: UInt64)
    {
        let memory = try GuestMemory(ranges: Layout.ram(size: size))
        let loader = LinuxLoader(memory: memory, vcpus: 1, virtioDevices: 1)
        let kernel = try file(bytes)
        let archive = try initramfs.map { try file($0) }
        defer {
            unlink(kernel)
            if let archive { unlink(archive) }
        }
        let entry = try loader.load(kernel: kernel, initramfs: archive, commandLine: line)
        return (memory, entry)
    }
    private func complaint(_ body: () throws -> Void) -> String {
        do { try body() } catch { return "\(error)" }
        return ""
    }

    @Test func placesKernelParametersAndInitramfs() throws {
        let (memory, entry) = try load(image(), initramfs: [1, 2, 3], line: "console=ttyS0")
        #expect(entry == 0x100_0200)
        let parameters = Layout.bootParameters
        #expect(try memory.load(GuestAddress(parameters + 0x202), as: UInt32.self) == 0x5372_6448)
        #expect(try memory.load(GuestAddress(parameters + 0x70), as: UInt64.self) == Layout.acpiTables)
        #expect(try memory.load(GuestAddress(parameters + 0x21c), as: UInt32.self) == 3)
        let address = try memory.load(GuestAddress(parameters + 0x218), as: UInt32.self)
        #expect(try memory.load(GuestAddress(UInt64(address)), as: UInt16.self) == 0x0201)
        #expect(try memory.load(GuestAddress(parameters + 0x1e8), as: UInt8.self) == 4)
        #expect(try memory.load(GuestAddress(0x100_0000), as: UInt8.self) == 0x90)
    }

    @Test func whatIsNoKernelIsRefusedWithTheRemedy() {
        #expect(complaint { _ = try load([]) }.contains("--kernel"))
        #expect(complaint { _ = try load([UInt8](repeating: 0, count: 0x4000)) }.contains("bzImage"))
        #expect(complaint { _ = try load(image { $0[0x236] = 0 }) }.contains("64-bit"))
        #expect(complaint { _ = try load(image { $0[0x1f1] = 255 }) }.contains("cut short"))
        #expect(complaint { _ = try load(image { for n in 0x258..<0x260 { $0[n] = 0xff } }) }.contains("--memory"))
        #expect(complaint { _ = try load(image { for n in 0x260..<0x264 { $0[n] = 0xff } }) }.contains("--memory"))
        #expect(complaint { _ = try load(image(), line: String(repeating: "x", count: 5000)) }.contains("--cmdline"))
        #expect(complaint { _ = try load(image(), initramfs: []) }.contains("--initramfs"))
        #expect(complaint { _ = try load(image(), initramfs: [UInt8](repeating: 0, count: 60 << 20)) }.contains("--memory"))
    }

    /// Any byte of the header may be anything: an error or a load, never a trap.
    @Test func hostileHeaders() {
        for offset in 0x1f1..<0x268 {
            for value: UInt8 in [0, 0x7f, 0x80, 0xff] { _ = complaint { _ = try load(image { $0[offset] = value }) } }
        }
    }
}
