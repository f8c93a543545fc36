// SPDX-License-Identifier: Apache-2.0
internal import CLinux
import KVM

/// The CPUID tables of a machine: what KVM offers, with each vCPU's own numbers filled in (Intel SDM volume 2 "CPUID",
/// AMD APM volume 3 appendix E).
enum CPUIDTemplate {
    /// What all vCPUs share; travels with a migration, so that the guest keeps the CPU it booted on.
    static func make(_ system: System) throws(KVMError) -> [CPUIDEntry] {
        var entries = try system.supportedCPUID()
        let hasDeadlineTimer = system.check(.tscDeadlineTimer) > 0
        for n in entries.indices {
            switch entries[n].function {
            case 0x1:
                entries[n].ecx |= 1 << 31 // a hypervisor is present
                entries[n].ecx &= ~(1 << 5) // no VMX: nested state is not migrated
                if hasDeadlineTimer { entries[n].ecx |= 1 << 24 }
            case 0x8000_0001: entries[n].ecx &= ~(1 << 2) // no SVM, likewise
            default: break
            }
        }
        return entries
    }

    /// The tables of vCPU `number` of `count`: one socket, a core for each vCPU, no hyper-threads. The APIC id is the
    /// vCPU's number.
    static func entries(_ template: [CPUIDEntry], vcpu number: Int, of count: Int) -> [CPUIDEntry] {
        let id = UInt32(number), cores = UInt32(count)
        let bits = UInt32(count <= 1 ? 0 : Int.bitWidth - (count - 1).leadingZeroBitCount)
        return template.map { entry in
            var entry = entry
            switch entry.function {
            case 0x1:
                entry.ebx = entry.ebx & 0x0000_ffff | cores << 16 | id << 24
                entry.edx = count > 1 ? entry.edx | 1 << 28 : entry.edx & ~(1 << 28)
            case 0x4:
                if entry.eax & 0x1f != 0 { entry.eax = entry.eax & 0x3fff | (cores - 1) << 26 }
            case 0xb, 0x1f:
                entry.edx = id
                switch entry.index {
                case 0: (entry.eax, entry.ebx, entry.ecx) = (0, 1, 0x100)
                case 1: (entry.eax, entry.ebx, entry.ecx) = (bits, cores, 0x201)
                default: (entry.eax, entry.ebx, entry.ecx) = (0, 0, entry.index)
                }
            case 0x8000_0008: entry.ecx = bits << 12 | (cores - 1)
            case 0x8000_001e: (entry.eax, entry.ebx, entry.ecx) = (id, id, 0)
            default: break
            }
            return entry
        }
    }

    /// The features that `wanted` (a migrating guest's) has and `offered` (this host's) lacks, for the operator; nil if
    /// there is none.
    static func missing(_ wanted: [CPUIDEntry], in offered: [CPUIDEntry]) -> String? {
        // Leaves that are masks of features, and which of their registers are.
        let leaves: [(function: UInt32, index: UInt32, registers: [KeyPath<CPUIDEntry, UInt32>])] = [
            (0x1, 0, [\.ecx, \.edx]), (0x7, 0, [\.ebx, \.ecx, \.edx]), (0x7, 1, [\.eax]), (0xd, 0, [\.eax, \.edx]),
            (0xd, 1, [\.eax]), (0x8000_0001, 0, [\.ecx, \.edx]), (0x8000_0008, 0, [\.ebx]), (0x4000_0001, 0, [\.eax]),
        ]
        for leaf in leaves {
            guard let want = wanted.first(where: { $0.function == leaf.function && $0.index == leaf.index }) else { continue }
            let have = offered.first { $0.function == leaf.function && $0.index == leaf.index }
            for register in leaf.registers {
                let lacking = want[keyPath: register] & ~(have?[keyPath: register] ?? 0)
                if lacking != 0 {
                    return "bits 0x\(String(lacking, radix: 16)) of CPUID leaf 0x\(String(leaf.function, radix: 16))"
                }
            }
        }
        return nil
    }
}
