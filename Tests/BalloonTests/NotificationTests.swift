// SPDX-License-Identifier: Apache-2.0
import Balloon
import CLinux
import GuestMemory
import Synchronization
import TestSupport
import Testing
import Virtio

/// A driver that adds buffers while the device serves its queue: whatever is in the queue has a notification to come.
@Suite struct NotificationTests {
    /// Acts as another vCPU would, whenever the device writes to guest memory.
    final class OtherProcessor: Sendable {
        private let act = Mutex<(@Sendable () -> Void)?>(nil)
        /// Until it is told to stop. What it does itself does not call it again.
        func start(_ body: @escaping @Sendable () -> Void) { act.withLock { $0 = body } }
        func stop() { act.withLock { $0 = nil } }
        func wrote() { act.withLock { $0 }?() }
    }

    /// The other end of a ring.
    final class Driver: @unchecked Sendable {
        // Sendable: used by one thread.
        let queue: MockQueue
        private(set) var made = 0
        private(set) var used = 0
        /// The device asked for a notification of one of those that were made since the last look.
        var isKickDue = false
        init(_ queue: MockQueue) { self.queue = queue }

        /// Makes one more available, if one was used: as Linux does it with the event index (section 2.7.10).
        func add(upTo limit: Int) {
            used += queue.takeUsed().count
            guard made < limit, made - used < Int(queue.size) else { return }
            let head = UInt16(made % Int(queue.size)), new = UInt16(truncatingIfNeeded: made + 1)
            queue.publish(head)
            made += 1
            let event: UInt16 = queue.memory.peek(queue.used + 4 + 8 * UInt64(queue.size))
            if new &- event &- 1 < 1 { isKickDue = true }
        }
    }

    @Test(arguments: [1, 2, 3, 7]) func nothingIsLeftLyingWithTheEventIndex(_ rate: Int) throws {
        let size = 16 << 20
        let host = try #require(lacuna_mmap(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))
        defer { munmap(host, size) }
        let other = OtherProcessor()
        let memory = try GuestMemory(
            borrowing: [(GuestRange(start: GuestAddress(0), size: UInt64(size)), host)], limit: 1 << 32,
            hooks: BorrowedMemoryHooks(discard: nil) { _, _ in other.wrote() })
        let device = BalloonDevice(memory: memory, features: BalloonFeature.all)
        let transport = MMIOTransport(device: device, memory: memory) {}
        let mock = MockDriver(memory: memory, transport: transport)
        #expect(mock.negotiate(features: version1 | VirtioFeature.eventIndex))
        mock.enable(0, size: 256)
        mock.enable(1, size: 256)
        mock.add(.driverOK)
        let list = mock.allocate(4), queue = mock.queues[0]!, driver = Driver(mock.queues[0]!)
        memory.poke(UInt32(3000), at: list)
        for index in 0..<queue.size { queue.set(index, MockDescriptor(list, 4)) }
        // The ring is full when the device hears of it; then one more for each so many of the device's writes.
        let wanted = 5000, writes = Tally()
        for _ in 0..<256 { driver.add(upTo: wanted) }
        other.start {
            writes.add()
            if writes.value % rate == 0 { driver.add(upTo: wanted) }
        }
        driver.isKickDue = true
        var kicks = 0
        while driver.isKickDue {
            driver.isKickDue = false
            kicks += 1
            mock.kick(0)
            // The driver goes on when the device is done, too.
            driver.add(upTo: wanted)
        }
        other.stop()
        driver.add(upTo: wanted)
        #expect(driver.made == wanted && driver.used == wanted, "after \(kicks) notifications")
        #expect(device.counters.inflateChains == UInt64(wanted))
    }
}
