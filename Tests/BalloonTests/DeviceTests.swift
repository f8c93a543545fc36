// SPDX-License-Identifier: Apache-2.0
import Balloon
import GuestMemory
import TestSupport
import Testing
import Virtio

@Suite struct DeviceTests {
    @Test func offers() {
        let bench = Bench()
        #expect(bench.device.deviceID == 5)
        // All but DEFLATE_ON_OOM, which the operator has to ask for.
        #expect(bench.driver.offeredFeatures == 0x8000_0001_1000_001b)
        let full = BalloonDevice(memory: bench.memory, features: .max)
        #expect(full.offeredFeatures == 0x8000_0005_3000_003f)
        for index in 0..<6 {
            bench.driver.write(.queueSelect, UInt32(index))
            #expect(bench.driver.read(.queueSizeMax) == 256)
        }
        bench.driver.write(.queueSelect, 6)
        #expect(bench.driver.read(.queueSizeMax) == 0)
        // The feature without VERSION_1.
        #expect(!bench.driver.negotiate(features: bitmap))
        #expect(bench.driver.negotiate(features: bitmap | version1))
    }

    @Test func configurationSpace() {
        let bench = Bench.started()
        bench.device.setTarget(pages: 0x1234_5678)
        #expect(bench.driver.read(.interruptStatus) == 2)
        _ = bench.device.openWindow()
        for field in [0, 4, 8, 12, 16] as [UInt64] { bench.driver.setConfiguration(field, 0xa0a1_a2a3) }
        #expect([0, 4, 8, 12, 16, 20, 24].map { bench.driver.configuration($0) } == [
            0x1234_5678, 0xa0a1_a2a3, 0, 0xa0a1_a2a3, 2, 0, 0,
        ])
        #expect(bench.device.actualPages == 0xa0a1_a2a3)
        #expect(bench.device.counters.ignoredConfigurationBytes == 12)
        bench.transport.write(offset: 0x106, size: 2, value: 0xffff_0102)
        #expect(bench.device.actualPages == 0x0102_a2a3)
        #expect(bench.transport.read(offset: 0x101, size: 1) == 0x56)
        #expect(bench.transport.read(offset: 0x100, size: 8) == 0x0102_a2a3_1234_5678)
        for offset in [Int.min, -1, 19, 20, 1 << 40, .max] {
            _ = bench.device.readConfiguration(offset: offset, count: 8)
            bench.device.writeConfiguration(offset: offset, count: 8, value: 0)
        }
        #expect(bench.device.readConfiguration(offset: .max - 3, count: 8) == 0)
        #expect(bench.device.readConfiguration(offset: -4, count: 8) >> 32 == 0x1234_5678)
        // A reset forgets what the driver said, not what the host wants.
        bench.driver.write(.status, 0)
        #expect([0, 4, 8, 12, 16].map { bench.driver.configuration($0) } == [0x1234_5678, 0, 0, 0, 0])
    }

    @Test func pageLists() {
        let bench = Bench.started()
        // Twice the same, the hole (1024 to 2047), the end (2560 on).
        bench.inflate([5, 5, 6, 1024, 2047, 2048, 2560, .max])
        #expect(bench.device.counters.inflatedPages == 3 && bench.device.counters.listedPagesNotRAM == 4)
        bench.deflate([5, 7, 1024])
        #expect(bench.device.counters.deflatedPages == 1 && bench.device.counters.listedPagesNotRAM == 5)
        bench.driver.send(queue: 0, readable: [[1, 2, 3]])
        bench.driver.send(queue: 0, readable: [[UInt8](repeating: 0, count: 4 * 16385)])
        bench.driver.send(queue: 0, readable: [pageList([9])], writable: [4])
        #expect(bench.device.counters.malformedLists == 3 && bench.device.counters.inflatedPages == 3)
        // A list in pieces that cut numbers in two.
        let list = pageList([20, 21, 22])
        #expect(bench.driver.send(queue: 0, readable: [Array(list[..<5]), Array(list[5...])]).map(\.written) == [0])
        #expect(bench.device.counters.inflatedPages == 6)
        #expect(bench.device.counters.inflateChains == 5 && bench.device.counters.deflateChains == 1)
    }

    @Test func longestList() {
        let bench = Bench.started()
        bench.driver.send(queue: 0, readable: [pageList((0..<16384).map { UInt32($0 % 64) })])
        #expect(bench.device.counters.inflatedPages == 64 && bench.device.counters.malformedLists == 0)
    }

    @Test func resetEmptiesTheBalloon() throws {
        let bench = Bench.started(BalloonFeature.mustTellHost)
        bench.inflate([128])
        bench.driver.start(features: version1 | bitmap | BalloonFeature.mustTellHost, queues: [0, 1, 2])
        #expect(pages(try #require(bench.report(1)).pages) == [64])
    }

    @Test func manyChainsWithOneNotification() {
        let bench = Bench.started()
        let before = bench.interrupts.value
        for page in 0..<32 as Range<UInt32> { bench.driver.add(queue: 0, readable: [pageList([page])]) }
        bench.driver.kick(0)
        #expect(bench.driver.queues[0]!.takeUsed().count == 32)
        #expect(bench.interrupts.value == before + 1)
        bench.driver.queues[0]!.suppressInterrupts(true)
        bench.inflate([40])
        #expect(bench.interrupts.value == before + 1)
    }

    // MARK: Saved state

    private func saved(_ bench: Bench) -> [UInt8] {
        var encoder = StateEncoder()
        bench.transport.save(into: &encoder)
        return encoder.bytes
    }

    @Test func stateRoundTrip() throws {
        let source = Bench.started(BalloonFeature.mustTellHost)
        source.device.setTarget(pages: 77)
        source.driver.setConfiguration(4, 33)
        // Runs at the very beginning, across a word, at the end of a region and of the memory.
        source.inflate([0, 1, 63, 64, 65, 200, 1023, 2048, 2559])
        let old = source.device.openWindow()
        source.sendPages(old, first, start: 64, [1])

        let target = Bench(memory: source.memory)
        var decoder = StateDecoder(saved(source))
        try target.transport.restore(from: &decoder)
        try decoder.finish()
        // The window is not open here, and the driver is told so.
        #expect([0, 4, 8, 12, 16].map { target.driver.configuration($0) } == [77, 33, 0, 0, 0])
        #expect(target.driver.read(.interruptStatus) & 2 == 2)
        #expect(target.device.refusal == nil)
        #expect(target.device.waitForReport(old, milliseconds: 0) == nil)
        let request = target.device.openWindow()
        #expect(request == old + 1)
        // What the driver still had on its way for the source is stale.
        source.driver.add(queue: 2, readable: [header(old, kind: 2, flags: last) + words([0, 0, 0, 0, 0])])
        source.driver.add(queue: 2, readable: [header(request, flags: first, start: 320, bits: 64) + words([1])])
        source.driver.add(queue: 2, readable: [header(request, kind: 2, flags: last) + words([0, 0, 0, 0, 0])])
        target.driver.kick(2)
        let report = try #require(target.device.waitForReport(request, milliseconds: 0))
        #expect(pages(report.pages) == [0, 1, 63, 64, 65, 200, 320, 1023, 2048, 2559])
        #expect(target.device.counters.staleChains == 1)
    }

    @Test func requestNumbersWrap() throws {
        let source = Bench.started()
        var bytes = saved(source)
        // The next request's number lies behind version, target, actual and poison, at the start of the device's part.
        var encoder = StateEncoder()
        source.device.save(into: &encoder)
        let place = bytes.count - encoder.bytes.count + 13
        #expect(bytes[place] == 2)
        for offset in 0..<4 { bytes[place + offset] = 0xff }
        var decoder = StateDecoder(bytes)
        try source.transport.restore(from: &decoder)
        #expect(source.device.openWindow() == .max)
        #expect(source.device.openWindow() == 2)
        for value in 0..<2 as Range<UInt8> {
            bytes[place] = value
            for offset in 1..<4 { bytes[place + offset] = 0 }
            var decoder = StateDecoder(bytes)
            #expect(throws: StateError.self) { try source.transport.restore(from: &decoder) }
        }
    }

    @Test func impossibleBalloonPages() {
        func state(_ runs: [(UInt32, UInt32)], count: UInt32? = nil) -> StateDecoder {
            var encoder = StateEncoder()
            encoder.put(UInt8(3))
            for value in [0, 0, 0, 2] as [UInt32] { encoder.put(value) }
            // No hints, none on their way, no interval, no buffer of statistics and none wanted, no statistics; runs of pages.
            for value in [0, 0] as [UInt8] { encoder.put(value) }
            for value in [0, 0] as [UInt32] { encoder.put(value) }
            encoder.put(UInt8(0))
            for value in [0, 0] as [UInt16] { encoder.put(value) }
            encoder.put(UInt8(0))
            for value in [0, 0] as [UInt64] { encoder.put(value) }
            encoder.put(UInt16(0))
            encoder.put(UInt8(0))
            encoder.put(count ?? UInt32(runs.count))
            for (start, length) in runs {
                encoder.put(start)
                encoder.put(length)
            }
            return StateDecoder(encoder.bytes)
        }
        func restore(_ decoder: StateDecoder) throws {
            var decoder = decoder
            try BalloonDevice(memory: .withHole()).restore(from: &decoder)
        }
        #expect(throws: Never.self) { try restore(state([(0, 1024), (2048, 512)])) }
        for bad in [
            [(0, 0)], [(0, 1025)], [(1024, 1)], [(2047, 2)], [(2048, 513)], [(2560, 1)], [(.max, .max)],
            [(5, 1), (4, 1)], [(5, 2), (6, 1)], [(0, 2560)],
        ] as [[(UInt32, UInt32)]] {
            #expect(throws: StateError.self, "\(bad)") { try restore(state(bad)) }
        }
        #expect(throws: StateError.self) { try restore(state([(1, 1)], count: .max)) }
    }

    @Test func hostileState() {
        let source = Bench.started(BalloonFeature.mustTellHost)
        source.inflate([0, 1, 63, 64, 65, 200, 1023, 2048, 2559])
        let bytes = saved(source)
        let target = Bench(memory: source.memory)
        var random = SeededGenerator(seed: 11)
        for count in 0..<bytes.count {
            var decoder = StateDecoder(Array(bytes[..<count]))
            #expect(throws: StateError.self) { try target.transport.restore(from: &decoder) }
        }
        for _ in 0..<10_000 {
            var bad = bytes
            for _ in 0..<Int.random(in: 1...6, using: &random) {
                bad[Int.random(in: 0..<bad.count, using: &random)] = UInt8(truncatingIfNeeded: random.anyMagnitude())
            }
            var decoder = StateDecoder(bad)
            if (try? target.transport.restore(from: &decoder)) != nil {
                target.transport.kick()
                _ = target.device.openWindow()
                var encoder = StateEncoder()
                target.transport.save(into: &encoder)
            }
        }
        #expect(target.driver.start(features: version1 | bitmap, queues: [0, 1, 2]))
        #expect(target.report() != nil)
    }

    // MARK: Fuzz

    @Test(arguments: [1, 2] as [UInt64])
    func randomChains(seed: UInt64) {
        var random = SeededGenerator(seed: seed)
        let bench = Bench()
        for round in 0..<4000 {
            if round % 40 == 0 || bench.driver.status.contains(.needsReset) {
                let extra = random.next() % 2 == 0 ? BalloonFeature.mustTellHost : VirtioFeature.indirectDescriptors
                bench.driver.start(features: version1 | bitmap | extra, queues: [0, 1, 2])
            }
            let request = random.next() % 4 == 0 ? bench.device.openWindow() : bench.driver.configuration(16)
            let queue = bench.driver.queues[Int.random(in: 0..<3, using: &random)]!
            var bytes = header(
                random.next() % 8 == 0 ? UInt32(truncatingIfNeeded: random.next()) : request,
                kind: UInt16(random.next() % 4), flags: UInt16(random.next() % 8),
                start: random.next() % 2 == 0 ? 64 * (random.next() % 50) : random.anyMagnitude() & ~63,
                bits: random.next() % 2 == 0
                    ? 64 * UInt32(random.next() % 8) : UInt32(truncatingIfNeeded: random.anyMagnitude()))
            bytes += random.bytes(8 * Int.random(in: 0..<9, using: &random))
            // Some well-formed ones, too.
            switch random.next() % 6 {
            case 0:
                bytes = header(request, flags: UInt16(random.next() % 2), start: 64 * (random.next() % 50), bits: 128)
                bytes += random.bytes(16)
            case 1:
                bytes = header(request, kind: 2, flags: last | UInt16(random.next() % 2)) + words([0, 0, 0, 0, 0])
            default: break
            }
            bench.memory.poke(bytes, at: 0x8_0000)
            var list = [MockDescriptor(0x8_0000, UInt32(bytes.count))]
            if random.next() % 16 == 0 { list.append(MockDescriptor(0x9_0000, 8, flags: UInt16(random.next() % 8))) }
            if random.next() % 64 == 0 { list[0].address = random.anyMagnitude() }
            queue.publish(queue.chain(list))
            for index in 0..<3 { bench.driver.kick(index) }
            if let report = bench.device.waitForReport(request, milliseconds: 0) {
                #expect(report.request == request)
                #expect(report.pages.nextRun(from: 1024).map { $0.lowerBound >= 2048 } ?? true)
            }
            if random.next() % 8 == 0 { bench.device.closeWindow() }
            for queue in bench.driver.queues.values { _ = queue.takeUsed() }
        }
        #expect(bench.device.counters.reportsCompleted > 0 && bench.device.counters.malformedReportChains > 0)
        #expect(bench.device.counters.brokenQueues > 0 && bench.device.counters.staleChains > 0)
        bench.driver.start(features: version1 | bitmap, queues: [0, 1, 2])
        #expect(bench.report() != nil)
    }
}
