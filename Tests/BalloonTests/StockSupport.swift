// SPDX-License-Identifier: Apache-2.0
import Balloon
import GuestMemory
import TestSupport
import Testing
import Virtio

/// Statistics as Linux lays them out: ten bytes for each.
func statistics(_ list: [(UInt16, UInt64)]) -> [UInt8] {
    var bytes = ByteBuilder()
    for (tag, value) in list {
        bytes.put(tag)
        bytes.put(value)
    }
    return bytes.bytes
}

/// A balloon and a driver that plays Linux's `virtio_balloon.c`, with all of its queues.
final class StockBench {
    static let queues = (inflate: 0, deflate: 1, statistics: 2, hints: 3, reporting: 4)
    static let features =
        BalloonFeature.mustTellHost | BalloonFeature.statistics | BalloonFeature.freePageHint
        | BalloonFeature.pageReporting
    /// Where the configuration has `free_page_hint_cmd_id`.
    static let command: UInt64 = 8

    let memory: GuestMemory
    let device: BalloonDevice
    let transport: MMIOTransport
    let driver: MockDriver
    let interrupts = Tally()
    let log = MessageLog()

    init(
        features: UInt64 = StockBench.features, poison: UInt32? = nil, memory: GuestMemory = .withHole(),
        releaseUnit: Int = 1, reserved: Range<Int> = 0..<0, isStarted: Bool = true
    ) {
        self.memory = memory
        let log = log, interrupts = interrupts
        device = BalloonDevice(
            memory: memory, features: BalloonFeature.all, reserved: reserved, releaseUnit: releaseUnit,
            log: { log.add($0) })
        transport = MMIOTransport(device: device, memory: memory) { interrupts.add() }
        driver = MockDriver(memory: memory, transport: transport)
        guard isStarted else { return }
        #expect(driver.negotiate(features: version1 | features))
        var number = 0
        for mask in [nil, nil, BalloonFeature.statistics, BalloonFeature.freePageHint, BalloonFeature.pageReporting] {
            guard mask.map({ features & $0 != 0 }) ?? true else { continue }
            driver.enable(number)
            number += 1
        }
        if let poison { driver.setConfiguration(12, poison) }
        driver.add(.driverOK)
    }

    func inflate(_ pages: [UInt32]) { driver.send(queue: 0, readable: [pageList(pages)]) }
    func deflate(_ pages: [UInt32]) { driver.send(queue: 1, readable: [pageList(pages)]) }

    /// Makes buffers available that are the guest's own pages, and notifies.
    @discardableResult
    func send(queue: Int, pages: [(first: UInt64, count: UInt32)]) -> [(head: UInt32, written: UInt32)] {
        let ring = driver.queues[queue]!
        ring.publish(ring.chain(pages.map { MockDescriptor($0.first << 12, $0.count << 12, flags: DescriptorFlag.write) }))
        driver.kick(queue)
        return ring.takeUsed()
    }

    /// A command id, as the driver announces what its hints belong to.
    func sayCommand(_ id: UInt32) { driver.send(queue: Self.queues.hints, readable: [words32([id])]) }
    func hint(_ first: UInt64, _ count: UInt32 = 1) { send(queue: Self.queues.hints, pages: [(first, count)]) }

    func fill(_ pages: Range<Int>) {
        for page in pages { memory.poke([UInt8](repeating: 0xa5, count: 4096), at: UInt64(page) << 12) }
    }
    func isZero(_ pages: Range<Int>) -> Bool {
        pages.allSatisfy { memory.peek(UInt64($0) << 12, count: 4096).allSatisfy { $0 == 0 } }
    }
    func isFilled(_ pages: Range<Int>) -> Bool {
        pages.allSatisfy { memory.peek(UInt64($0) << 12, count: 4096).allSatisfy { $0 == 0xa5 } }
    }
    /// Takes the VMM's own dirty log.
    func takeLog() -> Set<Int> {
        let seen = PageBitmap(bitCount: memory.frameCount)
        for index in 0..<seen.wordCount { seen.store(memory.writeLog.atomicTake(word: index), inWord: index) }
        return pages(seen)
    }

    func save() -> [UInt8] {
        var encoder = StateEncoder()
        transport.save(into: &encoder)
        return encoder.bytes
    }
    func restore(_ bytes: [UInt8]) throws {
        var decoder = StateDecoder(bytes)
        try transport.restore(from: &decoder)
        try decoder.finish()
        transport.kick()
    }
}

func words32(_ list: [UInt32]) -> [UInt8] { pageList(list) }
