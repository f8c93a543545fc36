// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Synchronization
import TestSupport
import Testing
import Virtio

/// A queue of 8 descriptors at 64 KiB, buffers from 128 KiB on, indirect tables at 256 KiB.
private struct Bench {
    let memory = GuestMemory.withHole()
    let driver: MockQueue
    let queue: VirtQueue
    static let data: UInt64 = 0x2_0000
    static let table: UInt64 = 0x4_0000

    init(size: UInt16 = 8, startIndex: UInt16 = 0, indirect: Bool = true) {
        driver = MockQueue(memory: memory, base: 0x1_0000, size: size, startIndex: startIndex)
        queue = driver.deviceSide(indirect: indirect)
    }

    /// Publishes `head` and expects the queue to break, for good, with `error`.
    func expectBroken(_ head: UInt16, _ error: VirtQueueError, _ location: SourceLocation = #_sourceLocation) {
        driver.publish(head)
        #expect(throws: error, sourceLocation: location) { try queue.popChain() }
        // Never a quiet end: the same error again.
        #expect(throws: error, sourceLocation: location) { try queue.popChain() }
    }
}

private let data = Bench.data

@Suite struct QueueTests {
    @Test func directChainKeepsOrderAndDirection() throws {
        let bench = Bench()
        bench.memory.poke([1, 2, 3, 4, 5], at: data)
        bench.memory.poke([6, 7, 8], at: data + 100)
        let head = bench.driver.chain([
            MockDescriptor(data, 5), MockDescriptor(data + 100, 3),
            MockDescriptor(data + 200, 4, flags: DescriptorFlag.write),
        ])
        #expect(try bench.queue.popChain() == nil)
        bench.driver.publish(head)
        let chain = try #require(try bench.queue.popChain())
        #expect(chain.head == head)
        #expect(chain.readable.map(\.length) == [5, 3])
        #expect(chain.writable == [GuestSegment(address: GuestAddress(data + 200), length: 4)])
        #expect(chain.readableBytes == 8 && chain.writableBytes == 4)

        var reader = chain.reader()
        #expect(try reader.take(UInt16.self) == 0x0201)
        #expect(try reader.take(UInt32.self) == 0x0605_0403)
        #expect(reader.remaining == 2)
        #expect(throws: ChainReadError.tooShort(wanted: 4, left: 2)) { try reader.take(UInt32.self) }
        #expect(try reader.take(bytes: 2) == [7, 8])
        #expect(throws: ChainReadError.tooShort(wanted: 1, left: 0)) { try reader.take(UInt8.self) }

        #expect(chain.write([9, 9, 9, 9, 9]) == 4)
        #expect(bench.memory.peek(data + 200, count: 5) == [9, 9, 9, 9, 0])
        bench.queue.push(head: chain.head, written: 4)
        let used = bench.driver.takeUsed()
        #expect(used.count == 1 && used[0].head == UInt32(head) && used[0].written == 4)
        #expect(try bench.queue.popChain() == nil)
    }

    @Test func readerCrossesSegmentsAtEveryCut() throws {
        let bytes = (0..<24).map { UInt8($0) }
        for cut in 1..<24 {
            let bench = Bench()
            bench.memory.poke(Array(bytes[..<cut]), at: data)
            bench.memory.poke(Array(bytes[cut...]), at: data + 0x100)
            bench.driver.publish(
                bench.driver.chain([
                    MockDescriptor(data, UInt32(cut)), MockDescriptor(data + 0x100, UInt32(24 - cut)),
                ]))
            var reader = try #require(try bench.queue.popChain()).reader()
            #expect(try reader.take(UInt32.self) == 0x0302_0100)
            try reader.skip(4)
            var words = [UInt64](repeating: 0, count: 3)
            try reader.take(2, into: &words)
            #expect(words == [0x0f0e_0d0c_0b0a_0908, 0x1716_1514_1312_1110, 0])
            #expect(reader.remaining == 0)
        }
    }

    @Test func indirectChain() throws {
        let bench = Bench()
        bench.memory.poke([1, 2, 3], at: data)
        let list =
            (0..<20).map { MockDescriptor(data + UInt64($0), 1) } + [
                MockDescriptor(data + 64, 2, flags: DescriptorFlag.write)
            ]
        // Longer than the queue: Linux does that.
        bench.driver.publish(bench.driver.indirectChain(list, table: Bench.table))
        let chain = try #require(try bench.queue.popChain())
        #expect(chain.readable.count == 20 && chain.writable.count == 1 && chain.readableBytes == 20)
    }

    @Test func indirectTableAtTheEndOfADirectChain() throws {
        let bench = Bench()
        bench.driver.set(0, MockDescriptor(data, 4), table: Bench.table)
        // The write flag beside the indirect flag means nothing.
        bench.driver.publish(
            bench.driver.chain([
                MockDescriptor(data + 8, 4),
                MockDescriptor(Bench.table, 16, flags: DescriptorFlag.indirect | DescriptorFlag.write),
            ]))
        let chain = try #require(try bench.queue.popChain())
        #expect(chain.readable.map(\.address.rawValue) == [data + 8, data])
    }

    // MARK: Malformed chains

    @Test func loopIsFound() {
        let bench = Bench()
        bench.driver.set(0, MockDescriptor(data, 4, flags: DescriptorFlag.next, next: 1))
        bench.driver.set(1, MockDescriptor(data, 4, flags: DescriptorFlag.next, next: 0))
        bench.expectBroken(0, .loop(head: 0))
    }

    @Test func loopOntoItselfIsFound() {
        let bench = Bench()
        bench.driver.set(3, MockDescriptor(data, 4, flags: DescriptorFlag.next, next: 3))
        bench.expectBroken(3, .loop(head: 3))
    }

    @Test func brokenQueueStaysBrokenWhateverTheDriverMends() {
        let bench = Bench()
        bench.expectBroken(bench.driver.chain([MockDescriptor(data, 0)]), .zeroLength(head: 0))
        bench.driver.set(0, MockDescriptor(data, 4))
        #expect(throws: VirtQueueError.zeroLength(head: 0)) { try bench.queue.popChain() }
    }

    @Test func loopInIndirectTableIsFound() {
        let bench = Bench()
        bench.driver.set(0, MockDescriptor(data, 4, flags: DescriptorFlag.next, next: 1), table: Bench.table)
        bench.driver.set(1, MockDescriptor(data, 4, flags: DescriptorFlag.next, next: 0), table: Bench.table)
        bench.expectBroken(
            bench.driver.chain([MockDescriptor(Bench.table, 32, flags: DescriptorFlag.indirect)]), .loop(head: 0))
    }

    @Test func wholeTableIsNoLoop() throws {
        let bench = Bench()
        bench.driver.publish(bench.driver.chain((0..<8).map { MockDescriptor(data + 16 * $0, 4) }))
        #expect(try bench.queue.popChain()?.readable.count == 8)
    }

    @Test func headOutOfRange() {
        Bench().expectBroken(8, .headOutOfRange(8))
        Bench().expectBroken(65535, .headOutOfRange(65535))
    }

    @Test func nextOutOfRange() {
        let bench = Bench()
        bench.driver.set(0, MockDescriptor(data, 4, flags: DescriptorFlag.next, next: 8))
        bench.expectBroken(0, .nextOutOfRange(head: 0, next: 8))
        let other = Bench()
        other.driver.set(0, MockDescriptor(data, 4, flags: DescriptorFlag.next, next: 2), table: Bench.table)
        other.expectBroken(
            other.driver.chain([MockDescriptor(Bench.table, 32, flags: DescriptorFlag.indirect)]),
            .nextOutOfRange(head: 0, next: 2))
    }

    @Test func readableAfterWritable() {
        let bench = Bench()
        bench.expectBroken(
            bench.driver.chain([MockDescriptor(data, 4, flags: DescriptorFlag.write), MockDescriptor(data, 4)]),
            .readableAfterWritable(head: 0))
    }

    @Test func zeroLength() {
        let bench = Bench()
        bench.expectBroken(
            bench.driver.chain([MockDescriptor(data, 4), MockDescriptor(data, 0)]), .zeroLength(head: 0))
    }

    @Test func bufferNotRAM() {
        for (address, length) in [
            (4 << 20, 1), ((4 << 20) - 1, 2), (8 << 20 - 1, 2), (10 << 20, 1), (.max, 1), (.max - 3, 4), (0, 1 << 31),
            (1 << 63, 16),
        ] as [(UInt64, UInt32)] {
            let bench = Bench()
            bench.expectBroken(
                bench.driver.chain([MockDescriptor(address, length)]),
                .bufferNotRAM(head: 0, GuestAddress(address), length: length))
        }
    }

    @Test func moreThanFourGiBInAll() throws {
        // Address space only: nothing of it is touched.
        let memory = try GuestMemory(ranges: [GuestRange(start: GuestAddress(0), size: 3 << 30)])
        let driver = MockQueue(memory: memory, base: 0x1_0000, size: 8)
        let queue = driver.deviceSide()
        driver.publish(driver.chain([MockDescriptor(0, 1 << 31), MockDescriptor(0, 1 << 31)]))
        #expect(try queue.popChain()?.readableBytes == 1 << 32)
        driver.publish(
            driver.chain([MockDescriptor(0, 1 << 31), MockDescriptor(0, 1 << 31), MockDescriptor(0, 1)]))
        #expect(throws: VirtQueueError.tooLong(head: 2)) { try queue.popChain() }
    }

    @Test func indirectErrors() {
        func table(_ length: UInt32, at address: UInt64 = Bench.table, flags: UInt16 = 0) -> [MockDescriptor] {
            [MockDescriptor(address, length, flags: DescriptorFlag.indirect | flags)]
        }
        for length in [0, 1, 15, 17, 16 * 1025, .max] as [UInt32] {
            let bench = Bench()
            bench.expectBroken(bench.driver.chain(table(length)), .badIndirectSize(head: 0, bytes: length))
        }
        let hole = Bench()
        hole.expectBroken(
            hole.driver.chain(table(32, at: 4 << 20 - 16)), .indirectTableNotRAM(head: 0, GuestAddress(4 << 20 - 16)))
        let next = Bench()
        next.expectBroken(next.driver.chain(table(16, flags: DescriptorFlag.next)), .indirectWithNext(head: 0))
        let nested = Bench()
        nested.driver.set(0, MockDescriptor(Bench.table, 16, flags: DescriptorFlag.indirect), table: Bench.table)
        nested.expectBroken(nested.driver.chain(table(16)), .nestedIndirect(head: 0))
        let unasked = Bench(indirect: false)
        unasked.driver.set(0, MockDescriptor(data, 4), table: Bench.table)
        unasked.expectBroken(unasked.driver.chain(table(16)), .indirectNotNegotiated(head: 0))
    }

    @Test func availableIndexJump() throws {
        let full = Bench()
        _ = full.driver.chain([MockDescriptor(data, 4)])
        full.driver.publish(index: 8)
        #expect(try full.queue.popChain() != nil)
        for index in [9, 100, 65535] as [UInt16] {
            let bench = Bench()
            bench.driver.publish(index: index)
            #expect(throws: VirtQueueError.availableIndexJumped(from: 0, to: index)) { try bench.queue.popChain() }
        }
    }

    @Test func descriptorsChangingUnderTheReader() {
        // Another thread flips a chain between a good and various bad shapes. Whatever the queue returns was checked
        // in the very copy that is used.
        let bench = Bench(size: 8)
        let memory = bench.memory, table = bench.driver.descriptors
        bench.driver.set(0, MockDescriptor(data, 16, flags: DescriptorFlag.next, next: 1))
        bench.driver.set(1, MockDescriptor(data + 64, 16))
        let shared = StopFlag()
        let flipper = HostThread {
            var random = SeededGenerator(seed: 1)
            let addresses: [UInt64] = [data, .max - 1, 4 << 20, (4 << 20) - 8, 9 << 20]
            let lengths: [UInt32] = [16, 0, .max, 8, 1 << 20]
            while !shared.isSet {
                memory.poke(addresses.randomElement(using: &random)!, at: table + 16)
                memory.poke(lengths.randomElement(using: &random)!, at: table + 24)
                memory.poke(UInt16.random(in: 0..<8, using: &random), at: table + 28)
                memory.poke(UInt16.random(in: 0..<10, using: &random), at: table + 30)
            }
        }
        var good = 0
        var queue = bench.queue
        for round in 0..<20_000 {
            bench.driver.publish(0)
            do {
                guard let chain = try queue.popChain() else {
                    Issue.record("nothing in round \(round)")
                    break
                }
                good += 1
                var total = 0
                for segment in chain.readable + chain.writable {
                    #expect(segment.length > 0)
                    #expect(memory.hostPointer(segment.address, bytes: Int(segment.length)) != nil)
                    total += Int(segment.length)
                }
                #expect(total == chain.readableBytes + chain.writableBytes)
                if chain.readableBytes < 1 << 21 {
                    var reader = chain.reader()
                    #expect((try? reader.take(bytes: chain.readableBytes)) != nil)
                }
                queue.push(head: chain.head, written: 0)
                _ = bench.driver.takeUsed()
            } catch {
                // A new device side where the driver stands now.
                var state = bench.driver.state
                state.nextAvailable = bench.driver.availableIndex
                state.nextUsed = state.nextAvailable
                queue = try! VirtQueue(memory: memory, state: state, maximumSize: 8, allowsIndirect: true)
            }
        }
        shared.set()
        flipper.join()
        #expect(good > 0)
    }

    @Test func bytesChangingUnderTheReaderAreReadOnce() throws {
        let bench = Bench()
        let memory = bench.memory
        let shared = StopFlag()
        let flipper = HostThread {
            var value: UInt64 = 0
            while !shared.isSet {
                value &+= 0x0101_0101_0101_0101
                memory.poke(value, at: data)
            }
        }
        // The value taken is one that was there once, whole; later looks at the copy agree by construction.
        for _ in 0..<5000 {
            bench.driver.publish(bench.driver.chain([MockDescriptor(data, 8)]))
            let chain = try #require(try bench.queue.popChain())
            var reader = chain.reader()
            _ = try reader.take(UInt64.self)
            #expect(reader.remaining == 0)
            #expect(throws: ChainReadError.self) { try reader.take(UInt8.self) }
            bench.queue.push(head: chain.head, written: 0)
        }
        shared.set()
        flipper.join()
    }

    // MARK: Ring indices

    @Test(arguments: [0, 65530, 65535, 32767] as [UInt16])
    func indicesWrap(start: UInt16) throws {
        let bench = Bench(size: 4, startIndex: start)
        for round in 0..<70_000 {
            bench.memory.poke(UInt32(round), at: data)
            bench.driver.publish(bench.driver.chain([MockDescriptor(data, 4)]))
            guard let chain = try bench.queue.popChain() else {
                Issue.record("nothing in round \(round)")
                return
            }
            var reader = chain.reader()
            let value = try reader.take(UInt32.self)
            bench.queue.push(head: chain.head, written: UInt32(round))
            let used = bench.driver.takeUsed()
            guard value == UInt32(round), used.count == 1, used[0].written == UInt32(round) else {
                Issue.record("round \(round)")
                return
            }
        }
        #expect(bench.queue.state.nextUsed == start &+ UInt16(70_000 - 65536))
    }

    @Test func fullRingAcrossTheWrap() throws {
        let bench = Bench(size: 8, startIndex: 65533)
        var heads: [UInt16] = []
        for offset in 0..<8 {
            heads.append(bench.driver.chain([MockDescriptor(data + UInt64(offset), 1)]))
            bench.driver.publish(heads[offset])
        }
        var got: [UInt16] = []
        while let chain = try bench.queue.popChain() { got.append(chain.head) }
        #expect(got == heads)
        // Given back in another order.
        for head in got.reversed() { bench.queue.push(head: head, written: 1) }
        #expect(bench.driver.takeUsed().map(\.head) == heads.reversed().map(UInt32.init))
    }

    @Test func interruptSuppression() {
        let bench = Bench()
        #expect(bench.queue.wantsInterrupt)
        bench.driver.suppressInterrupts(true)
        #expect(!bench.queue.wantsInterrupt)
        bench.driver.suppressInterrupts(false)
        #expect(bench.queue.wantsInterrupt)
    }

    @Test func usedRingIsLoggedAsDirty() throws {
        let bench = Bench()
        bench.driver.publish(bench.driver.chain([MockDescriptor(data, 4)]))
        let chain = try #require(try bench.queue.popChain())
        #expect(bench.memory.writeLog.population == 0)
        bench.queue.push(head: chain.head, written: 0)
        #expect(bench.memory.writeLog[Int(bench.driver.used >> 12)])
    }

    @Test func disabledQueueTouchesNothing() throws {
        let bench = Bench()
        bench.driver.publish(bench.driver.chain([MockDescriptor(data, 4)]))
        let chain = try #require(try bench.queue.popChain())
        bench.driver.publish(bench.driver.chain([MockDescriptor(data, 4)]))
        bench.queue.disable()
        #expect(try bench.queue.popChain() == nil)
        bench.queue.push(head: chain.head, written: 0)
        #expect(bench.driver.takeUsed().isEmpty && !bench.queue.wantsInterrupt)
    }

    // MARK: The checked constructor

    @Test func badSetUps() {
        let memory = GuestMemory.withHole()
        func make(_ change: (inout VirtQueueState) -> Void) throws(VirtQueueError) -> VirtQueue {
            var state = VirtQueueState(
                size: 8, descriptors: GuestAddress(0x1000), available: GuestAddress(0x2000), used: GuestAddress(0x3000))
            change(&state)
            return try VirtQueue(memory: memory, state: state, maximumSize: 256, allowsIndirect: false)
        }
        #expect(throws: Never.self) { try make { _ in } }
        #expect(throws: Never.self) { try make { $0.size = 256 } }
        for size in [0, 3, 12, 512, 65536, 65544, .max] as [UInt32] {
            #expect(throws: VirtQueueError.badSize(size, maximum: 256)) { try make { $0.size = size } }
        }
        #expect(throws: VirtQueueError.misaligned(.descriptors, GuestAddress(8))) {
            try make { $0.descriptors = GuestAddress(8) }
        }
        #expect(throws: VirtQueueError.misaligned(.available, GuestAddress(1))) {
            try make { $0.available = GuestAddress(1) }
        }
        #expect(throws: VirtQueueError.misaligned(.used, GuestAddress(2))) { try make { $0.used = GuestAddress(2) } }
        for address in [4 << 20, (4 << 20) - 16, (10 << 20) - 16, 1 << 63, .max - 15] as [UInt64] {
            #expect(throws: VirtQueueError.notRAM(.descriptors, GuestAddress(address))) {
                try make { $0.descriptors = GuestAddress(address) }
            }
            #expect(throws: VirtQueueError.notRAM(.available, GuestAddress(address))) {
                try make { $0.available = GuestAddress(address) }
            }
            #expect(throws: VirtQueueError.notRAM(.used, GuestAddress(address))) {
                try make { $0.used = GuestAddress(address) }
            }
        }
        #expect(throws: VirtQueueError.badCounters(nextAvailable: 1, nextUsed: 65528)) {
            try make {
                $0.nextAvailable = 1
                $0.nextUsed = 65528
            }
        }
    }

    @Test func stateRoundTrip() throws {
        let bench = Bench(startIndex: 65534)
        bench.driver.publish(bench.driver.chain([MockDescriptor(data, 4)]))
        let chain = try #require(try bench.queue.popChain())
        var encoder = StateEncoder()
        bench.queue.state.encode(into: &encoder)
        var decoder = StateDecoder(encoder.bytes)
        let state = try VirtQueueState(from: &decoder)
        try decoder.finish()
        #expect(state == bench.queue.state && state.nextAvailable == 65535 && state.nextUsed == 65534)
        let queue = try VirtQueue(memory: bench.memory, state: state, maximumSize: 8, allowsIndirect: true)
        queue.push(head: chain.head, written: 3)
        #expect(bench.driver.takeUsed().map(\.written) == [3])
    }
}

/// A flag that one thread sets and another looks at.
private final class StopFlag: Sendable {
    private let flag = Atomic<Bool>(false)
    var isSet: Bool { flag.load(ordering: .acquiring) }
    func set() { flag.store(true, ordering: .releasing) }
}
