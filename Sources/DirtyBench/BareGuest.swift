// SPDX-License-Identifier: Apache-2.0
import CLinux
import GuestMemory
import KVM
import Machine
import Migration

/// A virtual machine without a kernel: each vCPU runs a dozen bytes of code that write to the pages of a list, and
/// nothing else. So the pages it makes dirty are known exactly.
///
/// Thread rules: `write` for each vCPU from one thread at a time; the rest as `DirtyTracker` says.
final class BareGuest: Sendable {
    /// Page frames 0 up to this are the memory under test; code and lists lie behind it, in a slot of their own.
    let pages: Int
    let memory: GuestMemory
    let slots: [MemorySlot]
    private let vm: VirtualMachine
    private let vcpus: [VCPU]
    private let rings: DirtyRings?
    private let tracking: DirtyTracking

    private static let area: UInt64 = 0x8000_0000
    private static let areaPerVCPU: UInt64 = 4 << 20
    /// The longest list.
    private static let listEntries = Int(areaPerVCPU / 4) - 1024

    // next: mov eax,[esi]; shl eax,12; mov [eax],ebx; add esi,4; dec ecx; jnz next; hlt
    private static let code: [UInt8] = [
        0x8b, 0x06, 0xc1, 0xe0, 0x0c, 0x89, 0x18, 0x83, 0xc6, 0x04, 0x49, 0x75, 0xf3, 0xf4,
    ]

    /// `size` is a multiple of 2 MiB, up to 2 GiB: the code runs in 32-bit mode, without paging.
    init(
        size: UInt64, vcpus count: Int, tracking: DirtyTracking,
        ringPeriod: Int32 = DirtyRings.usualPeriodMilliseconds
    ) throws(BenchError) {
        precondition(size > 0 && size % (2 << 20) == 0 && size <= Self.area)
        pages = Int(size / 4096)
        self.tracking = tracking
        do {
            let memory = try GuestMemory(ranges: [
                GuestRange(start: GuestAddress(0), size: size),
                GuestRange(start: GuestAddress(Self.area), size: Self.areaPerVCPU * UInt64(count)),
            ])
            let system = try System(), vm = try system.makeVM()
            try tracking.prepare(vm)
            let slots = memory.regions.enumerated().map { number, region in
                MemorySlot(
                    number: UInt32(number), guestAddress: region.range.start.rawValue, size: region.range.size,
                    hostAddress: UInt(bitPattern: region.host))
            }
            for slot in slots { try vm.set(slot, logDirtyPages: false) }
            let cpuid = try system.supportedCPUID()
            var made: [VCPU] = []
            for number in 0..<count {
                let vcpu = try vm.makeVCPU(number, cpuid: cpuid)
                try Self.enterProtectedMode(vcpu)
                let code = memory.hostPointer(Self.area(of: number), bytes: Self.code.count)!
                Self.code.withUnsafeBytes { code.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
                made.append(vcpu)
            }
            let rings = made.compactMap(\.ring)
            self.rings = rings.isEmpty ? nil : DirtyRings(
                vm: vm, slots: slots, rings: rings, periodMilliseconds: ringPeriod)
            (self.memory, self.vm, self.slots, vcpus) = (memory, vm, slots, made)
        } catch { throw BenchError("cannot make a guest to measure with: \(error)") }
    }

    private static func area(of vcpu: Int) -> GuestAddress { GuestAddress(area + UInt64(vcpu) * areaPerVCPU) }

    private static func enterProtectedMode(_ vcpu: VCPU) throws(KVMError) {
        var special = try vcpu.specialRegisters()
        func flat(type: UInt8) -> kvm_segment {
            var segment = kvm_segment()
            (segment.limit, segment.selector, segment.type) = (0xffff_ffff, 8, type)
            (segment.present, segment.s, segment.g, segment.db) = (1, 1, 1, 1)
            return segment
        }
        special.cs = flat(type: 0xb)
        let data = flat(type: 0x3)
        (special.ds, special.es, special.ss, special.fs, special.gs) = (data, data, data, data, data)
        special.cr0 |= 1
        try vcpu.set(special)
    }

    /// Of the memory under test and of nothing else.
    func makeTracker(stretchPages: Int = 16384) -> any DirtyTracker {
        if let rings { return rings }
        if tracking == .manual {
            return ManualDirtyLog(vm: vm, slots: slots, stretchPages: stretchPages)
        }
        return KVMDirtyLog(vm: vm, slots: slots)
    }

    var ringFigures: DirtyRingFigures { rings?.figures ?? DirtyRingFigures() }

    /// Lets the vCPUs, each on a thread of its own, write `value` to the first word of each of `list`, and waits until
    /// they have.
    func share(_ value: UInt32, to list: [UInt32]) throws(BenchError) {
        guard vcpus.count > 1, list.count > 1 else { return try write(value, to: list) }
        let others = (1..<vcpus.count).map { number in
            let part = stride(from: number, to: list.count, by: vcpus.count).map { list[$0] }
            return Background("vcpu\(number)") { [self] () -> BenchError? in
                do throws(BenchError) { try write(value, to: part, vcpu: number); return nil } catch { return error }
            }
        }
        let mine = Result { () throws(BenchError) in
            try write(value, to: stride(from: 0, to: list.count, by: vcpus.count).map { list[$0] })
        }
        for other in others { if let failure = other.join() { throw failure } }
        try mine.get()
    }

    /// Lets vCPU `number` write `value` to the first word of each of `list`, and waits until it has.
    func write(_ value: UInt32, to list: [UInt32], vcpu number: Int = 0) throws(BenchError) {
        var rest = list[...]
        while !rest.isEmpty {
            let part = rest.prefix(Self.listEntries)
            rest = rest.dropFirst(part.count)
            // Not logged: the lists are no memory under test.
            let address = GuestAddress(Self.area(of: number).rawValue + 4096)
            let place = memory.hostPointer(address, bytes: part.count * 4)!
            part.withUnsafeBytes { place.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
            memory.fence()
            do throws(KVMError) {
                var registers = kvm_regs()
                registers.rip = Self.area(of: number).rawValue
                registers.rsi = address.rawValue
                registers.rcx = UInt64(part.count)
                registers.rbx = UInt64(value)
                registers.rflags = 2
                try vcpus[number].set(registers)
            } catch { throw BenchError("cannot start the guest's code: \(error)") }
            try enter(vcpus[number])
        }
    }

    private func enter(_ vcpu: VCPU) throws(BenchError) {
        while true {
            switch vcpu.enter() {
            case .halted: return
            case .dirtyRingFull: rings?.relieve()
            case .interrupted: continue
            case let other: throw BenchError("the guest's code ended with \(other)")
            }
        }
    }
}
