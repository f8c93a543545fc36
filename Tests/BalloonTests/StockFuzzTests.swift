// SPDX-License-Identifier: Apache-2.0
import Balloon
import GuestMemory
import TestSupport
import Testing
import Virtio

/// A guest that sends anything on any queue, in any direction, and hosts that ask at any time.
@Suite struct StockFuzzTests {
    /// Where the queues are, which the random lists must leave alone: the guest's loss, but the test's too.
    private static let protected = 256..<1024

    @Test(arguments: [1, 2, 3, 4] as [UInt64])
    func anythingOnAnyQueue(seed: UInt64) throws {
        var random = SeededGenerator(seed: seed)
        let unit = seed % 2 == 0 ? 64 : 1
        var bench = StockBench(features: StockBench.features, releaseUnit: unit, reserved: 0x9f..<0xff)
        bench.fill(0x9f..<0xff)
        var totals = BalloonCounters()
        func page() -> UInt32 {
            switch random.next() % 8 {
            case 0: return UInt32(truncatingIfNeeded: random.anyMagnitude())
            case 1: return UInt32.random(in: 0x9e..<0x101, using: &random)
            case 2: return UInt32.random(in: 1020..<2052, using: &random)
            default: return random.next() % 2 == 0 ? UInt32.random(in: 0..<256, using: &random) : UInt32.random(in: 2048..<2560, using: &random)
            }
        }
        for round in 0..<6000 {
            let number = Int.random(in: 0..<5, using: &random), ring = bench.driver.queues[number]!
            var bytes: [UInt8] = []
            switch number {
            case 0, 1: bytes = pageList((0..<Int.random(in: 1...64, using: &random)).map { _ in page() }.filter { !Self.protected.contains(Int($0)) })
            case 2: bytes = statistics((0..<Int.random(in: 1...20, using: &random)).map { _ in (UInt16(random.next() % 20), random.next()) })
            case 3: bytes = words32([random.next() % 2 == 0 ? bench.driver.configuration(8) : UInt32(random.next() % 6)])
            default: break
            }
            if random.next() % 10 == 0 { bytes += random.bytes(Int.random(in: 1...9, using: &random)) }
            var list: [MockDescriptor] = []
            if !bytes.isEmpty, number != 4 || random.next() % 8 == 0 {
                bench.memory.poke(bytes, at: 0x20_0000)
                list.append(MockDescriptor(0x20_0000, UInt32(bytes.count)))
            }
            if number >= 3 && random.next() % 2 == 0 || random.next() % 16 == 0 {
                let odd: UInt64 = random.next() % 8 == 0 ? random.next() % 4096 : 0
                let pages = UInt32(1 + random.next() % 110), rest = UInt32(random.next() % 4096)
                list.append(MockDescriptor(UInt64(2048 + random.next() % 390) << 12 + odd, pages << 12 - (random.next() % 2 == 0 ? 0 : rest), flags: DescriptorFlag.write))
            }
            if random.next() % 200 == 0 { list.append(MockDescriptor(random.anyMagnitude(), 4096, flags: DescriptorFlag.write)) }
            if list.isEmpty { list = [MockDescriptor(0x20_0000, 4)] }
            ring.publish(ring.chain(list))
            bench.driver.kick(number)
            switch random.next() % 16 {
            case 0: _ = bench.device.openWindow()
            case 1: bench.device.closeWindow()
            case 2: bench.device.releaseHints()
            case 3: _ = bench.device.requestStatistics()
            case 4: bench.device.setQuiesced(random.next() % 2 == 0)
            case 5: if let report = bench.device.waitForReport(bench.driver.configuration(8), milliseconds: 0) {
                #expect(pages(report.pages).isDisjoint(with: Array(0x9f..<0xff) + Array(1024..<2048)))
            }
            default: break
            }
            for ring in bench.driver.queues.values { _ = ring.takeUsed() }
            let counters = bench.device.counters
            if bench.driver.status.contains(.needsReset) || round % 500 == 499 {
                // The machine's own pages are as they were, and the whole state can be had and taken.
                #expect(bench.isFilled(0x9f..<0xff))
                #expect(counters.releasedPages % UInt64(unit) == 0)
                let target = StockBench(memory: bench.memory, releaseUnit: unit, reserved: 0x9f..<0xff, isStarted: false)
                #expect(throws: Never.self) {
                    var decoder = StateDecoder(bench.save())
                    try target.transport.restore(from: &decoder)
                    try decoder.finish()
                }
                #expect(target.device.status.inflatedPages == bench.device.status.inflatedPages)
                totals.brokenQueues += counters.brokenQueues
                totals.malformedLists += counters.malformedLists
                totals.malformedStatistics += counters.malformedStatistics
                totals.malformedHints += counters.malformedHints
                totals.malformedReportings += counters.malformedReportings
                totals.misplacedHints += counters.misplacedHints
                totals.hintedPages += counters.hintedPages
                totals.releasedPages += counters.releasedPages
                bench = StockBench(features: StockBench.features, releaseUnit: unit, reserved: 0x9f..<0xff)
                bench.fill(0x9f..<0xff)
            }
        }
        // Every kind of wrong was there, and every kind of right.
        for count in [
            totals.brokenQueues, totals.malformedLists, totals.malformedStatistics, totals.malformedHints,
            totals.malformedReportings, totals.misplacedHints, totals.hintedPages, totals.releasedPages,
        ] { #expect(count > 0) }
    }

    /// A queue over memory that is not there: the device does not start, and says that it needs a reset.
    @Test func queueOverUnmappedMemory() {
        for base in [4 << 20, 1 << 40, UInt64.max & ~4095] {
            let bench = StockBench(isStarted: false)
            #expect(bench.driver.negotiate(features: version1 | StockBench.features))
            for number in 0..<5 { bench.driver.enable(number, base: number == 2 ? base : nil) }
            bench.driver.add(.driverOK)
            #expect(bench.driver.status.contains(.needsReset), "\(base)")
            #expect(bench.device.requestStatistics() == nil && bench.device.refusal != nil)
            // And the next driver finds it whole.
            #expect(bench.driver.start(features: version1 | StockBench.features, queues: [0, 1, 2, 3, 4]))
        }
    }
}
