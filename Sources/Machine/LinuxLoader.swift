// SPDX-License-Identifier: Apache-2.0
internal import CLinux
import GuestMemory
import KVM

/// Loads an unmodified bzImage and its initramfs, and sets a vCPU up to enter it by the 64-bit boot protocol
/// (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
struct LinuxLoader {
    let memory: GuestMemory
    let vcpus: Int
    let virtioDevices: Int

    /// Returns the guest-physical address of the 64-bit entry point.
    func load(kernel path: String, initramfs: String?, commandLine: String) throws(MachineError) -> UInt64 {
        let remedy = "give a Linux bzImage, such as /boot/vmlinuz-…, with --kernel"
        let image = try readFile(path, what: "the kernel", remedy: remedy)
        func field<Value: FixedWidthInteger>(_ offset: Int, _ type: Value.Type) -> Value {
            image.withUnsafeBytes { $0.loadUnaligned(fromByteOffset: offset, as: Value.self) }
        }
        guard image.count > 0x1000, field(0x202, UInt32.self) == 0x5372_6448 else { // "HdrS"
            throw MachineError("\(path) is not a Linux bzImage; \(remedy)")
        }
        guard field(0x206, UInt16.self) >= 0x020c, field(0x236, UInt16.self) & 1 == 1 else {
            throw MachineError("the kernel \(path) has no 64-bit entry point; give an x86-64 kernel with --kernel")
        }
        let setupSectors = image[0x1f1] == 0 ? 4 : Int(image[0x1f1])
        let protectedMode = (setupSectors + 1) * 512
        guard protectedMode < image.count else { throw MachineError("the kernel \(path) is cut short; \(remedy)") }
        let lowSize = memory.regions[0].range.size
        let loadAddress = field(0x258, UInt64.self)
        let kernelSize = max(UInt64(field(0x260, UInt32.self)), UInt64(image.count - protectedMode))
        guard loadAddress >= 0x10_0000, loadAddress < 1 << 32, kernelSize < 1 << 32, loadAddress + kernelSize < lowSize else {
            throw MachineError(
                "the kernel needs \((loadAddress &+ kernelSize) >> 20) MiB to unpack itself and the guest has \(lowSize >> 20) MiB below 4 GiB; give it more with --memory")
        }
        try put(Array(image[protectedMode...]), at: loadAddress)

        var parameters = [UInt8](repeating: 0, count: 4096)
        func set<Value: FixedWidthInteger>(_ value: Value, _ offset: Int) {
            parameters.withUnsafeMutableBytes { $0.storeBytes(of: value.littleEndian, toByteOffset: offset, as: Value.self) }
        }
        let headerEnd = min(0x202 + Int(image[0x201]), 0x290)
        parameters.replaceSubrange(0x1f1..<headerEnd, with: image[0x1f1..<headerEnd])
        set(UInt8(0xff), 0x210) // a loader without an assigned number
        set(parameters[0x211] | 1, 0x211) // loaded high

        let limit = Int(field(0x238, UInt32.self))
        let line = Array(commandLine.utf8)
        guard line.count < min(limit, 4096), !line.contains(0) else {
            throw MachineError("the kernel command line has \(line.count) bytes and this kernel takes \(min(limit, 4095)); shorten --cmdline")
        }
        try put(line + [0], at: Layout.commandLine)
        set(UInt32(Layout.commandLine), 0x228)

        if let initramfs {
            let archive = try readFile(initramfs, what: "the initramfs", remedy: "check --initramfs")
            guard !archive.isEmpty else { throw MachineError("the initramfs \(initramfs) is empty; check --initramfs") }
            let top = min(lowSize, UInt64(field(0x22c, UInt32.self)) + 1)
            let room = top > loadAddress + kernelSize ? top - (loadAddress + kernelSize) : 0
            guard UInt64(archive.count) + 4096 <= room else {
                throw MachineError("the initramfs has \(archive.count >> 20) MiB and \(room >> 20) MiB are left beside the kernel; give the guest more with --memory")
            }
            let address = (top - UInt64(archive.count)) & ~0xfff
            try put(archive, at: address)
            set(UInt32(address), 0x218)
            set(UInt32(archive.count), 0x21c)
        }

        var map: [(start: UInt64, end: UInt64, type: UInt32)] = [
            (0, Layout.lowMemoryEnd, 1),
            (Layout.lowMemoryEnd, 0xa_0000, 2),
            (Layout.acpiTables, Layout.acpiTables + Layout.acpiTablesSize, 2),
            (0x10_0000, lowSize, 1),
        ]
        for region in memory.regions.dropFirst() {
            map.append((region.range.start.rawValue, region.range.start.rawValue + region.range.size, 1))
        }
        set(UInt8(map.count), 0x1e8)
        for (n, entry) in map.enumerated() {
            set(entry.start, 0x2d0 + 20 * n)
            set(entry.end - entry.start, 0x2d0 + 20 * n + 8)
            set(entry.type, 0x2d0 + 20 * n + 16)
        }
        set(Layout.acpiTables, 0x070)
        try put(parameters, at: Layout.bootParameters)
        try put(ACPI.tables(vcpus: vcpus, virtioDevices: virtioDevices), at: Layout.acpiTables)
        try putTables()
        return loadAddress + 0x200
    }

    /// A flat GDT and an identity map of the first 4 GiB in 2 MiB pages: what the 64-bit entry asks for.
    private func putTables() throws(MachineError) {
        func words(_ values: [UInt64]) -> [UInt8] { values.flatMap { value in withUnsafeBytes(of: value.littleEndian) { Array($0) } } }
        try put(words([0, 0, 0x00af_9a00_0000_ffff, 0x00cf_9200_0000_ffff]), at: Layout.gdt)
        let top = Layout.pageTables, directories = top + 0x1000, first = top + 0x2000
        try put(words([directories | 3]), at: top)
        try put(words((0..<4).map { (first + $0 * 0x1000) | 3 }), at: directories)
        try put(words((0..<2048).map { $0 << 21 | 0x83 }), at: first)
    }

    private func put(_ bytes: [UInt8], at address: UInt64) throws(MachineError) {
        let result: Result<Void, GuestMemoryError> = bytes.withUnsafeBytes { buffer in
            do throws(GuestMemoryError) { return .success(try memory.write(buffer, at: GuestAddress(address))) } catch {
                return .failure(error)
            }
        }
        do { try result.get() } catch { throw MachineError("\(error); give the guest more with --memory") }
    }

    /// Long mode with paging on, as the boot protocol wants it: flat segments, interrupts off, RSI at the parameters.
    func enter(_ vcpu: VCPU, at entry: UInt64) throws(KVMError) {
        var special = try vcpu.specialRegisters()
        func segment(_ selector: UInt16, type: UInt8, long: UInt8) -> kvm_segment {
            var segment = kvm_segment()
            segment.selector = selector
            segment.limit = 0xffff_ffff
            segment.type = type
            segment.present = 1
            segment.s = 1
            segment.g = 1
            segment.l = long
            segment.db = long == 1 ? 0 : 1
            return segment
        }
        special.cs = segment(0x10, type: 0xb, long: 1)
        let data = segment(0x18, type: 0x3, long: 0)
        special.ds = data
        special.es = data
        special.fs = data
        special.gs = data
        special.ss = data
        special.gdt.base = Layout.gdt
        special.gdt.limit = 31
        special.idt.base = 0
        special.idt.limit = 0
        special.cr3 = Layout.pageTables
        special.cr4 |= 1 << 5 // PAE
        special.cr0 |= 1 << 31 | 1 // paging, protected mode
        special.efer |= 1 << 8 | 1 << 10 // long mode enabled and active
        try vcpu.set(special)
        var registers = kvm_regs()
        registers.rip = entry
        registers.rsi = Layout.bootParameters
        registers.rflags = 2
        try vcpu.set(registers)
    }
}
