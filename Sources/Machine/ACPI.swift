// SPDX-License-Identifier: Apache-2.0

/// The ACPI tables (specification 6.5, chapters 5 and 20) from which an unmodified kernel finds its CPUs, interrupt
/// controllers, virtio-mmio devices, the serial port and the registers for power-off and reset.
enum ACPI {
    /// All tables, to be placed at `Layout.acpiTables`; the RSDP comes first.
    static func tables(vcpus: Int, virtioDevices: Int) -> [UInt8] {
        let base = Layout.acpiTables
        var image = [UInt8](repeating: 0, count: 64) // the RSDP's place, filled in last
        func place(_ table: [UInt8]) -> UInt64 {
            while image.count % 64 != 0 { image.append(0) }
            defer { image += table }
            return base + UInt64(image.count)
        }
        let facs = place(facs())
        let dsdt = place(table("DSDT", revision: 2, differentiatedDescription(virtioDevices: virtioDevices)))
        let fadt = place(table("FACP", revision: 6, fixedDescription(facs: facs, dsdt: dsdt)))
        let madt = place(table("APIC", revision: 5, interruptControllers(vcpus: vcpus)))
        let xsdt = place(table("XSDT", revision: 1, little(fadt) + little(madt)))

        var rsdp = Array("RSD PTR ".utf8) + [0] + oem + [2] + little(UInt32(0)) + little(UInt32(36)) + little(xsdt) + [0, 0, 0, 0]
        rsdp[8] = checksum(rsdp[..<20])
        rsdp[32] = checksum(rsdp[...])
        image.replaceSubrange(0..<rsdp.count, with: rsdp)
        precondition(image.count <= Int(Layout.acpiTablesSize))
        return image
    }

    private static let oem = Array("LACUNA".utf8)

    private static func little<Value: FixedWidthInteger>(_ value: Value) -> [UInt8] {
        withUnsafeBytes(of: value.littleEndian) { Array($0) }
    }

    /// The byte that makes the sum of all bytes zero.
    private static func checksum(_ bytes: ArraySlice<UInt8>) -> UInt8 { 0 &- bytes.reduce(0, &+) }

    private static func table(_ signature: String, revision: UInt8, _ body: [UInt8]) -> [UInt8] {
        var bytes = Array(signature.utf8) + little(UInt32(36 + body.count)) + [revision, 0] + oem
        bytes += Array("LACUNAVM".utf8) + little(UInt32(1)) + Array("LACU".utf8) + little(UInt32(1)) + body
        bytes[9] = checksum(bytes[...])
        return bytes
    }

    private static func facs() -> [UInt8] {
        var bytes = Array("FACS".utf8) + little(UInt32(64)) + [UInt8](repeating: 0, count: 56)
        bytes[32] = 2 // version
        return bytes
    }

    /// Generic address structure of a port (5.2.3.2).
    private static func port(_ port: UInt16, bits: UInt8) -> [UInt8] { [1, bits, 0, bits / 8] + little(UInt64(port)) }

    /// FADT (5.2.9). Offsets below count from the start of the table, header included, as the specification's do.
    private static func fixedDescription(facs: UInt64, dsdt: UInt64) -> [UInt8] {
        var body = [UInt8](repeating: 0, count: 276 - 36)
        func put(_ bytes: [UInt8], _ offset: Int) { body.replaceSubrange(offset - 36..<offset - 36 + bytes.count, with: bytes) }
        put(little(UInt32(facs)), 36)
        put(little(UInt32(dsdt)), 40)
        put(little(UInt16(Layout.systemControlLine)), 46)
        // SMI_CMD stays 0: the machine is always in ACPI mode.
        put(little(UInt32(Layout.powerEvents)), 56)
        put(little(UInt32(Layout.powerControl)), 64)
        put([4], 88) // PM1_EVT_LEN
        put([2], 89) // PM1_CNT_LEN
        put(little(UInt16(0xffff)), 96) // no C2
        put(little(UInt16(0xffff)), 98) // no C3
        put(little(UInt16(1 << 0 | 1 << 2 | 1 << 5)), 109) // legacy serial port; no VGA; no CMOS clock; no 8042
        // WBINVD works; C1 works; no fixed sleep button; the reset register is there.
        put(little(UInt32(1 << 0 | 1 << 2 | 1 << 5 | 1 << 10)), 112)
        put(port(Layout.resetPort, bits: 8), 116)
        put([Layout.resetValue], 128)
        put([5], 131) // minor version
        put(little(dsdt), 140)
        put(port(Layout.powerEvents, bits: 32), 148)
        put(port(Layout.powerControl, bits: 16), 172)
        return body
    }

    /// MADT (5.2.12).
    private static func interruptControllers(vcpus: Int) -> [UInt8] {
        var body = little(UInt32(Layout.lapic)) + little(UInt32(1)) // PC-AT compatible: there are two 8259s to mask
        for cpu in 0..<UInt8(vcpus) { body += [0, 8, cpu, cpu] + little(UInt32(1)) }
        body += [1, 12, UInt8(vcpus), 0] + little(UInt32(Layout.ioapic)) + little(UInt32(0))
        // The SCI is level triggered and active high.
        body += [2, 10, 0, UInt8(Layout.systemControlLine)] + little(Layout.systemControlLine) + little(UInt16(0x0d))
        body += [4, 6, 0xff] + little(UInt16(0)) + [1] // NMI is LINT1 of every LAPIC
        return body
    }

    // MARK: AML (20.2)

    /// A package length counts itself too.
    private static func package(_ contents: [UInt8]) -> [UInt8] {
        if contents.count + 1 < 64 { return [UInt8(contents.count + 1)] + contents }
        let length = contents.count + 2
        precondition(length < 1 << 12)
        return [0x40 | UInt8(length & 0xf), UInt8(length >> 4)] + contents
    }
    private static func name(_ name: String, _ value: [UInt8]) -> [UInt8] { [0x08] + Array(name.utf8) + value }
    private static func text(_ text: String) -> [UInt8] { [0x0d] + Array(text.utf8) + [0] }
    private static func byte(_ value: UInt8) -> [UInt8] { [0x0a, value] }
    private static func buffer(_ bytes: [UInt8]) -> [UInt8] { [0x11] + package(byte(UInt8(bytes.count)) + bytes) }
    private static func device(_ name: String, _ contents: [UInt8]) -> [UInt8] {
        [0x5b, 0x82] + package(Array(name.utf8) + contents)
    }
    private static let endTag: [UInt8] = [0x79, 0]

    private static func differentiatedDescription(virtioDevices: Int) -> [UInt8] {
        let off = byte(UInt8(Layout.sleepTypeOff))
        let sleep = name("_S5_", [0x12] + package([4] + off + off + [0, 0]))
        var devices = device(
            "COM1",
            name("_HID", [0x0c, 0x41, 0xd0, 0x05, 0x01]) // EISA id PNP0501
                + name("_UID", byte(1))
                + name(
                    "_CRS",
                    buffer(
                        [0x47, 1] + little(Layout.serialPort) + little(Layout.serialPort) + [1, 8]
                            + [0x22] + little(UInt16(1) << UInt16(Layout.serialLine)) + endTag)))
        for index in 0..<virtioDevices {
            let address = UInt32(Layout.virtioBase + UInt64(index) * Layout.virtioStride)
            let memory: [UInt8] = [0x86, 9, 0, 1] + little(address) + little(UInt32(Layout.virtioRegisters))
            // Consumer, edge triggered, active high, exclusive: one interrupt.
            let interrupt: [UInt8] = [0x89, 6, 0, 0x03, 1] + little(Layout.virtioLine + UInt32(index))
            devices += device(
                "VIO\(index)",
                name("_HID", text("LNRO0005")) + name("_UID", byte(UInt8(index)))
                    + name("_CRS", buffer(memory + interrupt + endTag)))
        }
        return sleep + [0x10] + package(Array("\\_SB_".utf8) + devices)
    }
}
