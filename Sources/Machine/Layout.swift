// SPDX-License-Identifier: Apache-2.0
import GuestMemory

/// Where things are in the guest's physical address space.
enum Layout {
    /// RAM below 4 GiB ends here at the latest: 3 GiB.
    static let holeStart: UInt64 = 0xc000_0000
    static let fourGiB: UInt64 = 0x1_0000_0000

    // Below 1 MiB. Free for the kernel once it has started, except for the ACPI tables.
    static let gdt: UInt64 = 0x500
    static let bootParameters: UInt64 = 0x7000
    static let pageTables: UInt64 = 0x9000
    static let commandLine: UInt64 = 0x2_0000
    /// Conventional memory ends here (0x9fc00): the last KiB is the extended BIOS data area by custom.
    static let lowMemoryEnd: UInt64 = 0x9_fc00
    /// The kernel looks for nothing here unasked; boot parameters point at the RSDP.
    static let acpiTables: UInt64 = 0xf_0000
    static let acpiTablesSize: UInt64 = 0x1_0000

    /// Page frames below 1 MiB that the kernel is not told of as RAM.
    static let firmwarePages = 0x9f..<0x100

    static let virtioBase: UInt64 = 0xd000_0000
    /// Each virtio-mmio device has a page, though its registers fill only 0x200 bytes.
    static let virtioStride: UInt64 = 0x1000
    static let virtioRegisters: UInt64 = 0x200
    /// The first global system interrupt of the virtio devices: past the 16 legacy ones, below the IOAPIC's 24.
    static let virtioLine: UInt32 = 16
    static let ioapic: UInt64 = 0xfec0_0000
    static let lapic: UInt64 = 0xfee0_0000

    static let serialPort: UInt16 = 0x3f8
    static let serialLine: UInt32 = 4
    static let powerEvents: UInt16 = 0x600
    static let powerControl: UInt16 = 0x604
    static let resetPort: UInt16 = 0x608
    static let resetValue: UInt8 = 0x01
    /// The value of SLP_TYP that \_S5 announces for "off".
    static let sleepTypeOff: UInt16 = 5
    static let systemControlLine: UInt32 = 9

    /// RAM of `size` bytes: below the hole, and the rest from 4 GiB on.
    static func ram(size: UInt64) -> [GuestRange] {
        if size <= holeStart { return [GuestRange(start: GuestAddress(0), size: size)] }
        return [
            GuestRange(start: GuestAddress(0), size: holeStart),
            GuestRange(start: GuestAddress(fourGiB), size: size - holeStart),
        ]
    }
}
