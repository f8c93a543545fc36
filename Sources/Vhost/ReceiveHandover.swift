// SPDX-License-Identifier: Apache-2.0
internal import CLinux
internal import GuestMemory
internal import Synchronization

/// Hands the receive queue's buffers to the kernel one by one, through an available ring of this process's own, and so
/// knows every page that the kernel may have written to. The kernel logs its writes to the used ring only, and by the
/// time somebody looks at the driver's ring a buffer may have been used, taken and replaced: the driver keeps the
/// packet, with a header that it reads again much later.
///
/// The entries have the places and numbers that they have in the driver's ring, so that the kernel's position in one is
/// its position in the other. Descriptors and used ring are the driver's.
///
/// Thread rules: every method may be called from any thread.
@safe final class ReceiveHandover: Sendable {
    private struct State {
        var ring: VhostRing
        /// The next entry of the driver's available ring to hand over.
        var next: UInt16 = 0
        /// The pages of the buffer last handed over at each place of the ring: it may be in use, or used.
        var places: [[Range<Int>]] = []
        /// Pages of buffers handed over before those, since the last collection; nil without a log. A bitmap: a driver
        /// may name all of memory again and again, which must cost neither room nor a look at each page.
        var earlier: PageBitmap?

        /// The buffer at `place` is about to be forgotten, and may have been written to.
        func keep(_ place: Int) {
            guard let earlier else { return }
            for pages in places[place] { earlier.set(pages) }
        }
    }
    private let memory: GuestMemory
    /// A struct vring_avail: flags, which stay 0 (the driver's are looked at before it is interrupted), index, entries.
    private nonisolated(unsafe) let available: UnsafeMutableRawPointer
    private let state: Mutex<State>
    private static let bytes = 4096
    /// As many entries as fit.
    private static let sizeLimit = 1024

    /// Nil if there is no memory for it.
    init?(memory: GuestMemory) {
        guard let page = unsafe lacuna_mmap(Self.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) else {
            return nil
        }
        self.memory = memory
        unsafe available = page
        let none = GuestAddress(0)
        state = Mutex(State(ring: VhostRing(size: 0, descriptors: none, available: none, used: none, nextAvailable: 0)))
    }

    deinit { unsafe munmap(available, Self.bytes) }

    /// Begins where the kernel shall go on. Returns the address of the ring for the kernel, nil if `ring` is too large.
    func begin(_ ring: VhostRing) -> UInt64? {
        guard ring.size > 0, Int(ring.size) <= Self.sizeLimit else { return nil }
        state.withLock { state in
            for place in state.places.indices { state.keep(place) }
            state.ring = ring
            state.next = ring.nextAvailable
            state.places = Array(repeating: [], count: Int(ring.size))
            unsafe lacuna_store_release_16(available + 2, ring.nextAvailable)
            handOver(&state)
        }
        return unsafe UInt64(UInt(bitPattern: available))
    }

    /// Hands over what the driver made available meanwhile. True if there was something.
    @discardableResult func handOver() -> Bool { state.withLock { handOver(&$0) } }

    @discardableResult private func handOver(_ state: inout State) -> Bool {
        let ring = state.ring
        guard ring.size > 0, let index = try? memory.loadAcquire16(GuestAddress(ring.available.rawValue &+ 2)),
            index != state.next
        else { return false }
        // More than the ring has: the kernel finds that wrong in the driver's index, and says so.
        if index &- state.next > ring.size {
            state.next = index
        }
        while state.next != index {
            let place = Int(state.next % ring.size)
            let entry = ring.available.rawValue &+ 4 &+ 2 &* UInt64(place)
            guard let head = try? memory.load(GuestAddress(entry), as: UInt16.self) else { break }
            state.keep(place)
            state.places[place] = pagesOfChain(head, ring)
            unsafe lacuna_store_release_16(available + 4 + 2 * place, head)
            state.next &+= 1
        }
        // What a page is for is known before the kernel may write to it.
        unsafe lacuna_store_release_16(available + 2, state.next)
        return true
    }

    /// The pages that the kernel may write to on behalf of one chain. The driver must not change it meanwhile; one that
    /// does harms itself: what it says is only used to mark pages, within bounds.
    private func pagesOfChain(_ head: UInt16, _ ring: VhostRing) -> [Range<Int>] {
        var pages: [Range<Int>] = []
        var number = head
        for _ in 0..<ring.size {
            // struct virtq_desc: address, length, flags, next.
            let place = ring.descriptors.rawValue &+ 16 &* UInt64(number)
            guard number < ring.size, let address = try? memory.load(GuestAddress(place), as: UInt64.self),
                let length = try? memory.load(GuestAddress(place &+ 8), as: UInt32.self),
                let flags = try? memory.load(GuestAddress(place &+ 12), as: UInt16.self),
                let next = try? memory.load(GuestAddress(place &+ 14), as: UInt16.self)
            else { break }
            let isWritable = flags & 2 != 0, hasNext = flags & 1 != 0
            if isWritable, length > 0, unsafe memory.hostPointer(GuestAddress(address), bytes: Int(length)) != nil {
                pages.append(Int(address >> pageShift)..<Int((address &+ UInt64(length) &- 1) >> pageShift) + 1)
            }
            guard hasNext else { break }
            number = next
        }
        return pages
    }

    /// True if the kernel has used all that it was given: it may have looked in vain, and the driver, told not to
    /// notify while it did, may have made buffers available without a word.
    var isExhausted: Bool {
        state.withLock { state in
            guard state.ring.size > 0 else { return true }
            let used = try? memory.loadAcquire16(GuestAddress(state.ring.used.rawValue &+ 2))
            return used == state.next
        }
    }

    /// Whether the driver wants to be interrupted for used buffers.
    var wantsInterrupt: Bool {
        // The kernel's write of the used index comes before this look, as the driver's look at that comes after its
        // write of the flags.
        lacuna_fence()
        let ring = state.withLock { $0.ring }
        return ((try? memory.load(ring.available, as: UInt16.self)) ?? 0) & 1 == 0
    }

    /// From here on, or no more, pages are remembered for `collect`.
    func setLogging(_ on: Bool) {
        state.withLock { $0.earlier = on ? PageBitmap(bitCount: memory.frameCount) : nil }
    }

    /// Adds every page that the kernel may have written to since the last time. `bitmap` has a bit for each frame of
    /// guest memory.
    func collect(into bitmap: PageBitmap) {
        state.withLock { state in
            if let earlier = state.earlier {
                bitmap.formUnion(earlier)
                earlier.clearAll()
            }
            for place in state.places { for pages in place { bitmap.set(pages) } }
        }
    }
}
