// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import KVM
import Migration
import Synchronization

/// How KVM is asked which pages the vCPUs made dirty. Chosen when the machine is made; the two ends of a migration may
/// differ.
public enum DirtyTracking: Sendable, Equatable {
    /// `KVM_GET_DIRTY_LOG`, which clears and protects what it returns.
    case bitmap
    /// Manual protection: pages are protected in stretches, just before they are sent.
    case manual
    /// A ring of so many entries for each vCPU: a power of two, 1024 to 65536.
    case ring(entries: Int)

    /// Entries of a ring nobody chose a size for: 16 MiB of address space a vCPU, 256 MiB of dirty pages.
    public static let defaultRingEntries = 65536

    /// Prepares a VM that has neither slots nor vCPUs yet.
    package func prepare(_ vm: VirtualMachine) throws(KVMError) {
        switch self {
        case .bitmap: break
        case .manual: try vm.enableManualProtection()
        case .ring(let entries): try vm.enableDirtyRing(entries: entries)
        }
    }
}

extension PageBitmap {
    /// The words as the kernel takes them, with the error passed through (`rethrows` is untyped).
    fileprivate func withKernelWords(
        _ words: Range<Int>, _ body: (UnsafeMutableBufferPointer<UInt64>) throws(KVMError) -> Void
    ) throws(KVMError) {
        let result: Result<Void, KVMError> = withUnsafeWords { all in
            do throws(KVMError) {
                return .success(try body(UnsafeMutableBufferPointer(rebasing: all[words])))
            } catch { return .failure(error) }
        }
        try result.get()
    }

    /// The same for words that the kernel only reads: the whole summary would be made anew after each stretch otherwise.
    fileprivate func withReadOnlyKernelWords(
        _ words: Range<Int>, _ body: (UnsafeMutableBufferPointer<UInt64>) throws(KVMError) -> Void
    ) throws(KVMError) {
        let result: Result<Void, KVMError> = withUnsafeReadOnlyWords { all in
            do throws(KVMError) {
                return .success(try body(UnsafeMutableBufferPointer(mutating: UnsafeBufferPointer(rebasing: all[words]))))
            } catch { return .failure(error) }
        }
        try result.get()
    }
}

/// KVM's dirty log of all memory slots, collected and cleared in one step (`KVM_GET_DIRTY_LOG`).
package final class KVMDirtyLog: DirtyTracker {
    private let vm: VirtualMachine
    private let slots: [MemorySlot]
    private let buffers: [PageBitmap]

    package init(vm: VirtualMachine, slots: [MemorySlot]) {
        self.vm = vm
        self.slots = slots
        buffers = slots.map { PageBitmap(bitCount: Int($0.size / 4096)) }
    }

    package func arm() throws(PartFailure) {
        do throws(KVMError) {
            // Setting the flag write-protects every page of the slot before the call returns. What a log of an earlier,
            // failed migration held went with that log when it was disarmed.
            for slot in slots { try vm.set(slot, logDirtyPages: true) }
        } catch { throw PartFailure("cannot start the dirty log: \(error)") }
    }

    package func collect(into bitmap: PageBitmap) throws(PartFailure) {
        for (slot, buffer) in zip(slots, buffers) {
            do throws(KVMError) {
                try buffer.withKernelWords(0..<buffer.wordCount) { (words) throws(KVMError) in
                    try vm.getDirtyLog(slot, into: words)
                }
            } catch { throw PartFailure("cannot read the dirty log: \(error)") }
            // Slots begin and end on multiples of 64 pages, so words line up.
            let first = Int(slot.guestAddress / 4096 / 64)
            var next = buffer.firstWord
            while let index = next {
                bitmap.merge(buffer.word(index), intoWord: first + index)
                next = buffer.nextWord(from: index + 1)
            }
        }
    }

    package func disarm() { for slot in slots { try? vm.set(slot, logDirtyPages: false) } }
}

/// KVM's dirty log under manual protection (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` with `INITIALLY_SET`): collecting
/// changes nothing, and a page is protected again only when it is about to be sent, a stretch of pages at a time; or
/// with all others before the guest is asked for free pages (rule W1).
///
/// Thread rules: one thread at a time, and those of `DirtyTracker`.
package final class ManualDirtyLog: DirtyTracker, @unchecked Sendable {
    // Sendable by the thread rules above.
    private struct Slot {
        let slot: MemorySlot
        let pages: Range<Int>
        /// What `KVM_GET_DIRTY_LOG` fills.
        let buffer: PageBitmap
        /// Pages that were collected and are not protected yet: a write to them goes unseen, and their bits stand.
        let open: PageBitmap
        /// Stretches of the slot with such pages.
        var openStretches: [Bool]
    }

    private let vm: VirtualMachine
    private var slots: [Slot]
    private let stretchPages: Int
    private var isArmed = false

    /// `stretchPages`, a multiple of 64, is how many pages one `KVM_CLEAR_DIRTY_LOG` covers: 64 MiB of guest memory by
    /// default.
    package init(vm: VirtualMachine, slots: [MemorySlot], stretchPages: Int = 16384) {
        precondition(stretchPages > 0 && stretchPages % 64 == 0)
        self.vm = vm
        self.stretchPages = stretchPages
        self.slots = slots.map { slot in
            let count = Int(slot.size / 4096), first = Int(slot.guestAddress / 4096)
            return Slot(
                slot: slot, pages: first..<first + count, buffer: PageBitmap(bitCount: count),
                open: PageBitmap(bitCount: count),
                openStretches: Array(repeating: false, count: (count + stretchPages - 1) / stretchPages))
        }
    }

    package func arm() throws(PartFailure) {
        isArmed = true
        do throws(KVMError) {
            for index in slots.indices {
                // No page is protected by this: every bit of the new log is set, and stands for its page until then.
                try vm.set(slots[index].slot, logDirtyPages: true)
                slots[index].open.set(0..<slots[index].pages.count)
                for stretch in slots[index].openStretches.indices { slots[index].openStretches[stretch] = true }
            }
        } catch { throw PartFailure("cannot start the dirty log: \(error)") }
    }

    package func collect(into bitmap: PageBitmap) throws(PartFailure) {
        // Before the look: the bits of pages already collected would come again and look like new writes.
        try protectAll()
        for index in slots.indices {
            let buffer = slots[index].buffer, open = slots[index].open, slot = slots[index].slot
            do throws(KVMError) {
                try buffer.withKernelWords(0..<buffer.wordCount) { (words) throws(KVMError) in
                    try vm.getDirtyLog(slot, into: words)
                }
            } catch { throw PartFailure("cannot read the dirty log: \(error)") }
            let first = slots[index].pages.lowerBound / 64
            var next = buffer.firstWord
            while let word = next {
                let bits = buffer.word(word)
                next = buffer.nextWord(from: word + 1)
                bitmap.merge(bits, intoWord: first + word)
                open.merge(bits, intoWord: word)
                slots[index].openStretches[word * 64 / stretchPages] = true
            }
        }
    }

    package func protectAll() throws(PartFailure) {
        do throws(KVMError) {
            for index in slots.indices {
                for stretch in slots[index].openStretches.indices { try protect(index, stretch) }
            }
        } catch { throw PartFailure("cannot protect pages for the dirty log: \(error)") }
    }

    package func willSend(_ pages: Range<Int>) throws(PartFailure) {
        do throws(KVMError) {
            for index in slots.indices {
                let mine = pages.clamped(to: slots[index].pages), first = slots[index].pages.lowerBound
                if mine.isEmpty { continue }
                for stretch in (mine.lowerBound - first) / stretchPages...(mine.upperBound - 1 - first) / stretchPages {
                    try protect(index, stretch)
                }
            }
        } catch { throw PartFailure("cannot protect pages for the dirty log: \(error)") }
    }

    private func protect(_ index: Int, _ stretch: Int) throws(KVMError) {
        guard slots[index].openStretches[stretch] else { return }
        let open = slots[index].open, slot = slots[index].slot
        let pages = stretch * stretchPages..<min((stretch + 1) * stretchPages, slots[index].pages.count)
        try open.withReadOnlyKernelWords(pages.lowerBound / 64..<(pages.upperBound + 63) / 64) { (words) throws(KVMError) in
            try vm.clearDirtyLog(slot, pages: pages, words: words)
        }
        open.clear(pages)
        slots[index].openStretches[stretch] = false
    }

    package func disarm() {
        guard isArmed else { return }
        isArmed = false
        for index in slots.indices {
            try? vm.set(slots[index].slot, logDirtyPages: false)
            slots[index].open.clearAll()
            for stretch in slots[index].openStretches.indices { slots[index].openStretches[stretch] = false }
        }
    }
}
