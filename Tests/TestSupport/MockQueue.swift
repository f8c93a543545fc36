// SPDX-License-Identifier: Apache-2.0
public import GuestMemory
public import Virtio

/// Flags of a descriptor (virtio 1.3, section 2.7.5).
public enum DescriptorFlag {
    public static let next: UInt16 = 1
    public static let write: UInt16 = 2
    public static let indirect: UInt16 = 4
}

/// A descriptor as a driver writes it, right or wrong.
public struct MockDescriptor {
    public var address: UInt64
    public var length: UInt32
    public var flags: UInt16
    public var next: UInt16
    public init(_ address: UInt64, _ length: UInt32, flags: UInt16 = 0, next: UInt16 = 0) {
        self.address = address
        self.length = length
        self.flags = flags
        self.next = next
    }
}

/// The guest's side of a split virtqueue, in guest memory. It checks nothing: any nonsense can be written.
public final class MockQueue {
    public let memory: GuestMemory
    public let size: UInt16
    /// Bytes from `base` on that the three parts take.
    public static func bytes(size: UInt16) -> UInt64 { (16 * UInt64(size) + 4096 + 16 * UInt64(size) + 4095) & ~4095 }
    public let descriptors: UInt64
    public let available: UInt64
    public let used: UInt64
    /// The index of the available ring, as last published.
    public private(set) var availableIndex: UInt16
    /// The index of the used ring up to which `takeUsed` has come.
    public private(set) var usedIndex: UInt16
    private var nextFree: UInt16 = 0

    public init(memory: GuestMemory, base: UInt64, size: UInt16, startIndex: UInt16 = 0) {
        self.memory = memory
        self.size = size
        descriptors = base
        available = base + 16 * UInt64(size)
        used = (available + 6 + 2 * UInt64(size) + 7) & ~7
        availableIndex = startIndex
        usedIndex = startIndex
        memory.poke([UInt8](repeating: 0, count: Int(Self.bytes(size: size))), at: base)
        memory.poke(startIndex, at: available + 2)
        memory.poke(startIndex, at: used + 2)
    }

    /// What a device needs to serve this queue.
    public var state: VirtQueueState {
        VirtQueueState(
            size: UInt32(size), descriptors: GuestAddress(descriptors), available: GuestAddress(available),
            used: GuestAddress(used), nextAvailable: usedIndex, nextUsed: usedIndex)
    }

    public func deviceSide(indirect: Bool = true) -> VirtQueue {
        try! VirtQueue(memory: memory, state: state, maximumSize: 32768, allowsIndirect: indirect)
    }

    /// Writes a descriptor into the queue's table, or into another one.
    public func set(_ index: UInt16, _ descriptor: MockDescriptor, table: UInt64? = nil) {
        let place = (table ?? descriptors) + 16 * UInt64(index)
        memory.poke(descriptor.address, at: place)
        memory.poke(descriptor.length, at: place + 8)
        memory.poke(descriptor.flags, at: place + 12)
        memory.poke(descriptor.next, at: place + 14)
    }

    /// Writes descriptors one after the other and links them. Returns the head. Descriptors are handed out in a
    /// circle: a caller has no more chains outstanding than fit.
    public func chain(_ list: [MockDescriptor]) -> UInt16 {
        let head = nextFree
        for (offset, item) in list.enumerated() {
            var item = item
            let place = nextFree
            nextFree = (nextFree + 1) % size
            if offset < list.count - 1 {
                item.flags |= DescriptorFlag.next
                item.next = nextFree
            }
            set(place, item)
        }
        return head
    }

    /// Writes a table of linked descriptors at `table`, and one descriptor that points at it. Returns the head.
    public func indirectChain(_ list: [MockDescriptor], table: UInt64) -> UInt16 {
        for (offset, item) in list.enumerated() {
            var item = item
            if offset < list.count - 1 {
                item.flags |= DescriptorFlag.next
                item.next = UInt16(offset + 1)
            }
            set(UInt16(offset), item, table: table)
        }
        return chain([MockDescriptor(table, UInt32(16 * list.count), flags: DescriptorFlag.indirect)])
    }

    /// Makes a chain available.
    public func publish(_ head: UInt16) {
        memory.poke(head, at: available + 4 + 2 * UInt64(availableIndex % size))
        publish(index: availableIndex &+ 1)
    }

    /// Writes the available index, whatever it is.
    public func publish(index: UInt16) {
        availableIndex = index
        memory.fence()
        memory.poke(index, at: available + 2)
    }

    /// VIRTQ_AVAIL_F_NO_INTERRUPT.
    public func suppressInterrupts(_ on: Bool) { memory.poke(UInt16(on ? 1 : 0), at: available) }

    /// What the device gave back since the last call: at most as many as the ring holds, whatever its index says.
    public func takeUsed() -> [(head: UInt32, written: UInt32)] {
        var result: [(UInt32, UInt32)] = []
        let index = try! memory.loadAcquire16(GuestAddress(used + 2))
        while usedIndex != index, result.count < Int(size) {
            let entry = used + 4 + 8 * UInt64(usedIndex % size)
            result.append((memory.peek(entry), memory.peek(entry + 4)))
            usedIndex &+= 1
        }
        return result
    }
}
