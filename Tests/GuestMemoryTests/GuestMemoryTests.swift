// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import TestSupport
import Testing

@Suite struct GuestMemoryTests {
    private func range(_ start: UInt64, _ size: UInt64) -> GuestRange {
        GuestRange(start: GuestAddress(start), size: size)
    }

    @Test func layout() throws {
        let memory = GuestMemory.withHole()
        #expect(memory.frameCount == 2560 && memory.ramPages == 1536 && memory.regions.count == 2)
        #expect(memory.writeLog.bitCount == 2560)
        for page in [0, 1023, 2048, 2559] { #expect(memory.isRAM(page: page), "\(page)") }
        for page in [1024, 2047, 2560] { #expect(!memory.isRAM(page: page), "\(page)") }
        #expect(memory.isRAM(pages: 0..<1024) && !memory.isRAM(pages: 0..<1025) && !memory.isRAM(pages: 1023..<2049))
        // Adjacent ranges are two regions all the same.
        let adjacent = try GuestMemory(ranges: [range(0, 1 << 18), range(1 << 18, 1 << 18)])
        #expect(adjacent.hostPointer(GuestAddress(1 << 18 - 1), bytes: 2) == nil)
    }

    @Test func badLayouts() {
        let unit: UInt64 = 1 << 18
        for ranges in [
            [], [range(0, 0)], [range(0, 4096)], [range(4096, unit)], [range(unit, unit), range(0, unit)],
            [range(0, 2 * unit), range(unit, unit)], [range(0, unit), range(0, unit)], [range(1 << 52, unit)],
            [range(0 &- unit, unit)], [range(0 &- unit, 2 * unit)],
        ] {
            do throws(GuestMemoryError) {
                _ = try GuestMemory(ranges: ranges)
                Issue.record("\(ranges) was accepted")
            } catch {
                guard case .badLayout = error else {
                    Issue.record("\(ranges): \(error)")
                    continue
                }
            }
        }
    }

    @Test func boundsOfEveryAccess() {
        let memory = GuestMemory.withHole()
        let cases: [(UInt64, Int, Bool)] = [
            (0, 8, true), ((4 << 20) - 8, 8, true), ((4 << 20) - 7, 8, false), (4 << 20, 1, false), (6 << 20, 8, false),
            ((8 << 20) - 1, 2, false), (8 << 20, 8, true), ((10 << 20) - 8, 8, true), ((10 << 20) - 7, 8, false),
            (10 << 20, 1, false), (.max, 1, false), (.max - 7, 8, false), (1 << 63, 8, false), (0, 4 << 20, true),
            (0, 4 << 20 + 1, false), (0, .max, false), (1, .max, false), (0, -1, false), (0, .min, false),
        ]
        for (address, bytes, isValid) in cases {
            let place = GuestAddress(address)
            #expect((memory.hostPointer(place, bytes: bytes) != nil) == isValid, "\(address) \(bytes)")
            guard bytes == 8 else { continue }
            let error = GuestMemoryError.notRAM(place, bytes: 8)
            var buffer: UInt64 = 0
            if isValid {
                #expect(throws: Never.self) { try memory.store(UInt64(7), at: place) }
                #expect(throws: Never.self) {
                    try withUnsafeMutableBytes(of: &buffer) { try memory.read(place, into: $0) }
                }
                #expect(buffer == 7)
            } else {
                #expect(throws: error) { try memory.store(UInt64(7), at: place) }
                #expect(throws: error) { _ = try memory.load(place, as: UInt64.self) }
                #expect(throws: error) { try withUnsafeMutableBytes(of: &buffer) { try memory.read(place, into: $0) } }
                #expect(throws: error) { try withUnsafeBytes(of: buffer) { try memory.write($0, at: place) } }
            }
        }
        for address in [1, (4 << 20) - 1, 4 << 20, .max - 1] as [UInt64] {
            let place = GuestAddress(address)
            #expect(throws: GuestMemoryError.self) { _ = try memory.loadAcquire16(place) }
            #expect(throws: GuestMemoryError.self) { try memory.storeRelease16(1, at: place) }
        }
    }

    @Test func writesAreLoggedAndReadsAreNot() throws {
        let memory = GuestMemory.withHole()
        _ = try memory.load(GuestAddress(0), as: UInt64.self)
        _ = try memory.loadAcquire16(GuestAddress(2))
        #expect(memory.writeLog.population == 0)
        // Across a page's edge, without alignment.
        try memory.store(UInt64(0x0102_0304_0506_0708), at: GuestAddress(0x1ffc))
        #expect(memory.writeLog.nextRun(from: 0) == 1..<3)
        #expect(try memory.load(GuestAddress(0x1ffd), as: UInt32.self) == 0x0405_0607)
        try memory.storeRelease16(9, at: GuestAddress(0x5ffe))
        let bytes = [UInt8](repeating: 5, count: 3 * 4096)
        try bytes.withUnsafeBytes { try memory.write($0, at: GuestAddress(8 << 20)) }
        try [UInt8]().withUnsafeBytes { try memory.write($0, at: GuestAddress(0x9000)) }
        #expect(memory.writeLog.population == 2 + 1 + 3 && memory.writeLog[5] && memory.writeLog[2050])
        #expect(throws: GuestMemoryError.self) {
            try bytes.withUnsafeBytes { try memory.write($0, at: GuestAddress((4 << 20) - 4096)) }
        }
        #expect(memory.writeLog.population == 6)
    }

    @Test func discardedPagesReadAsZero() throws {
        let memory = GuestMemory.withHole()
        memory.poke([UInt8](repeating: 0xee, count: 4 * 4096), at: 0x10000)
        try memory.discard(pages: 17..<19)
        #expect(memory.peek(0x10fff, count: 2) == [0xee, 0] && memory.peek(0x12fff, count: 2) == [0, 0xee])
        #expect(throws: GuestMemoryError.self) { try memory.discard(pages: 1023..<1025) }
        #expect(throws: GuestMemoryError.self) { try memory.discard(pages: 1500..<1501) }
    }

    @Test func addresses() {
        #expect(GuestAddress(0x1fff).pageFrame == PageFrameNumber(1))
        #expect(PageFrameNumber(3).address == GuestAddress(0x3000))
        #expect(GuestAddress(.max).advanced(by: 1) == nil)
        #expect(GuestAddress(.max - 1).advanced(by: 1) == GuestAddress(.max))
        #expect(GuestAddress(255).description == "0xff")
    }

    @Test func stateCodingRoundTripAndItsLimits() throws {
        var encoder = StateEncoder()
        encoder.put(UInt64.max - 1)
        encoder.put(Int16(-2))
        encoder.put(true)
        encoder.put([1, 2, 3])
        encoder.put("gap")
        var decoder = StateDecoder(encoder.bytes)
        #expect(try decoder.take(UInt64.self) == .max - 1)
        #expect(try decoder.take(Int16.self) == -2)
        #expect(try decoder.takeBool())
        #expect(try decoder.takeBlob(limit: 3) == [1, 2, 3])
        #expect(throws: StateError.self) { try decoder.finish() }
        #expect(try decoder.takeString(limit: 10) == "gap")
        try decoder.finish()
        #expect(throws: StateError.self) { _ = try decoder.take(UInt8.self) }

        var blob = StateDecoder([4, 0, 0, 0, 1, 2, 3])
        #expect(throws: StateError.self) { _ = try blob.takeBlob(limit: 100) }
        var long = StateDecoder([0xff, 0xff, 0xff, 0xff, 1])
        #expect(throws: StateError.self) { _ = try long.takeBlob(limit: 100) }
        var truth = StateDecoder([2])
        #expect(throws: StateError.self) { _ = try truth.takeBool() }
        var random = SeededGenerator(seed: 3)
        for _ in 0..<2000 {
            var decoder = StateDecoder(random.bytes(Int.random(in: 0..<40, using: &random)))
            _ = try? decoder.take(UInt32.self)
            _ = try? decoder.takeString(limit: 20)
            _ = try? decoder.takeBlob(limit: .max)
            _ = try? decoder.takeBool()
            _ = try? decoder.finish()
        }
    }

    @Test func numbersBeyondAnyMemory() {
        let memory = GuestMemory.withHole()
        #expect(!memory.isRAM(page: .max) && !memory.isRAM(page: 2560) && memory.isRAM(page: 2559))
        // An address and a length that nobody has checked.
        memory.logWrite(GuestAddress(.max), bytes: .max)
        memory.logWrite(GuestAddress(.max - 1), bytes: 1)
        memory.logWrite(GuestAddress(2560 << 12), bytes: 1)
        #expect(memory.writeLog.population == 0)
        memory.logWrite(GuestAddress(2559 << 12), bytes: .max)
        #expect(memory.writeLog.population == 1 && memory.writeLog[2559])
    }

    @Test func releasedPagesAreLogged() throws {
        let memory = GuestMemory.withHole()
        memory.poke([UInt8](repeating: 7, count: 3 * 4096), at: 5 << 12)
        try memory.release(pages: 5..<7)
        #expect(memory.peek(5 << 12, count: 3 * 4096) == [UInt8](repeating: 0, count: 8192) + [UInt8](repeating: 7, count: 4096))
        #expect((0..<2560).filter { memory.writeLog[$0] } == [5, 6])
        for pages in [1023..<1025, 1024..<1025, 2559..<2561, -1..<1] {
            #expect(throws: GuestMemoryError.self) { try memory.release(pages: pages) }
        }
        #expect(memory.writeLog.population == 2)
    }
}
