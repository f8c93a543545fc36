// SPDX-License-Identifier: Apache-2.0
import Balloon
import GuestMemory
import Synchronization
import TestSupport
import Testing
import Virtio

/// The device as the stock Linux driver knows it.
@Suite struct StockTests {
    // MARK: Queue numbers

    @Test func queueNumbersFollowTheFeatures() {
        // Linux leaves no gaps: reporting alone is queue 2. A driver by the specification has it at 4.
        let features = version1 | BalloonFeature.pageReporting
        for number in [2, 4] {
            let bench = StockBench(isStarted: false)
            #expect(bench.driver.start(features: features, queues: [0, 1, number]))
            bench.fill(100..<101)
            #expect(bench.send(queue: number, pages: [(100, 1)]).count == 1)
            #expect(bench.isZero(100..<101), "queue \(number)")
        }
        // All of the standard's, and the bitmap's last.
        let bench = StockBench(isStarted: false)
        #expect(bench.driver.start(features: version1 | StockBench.features | bitmap, queues: [0, 1, 2, 3, 4, 5]))
        #expect(bench.device.hintMethod == .bitmap)
        bench.driver.send(queue: 2, readable: [statistics([(4, 77)])])
        #expect(bench.device.status.statistics?.values == [.free: 77])
        // Hints and bitmap without the others: 2 and 3, or 3 and 5.
        for numbers in [[2, 3], [3, 5]] {
            let bench = StockBench(isStarted: false)
            let features = version1 | BalloonFeature.freePageHint | bitmap
            #expect(bench.driver.start(features: features, queues: [0, 1] + numbers))
            bench.driver.send(queue: numbers[0], readable: [words32([0])])
            #expect(bench.device.counters.hintChains == 1, "\(numbers)")
            bench.driver.send(queue: numbers[1], readable: [header(9)])
            #expect(bench.device.counters.reportChains == 1, "\(numbers)")
        }
    }

    // MARK: Inflate and deflate

    @Test func inflatedPagesGoBackBeforeTheDriverHears() {
        let bench = StockBench()
        bench.fill(100..<110)
        _ = bench.takeLog()
        // Side by side in either order, and one apart: three runs would be two.
        bench.driver.add(queue: 0, readable: [pageList([103, 102, 101, 104, 107])])
        bench.driver.kick(0)
        #expect(bench.isZero(101..<105) && bench.isZero(107..<108))
        #expect(bench.isFilled(100..<101) && bench.isFilled(105..<107) && bench.isFilled(108..<110))
        let counters = bench.device.counters
        #expect(counters.releasedPages == 5 && counters.releases == 2)
        #expect(bench.device.status.inflatedPages == 5)
    }

    /// A migration under way sends the page again: what it held before must not stay at the destination.
    @Test func w3_releasedPagesAreInTheWriteLog() {
        let bench = StockBench()
        bench.fill(100..<110)
        _ = bench.takeLog()
        bench.inflate([100, 101])
        #expect(bench.takeLog().isSuperset(of: [100, 101]))
        bench.send(queue: StockBench.queues.reporting, pages: [(104, 2)])
        #expect(bench.takeLog().isSuperset(of: [104, 105]))
    }

    @Test func nothingIsDiscardedTwice() {
        let bench = StockBench()
        bench.inflate([100])
        // The guest has the page again, and uses it.
        bench.deflate([100])
        bench.fill(100..<101)
        bench.deflate([100])
        #expect(bench.isFilled(100..<101))
        bench.inflate([101])
        bench.fill(101..<102)
        // In the balloon already: a driver that says so is confused, and the page is left alone.
        bench.inflate([101])
        #expect(bench.isFilled(101..<102))
        let counters = bench.device.counters
        #expect(counters.pagesInflatedTwice == 1 && counters.pagesNotInflated == 1)
    }

    @Test func hugePagesGoBackWhole() {
        // A unit of 64 pages; the regions are multiples of it.
        let bench = StockBench(releaseUnit: 64)
        bench.fill(64..<256)
        bench.inflate(Array(64..<127))
        #expect(bench.isFilled(64..<256) && bench.device.counters.releasedPages == 0)
        bench.inflate([128, 127])
        #expect(bench.isZero(64..<128) && bench.isFilled(128..<256))
        #expect(bench.device.counters.releasedPages == 64 && bench.device.counters.releases == 1)
        bench.inflate(Array(129..<256).reversed())
        #expect(bench.isZero(128..<256) && bench.device.counters.releases == 2)
        // Taken back in part and given again: the whole goes back once more.
        bench.deflate([70])
        bench.fill(64..<128)
        bench.inflate([70])
        #expect(bench.isZero(64..<128))
        // Of a report only what is a whole.
        bench.fill(300..<600)
        bench.send(queue: StockBench.queues.reporting, pages: [(300, 200)])
        #expect(bench.isZero(320..<448) && bench.isFilled(300..<320) && bench.isFilled(448..<600))
    }

    /// The other pages of a unit were acknowledged before: without MUST_TELL_HOST the guest may be using them.
    @Test func hugePagesStayWithoutMustTellHost() {
        let bench = StockBench(features: 0, releaseUnit: 64)
        bench.fill(64..<128)
        bench.inflate(Array(64..<128))
        #expect(bench.isFilled(64..<128) && bench.device.counters.releasedPages == 0)
    }

    @Test func pagesThatAreNotTheGuests() {
        let bench = StockBench(reserved: 0x9f..<0xff)
        bench.fill(0x9e..<0x100)
        // The firmware's area, the hole, beyond the end, and the highest number there is.
        bench.inflate([0x9f, 0xf0, 0xfe, 1024, 2047, 2560, .max])
        bench.send(queue: StockBench.queues.reporting, pages: [(0x9e, 2)])
        #expect(bench.isFilled(0x9e..<0x100))
        #expect(bench.device.counters.listedPagesNotRAM == 9 && bench.device.status.inflatedPages == 0)
        #expect(bench.log.lines.count == 1 && bench.log.lines[0].contains("7 pages"))
        bench.inflate([0x9e, 0xff])
        #expect(bench.isZero(0x9e..<0x9f) && bench.isZero(0xff..<0x100))
    }

    @Test func messagesAreBounded() {
        let bench = StockBench()
        for _ in 0..<1000 { bench.inflate([.max]) }
        #expect(bench.device.counters.listedPagesNotRAM == 1000)
        // At least one, and no more than a burst for each period that may have begun meanwhile.
        #expect((1...40).contains(bench.log.lines.count))
    }

    @Test func targetAndActual() {
        let bench = StockBench()
        bench.device.setTarget(pages: 3)
        #expect(bench.driver.configuration(0) == 3 && bench.driver.read(.interruptStatus) & 2 == 2)
        #expect(!bench.device.waitForActual(pages: 3, milliseconds: 0))
        let transport = bench.transport
        let driver = HostThread { transport.write(offset: MMIO.configuration + 4, size: 4, value: 3) }
        #expect(bench.device.waitForActual(pages: 3, milliseconds: 60_000))
        driver.join()
        #expect(bench.device.status.actualPages == 3 && bench.device.status.targetPages == 3)
    }

    // MARK: Reporting

    @Test func reportedPagesGoBack() {
        let bench = StockBench()
        bench.fill(512..<1024)
        #expect(bench.send(queue: 4, pages: [(640, 64), (512, 64), (576, 64)]).map(\.written) == [0])
        #expect(bench.isZero(512..<704) && bench.isFilled(704..<1024))
        let counters = bench.device.counters
        #expect(counters.reportedFreePages == 192 && counters.releasedPages == 192 && counters.releases == 1)
        // Half a page, and a readable part.
        let ring = bench.driver.queues[4]!
        ring.publish(ring.chain([MockDescriptor(800 << 12, 0x1800, flags: DescriptorFlag.write)]))
        bench.driver.kick(4)
        ring.publish(
            ring.chain([MockDescriptor(800 << 12, 4096), MockDescriptor(801 << 12, 4096, flags: DescriptorFlag.write)]))
        bench.driver.kick(4)
        #expect(bench.isFilled(704..<1024) && bench.device.counters.malformedReportings == 2)
        #expect(ring.takeUsed().count == 2)
    }

    @Test func reportedPagesKeepThePoison() {
        for (poison, isKept) in [(0xaaaa_aaaa, true), (0, false)] as [(UInt32, Bool)] {
            let bench = StockBench(features: StockBench.features | BalloonFeature.pagePoison, poison: poison)
            bench.fill(512..<576)
            bench.send(queue: 4, pages: [(512, 64)])
            #expect(isKept ? bench.isFilled(512..<576) : bench.isZero(512..<576))
            #expect(bench.device.counters.reportedPagesKept == (isKept ? 64 : 0))
            #expect(bench.device.status.poison == poison)
        }
        // Inflated pages are the device's, poison or not.
        let bench = StockBench(features: StockBench.features | BalloonFeature.pagePoison, poison: 1)
        bench.fill(512..<513)
        bench.inflate([512])
        #expect(bench.isZero(512..<513))
    }

    // MARK: Statistics

    @Test func statisticsRoundTrip() throws {
        let bench = StockBench()
        #expect(bench.device.requestStatistics() == 0)
        // The driver's first buffer, which the device keeps.
        #expect(bench.driver.send(queue: 2, readable: [statistics([(0, 1)])]).isEmpty)
        #expect(bench.device.status.statistics?.number == 1)
        let before = bench.interrupts.value
        let number = try #require(bench.device.requestStatistics())
        #expect(number == 1 && bench.interrupts.value == before + 1)
        #expect(bench.driver.queues[2]!.takeUsed().map(\.written) == [0])
        #expect(bench.device.waitForStatistics(after: number, milliseconds: 0) == nil)
        // All sixteen in reverse, a tag twice, and two that nobody knows.
        let all = (0..<16 as Range<UInt16>).reversed().map { ($0, UInt64($0) * 1000 + 7) }
        bench.driver.send(queue: 2, readable: [statistics([(16, 1), (3, 0)] + all + [(.max, 2)])])
        let answer = try #require(bench.device.waitForStatistics(after: number, milliseconds: 0))
        #expect(answer.number == 2 && answer.values.count == 16)
        for tag in StatisticTag.allCases { #expect(answer.values[tag] == UInt64(tag.rawValue) * 1000 + 7) }
        #expect(bench.device.counters.unknownStatistics == 2)
        // After the year 2020, by a clock in milliseconds.
        #expect(answer.time > 1_577_836_800_000)
    }

    /// Linux lays its first buffer out, and notifies, while it sets the queues up.
    @Test func firstBufferFromBeforeDriverOK() {
        let bench = StockBench(isStarted: false)
        #expect(bench.driver.negotiate(features: version1 | BalloonFeature.statistics))
        for number in 0..<3 { bench.driver.enable(number) }
        bench.driver.add(queue: 2, readable: [statistics([(4, 5)])])
        bench.driver.kick(2)
        #expect(bench.device.counters.statisticsBuffers == 0)
        bench.driver.add(.driverOK)
        #expect(bench.device.status.statistics?.values == [.free: 5])
        #expect(bench.device.requestStatistics() == 1 && bench.driver.queues[2]!.takeUsed().count == 1)
    }

    @Test func requestsBeforeTheAnswerAreOneRequest() {
        let bench = StockBench()
        bench.driver.send(queue: 2, readable: [statistics([(4, 1)])])
        for _ in 0..<5 { #expect(bench.device.requestStatistics() == 1) }
        #expect(bench.driver.queues[2]!.takeUsed().count == 1)
    }

    @Test func malformedStatistics() {
        let bench = StockBench()
        func buffer(_ bytes: [UInt8], writable: [Int] = []) {
            bench.driver.send(queue: 2, readable: [bytes], writable: writable)
            // The buffer is kept and can be asked with: a driver that errs once is not lost.
            _ = bench.device.requestStatistics()
            #expect(bench.driver.queues[2]!.takeUsed().count == 1)
        }
        buffer([1])
        buffer(statistics([(0, 1)]) + [0, 0])
        buffer([UInt8](repeating: 0, count: 2570))
        buffer(statistics([(0, 1)]), writable: [10])
        #expect(bench.device.counters.malformedStatistics == 4 && bench.device.status.statistics == nil)
        buffer(statistics([(5, 9)]))
        #expect(bench.device.status.statistics?.values == [.total: 9])
        // A second buffer while the device has one.
        bench.driver.send(queue: 2, readable: [statistics([(5, 10)])])
        #expect(bench.driver.send(queue: 2, readable: [statistics([(5, 11)])]).count == 1)
        #expect(bench.device.counters.extraStatisticsBuffers == 1)
    }

    @Test func nothingIsWrittenWhileTheMachineStands() {
        let bench = StockBench()
        bench.driver.send(queue: 2, readable: [statistics([(5, 9)])])
        bench.device.setQuiesced(true)
        _ = bench.takeLog()
        #expect(bench.device.requestStatistics() == 1)
        #expect(bench.takeLog().isEmpty && bench.driver.queues[2]!.takeUsed().isEmpty)
        bench.device.setQuiesced(false)
        #expect(bench.driver.queues[2]!.takeUsed().count == 1)
    }

    @Test func withoutTheQueueThereIsNothingToAsk() {
        let bench = StockBench(features: BalloonFeature.pageReporting)
        #expect(bench.device.requestStatistics() == nil)
        #expect(bench.device.refusal?.contains("FREE_PAGE_HINT") == true)
    }
}

/// Takes a device's messages.
final class MessageLog: Sendable {
    private let taken = Mutex<[String]>([])
    var lines: [String] { taken.withLock { $0 } }
    func add(_ line: String) { taken.withLock { $0.append(line) } }
}
