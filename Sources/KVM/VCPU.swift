// SPDX-License-Identifier: Apache-2.0
public import CLinux

/// Why KVM_RUN came back.
public enum VCPUExit: Sendable, Equatable {
    /// Port I/O: `count` elements of `size` bytes at `VCPU.ioData`.
    case io(port: UInt16, size: Int, count: Int, isWrite: Bool)
    /// Memory-mapped I/O of `size` bytes; the value is at `VCPU.mmioValue`.
    case mmio(address: UInt64, size: Int, isWrite: Bool)
    case halted
    /// Triple fault: on x86 the way of last resort to reboot.
    case shutdown
    /// The vCPU's dirty ring is nearly full: it has to be harvested and reset before the vCPU can run on.
    case dirtyRingFull
    /// A signal, or `immediateExit`: nothing happened, pending I/O is complete.
    case interrupted
    /// KVM cannot go on; the text says why.
    case failed(String)
}

/// A vCPU's whole state, as the kernel's own structures by name. Opaque; sizes are checked when set.
public struct VCPUState: Sendable, Equatable {
    public var parts: [(name: String, bytes: [UInt8])]
    public init(parts: [(name: String, bytes: [UInt8])]) { self.parts = parts }
    public static func == (a: VCPUState, b: VCPUState) -> Bool {
        a.parts.elementsEqual(b.parts) { $0.name == $1.name && $0.bytes == $1.bytes }
    }
    subscript(name: String) -> [UInt8]? { parts.first { $0.name == name }?.bytes }
}

/// One vCPU.
///
/// Thread rules: `run` and everything that reads or sets state belong to the thread that runs the vCPU, or to any one
/// thread while that one is parked. Only `requestExit` may be called from anywhere at any time.
public final class VCPU: @unchecked Sendable {
    // Sendable by the thread rules above.
    public let number: Int
    /// Present if the VM has dirty rings. Its thread rules are its own.
    public let ring: DirtyRing?
    private let system: System
    private let descriptor: Descriptor
    private let run: UnsafeMutablePointer<kvm_run>
    private let xsaveSize: Int

    init(
        system: System, descriptor: Descriptor, number: Int, cpuid: [CPUIDEntry], ringEntries: Int?
    ) throws(KVMError) {
        self.system = system
        self.descriptor = descriptor
        self.number = number
        xsaveSize = max(4096, system.check(.xsave2))
        ring = try ringEntries.map { entries throws(KVMError) in try DirtyRing(vcpu: descriptor, entries: entries) }
        guard let page = lacuna_mmap(system.runSize, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor.number, 0) else {
            throw KVMError(call: "mmap of the vCPU", errno: lacuna_errno())
        }
        run = page.assumingMemoryBound(to: kvm_run.self)
        var table = CPUIDTable.encode(cpuid)
        do { try descriptor.call("KVM_SET_CPUID2", lacuna_KVM_SET_CPUID2, bytes: &table) } catch {
            munmap(page, system.runSize)
            throw error
        }
    }

    deinit { munmap(run, system.runSize) }

    /// Enters the guest. Comes back on an exit or a signal.
    public func enter() -> VCPUExit {
        let result = lacuna_ioctl_none(descriptor.number, lacuna_KVM_RUN, 0)
        if result < 0 {
            let code = lacuna_errno()
            // EAGAIN: an application processor that was never started, woken for nothing.
            if code == EINTR || code == EAGAIN { return .interrupted }
            return .failed(KVMError(call: "KVM_RUN", errno: code).description)
        }
        switch Int32(run.pointee.exit_reason) {
        case KVM_EXIT_IO:
            return .io(
                port: lacuna_run_io_port(run), size: Int(lacuna_run_io_size(run)), count: Int(lacuna_run_io_count(run)),
                isWrite: lacuna_run_io_direction(run) == KVM_EXIT_IO_OUT)
        case KVM_EXIT_MMIO:
            return .mmio(
                address: lacuna_run_mmio_address(run), size: Int(lacuna_run_mmio_length(run)),
                isWrite: lacuna_run_mmio_is_write(run))
        case KVM_EXIT_HLT: return .halted
        case KVM_EXIT_SHUTDOWN: return .shutdown
        case KVM_EXIT_DIRTY_RING_FULL: return .dirtyRingFull
        case KVM_EXIT_INTR: return .interrupted
        case KVM_EXIT_FAIL_ENTRY:
            return .failed("the CPU refused to enter the guest (reason 0x\(String(lacuna_run_fail_reason(run), radix: 16)))")
        case KVM_EXIT_INTERNAL_ERROR:
            return .failed("KVM internal error \(lacuna_run_internal_suberror(run)) at \(instructionPointer)")
        case let reason: return .failed("unexpected exit \(reason) from the guest")
        }
    }

    private var instructionPointer: String {
        guard let registers = try? registers() else { return "an unknown address" }
        return "rip 0x" + String(registers.rip, radix: 16)
    }

    /// The bytes of a port I/O exit, `size * count` of them, inside the shared page. Read for a write exit; fill for a
    /// read exit.
    public var ioData: UnsafeMutableRawPointer { UnsafeMutableRawPointer(run) + Int(lacuna_run_io_offset(run)) }

    /// The value of an MMIO exit, zero-extended. Read for a write exit; set for a read exit.
    public var mmioValue: UInt64 {
        get {
            var value: UInt64 = 0
            let data = lacuna_run_mmio_data(run)!
            for byte in (0..<min(8, Int(lacuna_run_mmio_length(run)))).reversed() { value = value << 8 | UInt64(data[byte]) }
            return value
        }
        set {
            let data = lacuna_run_mmio_data(run)!
            for byte in 0..<8 { data[byte] = UInt8(truncatingIfNeeded: newValue >> UInt64(8 * byte)) }
        }
    }

    /// With `true` the next `enter` completes pending I/O and comes back at once. To be followed by a signal to the
    /// vCPU's thread, in case it is inside already.
    public func requestExit(_ wanted: Bool) { lacuna_run_set_immediate_exit(run, wanted ? 1 : 0) }

    public func registers() throws(KVMError) -> kvm_regs {
        var registers = kvm_regs()
        try descriptor.call("KVM_GET_REGS", lacuna_KVM_GET_REGS, &registers)
        return registers
    }
    public func set(_ registers: kvm_regs) throws(KVMError) {
        var copy = registers
        try descriptor.call("KVM_SET_REGS", lacuna_KVM_SET_REGS, &copy)
    }
    public func specialRegisters() throws(KVMError) -> kvm_sregs {
        var registers = kvm_sregs()
        try descriptor.call("KVM_GET_SREGS", lacuna_KVM_GET_SREGS, &registers)
        return registers
    }
    public func set(_ registers: kvm_sregs) throws(KVMError) {
        var copy = registers
        try descriptor.call("KVM_SET_SREGS", lacuna_KVM_SET_SREGS, &copy)
    }

    /// Tells the guest's clock that it was stopped on purpose, so that its watchdogs do not bark. Best effort: a guest
    /// without kvmclock makes it fail, and needs none.
    public func noteClockStopped() { _ = try? descriptor.call("KVM_KVMCLOCK_CTRL", lacuna_KVM_KVMCLOCK_CTRL) }

    // MARK: Saved state

    /// The structures in the order in which they must be set: the mode (special registers) before what depends on it,
    /// the LAPIC before the MSR of its deadline timer, pending events last.
    private var structures: [(name: String, get: UInt, set: UInt, size: Int)] {
        [
            ("mp-state", lacuna_KVM_GET_MP_STATE, lacuna_KVM_SET_MP_STATE, MemoryLayout<kvm_mp_state>.size),
            ("regs", lacuna_KVM_GET_REGS, lacuna_KVM_SET_REGS, MemoryLayout<kvm_regs>.size),
            ("sregs", lacuna_KVM_GET_SREGS, lacuna_KVM_SET_SREGS, MemoryLayout<kvm_sregs>.size),
            ("xcrs", lacuna_KVM_GET_XCRS, lacuna_KVM_SET_XCRS, MemoryLayout<kvm_xcrs>.size),
            (
                "xsave", system.check(.xsave2) > 0 ? lacuna_KVM_GET_XSAVE2 : lacuna_KVM_GET_XSAVE, lacuna_KVM_SET_XSAVE,
                xsaveSize
            ),
            ("debugregs", lacuna_KVM_GET_DEBUGREGS, lacuna_KVM_SET_DEBUGREGS, MemoryLayout<kvm_debugregs>.size),
            ("lapic", lacuna_KVM_GET_LAPIC, lacuna_KVM_SET_LAPIC, MemoryLayout<kvm_lapic_state>.size),
            ("msrs", 0, 0, 0),
            ("events", lacuna_KVM_GET_VCPU_EVENTS, lacuna_KVM_SET_VCPU_EVENTS, MemoryLayout<kvm_vcpu_events>.size),
        ]
    }

    /// Everything a vCPU is, of a vCPU whose last exit was `.interrupted` (so that no I/O is half done).
    public func save() throws(KVMError) -> VCPUState {
        var parts: [(name: String, bytes: [UInt8])] = []
        // KVM settles a pending INIT or SIPI when it is asked for the MP state: first, before the registers are read.
        for structure in structures {
            if structure.name == "msrs" {
                parts.append(("msrs", try readMSRs(try system.stateMSRs())))
            } else {
                parts.append(
                    (structure.name, try descriptor.get("KVM_GET (\(structure.name))", structure.get, size: structure.size)))
            }
        }
        return VCPUState(parts: parts)
    }

    /// Loads what `save` gave. The bytes may come from a peer: sizes are checked here, contents by the kernel.
    public func restore(_ state: VCPUState) throws(KVMError) {
        for structure in structures {
            guard let bytes = state[structure.name] else {
                throw KVMError(call: "vCPU state without its part \(structure.name)", errno: EINVAL)
            }
            if structure.name == "msrs" {
                try writeMSRs(bytes)
            } else {
                try descriptor.set("KVM_SET (\(structure.name))", structure.set, bytes, size: structure.size)
            }
        }
    }

    /// struct kvm_msrs holds a count and padding (8 bytes), then entries of 16: index, reserved, value. The same
    /// entries, without the head, are the saved form.
    private func readMSRs(_ indices: [UInt32]) throws(KVMError) -> [UInt8] {
        var saved: [UInt8] = []
        // One at a time: a list call stops at the first MSR that this guest's CPUID hides, and there are such.
        for index in indices {
            var one = [UInt8](repeating: 0, count: 24)
            one.put(UInt32(1), at: 0)
            one.put(index, at: 8)
            if try descriptor.call("KVM_GET_MSRS", lacuna_KVM_GET_MSRS, bytes: &one) == 1 { saved += one[8...] }
        }
        return saved
    }

    private func writeMSRs(_ entries: [UInt8]) throws(KVMError) {
        guard entries.count % 16 == 0, entries.count <= 16 * 4096 else {
            throw KVMError(call: "MSR list of \(entries.count) bytes", errno: EINVAL)
        }
        let deadline: UInt32 = 0x6e0 // IA32_TSC_DEADLINE counts against the TSC, so the TSC has to be set before it
        func index(_ n: Int) -> UInt32 { entries.value(UInt32.self, at: 16 * n) }
        let order = (0..<entries.count / 16).sorted { (index($0) == deadline ? 1 : 0, $0) < (index($1) == deadline ? 1 : 0, $1) }
        for n in order {
            var one = [UInt8](repeating: 0, count: 24)
            one.put(UInt32(1), at: 0)
            one.put(index(n), at: 8)
            let wanted = entries.value(UInt64.self, at: 16 * n + 8)
            one.put(wanted, at: 16)
            if try descriptor.call("KVM_SET_MSRS", lacuna_KVM_SET_MSRS, bytes: &one) == 1 { continue }
            // Some can be read but not written; no harm is done if the value is there already.
            guard try descriptor.call("KVM_GET_MSRS", lacuna_KVM_GET_MSRS, bytes: &one) == 1,
                one.value(UInt64.self, at: 16) == wanted
            else { throw KVMError(call: "KVM_SET_MSRS of 0x\(String(index(n), radix: 16))", errno: EINVAL) }
        }
    }
}
