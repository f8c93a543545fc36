// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import KVM
import Migration
import Testing

@testable import Machine

@Suite struct DescriptionTests {
    private var cpuid: [CPUIDEntry] {
        [
            CPUIDEntry(function: 1, index: 0, flags: 0, eax: 1, ebx: 2, ecx: 0x10, edx: 0x20),
            CPUIDEntry(function: 7, index: 0, flags: 1, eax: 1, ebx: 0xff, ecx: 3, edx: 4),
            CPUIDEntry(function: 0x8000_0008, index: 0, flags: 0, eax: 48, ebx: 0, ecx: 0, edx: 0),
        ]
    }
    private var description: MachineDescription {
        MachineDescription(
            configuration: MachineConfiguration(memorySize: 1 << 30, vcpus: 2), virtioDevices: [5], cpuid: cpuid)
    }

    @Test func roundTrip() throws {
        let copy = try MachineDescription(decoding: description.encode())
        #expect(copy.configuration == description.configuration)
        #expect(copy.virtioDevices == [5] && copy.cpuid == cpuid)
    }

    /// A peer's bytes: cut short anywhere, longer, or with any byte changed, they throw or decode, and never trap.
    @Test func hostileDescriptions() throws {
        let good = description.encode()
        for length in 0..<good.count {
            #expect(throws: StateError.self) { try MachineDescription(decoding: Array(good[..<length])) }
        }
        #expect(throws: StateError.self) { try MachineDescription(decoding: good + [0]) }
        for position in good.indices {
            for value: UInt8 in [0, 1, 0x7f, 0x80, 0xff] {
                var bad = good
                bad[position] = value
                _ = try? MachineDescription(decoding: bad)
            }
        }
    }

    static let impossible: [(UInt64, Int)] = [
        (0, 1), (66_060_288, 1), (1_073_741_825, 1), (2_199_023_255_552, 1), (1_073_741_824, 0), (1_073_741_824, 9), (.max, 1),
    ]

    @Test(arguments: impossible)
    func impossibleMachinesAreRefused(size: UInt64, vcpus: Int) {
        let configuration = MachineConfiguration(memorySize: size, vcpus: vcpus)
        #expect(throws: MachineError.self) { try configuration.check() }
        let incoming = IncomingMachine(console: -1, memorySize: nil, vcpus: nil)
        var description = description
        description.configuration = MachineConfiguration(memorySize: size, vcpus: min(vcpus, 0xffff))
        #expect(throws: PartFailure.self) { try incoming.prepare(machineDescription: description.encode()) }
        #expect(incoming.machine == nil)
    }

    @Test func anotherMachineThanAllowedIsRefusedWithTheRemedy() {
        let memory = IncomingMachine(console: -1, memorySize: 512 << 20, vcpus: nil)
        let cpus = IncomingMachine(console: -1, memorySize: nil, vcpus: 4)
        do {
            _ = try memory.prepare(machineDescription: description.encode())
            Issue.record("accepted")
        } catch { #expect(error.what.contains("--memory 1024M")) }
        do {
            _ = try cpus.prepare(machineDescription: description.encode())
            Issue.record("accepted")
        } catch { #expect(error.what.contains("--cpus 2")) }
    }

    @Test func missingCPUFeaturesAreNamed() {
        #expect(CPUIDTemplate.missing(cpuid, in: cpuid) == nil)
        var less = cpuid
        less[1].ebx = 0xf0
        #expect(CPUIDTemplate.missing(cpuid, in: less)?.contains("0xf of CPUID leaf 0x7") == true)
        #expect(CPUIDTemplate.missing(cpuid, in: []) != nil)
        #expect(CPUIDTemplate.missing(less, in: cpuid) == nil)
    }

    @Test func eachVCPUHasItsOwnNumber() {
        for number in 0..<6 {
            let entries = CPUIDTemplate.entries(cpuid, vcpu: number, of: 6)
            #expect(entries[0].ebx >> 24 == UInt32(number))
            #expect(entries[0].ebx >> 16 & 0xff == 6)
            #expect(entries[2].ecx == 3 << 12 | 5)
        }
    }

    @Test func memoryLeavesTheHoleFree() {
        #expect(Layout.ram(size: 1 << 30).count == 1)
        let split = Layout.ram(size: 4 << 30)
        #expect(split.count == 2)
        #expect(split[0].start.rawValue + split[0].size == Layout.holeStart)
        #expect(split[1].start.rawValue == Layout.fourGiB && split[1].size == 1 << 30)
        #expect(Layout.virtioBase >= Layout.holeStart)
    }
}
