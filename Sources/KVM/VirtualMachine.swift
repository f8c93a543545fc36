// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// A slot of guest memory. KVM knows memory by slot number.
public struct MemorySlot: Sendable, Equatable {
    public let number: UInt32
    /// Guest-physical address of the first byte, page aligned.
    public let guestAddress: UInt64
    /// Bytes, a multiple of the page size.
    public let size: UInt64
    /// Where the host has it mapped.
    public let hostAddress: UInt
    public init(number: UInt32, guestAddress: UInt64, size: UInt64, hostAddress: UInt) {
        self.number = number
        self.guestAddress = guestAddress
        self.size = size
        self.hostAddress = hostAddress
    }
}

/// The interrupt controllers and the clock, as the kernel's own structures. Opaque; sizes are checked when set.
public struct PlatformState: Sendable, Equatable {
    /// master PIC, slave PIC, IOAPIC: struct kvm_irqchip
    public var chips: [[UInt8]]
    /// struct kvm_pit_state2
    public var pit: [UInt8]
    /// kvmclock, nanoseconds
    public var clock: UInt64
    public init(chips: [[UInt8]], pit: [UInt8], clock: UInt64) {
        self.chips = chips
        self.pit = pit
        self.clock = clock
    }
}

/// A VM: memory slots, interrupt controllers, vCPUs.
///
/// Thread rules: every method may be called from any thread; KVM serialises them.
public final class VirtualMachine: Sendable {
    public let system: System
    let descriptor: Descriptor

    init(system: System, descriptor: Descriptor) {
        self.system = system
        self.descriptor = descriptor
    }

    /// Makes PIC, IOAPIC, LAPICs and PIT in the kernel. Before the first vCPU.
    public func makeInterruptControllers() throws(KVMError) {
        // Intel's real-mode emulation wants four pages of its own; below the firmware area nothing else is mapped.
        try descriptor.call("KVM_SET_TSS_ADDR", lacuna_KVM_SET_TSS_ADDR, 0xfffb_d000)
        try descriptor.call("KVM_CREATE_IRQCHIP", lacuna_KVM_CREATE_IRQCHIP)
        var pit = kvm_pit_config()
        pit.flags = 1 // KVM_PIT_SPEAKER_DUMMY: answers port 0x61, which the guest's timer calibration reads
        try descriptor.call("KVM_CREATE_PIT2", lacuna_KVM_CREATE_PIT2, &pit)
    }

    /// Maps a slot, or changes its flags.
    public func set(_ slot: MemorySlot, logDirtyPages: Bool) throws(KVMError) {
        var region = kvm_userspace_memory_region()
        region.slot = slot.number
        region.flags = logDirtyPages ? UInt32(KVM_MEM_LOG_DIRTY_PAGES) : 0
        region.guest_phys_addr = slot.guestAddress
        region.memory_size = slot.size
        region.userspace_addr = UInt64(slot.hostAddress)
        try descriptor.call("KVM_SET_USER_MEMORY_REGION", lacuna_KVM_SET_USER_MEMORY_REGION, &region)
    }

    /// Fills `words` with the slot's dirty bitmap (one bit a page, 64-bit words) and, in the same step for each page,
    /// clears it in the kernel and write-protects the page again. `words` must hold the whole slot.
    public func getDirtyLog(_ slot: MemorySlot, into words: UnsafeMutableBufferPointer<UInt64>) throws(KVMError) {
        precondition(UInt64(words.count) * 64 * 4096 >= slot.size)
        var log = kvm_dirty_log()
        log.slot = slot.number
        log.dirty_bitmap = UnsafeMutableRawPointer(words.baseAddress)
        try descriptor.call("KVM_GET_DIRTY_LOG", lacuna_KVM_GET_DIRTY_LOG, &log)
    }

    /// Sets the level of an interrupt line (GSI).
    public func setLine(_ line: UInt32, high: Bool) {
        var level = kvm_irq_level()
        level.irq = line
        level.level = high ? 1 : 0
        // Fails only for a line that does not exist, which would be our own mistake.
        _ = try? descriptor.call("KVM_IRQ_LINE", lacuna_KVM_IRQ_LINE, &level)
    }

    public func makeVCPU(_ number: Int, cpuid: [CPUIDEntry]) throws(KVMError) -> VCPU {
        let vcpu = try descriptor.call("KVM_CREATE_VCPU", lacuna_KVM_CREATE_VCPU, UInt(number))
        return try VCPU(system: system, descriptor: Descriptor(vcpu), number: number, cpuid: cpuid)
    }

    /// The interrupt controllers, PIT and clock of a VM whose vCPUs do not run.
    public func savePlatform() throws(KVMError) -> PlatformState {
        var chips: [[UInt8]] = []
        for id in 0..<3 as Range<UInt32> {
            var chip = [UInt8](repeating: 0, count: MemoryLayout<kvm_irqchip>.size)
            chip.put(id, at: 0)
            try descriptor.call("KVM_GET_IRQCHIP", lacuna_KVM_GET_IRQCHIP, bytes: &chip)
            chips.append(chip)
        }
        let pit = try descriptor.get("KVM_GET_PIT2", lacuna_KVM_GET_PIT2, size: MemoryLayout<kvm_pit_state2>.size)
        var clock = kvm_clock_data()
        try descriptor.call("KVM_GET_CLOCK", lacuna_KVM_GET_CLOCK, &clock)
        return PlatformState(chips: chips, pit: pit, clock: clock.clock)
    }

    /// Loads what `savePlatform` gave. The kernel checks the contents; a wrong size or chip number is EINVAL.
    public func restorePlatform(_ state: PlatformState) throws(KVMError) {
        guard state.chips.count == 3 else { throw KVMError(call: "KVM_SET_IRQCHIP", errno: EINVAL) }
        for (id, chip) in state.chips.enumerated() {
            guard chip.count == MemoryLayout<kvm_irqchip>.size, chip.value(UInt32.self, at: 0) == UInt32(id) else {
                throw KVMError(call: "KVM_SET_IRQCHIP", errno: EINVAL)
            }
            try descriptor.set("KVM_SET_IRQCHIP", lacuna_KVM_SET_IRQCHIP, chip, size: MemoryLayout<kvm_irqchip>.size)
        }
        try descriptor.set("KVM_SET_PIT2", lacuna_KVM_SET_PIT2, state.pit, size: MemoryLayout<kvm_pit_state2>.size)
        var clock = kvm_clock_data()
        clock.clock = state.clock
        try descriptor.call("KVM_SET_CLOCK", lacuna_KVM_SET_CLOCK, &clock)
    }
}
