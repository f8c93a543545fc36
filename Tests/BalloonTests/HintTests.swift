// SPDX-License-Identifier: Apache-2.0
import Balloon
import GuestMemory
import TestSupport
import Testing
import Virtio

/// Free page hints (virtio 1.3, section 5.5.6.5) of a stock driver as reports of free pages.
@Suite struct HintTests {
    private func command(_ bench: StockBench) -> UInt32 { bench.driver.configuration(StockBench.command) }

    @Test func wholeSession() throws {
        let bench = StockBench()
        #expect(bench.device.hintMethod == .freePageHint && bench.device.refusal == nil && command(bench) == 0)
        let request = bench.device.openWindow()
        #expect(request == 2 && command(bench) == 2 && bench.driver.configuration(16) == 0)
        bench.sayCommand(2)
        bench.hint(512, 64)
        bench.hint(2048, 512)
        #expect(bench.device.waitForReport(request, milliseconds: 0).map { pages($0.pages).count } == 576)
        // Of no more use: the driver need not go on.
        #expect(command(bench) == 0)
        bench.hint(600)
        bench.sayCommand(0)
        #expect(bench.device.counters.staleHints == 1 && bench.device.counters.hintedPages == 576)
        bench.device.releaseHints()
        #expect(command(bench) == 1)
        // The next migration.
        let next = bench.device.openWindow()
        #expect(next == 3 && command(bench) == 3)
        bench.sayCommand(3)
        bench.hint(700)
        bench.sayCommand(0)
        #expect(pages(try #require(bench.device.waitForReport(next, milliseconds: 0)).pages) == [700])
        bench.device.releaseHints()
        bench.device.releaseHints()
        #expect(command(bench) == 1)
    }

    /// A driver that never sees DONE keeps what it hinted, and has nothing left to hint for the next request.
    @Test func theNextRequestWaitsUntilDoneWasRead() throws {
        let bench = StockBench()
        let request = bench.device.openWindow()
        bench.sayCommand(request)
        bench.hint(512)
        _ = bench.device.waitForReport(request, milliseconds: 0)
        bench.sayCommand(0)
        bench.device.releaseHints()
        let next = bench.device.openWindow(), before = bench.interrupts.value
        // Other fields are not it.
        _ = bench.driver.configuration(0)
        _ = bench.driver.configuration(12)
        #expect(bench.device.askWhatWaits() == nil && bench.device.waitForReport(next, milliseconds: 0) == nil)
        // A read gives no signals.
        #expect(bench.driver.configuration(8) == 1 && bench.interrupts.value == before)
        // Told to look again, it finds the request.
        #expect(bench.device.askWhatWaits() == nil)
        #expect(bench.interrupts.value == before + 1 && command(bench) == next)
        bench.sayCommand(next)
        bench.hint(700)
        #expect(pages(try #require(bench.device.waitForReport(next, milliseconds: 0)).pages) == [700])
    }

    /// A device in the state in which a request waits for DONE to be read.
    private func waiting(afterStop: Bool) -> (bench: StockBench, next: UInt32) {
        let bench = StockBench()
        let request = bench.device.openWindow()
        bench.sayCommand(request)
        bench.hint(512)
        if afterStop { bench.sayCommand(0) }
        bench.device.releaseHints()
        let next = bench.device.openWindow()
        bench.driver.write(.interruptAcknowledge, 3)
        return (bench, next)
    }
    /// The command id as somebody sees it who fetches everything.
    private func shown(_ bench: StockBench) -> UInt32 {
        bench.device.readConfiguration(offset: 0, bytes: 20)[8..<12].reversed().reduce(0) { $0 << 8 | UInt32($1) }
    }
    private func configurationChanged(_ bench: StockBench) -> Bool {
        defer { bench.driver.write(.interruptAcknowledge, 2) }
        return bench.driver.read(.interruptStatus) & 2 != 0
    }

    @Test func whoWaitsForTheReportAsksAsSoonAsDoneWasRead() throws {
        let (bench, next) = waiting(afterStop: true)
        let device = bench.device, result = MessageLog()
        let thread = HostThread {
            let report = device.waitForReport(next, milliseconds: 60_000)
            result.add(report.map { "\(pages($0.pages))" } ?? "none")
        }
        #expect(command(bench) == 1)
        while command(bench) == 1 { sleep(milliseconds: 1) }
        #expect(configurationChanged(bench) && command(bench) == next)
        bench.sayCommand(next)
        bench.hint(700)
        bench.sayCommand(0)
        thread.join()
        #expect(result.lines == ["[700]"])
    }

    /// Linux reads the id in its sending loop too, where DONE gives nothing back.
    @Test func doneReadWhileSendingDoesNotCount() {
        let (bench, next) = waiting(afterStop: false)
        #expect(command(bench) == 1 && shown(bench) == 1 && bench.device.askWhatWaits() == nil)
        #expect(command(bench) == 1 && !configurationChanged(bench))
        // Not all of what it sent was looked at.
        bench.driver.add(queue: 3, readable: [words32([0])])
        bench.driver.add(queue: 3, readable: [words32([5])])
        bench.driver.kick(3)
        #expect(command(bench) == 1 && bench.device.askWhatWaits() == nil && !configurationChanged(bench))
        bench.driver.add(queue: 3, readable: [words32([0])])
        #expect(command(bench) == 1 && bench.device.askWhatWaits() == nil)
        bench.driver.kick(3)
        // It looks again at the end of its sending, and that counts.
        #expect(configurationChanged(bench) && bench.device.askWhatWaits() == nil && shown(bench) == 1)
        #expect(command(bench) == 1 && bench.device.askWhatWaits() == nil)
        #expect(configurationChanged(bench) && command(bench) == next)
    }

    /// An id that the driver announced and the device did not see yet is sending, too.
    @Test func doneReadBehindAnUnseenCommandDoesNotCount() {
        let (bench, next) = waiting(afterStop: true)
        bench.driver.add(queue: 3, readable: [words32([next - 1])])
        #expect(command(bench) == 1 && bench.device.askWhatWaits() == nil && shown(bench) == 1)
        bench.driver.add(queue: 3, readable: [words32([0])])
        bench.driver.kick(3)
        #expect(configurationChanged(bench) && command(bench) == 1)
        #expect(bench.device.askWhatWaits() == nil && command(bench) == next)
    }

    /// QEMU fetches the whole configuration whichever field its guest reads.
    @Test func aReadOfEverythingCountsAfterAWhile() throws {
        for isBytewise in [false, true] {
            let (bench, next) = waiting(afterStop: true)
            #expect(bench.device.askWhatWaits() == nil)
            if isBytewise {
                // The value stays whole while it is read in pieces.
                #expect((8..<12).map { bench.device.readConfiguration(offset: $0, count: 1) } == [1, 0, 0, 0])
            } else {
                #expect(shown(bench) == 1)
            }
            let delay = try #require(bench.device.askWhatWaits())
            #expect(delay > 0 && delay <= 101 && !configurationChanged(bench))
            // Who waits for the report asks when it is time.
            #expect(!bench.device.waitForEnd(of: next, milliseconds: delay + 50))
            #expect(configurationChanged(bench) && shown(bench) == next)
        }
        // A request that comes later than that finds DONE read.
        let bench = StockBench()
        _ = bench.device.openWindow()
        bench.device.releaseHints()
        #expect(shown(bench) == 1)
        sleep(milliseconds: 110)
        #expect(bench.device.openWindow() == shown(bench))
        // One that began to send meanwhile did so without having seen it.
        let (late, next) = waiting(afterStop: true)
        #expect(shown(late) == 1)
        late.sayCommand(next - 1)
        #expect(!late.device.waitForEnd(of: next, milliseconds: 150) && shown(late) == 1)
        late.driver.write(.interruptAcknowledge, 3)
        late.sayCommand(0)
        #expect(configurationChanged(late) && command(late) == 1)
        #expect(late.device.askWhatWaits() == nil && command(late) == next)
    }

    @Test func aRequestThatIsTakenBackLeavesDoneStanding() {
        let bench = StockBench()
        _ = bench.device.openWindow()
        bench.device.releaseHints()
        _ = bench.device.openWindow()
        bench.device.closeWindow()
        #expect(command(bench) == 1 && command(bench) == 1)
        bench.device.releaseHints()
        _ = bench.device.openWindow()
        // A driver that starts anew knows of nothing.
        bench.driver.write(.status, 0)
        #expect(command(bench) == 0)
    }

    @Test func theDriversStopEndsTheReport() throws {
        let bench = StockBench()
        let request = bench.device.openWindow(), driver = bench.driver
        bench.sayCommand(request)
        bench.hint(512)
        let transport = bench.transport
        driver.add(queue: 3, readable: [words32([0])])
        let thread = HostThread { transport.write(offset: MMIO.Register.queueNotify.rawValue, size: 4, value: 3) }
        let report = bench.device.waitForReport(request, milliseconds: 60_000)
        thread.join()
        #expect(pages(try #require(report).pages) == [512])
    }

    @Test func w2_hintsOfAnEarlierRequestDoNotCount() throws {
        let bench = StockBench()
        let old = bench.device.openWindow()
        bench.sayCommand(old)
        bench.hint(512)
        // A merge, and the next round: what the driver still sends belongs to the first.
        bench.device.closeWindow()
        #expect(command(bench) == 0)
        bench.hint(513)
        let request = bench.device.openWindow()
        bench.hint(514)
        bench.sayCommand(0)
        bench.sayCommand(request)
        bench.hint(515)
        #expect(pages(try #require(bench.device.waitForReport(request, milliseconds: 0)).pages) == [515])
        #expect(bench.device.counters.staleHints == 2)
    }

    @Test func w2_staleCommandIdsDoNotCount() {
        let bench = StockBench()
        let request = bench.device.openWindow()
        for id in [request - 1, request + 1, .max] as [UInt32] where id > 1 {
            bench.sayCommand(id)
            bench.hint(512)
        }
        #expect(bench.device.waitForReport(request, milliseconds: 0) == nil)
        #expect(bench.device.counters.hintedPages == 0)
    }

    @Test func hintsOutOfOrder() {
        let bench = StockBench()
        bench.hint(512)
        #expect(bench.device.counters.misplacedHints == 1)
        let request = bench.device.openWindow()
        bench.hint(512)
        bench.sayCommand(0)
        bench.hint(512)
        #expect(bench.device.counters.misplacedHints == 3)
        // Ids of a wrong size, and one that only the device may say.
        for bytes in [[2], [2, 0, 0], [2, 0, 0, 0, 0], words32([1])] as [[UInt8]] {
            bench.sayCommand(request)
            bench.driver.send(queue: 3, readable: [bytes])
            // Whose hints these are cannot be told.
            bench.hint(512)
        }
        #expect(bench.device.counters.malformedHints == 4 && bench.device.counters.misplacedHints == 7)
        #expect(bench.device.counters.hintedPages == 0 && bench.driver.queues[3]!.takeUsed().isEmpty)
    }

    @Test func oddHints() throws {
        let bench = StockBench(reserved: 0x9f..<0xff)
        let request = bench.device.openWindow()
        // Id and pages in one chain; parts of pages; the firmware's area.
        let ring = bench.driver.queues[3]!, place = bench.driver.allocate(4)
        bench.memory.poke(request, at: place)
        ring.publish(
            ring.chain([
                MockDescriptor(place, 4), MockDescriptor(512 << 12, 4096, flags: DescriptorFlag.write),
                MockDescriptor(520 << 12 + 1, 3 * 4096, flags: DescriptorFlag.write),
                MockDescriptor(530 << 12, 4095, flags: DescriptorFlag.write),
                MockDescriptor(0xf0 << 12, 4096, flags: DescriptorFlag.write),
            ]))
        bench.driver.kick(3)
        #expect(pages(try #require(bench.device.waitForReport(request, milliseconds: 0)).pages) == [512, 521, 522])
        #expect(bench.device.counters.reportedPagesNotRAM == 1)
    }

    @Test func w4_hintedPagesKeepTheirBytes() {
        let bench = StockBench()
        bench.fill(512..<576)
        let request = bench.device.openWindow()
        _ = bench.takeLog()
        bench.sayCommand(request)
        bench.hint(512, 64)
        #expect(bench.device.waitForReport(request, milliseconds: 0) != nil)
        #expect(bench.isFilled(512..<576) && bench.takeLog().isDisjoint(with: 512..<576))
    }

    @Test func w5_balloonPagesAreFreeToo() throws {
        for (features, expected) in [
            (StockBench.features, [100, 512] as Set<Int>),
            (StockBench.features & ~BalloonFeature.mustTellHost, [512] as Set<Int>),
        ] {
            let bench = StockBench(features: features)
            bench.inflate([100, 101])
            let request = bench.device.openWindow()
            bench.sayCommand(request)
            bench.hint(512)
            // Waits in the queue: the guest's again as soon as it is used.
            bench.driver.add(queue: 1, readable: [pageList([101])])
            let report = try #require(bench.device.waitForReport(request, milliseconds: 0))
            #expect(pages(report.pages) == expected)
        }
    }

    @Test func w6_poisonIsRefused() {
        let bench = StockBench(features: StockBench.features | BalloonFeature.pagePoison, poison: 0xaa)
        #expect(bench.device.refusal?.contains("0xaa") == true)
        let request = bench.device.openWindow()
        bench.sayCommand(request)
        bench.hint(512)
        #expect(bench.device.waitForReport(request, milliseconds: 0) == nil)
        #expect(bench.device.counters.reportsVoid == 1)
    }

    @Test func resetEndsEverything() {
        let bench = StockBench()
        let request = bench.device.openWindow()
        bench.sayCommand(request)
        bench.hint(512)
        bench.driver.write(.status, 0)
        #expect(command(bench) == 0 && !bench.device.status.hasHints)
        #expect(bench.device.waitForReport(request, milliseconds: 0) == nil)
    }

    @Test func idsAreNotUsedAgain() throws {
        let bench = StockBench()
        var seen: Set<UInt32> = []
        for turn in 0..<50 {
            let request = bench.device.openWindow()
            #expect(request >= 2 && seen.insert(request).inserted)
            if turn % 3 != 0 { bench.sayCommand(request) }
            if turn % 2 == 0 { bench.device.closeWindow() } else { bench.device.releaseHints() }
        }
        // The numbers have come round to the id that the driver still hints under.
        let old = try #require(seen.max())
        bench.sayCommand(old)
        var state = bench.save()
        let encoded = try #require((0..<state.count - 4).last { place in
            (0..<4).allSatisfy { state[place + $0] == UInt8(truncatingIfNeeded: (old + 1) >> (8 * UInt32($0))) }
        })
        for offset in 0..<4 { state[encoded + offset] = UInt8(truncatingIfNeeded: old >> (8 * UInt32(offset))) }
        let target = StockBench(memory: bench.memory, isStarted: false)
        try target.restore(state)
        bench.driver.add(queue: 3, readable: [words32([old])])
        target.transport.kick()
        #expect(target.device.openWindow() == old + 1)
    }

    /// The device has no business with a hinted page after DONE, nor before.
    @Test func doneLeavesThePagesAlone() {
        let bench = StockBench()
        bench.fill(512..<576)
        let request = bench.device.openWindow()
        bench.sayCommand(request)
        bench.hint(512, 64)
        _ = bench.device.waitForReport(request, milliseconds: 0)
        bench.device.releaseHints()
        #expect(command(bench) == 1)
        bench.hint(512, 64)
        #expect(bench.isFilled(512..<576))
    }

    // MARK: Saved state

    @Test func savedInTheMiddleOfHints() throws {
        let source = StockBench()
        let request = source.device.openWindow()
        source.sayCommand(request)
        source.hint(512)
        // What the driver has on its way when the machine stops.
        source.driver.add(queue: 3, readable: [words32([0])])
        let target = StockBench(memory: source.memory, isStarted: false)
        try target.restore(source.save())
        // The destination has no use for hints: the guest gets its pages back.
        #expect(command(target) == 1 && target.driver.read(.interruptStatus) & 2 == 2)
        #expect(!target.device.status.hasHints && target.device.counters.hintChains == 1)
        #expect(target.device.openWindow() == request + 1)
        // One that is still sending gives nothing back when it reads DONE there.
        let sending = StockBench()
        sending.sayCommand(sending.device.openWindow())
        let third = StockBench(memory: sending.memory, isStarted: false)
        try third.restore(sending.save())
        let wanted = third.device.openWindow()
        #expect(command(third) == 1 && third.device.askWhatWaits() == nil && command(third) == 1)
        sending.driver.add(queue: 3, readable: [words32([0])])
        third.transport.kick()
        #expect(command(third) == 1 && third.device.askWhatWaits() == nil && command(third) == wanted)
        // A machine that nobody asked has nothing to let go of.
        let quiet = StockBench(isStarted: false)
        try quiet.restore(StockBench().save())
        #expect(command(quiet) == 0)
    }

    @Test func savedInTheMiddleOfAnInflate() throws {
        let source = StockBench()
        source.device.setTarget(pages: 3)
        source.inflate([100, 101])
        // Not served yet when the machine stops: the destination does it.
        source.driver.add(queue: 0, readable: [pageList([102])])
        source.driver.add(queue: 1, readable: [pageList([100])])
        source.fill(102..<103)
        let target = StockBench(memory: source.memory, isStarted: false)
        try target.restore(source.save())
        #expect(target.isZero(102..<103) && target.device.status.inflatedPages == 2)
        #expect(source.driver.queues[0]!.takeUsed().count == 1 && source.driver.queues[1]!.takeUsed().count == 1)
    }

    @Test func savedInTheMiddleOfAStatisticsRequest() throws {
        // With the driver's buffer at the device, and with the answer still to come.
        for isAsked in [false, true] {
            let source = StockBench()
            source.device.statisticsInterval = 1500
            source.driver.send(queue: 2, readable: [statistics([(4, 1)])])
            if isAsked {
                _ = source.device.requestStatistics()
                #expect(source.driver.queues[2]!.takeUsed().count == 1)
                source.driver.add(queue: 2, readable: [statistics([(4, 2)])])
            }
            let target = StockBench(memory: source.memory, isStarted: false)
            try target.restore(source.save())
            #expect(target.device.statisticsInterval == 1500)
            #expect(target.device.status.statistics?.values == [.free: isAsked ? 2 : 1])
            #expect(target.device.requestStatistics() == (isAsked ? 2 : 1))
            #expect(source.driver.queues[2]!.takeUsed().map(\.head).count == 1)
        }
        // One that could not be sent because the machine stood still.
        let source = StockBench()
        source.driver.send(queue: 2, readable: [statistics([(4, 1)])])
        source.device.setQuiesced(true)
        _ = source.device.requestStatistics()
        let target = StockBench(memory: source.memory, isStarted: false)
        target.device.setQuiesced(true)
        try target.restore(source.save())
        #expect(source.driver.queues[2]!.takeUsed().isEmpty)
        target.device.setQuiesced(false)
        #expect(source.driver.queues[2]!.takeUsed().count == 1)
    }

    @Test func manyRunsAreSavedAsWords() throws {
        let source = StockBench()
        // Every other page: more runs than words.
        source.inflate(stride(from: 0, to: 200, by: 2).map { UInt32($0) })
        let target = StockBench(memory: source.memory, isStarted: false)
        try target.restore(source.save())
        #expect(target.device.status.inflatedPages == 100)
    }
}
