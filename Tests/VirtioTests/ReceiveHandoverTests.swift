// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import TestSupport
import Testing
import Virtio

@testable import Vhost

/// What is known of the pages that the kernel writes received packets to. The driver is played by hand, the kernel by
/// looks at the ring that it would get.
@Suite struct ReceiveHandoverTests {
    private let memory = GuestMemory.withHole()
    private let driver: MockQueue
    private let handover: ReceiveHandover
    private let base: UInt64 = 0x1_0000

    init() throws {
        driver = MockQueue(memory: memory, base: base, size: 8, startIndex: 65530)
        handover = try #require(ReceiveHandover(memory: memory))
    }

    private func ring(_ next: UInt16) -> VhostRing {
        let state = driver.state
        return VhostRing(
            size: 8, descriptors: state.descriptors, available: state.available, used: state.used, nextAvailable: next)
    }
    /// Makes a buffer of one page available, in the descriptor `number`.
    private func post(_ page: UInt64, in number: UInt16, bytes: UInt32 = 4096) {
        driver.set(number, MockDescriptor(page << 12, bytes, flags: DescriptorFlag.write))
        driver.publish(number)
    }
    /// The kernel has used everything up to `index`.
    private func use(upTo index: UInt16) { memory.poke(index, at: driver.used + 2) }
    private func collect() -> [Int] {
        let bitmap = PageBitmap(bitCount: memory.frameCount)
        handover.collect(into: bitmap)
        return (0..<memory.frameCount).filter { bitmap[$0] }
    }

    @Test func aBufferThatWasTakenAndReplacedIsStillKnown() throws {
        _ = handover.begin(ring(65530))
        handover.setLogging(true)
        for number in 0..<8 as Range<UInt16> { post(32 + UInt64(number), in: number) }
        #expect(handover.handOver() && collect() == Array(32..<40))
        // The first three are used, and their descriptors used again, before anybody looks.
        use(upTo: 65533)
        for number in 0..<3 as Range<UInt16> { post(64 + UInt64(number), in: number) }
        #expect(handover.handOver())
        #expect(collect() == Array(32..<40) + [64, 65, 66])
        // The kernel no longer has the first ones.
        #expect(collect() == Array(35..<40) + [64, 65, 66])
        #expect(!handover.handOver())
    }

    @Test func aRingThatBeginsAnewForgetsNothing() throws {
        _ = handover.begin(ring(65530))
        handover.setLogging(true)
        post(40, in: 0)
        handover.handOver()
        use(upTo: 65531)
        _ = handover.begin(ring(65531))
        #expect(collect() == [40] && collect().isEmpty)
        // Without a log nothing is kept.
        handover.setLogging(false)
        post(41, in: 1)
        handover.handOver()
        _ = handover.begin(ring(65532))
        #expect(collect().isEmpty)
    }

    @Test func theKernelSeesTheDriversEntriesAtTheirPlaces() throws {
        for number in [5, 3, 7] as [UInt16] { post(50, in: number) }
        let own = try #require(handover.begin(ring(65530)).flatMap { UnsafePointer<UInt16>(bitPattern: UInt($0)) })
        #expect(own[0] == 0 && own[1] == 65533)
        #expect((0..<3).map { own[2 + (65530 + $0) % 8] } == [5, 3, 7])
        #expect(!handover.isExhausted)
        use(upTo: 65533)
        #expect(handover.isExhausted)
        // Across the end of the index's range.
        for number in 0..<5 as Range<UInt16> { post(51, in: number) }
        #expect(handover.handOver() && own[1] == 2 && !handover.isExhausted)
    }

    @Test func theDriverSaysWhetherItWantsInterrupts() throws {
        _ = handover.begin(ring(65530))
        #expect(handover.wantsInterrupt)
        driver.suppressInterrupts(true)
        #expect(!handover.wantsInterrupt)
    }

    /// The worst that a driver can write: nothing outside RAM is named, and every call ends.
    @Test func nonsenseIsOnlyPassedOn() throws {
        let own = try #require(handover.begin(ring(65530)).flatMap { UnsafePointer<UInt16>(bitPattern: UInt($0)) })
        handover.setLogging(true)
        post(1 << 40, in: 0)
        post(33, in: 1, bytes: 0)
        post(34, in: 2, bytes: .max)
        // Readable for the device, a chain in a circle, a head outside the table.
        driver.set(3, MockDescriptor(35 << 12, 4096))
        driver.publish(3)
        driver.set(4, MockDescriptor(36 << 12, 4096, flags: DescriptorFlag.write | DescriptorFlag.next, next: 4))
        driver.publish(4)
        driver.publish(8)
        driver.publish(.max)
        #expect(handover.handOver() && collect() == [36])
        // An index that is further ahead than the ring is long: the kernel is to see it.
        driver.publish(index: driver.availableIndex &+ 9)
        #expect(handover.handOver() && own[1] == driver.availableIndex)
        var random = SeededGenerator(seed: 11)
        for _ in 0..<2000 {
            for word in 0..<16 { memory.poke(random.next(), at: base + 8 * UInt64(word)) }
            memory.poke(UInt16(truncatingIfNeeded: random.next()), at: driver.available + 2)
            handover.handOver()
            _ = handover.isExhausted
        }
        #expect(collect().allSatisfy { $0 < memory.frameCount })
        #expect(handover.begin(VhostRing(size: 0, descriptors: ring(0).descriptors, available: ring(0).available, used: ring(0).used, nextAvailable: 0)) == nil)
    }
}
