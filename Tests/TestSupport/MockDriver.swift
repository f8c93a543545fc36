// SPDX-License-Identifier: Apache-2.0
public import GuestMemory
public import Virtio

/// A driver that plays Linux: it goes through the registers in the order of `virtio_mmio.c` and lays buffers into guest
/// memory.
public final class MockDriver {
    public let memory: GuestMemory
    public let transport: MMIOTransport
    public private(set) var queues: [Int: MockQueue] = [:]
    private let arenaStart: UInt64
    private var arena: UInt64

    /// - Parameter arena: where queues and buffers go; what is below is the test's.
    public init(memory: GuestMemory, transport: MMIOTransport, arena: UInt64 = 0x10_0000) {
        self.memory = memory
        self.transport = transport
        arenaStart = arena
        self.arena = arena
    }

    public func read(_ register: MMIO.Register) -> UInt32 {
        UInt32(truncatingIfNeeded: transport.read(offset: register.rawValue, size: 4))
    }
    public func write(_ register: MMIO.Register, _ value: UInt32) {
        transport.write(offset: register.rawValue, size: 4, value: UInt64(value))
    }
    public var status: DeviceStatus { DeviceStatus(rawValue: read(.status)) }
    public func add(_ status: DeviceStatus) { write(.status, read(.status) | status.rawValue) }
    public func configuration(_ offset: UInt64) -> UInt32 {
        UInt32(truncatingIfNeeded: transport.read(offset: MMIO.configuration + offset, size: 4))
    }
    public func setConfiguration(_ offset: UInt64, _ value: UInt32) {
        transport.write(offset: MMIO.configuration + offset, size: 4, value: UInt64(value))
    }

    /// Bytes of guest memory that nobody else has.
    public func allocate(_ bytes: UInt64, alignment: UInt64 = 16) -> UInt64 {
        arena = (arena + alignment - 1) & ~(alignment - 1)
        defer { arena += bytes }
        return arena
    }

    public var offeredFeatures: UInt64 {
        write(.deviceFeaturesSelect, 1)
        let high = read(.deviceFeatures)
        write(.deviceFeaturesSelect, 0)
        return UInt64(high) << 32 | UInt64(read(.deviceFeatures))
    }

    /// Resets and negotiates. False if the device refuses.
    public func negotiate(features: UInt64) -> Bool {
        write(.status, 0)
        queues = [:]
        arena = arenaStart
        add(.acknowledge)
        add(.driver)
        write(.driverFeaturesSelect, 1)
        write(.driverFeatures, UInt32(features >> 32))
        write(.driverFeaturesSelect, 0)
        write(.driverFeatures, UInt32(truncatingIfNeeded: features))
        add(.featuresOK)
        return status.contains(.featuresOK)
    }

    /// Sets a queue up. `base`: where, for wrong places.
    @discardableResult
    public func enable(_ index: Int, size: UInt16 = 32, base: UInt64? = nil) -> MockQueue {
        let queue = MockQueue(memory: memory, base: allocate(MockQueue.bytes(size: size), alignment: 4096), size: size)
        queues[index] = queue
        write(.queueSelect, UInt32(index))
        write(.queueSize, UInt32(size))
        let descriptors = base ?? queue.descriptors
        write(.queueDescriptorsLow, UInt32(truncatingIfNeeded: descriptors))
        write(.queueDescriptorsHigh, UInt32(descriptors >> 32))
        write(.queueDriverLow, UInt32(truncatingIfNeeded: queue.available))
        write(.queueDriverHigh, UInt32(queue.available >> 32))
        write(.queueDeviceLow, UInt32(truncatingIfNeeded: queue.used))
        write(.queueDeviceHigh, UInt32(queue.used >> 32))
        write(.queueReady, 1)
        return queue
    }

    /// The whole of a driver's start.
    @discardableResult
    public func start(features: UInt64, queues: [Int]) -> Bool {
        guard negotiate(features: features) else { return false }
        for index in queues { enable(index) }
        add(.driverOK)
        return !status.contains(.needsReset)
    }

    /// Lays buffers into memory and makes a chain of them available, without a notification.
    @discardableResult
    public func add(queue index: Int, readable: [[UInt8]], writable: [Int] = [], indirect: Bool = false) -> UInt16 {
        let queue = queues[index]!
        var list = readable.map { bytes in
            let place = allocate(UInt64(bytes.count))
            memory.poke(bytes, at: place)
            return MockDescriptor(place, UInt32(bytes.count))
        }
        list += writable.map { MockDescriptor(allocate(UInt64($0)), UInt32($0), flags: DescriptorFlag.write) }
        let head =
            indirect ? queue.indirectChain(list, table: allocate(16 * UInt64(list.count))) : queue.chain(list)
        queue.publish(head)
        return head
    }

    public func kick(_ index: Int) { write(.queueNotify, UInt32(index)) }

    /// `add`, `kick`, and what came back.
    @discardableResult
    public func send(
        queue index: Int, readable: [[UInt8]], writable: [Int] = [], indirect: Bool = false
    ) -> [(head: UInt32, written: UInt32)] {
        add(queue: index, readable: readable, writable: writable, indirect: indirect)
        kick(index)
        return queues[index]!.takeUsed()
    }
}
