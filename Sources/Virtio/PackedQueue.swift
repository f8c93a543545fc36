// SPDX-License-Identifier: Apache-2.0
internal import GuestMemory

/// A place in a packed ring, as `VirtQueueState` has it: the descriptor's index in bits 0 to 14, the inverse of the wrap
/// counter in bit 15.
struct PackedPosition {
    let index: UInt16
    /// The wrap counter, which begins as true.
    let wrap: Bool

    init(_ raw: UInt16) {
        index = raw & 0x7fff
        wrap = raw & 0x8000 == 0
    }

    /// `slots` further on, at most a whole ring of `size`.
    static func advance(_ raw: UInt16, by slots: UInt16, size: UInt16) -> UInt16 {
        // Cannot overflow: both are at most 2^15.
        let sum = UInt32(raw & 0x7fff) + UInt32(slots)
        guard sum >= UInt32(size) else { return raw &+ slots }
        return UInt16(sum - UInt32(size)) | (~raw & 0x8000)
    }

    /// Descriptors from the position `start` on to `end`: those that are taken and not given back. Nil for positions
    /// outside the ring, or more than a ring apart.
    static func outstanding(from start: UInt16, to end: UInt16, size: UInt16) -> UInt16? {
        let (first, last) = (PackedPosition(start), PackedPosition(end))
        guard first.index < size, last.index < size else { return nil }
        if first.wrap == last.wrap { return last.index >= first.index ? last.index - first.index : nil }
        // Cannot overflow: at most `size`, since the index of the end is not beyond the start's.
        return last.index <= first.index ? last.index + (size - first.index) : nil
    }
}

/// The packed layout (virtio 1.3, section 2.8): one ring of descriptors, which the driver makes available and the device
/// marks used in place.
extension VirtQueue {
    private static let availableFlag: UInt16 = 1 << 7
    private static let usedFlag: UInt16 = 1 << 15

    private func place(_ index: UInt16) -> GuestAddress {
        // Cannot wrap: the index is within the ring, and the whole ring is RAM.
        GuestAddress(descriptors.rawValue &+ UInt64(Descriptor.bytes) &* UInt64(index))
    }

    /// Whether the driver has made the descriptor at `raw` available (section 2.8.1): its two flags differ, and the first
    /// is the wrap counter.
    func isAvailable(_ raw: UInt16) -> Bool {
        let position = PackedPosition(raw)
        // Acquire: the rest of the chain is read after the flags that make it ours.
        guard let flags = try? memory.loadAcquire16(GuestAddress(place(position.index).rawValue &+ 14)) else {
            return false
        }
        let (available, used) = (flags & Self.availableFlag != 0, flags & Self.usedFlag != 0)
        return available == position.wrap && used != position.wrap
    }

    /// A packed descriptor has the buffer's id and the flags where a split one has its flags and the next index: the id
    /// comes out as `next`.
    private func loadPacked(
        _ table: GuestAddress, _ index: UInt16, isIndirect: Bool, head: UInt16
    ) throws(VirtQueueError) -> Descriptor {
        let raw = try load(table, index, isIndirect: isIndirect, head: head)
        return Descriptor(address: raw.address, length: raw.length, flags: raw.next, next: raw.flags)
    }

    func popPacked(_ progress: inout Progress) throws(VirtQueueError) -> DescriptorChain? {
        guard isAvailable(progress.nextAvailable) else { return nil }
        // Checked whenever either changes.
        let taken = PackedPosition.outstanding(from: progress.nextUsed, to: progress.nextAvailable, size: size) ?? size
        var segments = Segments(), slots: UInt16 = 0, position = progress.nextAvailable
        let head = PackedPosition(position).index
        var last = Descriptor()
        repeat {
            // A chain has no more descriptors than are not taken yet, or it runs into its own or another's.
            guard slots < size - min(taken, size) else { throw .loop(head: head) }
            last = try loadPacked(descriptors, PackedPosition(position).index, isIndirect: false, head: head)
            slots += 1
            position = PackedPosition.advance(position, by: 1, size: size)
            guard last.flags & Descriptor.indirect != 0 else {
                try add(last, to: &segments, head: head)
                continue
            }
            let (table, entries) = try indirectTable(last, head: head)
            // Section 2.8.8: all entries in order, of whose flags only one counts.
            for entry in 0..<entries {
                // Cannot be cut: an indirect table has at most 1024 entries.
                let descriptor = try loadPacked(table, UInt16(truncatingIfNeeded: entry), isIndirect: true, head: head)
                guard descriptor.flags & Descriptor.indirect == 0 else { throw .nestedIndirect(head: head) }
                try add(descriptor, to: &segments, head: head)
            }
        } while last.flags & Descriptor.next != 0
        progress.nextAvailable = position
        // The last descriptor has the buffer's id.
        return DescriptorChain(
            head: last.next, slots: slots, readable: segments.readable, writable: segments.writable, memory: memory)
    }

    func pushPacked(_ token: BufferToken, written: UInt32, _ progress: inout Progress) {
        guard progress.isEnabled, token.slots > 0,
            let taken = PackedPosition.outstanding(from: progress.nextUsed, to: progress.nextAvailable, size: size),
            token.slots <= taken
        else { return }
        let position = PackedPosition(progress.nextUsed), entry = place(position.index)
        // Cannot fail: `init` checked the whole ring. The address of a used descriptor means nothing.
        try? memory.store(written, at: GuestAddress(entry.rawValue &+ 8))
        try? memory.store(token.head, at: GuestAddress(entry.rawValue &+ 12))
        var flags: UInt16 = position.wrap ? Self.availableFlag | Self.usedFlag : 0
        if written > 0 { flags |= Descriptor.write }
        // Release: whoever sees the flags also sees the rest and the buffer's bytes.
        try? memory.storeRelease16(flags, at: GuestAddress(entry.rawValue &+ 14))
        progress.nextUsed = PackedPosition.advance(progress.nextUsed, by: token.slots, size: size)
    }

    /// Section 2.8.10: the driver's event suppression structure, which is what `available` points at.
    func packedWantsInterrupt(before: UInt16?, now: UInt16) -> Bool {
        guard let flags = try? memory.load(GuestAddress(available.rawValue &+ 2), as: UInt16.self) else { return true }
        switch flags & 3 {
        case 0: return true
        case 1: return false
        default: break
        }
        // A certain descriptor, if that was negotiated; 3 is reserved.
        guard flags & 3 == 2, usesEventIndex, let before,
            let wanted = try? memory.load(available, as: UInt16.self),
            let passed = PackedPosition.outstanding(from: before, to: now, size: size)
        else { return true }
        // In the driver's structure bit 15 is the wrap counter itself.
        guard let distance = PackedPosition.outstanding(from: before, to: wanted ^ 0x8000, size: size) else { return false }
        return distance < passed
    }
}
