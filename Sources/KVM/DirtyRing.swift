// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// One vCPU's dirty ring (Documentation/virt/kvm/api.rst, `KVM_CAP_DIRTY_LOG_RING`): the kernel enters each page that
/// the vCPU makes dirty; harvesting takes entries out, and `VirtualMachine.resetDirtyRings` protects their pages anew.
///
/// Thread rules: one thread at a time, and none during `resetDirtyRings`. The vCPU may run meanwhile.
public final class DirtyRing: @unchecked Sendable {
    // Sendable by the thread rules above; the mapping lives from init to deinit.
    /// Entries: a power of two.
    public let count: Int
    private let entries: UnsafeMutablePointer<kvm_dirty_gfn>
    private let bytes: Int
    /// The next entry to look at, modulo 2^32. The kernel's own index runs along with it.
    private var next: UInt32 = 0

    init(vcpu: Descriptor, entries count: Int) throws(KVMError) {
        self.count = count
        bytes = count * MemoryLayout<kvm_dirty_gfn>.stride
        let offset = off_t(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096
        guard let mapping = lacuna_mmap(bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.number, offset) else {
            throw KVMError(call: "mmap of the dirty ring", errno: lacuna_errno())
        }
        entries = mapping.assumingMemoryBound(to: kvm_dirty_gfn.self)
    }

    deinit { munmap(entries, bytes) }

    /// Hands every entry the kernel has filled to `body`: a slot's number and a page's index in it. Returns how many. At
    /// most a ring's worth, so that a vCPU that never rests cannot keep the caller here.
    public func harvest(_ body: (_ slot: UInt32, _ page: UInt64) -> Void) -> Int {
        var taken = 0
        while taken < count {
            let entry = entries + Int(next & UInt32(count - 1))
            // Acquire: slot and offset were written before the flag.
            guard lacuna_ring_entry_is_dirty(entry) else { break }
            body(entry.pointee.slot, entry.pointee.offset)
            // Release: the entry was read before the kernel may use it again.
            lacuna_ring_entry_harvested(entry)
            next &+= 1
            taken += 1
        }
        return taken
    }
}
