// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// One entry of a CPUID table: what the guest's CPUID instruction returns for a leaf and subleaf.
public struct CPUIDEntry: Equatable, Sendable {
    public var function, index, flags: UInt32
    public var eax, ebx, ecx, edx: UInt32
    public init(function: UInt32, index: UInt32, flags: UInt32, eax: UInt32, ebx: UInt32, ecx: UInt32, edx: UInt32) {
        self.function = function
        self.index = index
        self.flags = flags
        self.eax = eax
        self.ebx = ebx
        self.ecx = ecx
        self.edx = edx
    }
}

/// Capabilities this project asks about (`KVM_CAP_*` of <linux/kvm.h>).
public struct Capability: RawRepresentable, Sendable {
    public let rawValue: Int32
    public init(rawValue: Int32) { self.rawValue = rawValue }
    public static let immediateExit = Capability(rawValue: KVM_CAP_IMMEDIATE_EXIT)
    public static let xsave2 = Capability(rawValue: KVM_CAP_XSAVE2)
    public static let tscDeadlineTimer = Capability(rawValue: KVM_CAP_TSC_DEADLINE_TIMER)
    /// A set of `ManualProtection` flags, 0 where there is none.
    public static let manualDirtyLogProtection = Capability(rawValue: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
    /// The largest ring in bytes. Only hosts with strong memory order (x86) offer it.
    public static let dirtyRing = Capability(rawValue: KVM_CAP_DIRTY_LOG_RING)
    /// The same, with acquire and release order asked of both sides.
    public static let dirtyRingAcquireRelease = Capability(rawValue: KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
    public static let maximumVCPUs = Capability(rawValue: KVM_CAP_MAX_VCPUS)
}

/// /dev/kvm.
public final class System: Sendable {
    let descriptor: Descriptor
    /// Bytes of the shared page(s) of each vCPU.
    let runSize: Int

    /// Opens the device and checks that it speaks the stable API (version 12).
    public init(path: String = "/dev/kvm") throws(KVMError) {
        let number = lacuna_open(path, O_RDWR | O_CLOEXEC, 0)
        guard number >= 0 else { throw KVMError(call: "open \(path)", errno: lacuna_errno()) }
        descriptor = Descriptor(number)
        let version = try descriptor.call("KVM_GET_API_VERSION", lacuna_KVM_GET_API_VERSION)
        guard version == 12 else { throw KVMError(call: "KVM_GET_API_VERSION gave \(version), not 12", errno: ENOTSUP) }
        runSize = Int(try descriptor.call("KVM_GET_VCPU_MMAP_SIZE", lacuna_KVM_GET_VCPU_MMAP_SIZE))
    }

    /// 0 where the capability is absent; otherwise its value, mostly 1.
    public func check(_ capability: Capability) -> Int {
        Int(max(0, lacuna_ioctl_none(descriptor.number, lacuna_KVM_CHECK_EXTENSION, UInt(capability.rawValue))))
    }

    /// What this host's KVM can offer a guest as CPUID.
    public func supportedCPUID() throws(KVMError) -> [CPUIDEntry] {
        var count = 128
        while true {
            var table = CPUIDTable.blank(count)
            do {
                try descriptor.call("KVM_GET_SUPPORTED_CPUID", lacuna_KVM_GET_SUPPORTED_CPUID, bytes: &table)
                return CPUIDTable.decode(table)
            } catch {
                guard error.errno == E2BIG, count < 4096 else { throw error }
                count *= 2
            }
        }
    }

    /// The model-specific registers whose values make up a vCPU's state.
    public func stateMSRs() throws(KVMError) -> [UInt32] {
        // struct kvm_msr_list: a count, then the indices. The first call fails with E2BIG and fills in the count.
        var probe = [UInt8](repeating: 0, count: 4)
        do { try descriptor.call("KVM_GET_MSR_INDEX_LIST", lacuna_KVM_GET_MSR_INDEX_LIST, bytes: &probe) } catch {
            guard error.errno == E2BIG else { throw error }
        }
        let count = Int(probe.value(UInt32.self, at: 0))
        var list = [UInt8](repeating: 0, count: 4 + 4 * count)
        list.put(UInt32(count), at: 0)
        try descriptor.call("KVM_GET_MSR_INDEX_LIST", lacuna_KVM_GET_MSR_INDEX_LIST, bytes: &list)
        let found = min(count, Int(list.value(UInt32.self, at: 0)))
        return (0..<found).map { list.value(UInt32.self, at: 4 + 4 * $0) }
    }

    public func makeVM() throws(KVMError) -> VirtualMachine {
        let number = try descriptor.call("KVM_CREATE_VM", lacuna_KVM_CREATE_VM)
        return VirtualMachine(system: self, descriptor: Descriptor(number))
    }
}

/// struct kvm_cpuid2: a count and padding (8 bytes), then entries of 40 bytes.
enum CPUIDTable {
    static func blank(_ count: Int) -> [UInt8] {
        var table = [UInt8](repeating: 0, count: 8 + 40 * count)
        table.put(UInt32(count), at: 0)
        return table
    }
    static func decode(_ table: [UInt8]) -> [CPUIDEntry] {
        let count = min(Int(table.value(UInt32.self, at: 0)), (table.count - 8) / 40)
        return (0..<count).map { entry in
            func field(_ n: Int) -> UInt32 { table.value(UInt32.self, at: 8 + 40 * entry + 4 * n) }
            return CPUIDEntry(
                function: field(0), index: field(1), flags: field(2), eax: field(3), ebx: field(4), ecx: field(5),
                edx: field(6))
        }
    }
    static func encode(_ entries: [CPUIDEntry]) -> [UInt8] {
        var table = blank(entries.count)
        for (n, entry) in entries.enumerated() {
            let fields = [entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx]
            for (field, value) in fields.enumerated() { table.put(value, at: 8 + 40 * n + 4 * field) }
        }
        return table
    }
}

extension [UInt8] {
    /// A value of the host's byte order (x86: little-endian) inside a kernel structure.
    func value<Value: FixedWidthInteger>(_ type: Value.Type, at offset: Int) -> Value {
        withUnsafeBytes { $0.loadUnaligned(fromByteOffset: offset, as: Value.self) }
    }
    mutating func put<Value: FixedWidthInteger>(_ value: Value, at offset: Int) {
        withUnsafeMutableBytes { $0.storeBytes(of: value, toByteOffset: offset, as: Value.self) }
    }
}
