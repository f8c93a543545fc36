// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import TestSupport
import Testing
import Virtio

/// The packed layout (virtio 1.3, section 2.8), and the event index of both (2.7.10 and 2.8.10).
@Suite struct PackedTests {
    private let memory = GuestMemory.withHole()
    private func queue(_ size: UInt16 = 8) -> MockPackedQueue {
        MockPackedQueue(memory: memory, base: 0x1_0000, size: size)
    }
    private func buffer(_ page: UInt64, _ bytes: UInt32 = 16, write: Bool = false) -> MockDescriptor {
        MockDescriptor(page << 12, bytes, flags: write ? DescriptorFlag.write : 0)
    }

    /// Chains of one to three descriptors round and round a ring whose size is no power of two.
    @Test(arguments: [1, 3, 5, 7, 8] as [UInt16])
    func chainsGoRoundTheRing(size: UInt16) throws {
        let driver = queue(size), device = try driver.deviceSide()
        #expect(device.isEmpty && device.isPacked)
        for turn in 0..<100 as Range<UInt16> {
            let count = min(size, turn % 3 + 1)
            var list: [MockDescriptor] = [], lengths: [UInt32] = []
            for place in 0..<UInt64(count) {
                list.append(buffer(64 + place, UInt32(place) + 1, write: place > 0))
                if place > 0 { lengths.append(UInt32(place) + 1) }
            }
            driver.publish(list, id: turn)
            #expect(!device.isEmpty)
            let chain = try #require(try device.popChain())
            #expect(chain.head == turn && chain.token.slots == count)
            #expect(chain.readable.map(\.length) == [1])
            #expect(chain.writable.map(\.length) == lengths)
            #expect(try device.popChain() == nil && driver.takeUsed().isEmpty)
            device.push(chain.token, written: UInt32(turn % 2))
            let used = driver.takeUsed()
            #expect(used.count == 1 && used[0].id == turn && used[0].written == UInt32(turn % 2))
            // The write flag says whether anything was written.
            #expect(used[0].hasWritten == (turn % 2 == 1))
        }
    }

    @Test func fullRingGivenBackOutOfOrder() throws {
        let driver = queue(4), device = try driver.deviceSide()
        for _ in 0..<3 {
            for id in 0..<4 as Range<UInt16> { driver.publish([buffer(64 + UInt64(id))], id: id) }
            let chains = try (0..<4).map { _ in try #require(try device.popChain()) }
            #expect(try device.popChain() == nil)
            for place in [2, 0, 3, 1] { device.push(chains[place].token, written: 0) }
            #expect(driver.takeUsed().map(\.id) == [2, 0, 3, 1])
        }
    }

    @Test func indirectTables() throws {
        let driver = queue(4), device = try driver.deviceSide()
        driver.publishIndirect([buffer(64, 7), buffer(65, 8), buffer(66, 9, write: true)], table: 0x2_0000, id: 3)
        let chain = try #require(try device.popChain())
        #expect(chain.readable.map(\.length) == [7, 8] && chain.writable.map(\.length) == [9])
        #expect(chain.token == BufferToken(head: 3, slots: 1))
        // Not negotiated.
        driver.publishIndirect([buffer(64)], table: 0x2_0000, id: 1)
        let plain = try driver.deviceSide(features: 0)
        #expect(throws: VirtQueueError.indirectNotNegotiated(head: 0)) { try plain.popChain() }
        // An indirect descriptor in the table, and a table that is not RAM.
        for (list, table) in [
            ([MockDescriptor(0x3_0000, 16, flags: DescriptorFlag.indirect)], 0x2_0000), ([buffer(64)], 1 << 40),
        ] as [([MockDescriptor], UInt64)] {
            let driver = queue(4), device = try driver.deviceSide()
            if table < 1 << 30 {
                driver.publishIndirect(list, table: table, id: 0)
            } else {
                driver.publish([MockDescriptor(table, 16, flags: DescriptorFlag.indirect)], id: 0)
            }
            #expect(throws: VirtQueueError.self) { try device.popChain() }
        }
    }

    @Test func brokenChains() throws {
        let bad: [[MockDescriptor]] = [
            [MockDescriptor(64 << 12, 0)], [MockDescriptor(5 << 20, 16)],
            [buffer(64, write: true), buffer(65)],
            // The last one says that another follows: round the whole ring.
            (0..<4).map { _ in MockDescriptor(64 << 12, 1, flags: DescriptorFlag.next) },
        ]
        for list in bad {
            let driver = queue(4), device = try driver.deviceSide()
            driver.publish(list, id: 0)
            #expect(throws: VirtQueueError.self) { try device.popChain() }
            #expect(throws: VirtQueueError.self) { try device.popChain() }
        }
    }

    @Test func badSetUps() {
        func make(_ change: (inout VirtQueueState) -> Void) throws {
            var state = queue(8).state
            change(&state)
            _ = try VirtQueue(memory: memory, state: state, maximumSize: 256, features: VirtioFeature.packedRing)
        }
        #expect(throws: Never.self) { try make { $0.size = 7 } }
        let wrong: [(inout VirtQueueState) -> Void] = [
            { $0.size = 0 }, { $0.size = 257 }, { $0.descriptors = GuestAddress(0x1_0008) },
            { $0.descriptors = GuestAddress(4 << 20) }, { $0.available = GuestAddress(0x1_0002) },
            { $0.used = GuestAddress(.max - 3) }, { $0.nextAvailable = 8 }, { $0.nextUsed = 8 },
            { $0.nextUsed = 1 }, { ($0.nextAvailable, $0.nextUsed) = (0x8001, 0) },
        ]
        for change in wrong { #expect(throws: VirtQueueError.self) { try make(change) } }
    }

    @Test func savedInTheMiddle() throws {
        let driver = queue(3)
        var device = try driver.deviceSide()
        var held: BufferToken?
        for turn in 0..<20 as Range<UInt16> {
            driver.publish([buffer(64), buffer(65)], id: turn)
            let chain = try #require(try device.popChain())
            if let held { device.push(held, written: 0) }
            held = chain.token
            var encoder = StateEncoder()
            device.state.encode(into: &encoder)
            var decoder = StateDecoder(encoder.bytes)
            device = try VirtQueue(
                memory: memory, state: try VirtQueueState(from: &decoder), maximumSize: 256,
                features: VirtioFeature.packedRing)
            device.push(chain.token, written: 0)
            held = nil
            #expect(driver.takeUsed().map(\.id) == [turn])
            // One that was not handed out, or more of the ring than is taken.
            device.push(chain.token, written: 0)
            device.push(BufferToken(head: 0, slots: 0), written: 0)
            #expect(driver.takeUsed().isEmpty)
        }
    }

    @Test func interruptSuppression() throws {
        let driver = queue(4)
        let device = try driver.deviceSide(features: VirtioFeature.eventIndex)
        func use(_ id: UInt16) throws -> Bool {
            driver.publish([buffer(64)], id: id)
            device.push(try #require(try device.popChain()).token, written: 0)
            defer { _ = driver.takeUsed() }
            return device.wantsInterrupt
        }
        #expect(try use(0))
        driver.suppress(flags: 1)
        #expect(try !use(1))
        // Places 2 and 3, and 0 of the next round: the second next is wanted, then the one after the wrap.
        driver.suppress(flags: 2, index: 3, wrap: true)
        #expect(try !use(2))
        #expect(try use(3))
        driver.suppress(flags: 2, index: 0, wrap: false)
        #expect(try use(0))
        driver.suppress(flags: 2, index: 0, wrap: true)
        #expect(try !use(1))
        driver.suppress(flags: 0)
        #expect(try use(2))
    }

    // MARK: The event index of split queues

    @Test(arguments: [0, 0xfffe] as [UInt16])
    func splitEventIndex(start: UInt16) throws {
        let driver = MockQueue(memory: memory, base: 0x1_0000, size: 4, startIndex: start)
        let device = try VirtQueue(
            memory: memory, state: driver.state, maximumSize: 4, features: VirtioFeature.eventIndex)
        let usedEvent = driver.available + 4 + 8, availableEvent = driver.used + 4 + 32
        func use() throws -> Bool {
            driver.publish(driver.chain([buffer(64)]))
            device.push(head: try #require(try device.popChain()).head, written: 0)
            return device.wantsInterrupt
        }
        // Nothing is known at first: better one interrupt too many.
        memory.poke(start &- 1, at: usedEvent)
        #expect(try use())
        #expect(try !use())
        memory.poke(start &+ 3, at: usedEvent)
        #expect(try !use())
        #expect(try use())
        #expect(try !use())
        // The flag that does without the event index means nothing.
        driver.suppressInterrupts(true)
        memory.poke(start &+ 5, at: usedEvent)
        #expect(try use())
        // An empty queue asks for the next entry.
        #expect(try device.popChain() == nil)
        #expect(memory.peek(availableEvent, as: UInt16.self) == start &+ 6)
    }

    // MARK: Fuzz

    @Test(arguments: [1, 2, 3] as [UInt64])
    func randomRings(seed: UInt64) throws {
        var random = SeededGenerator(seed: seed)
        var chains = 0, failures = 0
        for _ in 0..<3000 {
            let size = UInt16.random(in: 1...8, using: &random)
            let driver = queue(size), device = try driver.deviceSide()
            for place in 0..<UInt64(size) {
                let address = random.next() % 4 == 0 ? random.anyMagnitude() : 0x4_0000 + random.next() % 65536
                let flags = UInt16(truncatingIfNeeded: random.next()) & 0x8087
                driver.set(
                    driver.descriptors + 16 * place, MockDescriptor(address, UInt32(truncatingIfNeeded: random.anyMagnitude())),
                    id: UInt16(truncatingIfNeeded: random.next()), flags: random.next() % 2 == 0 ? flags : flags & 3 | 0x80)
            }
            driver.suppress(flags: UInt16(random.next() % 4), index: UInt16(random.next() % 10), wrap: random.next() % 2 == 0)
            do {
                for _ in 0..<20 {
                    guard let chain = try device.popChain() else { break }
                    chains += 1
                    if random.next() % 2 == 0 { device.push(chain.token, written: UInt32(random.next() % 9)) }
                    _ = device.wantsInterrupt
                }
            } catch { failures += 1 }
            var encoder = StateEncoder()
            device.state.encode(into: &encoder)
            var decoder = StateDecoder(encoder.bytes)
            #expect(throws: Never.self) {
                try VirtQueue(
                    memory: memory, state: try VirtQueueState(from: &decoder), maximumSize: 256,
                    features: VirtioFeature.packedRing)
            }
        }
        #expect(chains > 100 && failures > 100)
    }
}
