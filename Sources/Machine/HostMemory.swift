// SPDX-License-Identifier: Apache-2.0
import Migration

/// What this host has, for a guest that wants to come.
enum HostMemory {
    /// Refuses a guest with more RAM than the host has memory and swap: it would find out when the source has stopped, or
    /// later. A guest that fits, but not beside what runs here now, is the operator's decision.
    static func check(canHold bytes: UInt64) throws(PartFailure) {
        let text: [UInt8]
        do { text = try readFile("/proc/meminfo", what: "this host's memory", remedy: "mount /proc") } catch {
            throw PartFailure("\(error)")
        }
        // A host that does not say how much it has is taken at the kernel's word when memory is mapped.
        guard let total = capacity(of: String(decoding: text, as: UTF8.self)), bytes > total else { return }
        throw PartFailure(
            "the guest has \(bytes >> 20) MiB of memory and the destination's host \(total >> 20) MiB, swap included; choose a larger host")
    }

    /// Memory and swap in bytes, from the text of /proc/meminfo (proc(5)); nil if the memory is not in it.
    static func capacity(of meminfo: String) -> UInt64? {
        func kibibytes(_ name: String) -> UInt64? {
            for line in meminfo.split(separator: "\n") where line.hasPrefix(name + ":") {
                return line.split(separator: " ").dropFirst().first.flatMap { UInt64($0) }
            }
            return nil
        }
        guard let memory = kibibytes("MemTotal") else { return nil }
        let (sum, overflow) = memory.addingReportingOverflow(kibibytes("SwapTotal") ?? 0)
        return overflow || sum > .max >> 10 ? nil : sum << 10
    }
}
