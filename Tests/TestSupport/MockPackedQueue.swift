// SPDX-License-Identifier: Apache-2.0
public import GuestMemory
public import Virtio

/// The guest's side of a packed virtqueue (virtio 1.3, section 2.8), in guest memory. It checks nothing.
public final class MockPackedQueue {
    public let memory: GuestMemory
    public let size: UInt16
    public let descriptors: UInt64
    /// The driver's and the device's event suppression structures.
    public let driverArea: UInt64
    public let deviceArea: UInt64
    /// Where the next chain goes, and where the next used descriptor is looked for, each with its wrap counter.
    private var available: (index: UInt16, wrap: Bool) = (0, true)
    private var used: (index: UInt16, wrap: Bool) = (0, true)
    /// How many descriptors each outstanding buffer takes, by id.
    private var slots: [UInt16: UInt16] = [:]

    public init(memory: GuestMemory, base: UInt64, size: UInt16) {
        self.memory = memory
        self.size = size
        descriptors = base
        driverArea = base + 16 * UInt64(size)
        deviceArea = driverArea + 4
        memory.poke([UInt8](repeating: 0, count: 16 * Int(size) + 8), at: base)
    }

    public var state: VirtQueueState {
        VirtQueueState(
            size: UInt32(size), descriptors: GuestAddress(descriptors), available: GuestAddress(driverArea),
            used: GuestAddress(deviceArea))
    }

    public func deviceSide(features: UInt64 = VirtioFeature.indirectDescriptors) throws -> VirtQueue {
        try VirtQueue(
            memory: memory, state: state, maximumSize: 32768, features: features | VirtioFeature.packedRing)
    }

    /// Writes a descriptor of the packed layout at `place`.
    public func set(_ place: UInt64, _ descriptor: MockDescriptor, id: UInt16, flags: UInt16) {
        memory.poke(descriptor.address, at: place)
        memory.poke(descriptor.length, at: place + 8)
        memory.poke(id, at: place + 12)
        memory.fence()
        memory.poke(flags, at: place + 14)
    }

    /// Makes a chain available: all but the first descriptor's flags first, as Linux does.
    public func publish(_ list: [MockDescriptor], id: UInt16) {
        var first: (place: UInt64, flags: UInt16)?
        for (offset, item) in list.enumerated() {
            let place = descriptors + 16 * UInt64(available.index)
            var flags = item.flags | (available.wrap ? 1 << 7 : 1 << 15)
            if offset < list.count - 1 { flags |= DescriptorFlag.next }
            if first == nil {
                first = (place, flags)
                // Unavailable still.
                flags ^= 1 << 7 | 1 << 15
            }
            set(place, item, id: id, flags: flags)
            advance(&available, by: 1)
        }
        slots[id] = UInt16(list.count)
        memory.fence()
        if let first { memory.poke(first.flags, at: first.place + 14) }
    }

    /// Makes a table at `table` available. In such a table the other flags than the write flag mean nothing.
    public func publishIndirect(_ list: [MockDescriptor], table: UInt64, id: UInt16) {
        for (offset, item) in list.enumerated() {
            set(table + 16 * UInt64(offset), item, id: 0xffff, flags: item.flags | DescriptorFlag.next)
        }
        publish([MockDescriptor(table, UInt32(16 * list.count), flags: DescriptorFlag.indirect)], id: id)
    }

    private func advance(_ position: inout (index: UInt16, wrap: Bool), by count: UInt16) {
        position.index += count
        if position.index >= size {
            position.index -= size
            position.wrap.toggle()
        }
    }

    /// The event suppression structure: `flags` 0 all, 1 none, 2 the descriptor at `index` with that wrap counter.
    public func suppress(flags: UInt16, index: UInt16 = 0, wrap: Bool = true) {
        memory.poke(index | (wrap ? 1 << 15 : 0), at: driverArea)
        memory.poke(flags, at: driverArea + 2)
    }

    /// What the device gave back since the last call: at most as many as the ring holds.
    public func takeUsed() -> [(id: UInt16, written: UInt32, hasWritten: Bool)] {
        var result: [(UInt16, UInt32, Bool)] = []
        while result.count < Int(size) {
            let place = descriptors + 16 * UInt64(used.index)
            let flags = memory.peek(place + 14, as: UInt16.self)
            guard (flags & 1 << 7 != 0) == used.wrap, (flags & 1 << 15 != 0) == used.wrap else { break }
            let id = memory.peek(place + 12, as: UInt16.self)
            result.append((id, memory.peek(place + 8), flags & DescriptorFlag.write != 0))
            guard let count = slots.removeValue(forKey: id) else { break }
            advance(&used, by: count)
        }
        return result
    }
}
