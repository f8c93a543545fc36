// SPDX-License-Identifier: Apache-2.0
internal import CLinux
internal import Synchronization

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
    private let ringEntries = Mutex<Int?>(nil)

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

    /// Makes `getDirtyLog` leave the log as it is and the pages writable, until `clearDirtyLog`; and makes a log start
    /// with every bit set, instead of protecting all pages at once. Before the first slot is logged.
    public func enableManualProtection() throws(KVMError) {
        // KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE and KVM_DIRTY_LOG_INITIALLY_SET; the latter is newer (5.7).
        let wanted = 1 | 2
        guard system.check(.manualDirtyLogProtection) & wanted == wanted else {
            throw KVMError(call: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", errno: ENOTSUP)
        }
        try enable(.manualDirtyLogProtection, UInt64(wanted))
    }

    /// Gives each vCPU made later a dirty ring of `entries` entries, and ends `getDirtyLog` for this VM. `entries` is a
    /// power of two, from 1024 (the kernel keeps some hundred in reserve) to the kernel's limit of 65536.
    public func enableDirtyRing(entries: Int) throws(KVMError) {
        guard (1024...65536).contains(entries), entries & (entries - 1) == 0 else {
            throw KVMError(call: "a dirty ring of \(entries) entries", errno: EINVAL)
        }
        let capability: Capability
        if system.check(.dirtyRingAcquireRelease) > 0 {
            capability = .dirtyRingAcquireRelease
        } else if system.check(.dirtyRing) > 0 {
            capability = .dirtyRing
        } else {
            throw KVMError(call: "KVM_CAP_DIRTY_LOG_RING", errno: ENOTSUP)
        }
        let bytes = entries * MemoryLayout<kvm_dirty_gfn>.stride
        guard bytes <= system.check(capability) else {
            throw KVMError(call: "a dirty ring of \(entries) entries", errno: E2BIG)
        }
        try enable(capability, UInt64(bytes))
        ringEntries.withLock { $0 = entries }
    }

    private func enable(_ capability: Capability, _ argument: UInt64) throws(KVMError) {
        var request = kvm_enable_cap()
        request.cap = UInt32(bitPattern: capability.rawValue)
        request.args.0 = argument
        try descriptor.call("KVM_ENABLE_CAP \(capability.rawValue)", lacuna_KVM_ENABLE_CAP, &request)
    }

    /// Under manual protection: clears those bits of the slot's log that `words` has set, and protects their pages, so
    /// that the next write is logged again. `words` covers `pages` of the slot, which begin at a multiple of 64 and end
    /// at one or with the slot.
    public func clearDirtyLog(
        _ slot: MemorySlot, pages: Range<Int>, words: UnsafeMutableBufferPointer<UInt64>
    ) throws(KVMError) {
        precondition(pages.lowerBound % 64 == 0 && words.count * 64 >= pages.count)
        var request = lacuna_clear_log(slot.number, UInt64(pages.lowerBound), UInt32(pages.count), words.baseAddress)
        try descriptor.call("KVM_CLEAR_DIRTY_LOG", lacuna_KVM_CLEAR_DIRTY_LOG, &request)
    }

    /// Protects every page whose ring entry was harvested, and frees those entries. Returns how many. Not at the same
    /// time as a harvest: an entry that is freed half-read would be lost.
    @discardableResult
    public func resetDirtyRings() throws(KVMError) -> Int {
        Int(try descriptor.call("KVM_RESET_DIRTY_RINGS", lacuna_KVM_RESET_DIRTY_RINGS))
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
        return try VCPU(
            system: system, descriptor: Descriptor(vcpu), number: number, cpuid: cpuid,
            ringEntries: ringEntries.withLock { $0 })
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
