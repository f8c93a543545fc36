// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import TestSupport
import Testing

/// What the summary lets the bitmap pass over must hold nothing: every operation in random order, against a set.
@Suite struct SummaryTests {
    @Test(arguments: 0..<12 as Range<UInt64>) func everyOperationAgainstASet(seed: UInt64) {
        var random = SeededGenerator(seed: 500 + seed)
        // Several summary words, the last of them not whole.
        let count = [4096, 12_288, 20_000, 30_016][Int(seed % 4)]
        let map = PageBitmap(bitCount: count), other = PageBitmap(bitCount: count)
        var bits: Set<Int> = [], others: Set<Int> = []
        func range() -> Range<Int> {
            let start = Int.random(in: 0..<map.bitCount, using: &random)
            return start..<min(start + Int(random.next() >> UInt64.random(in: 50..<64, using: &random)), map.bitCount)
        }
        for _ in 0..<200 {
            let pages = range(), index = Int.random(in: 0..<map.wordCount, using: &random)
            let value = random.next() & random.next() & random.next()
            func pagesOf(_ word: UInt64) -> [Int] { (0..<64).filter { word >> UInt64($0) & 1 == 1 }.map { index * 64 + $0 } }
            switch Int.random(in: 0..<16, using: &random) {
            case 0: map.set(pages); bits.formUnion(pages)
            case 1: map.setOwn(pages); bits.formUnion(pages)
            case 2: map.clear(pages); bits.subtract(pages)
            case 3: map.clearOwn(pages); bits.subtract(pages)
            case 4: map.merge(value, intoWord: index); bits.formUnion(pagesOf(value))
            case 5:
                map.store(value, inWord: index)
                bits.subtract(index * 64..<index * 64 + 64)
                bits.formUnion(pagesOf(value))
            case 6: map.remove(value, fromWord: index); bits.subtract(pagesOf(value))
            case 7: if pages.lowerBound < map.bitCount { map.atomicSet(pages.lowerBound); bits.insert(pages.lowerBound) }
            case 8:
                let taken = map.atomicTake(word: index)
                #expect(Set(pagesOf(taken)) == bits.filter { $0 / 64 == index })
                bits.subtract(index * 64..<index * 64 + 64)
            case 9: other.set(pages); others.formUnion(pages)
            case 10: map.formUnion(other); bits.formUnion(others)
            case 11:
                #expect(map.intersectionCount(other) == bits.intersection(others).count)
                #expect(map.subtract(other) == bits.intersection(others).count)
                bits.subtract(others)
            case 12:
                map.withUnsafeWords { $0[index] = value }
                bits.subtract(index * 64..<index * 64 + 64)
                bits.formUnion(pagesOf(value))
            case 13: other.clearAll(); others = []
            case 14 where Int.random(in: 0..<4, using: &random) == 0: map.clearAll(); bits = []
            case 15 where Int.random(in: 0..<4, using: &random) == 0:
                var drained: Set<Int> = []
                map.atomicDrain { index, word in
                    #expect(word != 0)
                    for bit in 0..<64 where word >> UInt64(bit) & 1 == 1 { drained.insert(index * 64 + bit) }
                }
                #expect(drained == bits)
                bits = []
            default: break
            }
            #expect(map.population == bits.count)
            #expect(map.firstWord == bits.min().map { $0 / 64 } && map.lastWord == bits.max().map { $0 / 64 })
            #expect(map.next(from: pages.lowerBound) == bits.filter { $0 >= pages.lowerBound }.min())
            var seen: Set<Int> = [], end = -1
            map.forEachRun { run in
                #expect(run.lowerBound > end, "runs are in order and do not touch")
                seen.formUnion(run)
                end = run.upperBound
            }
            #expect(seen == bits)
        }
    }

    /// Two threads with words of their own, whose marks lie side by side in the summary: none may be lost.
    @Test func ownersOfWordsDoNotDisturbEachOther() {
        let map = PageBitmap(bitCount: 1 << 20)
        for turn in 0..<40 {
            let threads = (0..<2).map { number in
                HostThread {
                    for word in stride(from: number * 4, to: map.wordCount, by: 8) {
                        let pages = word * 64..<word * 64 + 256
                        map.setOwn(pages)
                        map.clearOwn(pages.lowerBound..<pages.lowerBound + 64)
                    }
                }
            }
            for thread in threads { thread.join() }
            // Found by a search, which goes by the marks.
            #expect(map.population == 3 << 18)
            var found = 0, next = map.firstWord
            while let index = next {
                found += 1
                next = map.nextWord(from: index + 1)
            }
            #expect(found == 3 * map.wordCount / 4, "turn \(turn)")
            map.clearAll()
            #expect(map.firstWord == nil)
        }
    }

    /// Two threads set bits all over while this one drains: each bit comes out once for each time it was set anew.
    @Test func drainsLoseNothing() {
        let map = PageBitmap(bitCount: 3 * 4096), rounds = 20_000, done = Tally()
        var taken = 0
        let threads = (0..<2).map { number in
            HostThread {
                var random = SeededGenerator(seed: UInt64(number))
                for _ in 0..<rounds {
                    let bit = number + 2 * Int.random(in: 0..<map.bitCount / 2, using: &random)
                    // Waits until it was taken, so that every set counts.
                    while map[bit] {}
                    map.atomicSet(bit)
                }
                done.add()
            }
        }
        while done.value < 2 { map.atomicDrain { _, bits in taken += bits.nonzeroBitCount } }
        map.atomicDrain { _, bits in taken += bits.nonzeroBitCount }
        for thread in threads { thread.join() }
        #expect(taken == 2 * rounds)
        #expect(map.population == 0 && map.firstWord == nil)
    }
}

@Suite struct DoubleBufferedLogTests {
    @Test func returnsWhatWasSet() {
        let log = DoubleBufferedLog(bitCount: 9000), target = PageBitmap(bitCount: 9000)
        var random = SeededGenerator(seed: 3), bits: Set<Int> = []
        for _ in 0..<20 {
            for _ in 0..<Int.random(in: 0..<300, using: &random) {
                let page = Int.random(in: 0..<9000, using: &random)
                log.atomicSet(page)
                bits.insert(page)
            }
            log.harvest(into: target)
            #expect(target.population == bits.count && bits.allSatisfy { target[$0] })
            #expect(target.lastWord == bits.max().map { $0 / 64 })
            if Bool.random(using: &random) {
                target.clearAll()
                bits = []
            }
        }
        log.fill()
        log.harvest(into: target)
        #expect(target.population == target.bitCount)
    }

    /// A bit set while the buffers change places is in this harvest or the next.
    @Test func losesNothingWhileItIsHarvested() {
        let log = DoubleBufferedLog(bitCount: 3 * 4096), found = PageBitmap(bitCount: 3 * 4096)
        let rounds = 20_000, owned = 1000
        let wanted = (0..<2).map { _ in Tally() }, seen = (0..<2).map { _ in Tally() }
        let threads = (0..<2).map { number in
            HostThread {
                // Each bit in turn, and the next only when it came out.
                for round in 0..<rounds {
                    log.atomicSet(number * 2 * 4096 + round * 7 % owned)
                    wanted[number].add()
                    while seen[number].value < wanted[number].value {}
                }
            }
        }
        while seen.contains(where: { $0.value < rounds }) {
            // What is asked for now was set before the harvest that follows, or the one before it: two are enough.
            let now = wanted.map(\.value)
            for _ in 0..<2 { log.harvest(into: found) }
            for number in 0..<2 where now[number] > seen[number].value {
                let page = number * 2 * 4096 + (now[number] - 1) * 7 % owned
                #expect(found[page], "thread \(number), set \(now[number])")
                found.clear(page..<page + 1)
                seen[number].add()
            }
        }
        for thread in threads { thread.join() }
    }
}
