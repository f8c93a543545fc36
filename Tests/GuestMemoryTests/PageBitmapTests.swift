// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import TestSupport
import Testing

/// Everything a bitmap does, one bit at a time.
private struct Oracle {
    var bits: [Bool]
    init(_ count: Int) { bits = Array(repeating: false, count: (count + 63) / 64 * 64) }
    init(_ map: PageBitmap) { bits = (0..<map.bitCount).map { map[$0] } }
    mutating func assign(_ pages: Range<Int>, _ value: Bool) { for page in pages { bits[page] = value } }
    var population: Int { bits.count { $0 } }
    func word(_ index: Int) -> UInt64 {
        (0..<64).reduce(0) { bits[64 * index + $1] ? $0 | 1 << UInt64($1) : $0 }
    }
    func next(from page: Int) -> Int? { page >= bits.count ? nil : bits[page...].firstIndex(of: true) }
    func nextRun(from page: Int, limit: Int) -> Range<Int>? {
        guard let start = next(from: page) else { return nil }
        let end = bits[start...].firstIndex(of: false) ?? bits.count
        return start..<min(end, limit > bits.count ? bits.count : start + limit)
    }
}

@Suite struct PageBitmapTests {
    static let shapes = [0, 1, 63, 64, 65, 127, 128, 129, 191, 640, 1000, 4095, 4096, 4097, 9000]

    /// Ranges that begin and end at and around the edges of words, and some others.
    private func ranges(_ count: Int, _ random: inout SeededGenerator) -> [Range<Int>] {
        var edges = Set([0, 1, 31, 62, 63, 64, 65, 126, 127, 128, 129, count - 1, count])
        edges = edges.filter { $0 >= 0 && $0 <= count }
        for _ in 0..<4 { edges.insert(Int.random(in: 0...count, using: &random)) }
        return edges.flatMap { low in edges.filter { $0 >= low }.map { low..<$0 } }
    }

    @Test(arguments: shapes) func againstTheOracle(count: Int) {
        var random = SeededGenerator(seed: UInt64(count))
        let map = PageBitmap(bitCount: count)
        var oracle = Oracle(count)
        #expect(map.bitCount == oracle.bits.count && map.wordCount == oracle.bits.count / 64)
        #expect(map.population == 0 && map.next(from: 0) == nil && map.nextRun(from: 0) == nil)
        for range in ranges(map.bitCount, &random).shuffled(using: &random) {
            let value = Bool.random(using: &random)
            if value { map.set(range) } else { map.clear(range) }
            oracle.assign(range, value)
            #expect(Oracle(map).bits == oracle.bits, "\(range) \(value)")
            #expect(map.population == oracle.population)
            #expect(map.firstWord == oracle.next(from: 0).map { $0 / 64 })
            #expect(map.lastWord == oracle.bits.lastIndex(of: true).map { $0 / 64 })
            let page = Int.random(in: 0...map.bitCount, using: &random)
            #expect(map.next(from: page) == oracle.next(from: page), "from \(page)")
            for limit in [1, 2, 63, 64, 65, .max] {
                let run = oracle.nextRun(from: page, limit: limit)
                #expect(map.nextRun(from: page, limit: limit) == run, "\(page) \(limit)")
            }
        }
        for index in 0..<map.wordCount { #expect(map.word(index) == oracle.word(index)) }
        map.clearAll()
        #expect(map.population == 0)
    }

    @Test(arguments: 0..<20 as Range<UInt64>) func runsCoverExactlyWhatIsSet(seed: UInt64) {
        var random = SeededGenerator(seed: seed)
        let map = PageBitmap(bitCount: 1000)
        for _ in 0..<Int(seed) * 3 {
            let start = Int.random(in: 0..<1000, using: &random)
            map.set(start..<min(start + Int(random.anyMagnitude() % 200), 1000))
        }
        for limit in [1, 7, 64, 100, .max] {
            var place = 0, seen = Oracle(1000)
            while let run = map.nextRun(from: place, limit: limit) {
                #expect(run.lowerBound >= place && !run.isEmpty && run.count <= limit)
                seen.assign(run, true)
                place = run.upperBound
            }
            #expect(seen.bits == Oracle(map).bits)
        }
    }

    @Test(arguments: 0..<20 as Range<UInt64>) func setOperations(seed: UInt64) {
        var random = SeededGenerator(seed: 100 + seed)
        func make() -> PageBitmap {
            let map = PageBitmap(bitCount: 640)
            for index in 0..<10 where random.next() % 4 != 0 {
                map.store(random.next() & random.next(), inWord: index)
            }
            if random.next() % 4 == 0 { map.store(.max, inWord: 3) }
            return map
        }
        let a = make(), b = make()
        let before = Oracle(a).bits, other = Oracle(b).bits
        let common = zip(before, other).count { $0 && $1 }
        #expect(a.intersectionCount(b) == common && b.intersectionCount(a) == common)
        #expect(a.subtract(b) == common)
        #expect(Oracle(a).bits == zip(before, other).map { $0 && !$1 })
        #expect(a.subtract(b) == 0)
        a.formUnion(b)
        #expect(Oracle(a).bits == zip(before, other).map { $0 || $1 })
        #expect(Oracle(b).bits == other)
    }

    @Test func words() {
        let map = PageBitmap(bitCount: 128)
        map.merge(0b1010, intoWord: 1)
        map.merge(0b0110, intoWord: 1)
        #expect(map.word(1) == 0b1110 && map.word(0) == 0 && map[65] && !map[64])
        map.remove(0b0111, fromWord: 1)
        #expect(map.word(1) == 0b1000)
        map.store(.max, inWord: 0)
        #expect(map.nextRun(from: 5) == 5..<64)
        #expect(map.withUnsafeWords { Array($0) } == [.max, 0b1000])
        map.atomicSet(127)
        #expect(map.atomicTake(word: 1) == 0x8000_0000_0000_0008)
        #expect(map.atomicTake(word: 1) == 0)
    }

    @Test func atomicSetsAreNeverLost() {
        // Two threads set, this one takes: each bit comes out once for each time it was set anew.
        let map = PageBitmap(bitCount: 64)
        let rounds = 20_000, taken = Tally()
        let done = Tally()
        let threads = (0..<2).map { number in
            HostThread {
                for round in 0..<rounds {
                    let bit = number * 32 + round % 32
                    // Waits until it was taken, so that every set counts.
                    while map[bit] {}
                    map.atomicSet(bit)
                }
                done.add()
            }
        }
        while done.value < 2 || map.word(0) != 0 {
            for _ in 0..<map.atomicTake(word: 0).nonzeroBitCount { taken.add() }
        }
        for thread in threads { thread.join() }
        #expect(taken.value == 2 * rounds)
    }

    @Test func runsAreNeverEmpty() {
        let bitmap = PageBitmap(bitCount: 128)
        bitmap.set(60..<70)
        #expect(bitmap.nextRun(from: 0, limit: 0) == nil && bitmap.nextRun(from: 0, limit: -1) == nil)
        #expect(bitmap.nextRun(from: 0, limit: 1) == 60..<61)
    }
}
