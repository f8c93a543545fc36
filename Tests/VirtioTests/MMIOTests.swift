// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Synchronization
import TestSupport
import Testing
import Virtio

/// A device that gives every chain back, with the number of its readable bytes.
private final class EchoDevice: VirtioDevice {
    struct State {
        var features: UInt64 = 0
        var queues: [VirtQueue?] = []
        var signals: DeviceSignals?
        var resets = 0
        var activations = 0
        var configuration: UInt32 = 0x4433_2211
        var saved: UInt32 = 7
    }
    let state = Mutex(State())
    /// Called in `notify`, with no lock of the device held.
    let during: @Sendable () -> Void
    init(during: @escaping @Sendable () -> Void = {}) { self.during = during }

    var deviceID: UInt32 { 42 }
    var offeredFeatures: UInt64 { VirtioFeature.version1 | VirtioFeature.indirectDescriptors | 1 << 63 | 1 << 5 | 1 }
    var queueSizes: [UInt16] { [64, 32] }
    /// Bit 5 needs bit 0.
    func accepts(features: UInt64) -> Bool { features & 1 << 5 == 0 || features & 1 != 0 }
    func activate(features: UInt64, queues: [VirtQueue?], signals: DeviceSignals) {
        state.withLock {
            $0.features = features
            $0.queues = queues
            $0.signals = signals
            $0.activations += 1
        }
    }
    func reset() {
        state.withLock {
            $0.queues = []
            $0.signals = nil
            $0.resets += 1
        }
    }
    func readConfiguration(offset: Int, count: Int) -> UInt64 {
        let value = state.withLock { UInt64($0.configuration) }
        return offset >= 4 ? 0 : value >> UInt64(8 * offset)
    }
    func writeConfiguration(offset: Int, count: Int, value: UInt64) {
        if offset == 0, count == 4 { state.withLock { $0.configuration = UInt32(truncatingIfNeeded: value) } }
    }
    func notify(queue index: Int) {
        let (queue, signals) = state.withLock { ($0.queues[index], $0.signals) }
        guard let queue, let signals else { return }
        do {
            while let chain = try queue.popChain() {
                during()
                queue.push(head: chain.head, written: UInt32(chain.readableBytes))
                if queue.wantsInterrupt { signals.usedBuffer(queue: index) }
            }
        } catch { signals.needsReset() }
    }
    func save(into encoder: inout StateEncoder) { encoder.put(state.withLock { $0.saved }) }
    func restore(from decoder: inout StateDecoder) throws(StateError) {
        let saved = try decoder.take(UInt32.self)
        guard saved < 1000 else { throw StateError("too much") }
        state.withLock { $0.saved = saved }
    }
}

private let version1 = VirtioFeature.version1

private struct Bench {
    let memory = GuestMemory.withHole()
    let device: EchoDevice
    let transport: MMIOTransport
    let driver: MockDriver
    let interrupts: Tally

    init(memory: GuestMemory? = nil, during: @escaping @Sendable () -> Void = {}) {
        let interrupts = Tally()
        let device = EchoDevice(during: during)
        transport = MMIOTransport(device: device, memory: memory ?? self.memory) { interrupts.add() }
        driver = MockDriver(memory: memory ?? self.memory, transport: transport)
        self.device = device
        self.interrupts = interrupts
    }
}

@Suite struct MMIOTests {
    @Test func identification() {
        let bench = Bench()
        #expect(bench.driver.read(.magicValue) == 0x7472_6976)
        #expect(bench.driver.read(.version) == 2)
        #expect(bench.driver.read(.deviceID) == 42)
        #expect(bench.driver.read(.vendorID) == MMIO.vendor)
        #expect(bench.driver.read(.sharedMemoryLengthLow) == .max)
        #expect(bench.driver.offeredFeatures == bench.device.offeredFeatures)
        bench.driver.write(.deviceFeaturesSelect, 2)
        #expect(bench.driver.read(.deviceFeatures) == 0)
        for (index, size) in [(0, 64), (1, 32), (2, 0), (.max, 0)] as [(UInt32, UInt32)] {
            bench.driver.write(.queueSelect, index)
            #expect(bench.driver.read(.queueSizeMax) == size)
            #expect(bench.driver.read(.queueReady) == 0)
        }
        #expect(bench.transport.counters == MMIOCounters())
    }

    @Test func wholeStartAndTraffic() {
        let bench = Bench()
        #expect(bench.driver.start(features: version1 | VirtioFeature.indirectDescriptors, queues: [0]))
        #expect(bench.driver.status == [.acknowledge, .driver, .featuresOK, .driverOK])
        bench.device.state.withLock {
            #expect($0.features == version1 | VirtioFeature.indirectDescriptors)
            #expect($0.queues.count == 2 && $0.queues[0]?.size == 32 && $0.queues[1] == nil)
        }
        let used = bench.driver.send(queue: 0, readable: [[1, 2, 3], [4]], indirect: true)
        #expect(used.map(\.written) == [4])
        #expect(bench.interrupts.value == 1)
        #expect(bench.driver.read(.interruptStatus) == 1)
        bench.driver.write(.interruptAcknowledge, 1)
        #expect(bench.driver.read(.interruptStatus) == 0)
        bench.driver.queues[0]!.suppressInterrupts(true)
        bench.driver.send(queue: 0, readable: [[1]])
        #expect(bench.interrupts.value == 1 && bench.driver.read(.interruptStatus) == 0)
        #expect(bench.transport.counters == MMIOCounters())
    }

    @Test func featureRefusals() {
        let bench = Bench()
        #expect(!bench.driver.negotiate(features: 0))
        #expect(!bench.driver.negotiate(features: version1 | 1 << 1))
        #expect(!bench.driver.negotiate(features: version1 | 1 << 62))
        // Bit 5 without bit 0, which the device needs for it.
        #expect(!bench.driver.negotiate(features: version1 | 1 << 5))
        #expect(bench.transport.counters.refusedFeatures == 4)
        // Going on regardless does not start the device.
        bench.driver.enable(0)
        bench.driver.add(.driverOK)
        #expect(!bench.driver.status.contains(.driverOK))
        #expect(bench.device.state.withLock { $0.activations } == 0)
        #expect(bench.driver.negotiate(features: version1 | 1 << 5 | 1 | 1 << 63))
        // Too late.
        bench.driver.write(.driverFeatures, 0)
        bench.driver.add(.driverOK)
        #expect(bench.device.state.withLock { $0.features } == version1 | 1 << 5 | 1 | 1 << 63)
        // A third word of features must stay empty.
        #expect(bench.driver.negotiate(features: version1))
        let before = bench.transport.counters.misplacedWrites
        bench.driver.write(.status, 0)
        bench.driver.write(.driverFeaturesSelect, 2)
        bench.driver.write(.driverFeatures, 0)
        #expect(bench.transport.counters.misplacedWrites == before)
        bench.driver.write(.driverFeatures, 1)
        #expect(bench.transport.counters.misplacedWrites == before + 1)
    }

    @Test func statusBitsAreOnlyAdded() {
        let bench = Bench()
        bench.driver.start(features: version1, queues: [0])
        bench.driver.write(.status, 1)
        #expect(bench.driver.status.contains(.driverOK))
        // Unknown bits and the device's own are not stored.
        bench.driver.write(.status, 0xffff_ff7f)
        #expect(bench.driver.status == [.acknowledge, .driver, .featuresOK, .driverOK])
        bench.driver.add(.failed)
        #expect(bench.driver.status.contains(.failed))
        // A driver that gave up is not served any more.
        #expect(bench.driver.send(queue: 0, readable: [[1]]).isEmpty)
        bench.driver.write(.status, 0)
        #expect(bench.driver.status == [])
        #expect(bench.driver.start(features: version1, queues: [0]))
        #expect(bench.driver.send(queue: 0, readable: [[1]]).count == 1)
    }

    @Test(arguments: [4 << 20, (4 << 20) - 16, 0x1008, 1 << 63, .max & ~15] as [UInt64])
    func badQueuePlaceNeedsReset(base: UInt64) {
        let bench = Bench()
        #expect(bench.driver.negotiate(features: version1))
        bench.driver.enable(0)
        bench.driver.enable(1, base: base)
        #expect(bench.driver.read(.queueReady) == 0)
        #expect(bench.transport.counters.refusedQueues == 1)
        #expect(!bench.driver.status.contains(.needsReset))
        bench.driver.add(.driverOK)
        #expect(bench.driver.status.contains(.needsReset))
        #expect(bench.interrupts.value == 1 && bench.driver.read(.interruptStatus) == 2)
        #expect(bench.device.state.withLock { $0.activations } == 0)
        #expect(bench.driver.send(queue: 0, readable: [[1]]).isEmpty)
        // A reset mends it.
        #expect(bench.driver.start(features: version1, queues: [0, 1]))
        #expect(bench.driver.send(queue: 1, readable: [[1]]).count == 1)
    }

    @Test func badQueueSizes() {
        for size in [0, 3, 64, 65536, 65568, .max] as [UInt32] {
            let bench = Bench()
            #expect(bench.driver.negotiate(features: version1))
            bench.driver.write(.queueSelect, 1)
            bench.driver.write(.queueSize, size)
            bench.driver.write(.queueReady, 1)
            #expect(bench.driver.read(.queueReady) == 0)
            #expect(bench.transport.counters.refusedQueues == 1)
        }
    }

    @Test func brokenRingNeedsReset() {
        let bench = Bench()
        bench.driver.start(features: version1, queues: [0])
        bench.driver.queues[0]!.publish(index: 500)
        bench.driver.kick(0)
        #expect(bench.driver.status.contains(.needsReset))
        #expect(bench.driver.read(.interruptStatus) == 2)
        bench.driver.kick(0)
        #expect(bench.driver.start(features: version1, queues: [0]))
        #expect(bench.driver.send(queue: 0, readable: [[1]]).count == 1)
    }

    @Test func readyQueueCannotBeChanged() {
        let bench = Bench()
        #expect(bench.driver.negotiate(features: version1))
        let queue = bench.driver.enable(0)
        bench.driver.write(.queueDescriptorsLow, 0x5000)
        bench.driver.write(.queueSize, 8)
        #expect(bench.transport.counters.misplacedWrites == 2)
        bench.driver.add(.driverOK)
        bench.device.state.withLock {
            #expect($0.queues[0]?.state.descriptors.rawValue == queue.descriptors && $0.queues[0]?.size == 32)
        }
        // A queue that was taken out of use is dead for the device that still has it.
        bench.driver.write(.queueReady, 0)
        #expect(bench.driver.read(.queueReady) == 0)
        bench.driver.add(queue: 0, readable: [[1]])
        bench.device.notify(queue: 0)
        #expect(queue.takeUsed().isEmpty)
    }

    @Test func badAccesses() {
        let bench = Bench()
        let transport = bench.transport
        var bad: UInt64 = 0
        for (offset, size) in [
            (0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0x18, 4), (0xfc + 2, 4), (0x70, 3), (0x70, 0), (0x70, -4),
            (0x103, 4), (0x102, 4), (0x101, 2), (0x100, 3), (0x100, 0), (0x1000, 4), (.max, 1), (1 << 63, 4),
        ] as [(UInt64, Int)] {
            #expect(transport.read(offset: offset, size: size) == 0)
            transport.write(offset: offset, size: size, value: .max)
            bad += 2
        }
        // The wrong direction.
        transport.write(offset: 0, size: 4, value: 1)
        #expect(transport.read(offset: 0x50, size: 4) == 0)
        #expect(transport.counters.badAccesses == bad + 2)
        #expect(transport.read(offset: 0x104, size: 8) == 0)
    }

    @Test func configurationAndItsGeneration() {
        let bench = Bench()
        #expect(bench.driver.configuration(0) == 0x4433_2211)
        #expect(bench.transport.read(offset: 0x102, size: 1) == 0x44_33 & 0xff)
        bench.driver.setConfiguration(0, 5)
        #expect(bench.driver.configuration(0) == 5)
        bench.driver.start(features: version1, queues: [])
        let generation = bench.driver.read(.configurationGeneration)
        bench.device.state.withLock { $0.signals }!.configurationChanged()
        #expect(bench.driver.read(.configurationGeneration) == generation + 1)
        #expect(bench.driver.read(.interruptStatus) == 2 && bench.interrupts.value == 1)
    }

    @Test func signalsDieWithTheReset() {
        let bench = Bench()
        bench.driver.start(features: version1, queues: [0])
        let old = bench.device.state.withLock { $0.signals }!
        bench.driver.start(features: version1, queues: [0])
        let before = bench.interrupts.value
        old.usedBuffer(queue: 0)
        old.configurationChanged()
        old.needsReset()
        #expect(bench.interrupts.value == before && bench.driver.read(.interruptStatus) == 0)
        #expect(!bench.driver.status.contains(.needsReset))
    }

    // MARK: Threads

    @Test func resetWhileTheDeviceWorks() {
        let inside = Tally(), released = Tally()
        let bench = Bench(during: {
            inside.add()
            while released.value == 0 { sleep(milliseconds: 1) }
        })
        bench.driver.start(features: version1, queues: [0])
        for _ in 0..<4 { bench.driver.add(queue: 0, readable: [[1]]) }
        let transport = bench.transport
        let vcpu = HostThread { transport.write(offset: MMIO.Register.queueNotify.rawValue, size: 4, value: 0) }
        while inside.value == 0 { sleep(milliseconds: 1) }
        // These return although the device is stuck.
        _ = bench.driver.read(.interruptStatus)
        bench.driver.write(.interruptAcknowledge, 3)
        _ = bench.driver.configuration(0)
        bench.device.state.withLock { $0.signals }!.configurationChanged()
        // The reset waits until the device is done.
        let other = HostThread { transport.write(offset: MMIO.Register.status.rawValue, size: 4, value: 0) }
        sleep(milliseconds: 20)
        #expect(inside.value == 1 && bench.device.state.withLock { $0.resets } == 1)
        released.add()
        other.join()
        vcpu.join()
        #expect(inside.value == 4 && bench.device.state.withLock { $0.resets } == 2)
        #expect(bench.driver.start(features: version1, queues: [0]))
        #expect(bench.driver.send(queue: 0, readable: [[1]]).count == 1)
    }

    @Test func manyThreadsAtOnce() {
        // vCPUs that start, kick and reset, and a host thread that signals: no deadlock, no trap.
        let bench = Bench()
        let transport = bench.transport, device = bench.device, memory = bench.memory
        let threads = (0..<3).map { number in
            HostThread {
                let driver = MockDriver(memory: memory, transport: transport, arena: 0x10_0000 + UInt64(number) << 18)
                for _ in 0..<300 {
                    driver.start(features: version1, queues: [0, 1])
                    driver.kick(0)
                    driver.kick(1)
                }
            }
        }
        let host = HostThread {
            for _ in 0..<3000 {
                device.state.withLock { $0.signals }?.configurationChanged()
                _ = transport.status
            }
        }
        for thread in threads { thread.join() }
        host.join()
        #expect(bench.driver.start(features: version1, queues: [0]))
    }

    // MARK: Fuzz

    @Test(arguments: [1, 2, 3] as [UInt64])
    func randomAccesses(seed: UInt64) {
        let bench = Bench()
        var random = SeededGenerator(seed: seed)
        let registers = MMIO.Register.allCases
        for round in 0..<100_000 {
            if round % 500 == 0 {
                // From a working device, from time to time.
                bench.driver.start(features: version1 | VirtioFeature.indirectDescriptors, queues: [0, 1])
                bench.memory.poke(random.bytes(0x4000), at: 0x10_0000)
            }
            let isKnown = random.next() % 8 != 0
            let offset = isKnown ? registers.randomElement(using: &random)!.rawValue : random.anyMagnitude()
            let size = isKnown ? 4 : Int(truncatingIfNeeded: random.next() % 17) - 4
            // Resets are rare enough to get somewhere.
            var value = random.anyMagnitude()
            if offset == MMIO.Register.status.rawValue, random.next() % 16 != 0 {
                value = UInt64([1, 3, 11, 15].randomElement(using: &random)!)
            }
            if random.next() % 3 == 0 {
                _ = bench.transport.read(offset: offset, size: size)
            } else {
                bench.transport.write(offset: offset, size: size, value: value)
            }
        }
        #expect(bench.driver.start(features: version1, queues: [0]))
        #expect(bench.driver.send(queue: 0, readable: [[1, 2]]).map(\.written) == [2])
    }

    // MARK: Saved state

    private func saved(_ transport: MMIOTransport) -> [UInt8] {
        var encoder = StateEncoder()
        transport.save(into: &encoder)
        return encoder.bytes
    }

    @Test func restoreGoesOnWhereSaveStopped() throws {
        let source = Bench()
        source.driver.start(features: version1, queues: [0])
        source.driver.send(queue: 0, readable: [[1]])
        // Not served yet: the notification is lost with the source.
        source.driver.add(queue: 0, readable: [[1, 2, 3]])
        source.device.state.withLock { $0.saved = 99 }
        let bytes = saved(source.transport)

        let target = Bench(memory: source.memory)
        var decoder = StateDecoder(bytes)
        try target.transport.restore(from: &decoder)
        try decoder.finish()
        #expect(target.device.state.withLock { $0.saved } == 99)
        #expect(target.driver.status == [.acknowledge, .driver, .featuresOK, .driverOK])
        // What was pending still is, and the configuration may differ.
        #expect(target.driver.read(.interruptStatus) == 3 && target.interrupts.value == 1)
        let queue = source.driver.queues[0]!
        _ = queue.takeUsed()
        target.transport.kick()
        #expect(queue.takeUsed().map(\.written) == [3])
        #expect(target.interrupts.value == 3)
    }

    @Test func restoreInTheMiddleOfTheStart() throws {
        let source = Bench()
        #expect(source.driver.negotiate(features: version1))
        let queue = source.driver.enable(0)
        let target = Bench(memory: source.memory)
        var decoder = StateDecoder(saved(source.transport))
        try target.transport.restore(from: &decoder)
        #expect(target.device.state.withLock { $0.activations } == 0 && target.interrupts.value == 0)
        target.driver.write(.queueSelect, 0)
        #expect(target.driver.read(.queueReady) == 1)
        target.driver.add(.driverOK)
        source.driver.add(queue: 0, readable: [[1]])
        target.driver.kick(0)
        #expect(queue.takeUsed().count == 1)
    }

    @Test func restoreOfABrokenDeviceStaysBroken() throws {
        let source = Bench()
        source.driver.start(features: version1, queues: [0])
        source.driver.queues[0]!.publish(index: 500)
        source.driver.kick(0)
        let target = Bench(memory: source.memory)
        var decoder = StateDecoder(saved(source.transport))
        try target.transport.restore(from: &decoder)
        #expect(target.driver.status.contains(.needsReset))
        #expect(target.device.state.withLock { $0.activations } == 0)
        target.transport.kick()
        #expect(target.driver.start(features: version1, queues: [0]))
    }

    @Test func hostileState() throws {
        let source = Bench()
        source.driver.start(features: version1, queues: [0, 1])
        let bytes = saved(source.transport)
        let target = Bench(memory: source.memory)
        for count in 0..<bytes.count {
            var decoder = StateDecoder(Array(bytes[..<count]))
            #expect(throws: StateError.self) { try target.transport.restore(from: &decoder) }
            #expect(target.driver.status == [])
        }
        var random = SeededGenerator(seed: 9)
        var accepted = 0
        for _ in 0..<20_000 {
            var bad = bytes
            for _ in 0..<Int.random(in: 1...4, using: &random) {
                bad[Int.random(in: 0..<bad.count, using: &random)] =
                    Bool.random(using: &random) ? UInt8(truncatingIfNeeded: random.next()) : 0xff
            }
            var decoder = StateDecoder(bad)
            do {
                try target.transport.restore(from: &decoder)
                accepted += 1
                target.transport.kick()
            } catch { #expect(target.driver.status == []) }
        }
        // Some bytes may be anything.
        #expect(accepted > 0)
        #expect(target.driver.start(features: version1, queues: [0]))
        #expect(target.driver.send(queue: 0, readable: [[1, 2]]).map(\.written) == [2])
    }
}
