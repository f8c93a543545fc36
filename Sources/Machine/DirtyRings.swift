// SPDX-License-Identifier: Apache-2.0
internal import CLinux
import GuestMemory
import KVM
import Migration
import Synchronization

/// What the rings of a machine did.
package struct DirtyRingFigures: Sendable, Equatable {
    /// Entries taken out.
    package var entries = 0
    /// Times a vCPU had to stop because its ring was full.
    package var fullRings = 0
    /// `KVM_RESET_DIRTY_RINGS` calls.
    package var resets = 0
    package init() {}
}

/// The dirty rings of all vCPUs. A collector thread empties them while tracking is armed; a vCPU whose ring is full
/// anyway empties it on its own thread, while the others run on.
///
/// Whoever harvests also resets, under one lock, before the harvested pages can be given to the migration. So a page
/// that `collect` returned is protected again (rule W1), and a page harvested later is in the next collection.
///
/// Thread rules: every method may be called from any thread; `arm`, `collect` and `disarm` as `DirtyTracker` says.
package final class DirtyRings: DirtyTracker {
    private struct State {
        var life = 0
        var isArmed = false
        /// What the collector or a full ring's vCPU met; told at the next collection.
        var failure: KVMError?
        var figures = DirtyRingFigures()
    }

    /// How often the collector looks. At this pace a ring of 65536 entries takes 5 GiB/s of dirty pages.
    package static let usualPeriodMilliseconds: Int32 = 50
    private let periodMilliseconds: Int32
    private let vm: VirtualMachine
    private let slots: [MemorySlot]
    private let rings: [DirtyRing]
    /// Harvested and not yet collected, by page frame. Under the lock of `state`.
    private let log: PageBitmap
    private let state = Mutex(State())
    /// Readable once the collector of the present life is to end.
    private let wake: Int32

    package init(vm: VirtualMachine, slots: [MemorySlot], rings: [DirtyRing], periodMilliseconds: Int32 = usualPeriodMilliseconds) {
        self.periodMilliseconds = periodMilliseconds
        self.vm = vm
        self.slots = slots
        self.rings = rings
        log = PageBitmap(bitCount: slots.map { Int(($0.guestAddress + $0.size) / 4096) }.max() ?? 0)
        wake = eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK))
    }

    deinit { if wake >= 0 { close(wake) } }

    package var figures: DirtyRingFigures { state.withLock { $0.figures } }

    package func arm() throws(PartFailure) {
        let life: Int
        do throws(KVMError) {
            life = try state.withLock { (state) throws(KVMError) in
                // Left over from an earlier migration, and of no interest: all memory is sent after this.
                state.failure = nil
                harvest(&state)
                if let failure = state.failure { throw failure }
                log.clearAll()
                // Protects every page before it returns.
                for slot in slots { try vm.set(slot, logDirtyPages: true) }
                state.life += 1
                state.isArmed = true
                return state.life
            }
        } catch {
            for slot in slots { try? vm.set(slot, logDirtyPages: false) }
            throw PartFailure("cannot start the dirty rings: \(error)")
        }
        do throws(MigrationError) { try startThreadIfPossible(named: "dirty rings") { self.run(life) } } catch {
            disarm()
            throw PartFailure("cannot start the dirty rings: \(error)")
        }
    }

    package func collect(into bitmap: PageBitmap) throws(PartFailure) {
        do throws(KVMError) {
            try state.withLock { (state) throws(KVMError) in
                harvest(&state)
                if let failure = state.failure { throw failure }
                // The log ends with the last slot, as every bitmap over the machine's memory does.
                log.atomicDrain { index, bits in bitmap.merge(bits, intoWord: index) }
            }
        } catch { throw PartFailure("cannot empty the dirty rings: \(error)") }
    }

    package func disarm() {
        let wasArmed = state.withLock { state in
            guard state.isArmed else { return false }
            state.isArmed = false
            for slot in slots { try? vm.set(slot, logDirtyPages: false) }
            return true
        }
        if wasArmed {
            var one: UInt64 = 1
            _ = write(wake, &one, 8)
        }
    }

    /// For the thread of a vCPU whose ring is full.
    package func relieve() {
        state.withLock { state in
            state.figures.fullRings += 1
            harvest(&state)
        }
    }

    /// Empties every ring into the log and protects the pages. The lock is held.
    private func harvest(_ state: inout State) {
        var taken = 0
        for ring in rings {
            taken += ring.harvest { slot, page in
                // The lower 16 bits are the slot, the upper ones the address space (0 but for system management mode).
                let number = Int(slot & 0xffff)
                guard number < slots.count, page < slots[number].size / 4096 else { return }
                let frame = Int(slots[number].guestAddress / 4096 + page)
                log.set(frame..<frame + 1)
            }
        }
        guard taken > 0 || state.failure != nil else { return }
        do throws(KVMError) {
            try vm.resetDirtyRings()
            state.failure = nil
            state.figures.resets += 1
            state.figures.entries += taken
        } catch {
            // The pages are in the log but stay writable: the migration has to be given up.
            state.failure = error
        }
    }

    /// The collector.
    private func run(_ life: Int) {
        while true {
            var event = pollfd(fd: wake, events: Int16(POLLIN), revents: 0)
            _ = poll(&event, 1, periodMilliseconds)
            let goesOn = state.withLock { state in
                guard state.isArmed, state.life == life else { return false }
                harvest(&state)
                return true
            }
            if !goesOn { break }
            // Woken for the end of an earlier life.
            var count: UInt64 = 0
            _ = read(wake, &count, 8)
        }
        var count: UInt64 = 0
        _ = read(wake, &count, 8)
    }
}
