// SPDX-License-Identifier: Apache-2.0
import Balloon
import GuestMemory
import Synchronization
import TestSupport
import Testing
import Virtio

@Suite struct WindowTests {
    // MARK: A report

    @Test func wholeReportAcrossTheHole() throws {
        let bench = Bench.started()
        #expect(bench.device.refusal == nil)
        let request = bench.device.openWindow()
        #expect(request == 2 && bench.driver.configuration(16) == 2)
        #expect(bench.driver.read(.interruptStatus) == 2 && bench.interrupts.value == 1)
        bench.driver.write(.interruptAcknowledge, 2)

        bench.sendPages(request, first, start: 64, [0xf, 0, 1 << 63])
        #expect(bench.device.waitForReport(request, milliseconds: 0) == nil)
        // The end of the first region and the beginning of the hole (page 1024 on).
        bench.sendPages(request, start: 960, [.max, 0x3])
        // The end of the hole and the second region (page 2048 on), and beyond the end (2560).
        bench.sendPages(request, start: 1984, [1, .max])
        bench.sendPages(request, start: 2496, [1 << 63, 0xff])
        bench.sendPages(request, start: 1 << 52 - 64, [7])
        bench.sendFigures(request, last, [1999, 140, 450, 61, 12])
        let report = try #require(bench.device.waitForReport(request, milliseconds: 0))

        #expect(report.request == request && report.pages.bitCount == bench.memory.frameCount)
        let expected = Set([64, 65, 66, 67, 255]).union(960..<1024).union(2048..<2112).union([2559])
        #expect(pages(report.pages) == expected)
        #expect(
            report.figures
                == FreePageFigures(
                    blocks: 1999, pages: 140, walkNanoseconds: 450, longestLockNanoseconds: 61, batches: 12))
        let counters = bench.device.counters
        #expect(counters.reportedPagesNotRAM == 2 + 1 + 8 + 3)
        #expect(counters.reportChains == 6 && counters.reportsCompleted == 1 && counters.malformedReportChains == 0)
        #expect(bench.driver.read(.interruptStatus) == 1)
        // A report is handed out once.
        #expect(bench.device.waitForReport(request, milliseconds: 0) == nil)
        bench.device.closeWindow()
        #expect(bench.driver.configuration(16) == 0)
    }

    @Test func fixedQueueNumbers() throws {
        var bench = Bench()
        bench.bitmapQueue = 5
        #expect(bench.driver.start(features: version1 | bitmap, queues: [0, 1, 5]))
        #expect(bench.device.refusal == nil)
        #expect(pages(try #require(bench.report(3)).pages) == [64, 65])
        // The gapless number is nothing to such a driver.
        let both = Bench()
        both.driver.start(features: version1 | bitmap, queues: [2, 5])
        both.driver.add(queue: 2, readable: [header(2)])
        both.driver.kick(2)
        #expect(both.device.counters.strayNotifications == 1 && both.device.counters.reportChains == 0)
    }

    @Test func driverWithoutInflateAndDeflate() throws {
        let bench = Bench()
        bench.driver.start(features: version1 | bitmap, queues: [2])
        #expect(pages(try #require(bench.report(1)).pages) == [64])
        let other = Bench()
        other.driver.start(features: version1 | bitmap | BalloonFeature.mustTellHost, queues: [2])
        #expect(pages(try #require(other.report(1)).pages) == [64])
    }

    @Test func chainCutAnywhere() throws {
        let whole = header(2, flags: first, start: 64, bits: 128) + words([0x8000_0000_0000_0001, 0x0f0f])
        for cut in 1..<whole.count {
            let bench = Bench.started(VirtioFeature.indirectDescriptors)
            let request = bench.device.openWindow()
            bench.driver.send(
                queue: 2, readable: [Array(whole[..<cut]), Array(whole[cut...])], indirect: cut % 2 == 0)
            bench.sendFigures(request)
            let report = try #require(bench.device.waitForReport(request, milliseconds: 0))
            #expect(pages(report.pages) == [64, 127, 128, 129, 130, 131, 136, 137, 138, 139])
        }
    }

    @Test func largestChain() throws {
        // 2^22 bits are more than this guest has; all that counts is that they are taken, piece by piece.
        let memory = try GuestMemory(ranges: [GuestRange(start: GuestAddress(0), size: 32 << 20)])
        let bench = Bench(memory: memory)
        bench.driver.start(features: version1 | bitmap, queues: [0, 1, 2])
        let request = bench.device.openWindow()
        bench.sendPages(request, first, start: 0, [UInt64](repeating: .max, count: 1 << 16))
        bench.sendFigures(request)
        let report = try #require(bench.device.waitForReport(request, milliseconds: 0))
        #expect(report.pages.population == memory.ramPages)
        #expect(bench.device.counters.reportedPagesNotRAM == UInt64(1 << 22 - memory.ramPages))
    }

    @Test func reportWithNothingFree() throws {
        let bench = Bench.started()
        let request = bench.device.openWindow()
        bench.sendFigures(request, first | last, [0, 0, 9, 9, 9])
        let report = try #require(bench.device.waitForReport(request, milliseconds: 0))
        #expect(report.pages.population == 0 && report.figures?.batches == 9)
    }

    // MARK: Rules of the window

    @Test func w2_answerToAnEarlierRequestIsDropped() throws {
        let bench = Bench.started()
        let old = bench.device.openWindow()
        bench.sendPages(old, first, start: 64, [1])
        let new = bench.device.openWindow()
        #expect(new != old)
        bench.sendPages(old, start: 128, [1])
        bench.sendFigures(old)
        #expect(bench.device.waitForReport(old, milliseconds: 0) == nil)
        #expect(bench.device.waitForReport(new, milliseconds: 0) == nil)
        // Nor does it spoil the new one.
        bench.sendPages(new, first, start: 192, [1])
        bench.sendPages(old, start: 256, [1])
        bench.sendFigures(old)
        bench.sendPages(UInt32.max, first, start: 256, [1])
        bench.sendFigures(new)
        let report = try #require(bench.device.waitForReport(new, milliseconds: 0))
        #expect(pages(report.pages) == [192])
        #expect(bench.device.counters.staleChains == 5)
    }

    @Test func w2_chainsAfterTheCloseAreDropped() {
        let bench = Bench.started()
        let request = bench.device.openWindow()
        bench.sendPages(request, first, start: 64, [1])
        bench.device.closeWindow()
        bench.sendPages(request, start: 128, [1])
        bench.sendFigures(request)
        #expect(bench.device.waitForReport(request, milliseconds: 0) == nil)
        #expect(bench.device.counters.lateChains == 2 && bench.device.counters.reportsCompleted == 0)
        // The same for one that is whole but was not taken.
        let second = bench.device.openWindow()
        bench.sendFigures(second, first | last)
        bench.device.closeWindow()
        #expect(bench.device.waitForReport(second, milliseconds: 0) == nil)
    }

    @Test func w2_chainsAfterTheLastAreDropped() throws {
        let bench = Bench.started()
        let request = bench.device.openWindow()
        bench.sendPages(request, first, start: 64, [1])
        bench.sendFigures(request)
        bench.sendPages(request, start: 128, [1])
        bench.sendPages(request, first, start: 128, [1])
        bench.send([[1, 2, 3]])
        let report = try #require(bench.device.waitForReport(request, milliseconds: 0))
        bench.sendPages(request, start: 192, [1])
        #expect(pages(report.pages) == [64])
        #expect(bench.device.counters.lateChains == 4)
    }

    @Test func w4_reportedPagesKeepTheirBytes() throws {
        let bench = Bench.started()
        var random = SeededGenerator(seed: 4)
        // Pages 64 to 127 and 2048 to 2111, all of them in use in truth.
        let low = random.bytes(64 * 4096), high = random.bytes(64 * 4096)
        bench.memory.poke(low, at: 64 * 4096)
        bench.memory.poke(high, at: 2048 * 4096)
        let request = bench.device.openWindow()
        bench.sendPages(request, first, start: 64, [.max])
        bench.sendPages(request, start: 2048, [.max])
        bench.sendFigures(request)
        let report = try #require(bench.device.waitForReport(request, milliseconds: 0))
        bench.device.closeWindow()
        #expect(report.pages.population == 128)
        // Compared outside of #expect, which would look for the differences of so many bytes for hours.
        let isLowKept = bench.memory.peek(64 * 4096, count: low.count) == low
        let isHighKept = bench.memory.peek(2048 * 4096, count: high.count) == high
        #expect(isLowKept && isHighKept)
        // Nor were they written and said to be clean, or anything else logged but the used ring.
        #expect(pages(bench.memory.writeLog) == [Int(bench.driver.queues[2]!.used >> 12)])
    }

    @Test func w5_balloonPagesNeedMustTellHost() throws {
        let silent = Bench.started()
        silent.inflate([128, 129])
        #expect(pages(try #require(silent.report(1)).pages) == [64])
        #expect(silent.device.counters.balloonPagesReported == 0)

        let telling = Bench.started(BalloonFeature.mustTellHost)
        telling.inflate([128, 129, 2100])
        telling.deflate([129])
        #expect(pages(try #require(telling.report(1)).pages) == [64, 128, 2100])
        #expect(telling.device.counters.balloonPagesReported == 2)
    }

    @Test func w5_deflateQueueIsDrainedInsideTheWindow() throws {
        let bench = Bench.started(BalloonFeature.mustTellHost)
        bench.inflate([128, 129, 130])
        let request = bench.device.openWindow()
        bench.sendPages(request, first, start: 64, [1])
        // The guest takes two pages back. The notification is still on its way when the report ends.
        bench.driver.add(queue: 1, readable: [pageList([128])])
        bench.driver.add(queue: 1, readable: [pageList([130])])
        bench.sendFigures(request)
        let report = try #require(bench.device.waitForReport(request, milliseconds: 0))
        #expect(pages(report.pages) == [64, 129])
        // The driver is told, or it would wait for ever.
        #expect(bench.driver.queues[1]!.takeUsed().count == 2)
        #expect(bench.driver.read(.interruptStatus) & 1 == 1)
        bench.driver.kick(1)
        #expect(bench.device.counters.deflatedPages == 2 && bench.device.counters.deflateChains == 2)
    }

    @Test func w5_brokenDeflateQueueVoidsTheReport() {
        let bench = Bench.started(BalloonFeature.mustTellHost)
        bench.inflate([128])
        let request = bench.device.openWindow()
        bench.sendPages(request, first, start: 64, [1])
        bench.driver.queues[1]!.publish(index: 999)
        bench.sendFigures(request)
        #expect(bench.device.waitForReport(request, milliseconds: 0) == nil)
        #expect(bench.driver.status.contains(.needsReset) && bench.device.counters.reportsCompleted == 0)
    }

    @Test func w5_deflateListThatCannotBeReadEmptiesTheBalloon() throws {
        for list in [[1, 2, 3], [UInt8](repeating: 0, count: 4 * 16385)] {
            let bench = Bench.started(BalloonFeature.mustTellHost)
            bench.inflate([128])
            bench.driver.send(queue: 1, readable: [list])
            #expect(pages(try #require(bench.report(1)).pages) == [64])
            #expect(bench.device.counters.malformedLists == 1)
        }
        let writable = Bench.started(BalloonFeature.mustTellHost)
        writable.inflate([128])
        writable.driver.send(queue: 1, readable: [pageList([128])], writable: [4])
        #expect(pages(try #require(writable.report(1)).pages) == [64])
    }

    @Test func w6_poisonIsRefused() {
        let bench = Bench()
        #expect(bench.driver.negotiate(features: version1 | bitmap | BalloonFeature.pagePoison))
        for index in 0..<3 { bench.driver.enable(index) }
        bench.driver.setConfiguration(12, 0xaaaa_aaaa)
        bench.driver.add(.driverOK)
        #expect(bench.device.refusal?.contains("0xaaaaaaaa") == true)
        // A host that asks regardless gets nothing it could misuse.
        #expect(bench.report() == nil)
        #expect(bench.device.counters.reportsVoid == 1)
        // Cleared on free (init_on_free): what zero is.
        bench.driver.setConfiguration(12, 0)
        #expect(bench.device.refusal == nil && bench.report() != nil)
        // Poison comes up in the middle.
        let request = bench.device.openWindow()
        bench.sendPages(request, first, start: 64, [1])
        bench.driver.setConfiguration(12, 1)
        bench.sendFigures(request)
        #expect(bench.device.waitForReport(request, milliseconds: 0) == nil)
    }

    // MARK: Sequence

    @Test func firstBeginsAnew() throws {
        let bench = Bench.started()
        let request = bench.device.openWindow()
        bench.sendPages(request, first, start: 64, [1])
        bench.sendPages(request, first, start: 128, [1])
        bench.sendFigures(request)
        #expect(pages(try #require(bench.device.waitForReport(request, milliseconds: 0)).pages) == [128])
    }

    @Test func chainsBeforeTheFirstAreDropped() throws {
        let bench = Bench.started()
        let request = bench.device.openWindow()
        bench.sendPages(request, start: 64, [1])
        bench.sendFigures(request)
        #expect(bench.device.waitForReport(request, milliseconds: 0) == nil)
        #expect(bench.device.counters.misplacedReportChains == 2)
        bench.sendPages(request, first, start: 128, [1])
        bench.sendFigures(request)
        #expect(pages(try #require(bench.device.waitForReport(request, milliseconds: 0)).pages) == [128])
    }

    @Test func guestGivesUp() {
        let bench = Bench.started()
        for flags in [first | last | failed, last | failed] {
            let request = bench.device.openWindow()
            if flags & first == 0 { bench.sendPages(request, first, start: 64, [1]) }
            bench.sendFigures(request, flags)
            // At once, not after the whole wait.
            #expect(bench.device.waitForReport(request, milliseconds: 60_000) == nil)
            bench.sendFigures(request, first | last)
            #expect(bench.device.waitForReport(request, milliseconds: 0) == nil)
        }
        #expect(bench.device.counters.reportsFailed == 2 && bench.device.counters.lateChains == 2)
        #expect(bench.report() != nil)
    }

    @Test func malformedChainsVoidTheReportOnly() {
        func figures(_ request: UInt32, _ header: [UInt8]) -> [UInt8] { header + words([1, 2, 3, 4, 5]) }
        let cases: [(String, (UInt32) -> [UInt8])] = [
            ("short", { Array(header($0, flags: first)[..<23]) }),
            ("kind 0", { header($0, kind: 0, flags: first, bits: 64) + words([1]) }),
            ("kind 3", { header($0, kind: 3, flags: first, bits: 64) + words([1]) }),
            ("unknown flag", { header($0, flags: first | 8, bits: 64) + words([1]) }),
            ("last with pages", { header($0, flags: first | last, bits: 64) + words([1]) }),
            ("failed, not last", { header($0, flags: first | failed, bits: 64) + words([1]) }),
            ("figures, not last", { figures($0, header($0, kind: 2, flags: first)) }),
            ("start", { header($0, flags: first, start: 63, bits: 64) + words([1]) }),
            ("start beyond", { header($0, flags: first, start: 1 << 52, bits: 64) + words([1]) }),
            ("start overflow", { header($0, flags: first, start: .max - 63, bits: 64) + words([1]) }),
            ("no bits", { header($0, flags: first) }),
            ("odd bits", { header($0, flags: first, bits: 65) + words([1]) }),
            ("too many bits", { header($0, flags: first, bits: 1 << 22 + 64) + words([1]) }),
            ("all bits", { header($0, flags: first, bits: .max) + words([1]) }),
            ("reserved", { header($0, flags: first, bits: 64, reserved: 1) + words([1]) }),
            ("bitmap short", { header($0, flags: first, bits: 128) + words([1]) }),
            ("bitmap long", { header($0, flags: first, bits: 64) + words([1, 1]) }),
            ("figures short", { header($0, kind: 2, flags: first | last) + words([1, 2, 3, 4]) }),
            ("figures long", { figures($0, header($0, kind: 2, flags: first | last)) + [0] }),
            ("figures bits", { figures($0, header($0, kind: 2, flags: first | last, bits: 64)) }),
            ("figures start", { figures($0, header($0, kind: 2, flags: first | last, start: 64)) }),
            ("figures reserved", { header($0, kind: 2, flags: first | last) + words([1, 2, 3, 4, 1 << 32]) }),
        ]
        for (name, make) in cases {
            for isMidway in [false, true] {
                let bench = Bench.started()
                let request = bench.device.openWindow()
                if isMidway { bench.sendPages(request, first, start: 64, [1]) }
                bench.send([make(request)])
                #expect(bench.device.counters.malformedReportChains == 1, "\(name)")
                #expect(bench.device.waitForReport(request, milliseconds: 60_000) == nil, "\(name)")
                // The rest of it is dropped, the device goes on, and so does the next request.
                bench.sendPages(request, first, start: 64, [1])
                bench.sendFigures(request)
                #expect(bench.device.waitForReport(request, milliseconds: 0) == nil, "\(name)")
                #expect(!bench.driver.status.contains(.needsReset), "\(name)")
                #expect(bench.report() != nil, "\(name)")
            }
        }
    }

    @Test func writableDescriptorsAreMalformedAndNotWritten() {
        let bench = Bench.started()
        let request = bench.device.openWindow()
        bench.send([header(request, flags: first, bits: 64), words([1])], writable: [64])
        #expect(bench.device.counters.malformedReportChains == 1)
        bench.send([], writable: [64])
        #expect(bench.device.waitForReport(request, milliseconds: 0) == nil)
    }

    @Test func brokenQueueEndsTheWindow() {
        let bench = Bench.started()
        let request = bench.device.openWindow()
        bench.driver.queues[2]!.publish(99)
        bench.driver.kick(2)
        #expect(bench.driver.status.contains(.needsReset))
        #expect(bench.device.waitForReport(request, milliseconds: 60_000) == nil)
        #expect(bench.device.refusal?.contains("reset") == true && bench.device.counters.brokenQueues == 1)
        bench.driver.start(features: version1 | bitmap, queues: [0, 1, 2])
        #expect(bench.device.refusal == nil && bench.report() != nil)
    }

    // MARK: Waiting

    @Test func waitEndsWithTheReport() {
        let bench = Bench.started()
        let request = bench.device.openWindow()
        let device = bench.device
        let shared = Shared()
        let host = HostThread {
            let report = device.waitForReport(request, milliseconds: 60_000)
            shared.pages.withLock { $0 = report?.pages.population }
        }
        sleep(milliseconds: 20)
        bench.sendPages(request, first, start: 64, [3])
        sleep(milliseconds: 20)
        bench.sendFigures(request)
        host.join()
        #expect(shared.pages.withLock { $0 } == 2)
    }

    @Test func waitEndsByItself() {
        let bench = Bench.started()
        let request = bench.device.openWindow()
        let clock = ContinuousClock()
        let elapsed = clock.measure { #expect(bench.device.waitForReport(request, milliseconds: 60) == nil) }
        #expect(elapsed >= .milliseconds(59) && elapsed < .seconds(20))
        #expect(bench.device.waitForReport(request, milliseconds: .min) == nil)
        #expect(bench.device.waitForReport(12345, milliseconds: .max) == nil)
    }

    @Test(arguments: ["close", "open", "reset", "break"])
    func waitEndsWithTheWindow(how: String) {
        let bench = Bench.started()
        let request = bench.device.openWindow()
        let device = bench.device
        let done = Tally()
        let host = HostThread {
            if device.waitForReport(request, milliseconds: 60_000) == nil { done.add() }
        }
        sleep(milliseconds: 30)
        #expect(done.value == 0)
        switch how {
        case "close": device.closeWindow()
        case "open": _ = device.openWindow()
        case "reset": bench.driver.write(.status, 0)
        default:
            bench.driver.queues[2]!.publish(index: 1000)
            bench.driver.kick(2)
        }
        host.join()
        #expect(done.value == 1)
        if how == "reset" { #expect(bench.driver.configuration(16) == 0) }
    }

    @Test func windowsAndReportsAtOnce() {
        // A vCPU that answers whatever the register says and a host that asks in haste: each report that comes out
        // answers the request it was taken for.
        let bench = Bench.started()
        let device = bench.device, memory = bench.memory, transport = bench.transport
        let stop = Tally()
        let queue = bench.driver.queues[2]!
        let base = queue.descriptors
        let guest = HostThread {
            let driver = MockDriver(memory: memory, transport: transport)
            let queue = MockQueue(memory: memory, base: base, size: 32)
            while stop.value == 0 {
                let request = driver.configuration(16)
                if request < 2 { continue }
                // The page tells the request.
                let chain = header(request, flags: first, start: 64, bits: 64) + words([1 << UInt64(request % 64)])
                memory.poke(chain, at: 0x8_0000)
                memory.poke(header(request, kind: 2, flags: last) + words([UInt64(request), 0, 0, 0, 0]), at: 0x9_0000)
                queue.publish(queue.chain([MockDescriptor(0x8_0000, 32)]))
                queue.publish(queue.chain([MockDescriptor(0x9_0000, 64)]))
                driver.kick(2)
            }
        }
        var reports = 0
        for round in 0..<2000 {
            let request = device.openWindow()
            if let report = device.waitForReport(request, milliseconds: round % 3) {
                reports += 1
                #expect(report.request == request)
                #expect(report.figures?.blocks == UInt64(request))
                #expect(pages(report.pages) == [64 + Int(request % 64)])
            }
            if round % 2 == 0 { device.closeWindow() }
        }
        stop.add()
        guest.join()
        #expect(reports > 0 && !bench.driver.status.contains(.needsReset))
    }

    // MARK: Refusals

    @Test func refusalsSayWhatToDo() {
        let bench = Bench()
        #expect(bench.device.refusal?.contains("no balloon driver") == true)
        bench.driver.start(features: version1, queues: [0, 1])
        #expect(bench.device.refusal?.contains("lacuna_balloon") == true)
        bench.driver.start(features: version1 | bitmap, queues: [0, 1])
        #expect(bench.device.refusal?.contains("queue") == true)
        bench.driver.start(features: version1 | bitmap, queues: [0, 1, 2])
        #expect(bench.device.refusal == nil)
        // A value without the feature means nothing.
        bench.driver.setConfiguration(12, 5)
        #expect(bench.device.refusal == nil)
        bench.driver.write(.status, 0)
        #expect(bench.device.refusal != nil)
    }
}

private final class Shared: Sendable {
    let pages = Mutex<Int?>(nil)
}
