// SPDX-License-Identifier: Apache-2.0
public import GuestMemory
internal import Synchronization

/// All there is to know of a virtqueue besides guest memory: plain data from a driver's registers or from a saved
/// state, and not to be trusted. `VirtQueue.init` is the one place that checks it.
public struct VirtQueueState: Sendable, Equatable {
    /// Descriptors.
    public var size: UInt32
    public var descriptors: GuestAddress
    /// The driver area: the available ring.
    public var available: GuestAddress
    /// The device area: the used ring.
    public var used: GuestAddress
    /// The next entry of the available ring to take, modulo 2^16. Of a packed queue: the next descriptor to take, in
    /// bits 0 to 14, and in bit 15 the inverse of the device's wrap counter for it; so 0 is the beginning of both kinds.
    public var nextAvailable: UInt16
    /// The next entry of the used ring to fill, modulo 2^16; of a packed queue like `nextAvailable`.
    public var nextUsed: UInt16

    public init(
        size: UInt32, descriptors: GuestAddress, available: GuestAddress, used: GuestAddress,
        nextAvailable: UInt16 = 0, nextUsed: UInt16 = 0
    ) {
        self.size = size
        self.descriptors = descriptors
        self.available = available
        self.used = used
        self.nextAvailable = nextAvailable
        self.nextUsed = nextUsed
    }

    /// Takes what `encode` wrote. Nothing is checked but that the bytes are there.
    public init(from decoder: inout StateDecoder) throws(StateError) {
        size = try decoder.take()
        descriptors = GuestAddress(try decoder.take(UInt64.self))
        available = GuestAddress(try decoder.take(UInt64.self))
        used = GuestAddress(try decoder.take(UInt64.self))
        nextAvailable = try decoder.take()
        nextUsed = try decoder.take()
    }

    public func encode(into encoder: inout StateEncoder) {
        encoder.put(size)
        encoder.put(descriptors.rawValue)
        encoder.put(available.rawValue)
        encoder.put(used.rawValue)
        encoder.put(nextAvailable)
        encoder.put(nextUsed)
    }
}

/// The device's side of a virtqueue: split (virtio 1.3, section 2.7) or packed (section 2.8).
///
/// Everything in the rings is the guest's to change at any moment. Each descriptor is copied once and checked before
/// anything is done with it; a chain that breaks the rules is an error that says which, and the queue stays broken.
///
/// Thread rules: every method may be called from any thread; a lock inside makes them one at a time.
public final class VirtQueue: Sendable {
    /// The most descriptors of one indirect table. A driver must not make chains longer than the queue (section
    /// 2.7.5.3.1) yet Linux does; no driver in use goes beyond this.
    public static let maximumIndirectEntries: UInt32 = 1024
    /// The most bytes of one chain (section 2.7.5).
    public static let maximumChainBytes: UInt64 = 1 << 32

    struct Progress {
        var nextAvailable: UInt16
        var nextUsed: UInt16
        var failure: VirtQueueError?
        var isEnabled = true
        /// `nextUsed` when the driver was last told, or the question last asked; nil: not since this object was made.
        var toldUsed: UInt16?
    }

    /// A descriptor as it lies in the table (section 2.7.5).
    struct Descriptor: BitwiseCopyable {
        var address: UInt64 = 0
        var length: UInt32 = 0
        var flags: UInt16 = 0
        var next: UInt16 = 0

        static let next: UInt16 = 1
        static let write: UInt16 = 2
        static let indirect: UInt16 = 4
        static let bytes = 16
    }

    /// Descriptors: of a split queue a power of two.
    public let size: UInt16
    public let isPacked: Bool
    let memory: GuestMemory
    let descriptors: GuestAddress
    let available: GuestAddress
    let used: GuestAddress
    let usesEventIndex: Bool
    private let allowsIndirect: Bool
    private let progress: Mutex<Progress>

    /// The one checked way to a live queue, for a new one and for one from a saved state.
    ///
    /// - Parameter maximumSize: the device's limit for this queue.
    /// - Parameter features: what was negotiated, of `VirtioFeature`.
    public init(
        memory: GuestMemory, state: VirtQueueState, maximumSize: UInt16, features: UInt64
    ) throws(VirtQueueError) {
        let isPacked = features & VirtioFeature.packedRing != 0
        guard state.size > 0, state.size <= UInt32(maximumSize), state.size <= 1 << 15,
            isPacked || state.size & (state.size - 1) == 0
        else { throw .badSize(state.size, maximum: maximumSize) }
        let size = UInt16(state.size), count = Int(size)
        // Sections 2.7 and 2.8: alignment and bytes of each part; the split rings are counted with their event field.
        let parts: [(VirtQueueError.Part, GuestAddress, alignment: UInt64, bytes: Int)] = [
            (.descriptors, state.descriptors, 16, 16 * count),
            (.available, state.available, isPacked ? 4 : 2, isPacked ? 4 : 6 + 2 * count),
            (.used, state.used, 4, isPacked ? 4 : 6 + 8 * count),
        ]
        for (part, address, alignment, bytes) in parts {
            guard address.rawValue % alignment == 0 else { throw .misaligned(part, address) }
            guard memory.isRAM(address, bytes: bytes) else { throw .notRAM(part, address) }
        }
        let isPossible =
            isPacked
            ? PackedPosition.outstanding(from: state.nextUsed, to: state.nextAvailable, size: size) != nil
            : state.nextAvailable &- state.nextUsed <= size
        guard isPossible else {
            throw .badCounters(nextAvailable: state.nextAvailable, nextUsed: state.nextUsed)
        }
        self.size = size
        self.isPacked = isPacked
        self.memory = memory
        allowsIndirect = features & VirtioFeature.indirectDescriptors != 0
        usesEventIndex = features & VirtioFeature.eventIndex != 0
        descriptors = state.descriptors
        available = state.available
        used = state.used
        progress = Mutex(Progress(nextAvailable: state.nextAvailable, nextUsed: state.nextUsed))
    }

    /// A split queue without the event index.
    public convenience init(
        memory: GuestMemory, state: VirtQueueState, maximumSize: UInt16, allowsIndirect: Bool
    ) throws(VirtQueueError) {
        try self.init(
            memory: memory, state: state, maximumSize: maximumSize,
            features: allowsIndirect ? VirtioFeature.indirectDescriptors : 0)
    }

    /// What to save.
    public var state: VirtQueueState {
        let (nextAvailable, nextUsed) = progress.withLock { ($0.nextAvailable, $0.nextUsed) }
        return VirtQueueState(
            size: UInt32(size), descriptors: descriptors, available: available, used: used,
            nextAvailable: nextAvailable, nextUsed: nextUsed)
    }

    /// Takes over where somebody else, who served the queue in the meantime, left off. Counters that cannot be are
    /// refused by whoever makes a queue of them again.
    public func moveOn(nextAvailable: UInt16, nextUsed: UInt16) {
        progress.withLock {
            $0.nextAvailable = nextAvailable
            $0.nextUsed = nextUsed
        }
    }

    /// Ends all access to guest memory: `popChain` finds nothing and `push` does nothing from here on. For transports,
    /// when the driver resets the device or the queue.
    public func disable() { progress.withLock { $0.isEnabled = false } }

    /// The next chain the driver made available, or nil if there is none. After an error every call throws the same.
    public func popChain() throws(VirtQueueError) -> DescriptorChain? {
        try progress.withLock { (progress) throws(VirtQueueError) -> DescriptorChain? in
            if let failure = progress.failure { throw failure }
            guard progress.isEnabled else { return nil }
            do throws(VirtQueueError) {
                if isPacked { return try popPacked(&progress) }
                guard let head = try nextHead(progress) else { return nil }
                let chain = try walk(head: head)
                progress.nextAvailable &+= 1
                return chain
            } catch {
                progress.failure = error
                throw error
            }
        }
    }

    /// True if the driver has made nothing available that was not taken yet, as far as can be told.
    public var isEmpty: Bool {
        progress.withLock { progress in
            if isPacked { return !progress.isEnabled || !isAvailable(progress.nextAvailable) }
            let index = try? memory.loadAcquire16(GuestAddress(available.rawValue &+ 2))
            return !progress.isEnabled || index == progress.nextAvailable
        }
    }

    /// Gives a chain back, with the number of bytes written to it.
    /// One that the queue did not hand out is ignored, as far as can be told.
    public func push(_ token: BufferToken, written: UInt32) {
        if isPacked { return progress.withLock { pushPacked(token, written: written, &$0) } }
        push(head: token.head, written: written)
    }

    /// Gives a chain of a split queue back by its head.
    public func push(head: UInt16, written: UInt32) {
        progress.withLock { progress in
            guard progress.isEnabled, !isPacked, progress.nextUsed != progress.nextAvailable else { return }
            let slot = UInt64(progress.nextUsed & (size &- 1))
            // Cannot wrap or fail: `init` checked the whole ring.
            let entry = GuestAddress(used.rawValue &+ 4 &+ 8 &* slot)
            try? memory.store(UInt64(head) | UInt64(written) << 32, at: entry)
            progress.nextUsed &+= 1
            // Release: whoever sees the index also sees the entry and the buffer's bytes.
            try? memory.storeRelease16(progress.nextUsed, at: GuestAddress(used.rawValue &+ 2))
        }
    }

    /// Whether the driver wants to be told of used buffers: to be asked after `push`.
    public var wantsInterrupt: Bool {
        let (isEnabled, now, before): (Bool, UInt16, UInt16?) = progress.withLock { progress in
            defer { progress.toldUsed = progress.nextUsed }
            return (progress.isEnabled, progress.nextUsed, progress.toldUsed)
        }
        guard isEnabled else { return false }
        // The index of the used ring must be visible before the flags are read: the driver allows interrupts first and
        // then looks at the index, so that one of the two always sees the other (section 2.7.7.2).
        memory.fence()
        if isPacked { return packedWantsInterrupt(before: before, now: now) }
        guard usesEventIndex else {
            let flags = try? memory.load(available, as: UInt16.self)
            return (flags ?? 0) & 1 == 0
        }
        guard let before else { return true }
        // Section 2.7.7.2: the driver names the entry whose use it wants to hear of, behind its ring.
        let place = GuestAddress(available.rawValue &+ 4 &+ 2 &* UInt64(size))
        let event = (try? memory.load(place, as: UInt16.self)) ?? before
        return now &- event &- 1 < now &- before
    }

    /// With the event index: asks for a notification of the next entry of the available ring (section 2.7.10). To be
    /// followed by one more look, for what came before the driver could see this.
    private func askForNotification(_ progress: Progress) {
        let place = GuestAddress(used.rawValue &+ 4 &+ 8 &* UInt64(size))
        try? memory.store(progress.nextAvailable, at: place)
        memory.fence()
    }

    /// For a device that stops before the queue is empty: from here on the driver notifies of what it makes available.
    /// Returns the chains that wait already and of which it may not notify any more; the device has to take them without
    /// being told. Without the event index that is none: the driver notifies of every chain, then.
    public func askForLaterNotification() -> Int {
        progress.withLock { progress in
            guard progress.isEnabled, progress.failure == nil, usesEventIndex, !isPacked,
                let index = try? memory.loadAcquire16(GuestAddress(available.rawValue &+ 2))
            else { return 0 }
            var found = index
            // A driver that meanwhile passed the entry named does not notify. It can do so only as often as it has
            // chains left: those that were not given back take up the queue.
            for _ in 0...size {
                let place = GuestAddress(used.rawValue &+ 4 &+ 8 &* UInt64(size))
                try? memory.store(found, at: place)
                // The entry has to be visible before the index is read again (section 2.7.10).
                memory.fence()
                guard let again = try? memory.loadAcquire16(GuestAddress(available.rawValue &+ 2)), again != found else {
                    break
                }
                found = again
            }
            // More than the queue's size is no driver's doing; the next look at the ring finds that out.
            return Int(min(found &- progress.nextAvailable, size))
        }
    }

    /// The head of the next chain, read from the available ring.
    private func nextHead(_ progress: Progress) throws(VirtQueueError) -> UInt16? {
        var head: UInt16 = 0, index: UInt16
        do throws(GuestMemoryError) {
            // Acquire: the entry and the descriptors are read after the index that makes them ours.
            var found = try memory.loadAcquire16(GuestAddress(available.rawValue &+ 2))
            if found == progress.nextAvailable, usesEventIndex {
                askForNotification(progress)
                found = try memory.loadAcquire16(GuestAddress(available.rawValue &+ 2))
            }
            index = found
            if index == progress.nextAvailable { return nil }
            // Within the ring whatever the index says; it is not used before that was checked.
            let slot = UInt64(progress.nextAvailable & (size &- 1))
            try memory.copyOut(GuestAddress(available.rawValue &+ 4 &+ 2 &* slot), into: &head)
        } catch { throw .notRAM(.available, available) }
        // Indices run modulo 2^16; a driver has at most `size` chains in the queue.
        guard index &- progress.nextAvailable <= size else {
            throw .availableIndexJumped(from: progress.nextAvailable, to: index)
        }
        guard head < size else { throw .headOutOfRange(head) }
        return head
    }

    /// The buffer of a chain, as it is put together.
    struct Segments {
        var readable: [GuestSegment] = []
        var writable: [GuestSegment] = []
        var total: UInt64 = 0
    }

    /// Checks a descriptor of a buffer and adds it.
    func add(_ descriptor: Descriptor, to segments: inout Segments, head: UInt16) throws(VirtQueueError) {
        guard descriptor.length > 0 else { throw .zeroLength(head: head) }
        // Cannot overflow: at most 2^16 descriptors of less than 2^32 bytes each.
        segments.total += UInt64(descriptor.length)
        guard segments.total <= Self.maximumChainBytes else { throw .tooLong(head: head) }
        let segment = GuestSegment(address: GuestAddress(descriptor.address), length: descriptor.length)
        guard memory.isRAM(segment.address, bytes: Int(segment.length)) else {
            throw .bufferNotRAM(head: head, segment.address, length: segment.length)
        }
        if descriptor.flags & Descriptor.write != 0 {
            segments.writable.append(segment)
        } else {
            guard segments.writable.isEmpty else { throw .readableAfterWritable(head: head) }
            segments.readable.append(segment)
        }
    }

    /// Checks an indirect descriptor. Returns its table and the entries there.
    func indirectTable(_ descriptor: Descriptor, head: UInt16) throws(VirtQueueError) -> (GuestAddress, UInt32) {
        guard allowsIndirect else { throw .indirectNotNegotiated(head: head) }
        guard descriptor.flags & Descriptor.next == 0 else { throw .indirectWithNext(head: head) }
        let bytes = descriptor.length
        guard bytes > 0, bytes % UInt32(Descriptor.bytes) == 0,
            bytes / UInt32(Descriptor.bytes) <= Self.maximumIndirectEntries
        else { throw .badIndirectSize(head: head, bytes: bytes) }
        let table = GuestAddress(descriptor.address)
        guard memory.isRAM(table, bytes: Int(bytes)) else { throw .indirectTableNotRAM(head: head, table) }
        // The write flag of this descriptor says nothing (section 2.7.5.3.2).
        return (table, bytes / UInt32(Descriptor.bytes))
    }

    /// Copies and checks every descriptor of a chain.
    private func walk(head: UInt16) throws(VirtQueueError) -> DescriptorChain {
        var segments = Segments()
        var table = descriptors, entries = UInt32(size), index = head
        var isIndirect = false
        // Bounds the walk: a chain through a table without a loop has at most as many descriptors as the table.
        var visits: UInt32 = 0
        while true {
            guard visits < entries else { throw .loop(head: head) }
            visits += 1
            let descriptor = try load(table, index, isIndirect: isIndirect, head: head)

            if descriptor.flags & Descriptor.indirect != 0 {
                guard allowsIndirect else { throw .indirectNotNegotiated(head: head) }
                guard !isIndirect else { throw .nestedIndirect(head: head) }
                (table, entries) = try indirectTable(descriptor, head: head)
                index = 0
                visits = 0
                isIndirect = true
                continue
            }

            try add(descriptor, to: &segments, head: head)
            guard descriptor.flags & Descriptor.next != 0 else { break }
            index = descriptor.next
            guard UInt32(index) < entries else { throw .nextOutOfRange(head: head, next: index) }
        }
        return DescriptorChain(
            head: head, readable: segments.readable, writable: segments.writable, memory: memory)
    }

    func load(
        _ table: GuestAddress, _ index: UInt16, isIndirect: Bool, head: UInt16
    ) throws(VirtQueueError) -> Descriptor {
        var descriptor = Descriptor()
        do throws(GuestMemoryError) {
            // Cannot wrap: the index is within the table, and the whole table is RAM.
            let offset = UInt64(Descriptor.bytes) &* UInt64(index)
            try memory.copyOut(GuestAddress(table.rawValue &+ offset), into: &descriptor)
        } catch {
            throw isIndirect ? .indirectTableNotRAM(head: head, table) : .notRAM(.descriptors, table)
        }
        return descriptor
    }
}
