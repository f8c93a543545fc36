// SPDX-License-Identifier: Apache-2.0
import Testing

@testable import Machine

@Suite struct ACPITests {
    private func value(_ image: [UInt8], _ offset: Int, bytes: Int) -> UInt64 {
        var value: UInt64 = 0
        for byte in (0..<bytes).reversed() { value = value << 8 | UInt64(image[offset + byte]) }
        return value
    }

    /// Follows the pointers as a kernel does, and checks each table's signature, length and checksum.
    @Test(arguments: [(1, 1), (8, 1), (3, 6)])
    func everyTableIsReachableAndSumsToZero(vcpus: Int, devices: Int) throws {
        let image = ACPI.tables(vcpus: vcpus, virtioDevices: devices)
        #expect(image.starts(with: Array("RSD PTR ".utf8)))
        #expect(image[..<20].reduce(0, &+) == 0)
        #expect(image[..<36].reduce(0, &+) == 0)
        func table(at address: UInt64, _ signature: String) throws -> Int {
            let offset = Int(address - Layout.acpiTables)
            #expect(Array(image[offset..<offset + 4]) == Array(signature.utf8))
            let length = Int(value(image, offset + 4, bytes: 4))
            try #require(offset + length <= image.count)
            #expect(image[offset..<offset + length].reduce(0, &+) == 0, "checksum of \(signature)")
            return offset
        }
        let xsdt = try table(at: value(image, 24, bytes: 8), "XSDT")
        let fadt = try table(at: value(image, xsdt + 36, bytes: 8), "FACP")
        let madt = try table(at: value(image, xsdt + 44, bytes: 8), "APIC")
        #expect(value(image, fadt + 4, bytes: 4) == 276)
        let dsdt = try table(at: value(image, fadt + 140, bytes: 8), "DSDT")
        #expect(value(image, fadt + 40, bytes: 4) == value(image, fadt + 140, bytes: 8))
        // A LAPIC entry (type 0) for each vCPU; every entry's length leads exactly to the end.
        var position = madt + 44, processors = 0
        let end = madt + Int(value(image, madt + 4, bytes: 4))
        while position < end {
            if image[position] == 0 { processors += 1 }
            try #require(image[position + 1] > 0)
            position += Int(image[position + 1])
        }
        #expect(position == end)
        #expect(processors == vcpus)
        let aml = Array(image[dsdt..<dsdt + Int(value(image, dsdt + 4, bytes: 4))])
        #expect(aml.split(separator: Array("LNRO0005".utf8)).count == devices + 1)
    }
}
