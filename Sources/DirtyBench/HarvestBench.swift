// SPDX-License-Identifier: Apache-2.0
import CLinux
import GuestMemory
import Machine
import Synchronization

/// `lacuna bench dirty harvest`: the ways to empty a bitmap into another while others set bits, against a plain copy of
/// it; and what walking one costs.
func harvestBench(_ options: BenchOptions) throws(BenchError) -> BenchTable {
    var table = BenchTable(
        "harvest", columns: ["what", "dirty_pct", "setters", "bitmap_MiB", "ms", "copies", "taken"])
    let bits = Int(options.memory / 4096)
    guard bits >= 1 << 15 else { throw BenchError("--memory is at least 128M for this benchmark") }
    let source = PageBitmap(bitCount: bits), target = PageBitmap(bitCount: bits)
    let double = DoubleBufferedLog(bitCount: bits)
    let bytes = source.wordCount * 8
    let megabytes = BenchValue.number(Double(bytes) / 1_048_576, decimals: 2)
    var copies: [UInt64] = []
    // Touches all memory once before anything is measured.
    for map in [source, target] { map.set(0..<map.bitCount) }
    for _ in 0..<9 {
        copies.append(
            source.withUnsafeWords { from in
                target.withUnsafeWords { to in timed { lacuna_copy(to.baseAddress!, from.baseAddress!, bytes) } }
            })
    }
    let copy = max(1, median(copies))
    table.add([
        .text("copy"), .count(100), .count(0), megabytes, .ms(copy), .number(1, decimals: 2), .count(0),
    ])
    for percent in [0.0, 0.01, 1, 10, 100] {
        for setters in [0, 1] {
            var ratios: [String: Double] = [:]
            func row(_ what: String, repetitions: Int, _ body: () -> Int, prepare: () -> Void, set: @escaping @Sendable (Int) -> Void) {
                var (times, taken): ([UInt64], Int) = ([], 0)
                let crew = (0..<setters).map { Setter(seed: UInt64($0 + 1), bits: bits, set) }
                for _ in 0..<repetitions {
                    prepare()
                    times.append(timed { taken = body() })
                }
                for setter in crew { setter.stop() }
                let ratio = Double(median(times)) / Double(copy)
                ratios[what] = ratio
                table.add([
                    .text(what), .number(percent, decimals: 2), .count(setters), megabytes, .ms(median(times)),
                    .number(ratio, decimals: 2), .count(taken),
                ])
            }
            let shape = Shape(percent: percent, bits: bits)
            let refill: () -> Void = {
                source.atomicDrain { _, _ in }
                target.clearAll()
                shape.fill { source.atomicSet($0) } whole: { source.set(0..<source.bitCount) }
            }
            let slow = percent == 100 && bits > 1 << 24 ? 1 : 3
            row("exchange each word", repetitions: 5, {
                for index in 0..<source.wordCount {
                    let taken = source.atomicTake(word: index)
                    if taken != 0 { target.merge(taken, intoWord: index) }
                }
                return target.population
            }, prepare: refill, set: source.atomicSet)
            row("exchange by summary", repetitions: 5, {
                source.atomicDrain { index, taken in target.merge(taken, intoWord: index) }
                return 0
            }, prepare: refill, set: source.atomicSet)
            row("double buffer", repetitions: 5, {
                double.harvest(into: target)
                return 0
            }, prepare: {
                double.harvest(into: target)
                double.harvest(into: target)
                target.clearAll()
                shape.fill { double.atomicSet($0) } whole: { double.fill() }
            }, set: double.atomicSet)
            row("find next, bit by bit", repetitions: slow, {
                var (page, count) = (0, 0)
                while let next = source.next(from: page) {
                    source.atomicClear(next)
                    target.set(next..<next + 1)
                    count += 1
                    page = next + 1
                }
                return count
            }, prepare: refill, set: source.atomicSet)
            guard setters == 0 else { continue }
            row("walk the runs", repetitions: 5, {
                var count = 0
                source.forEachRun { count += $0.count }
                return count
            }, prepare: refill, set: { _ in })
            if percent == 0, let drain = ratios["exchange by summary"], let walk = ratios["walk the runs"], drain + walk > 0.2 {
                table.misses.append("collecting and walking a clean bitmap takes \(drain + walk) of a copy, more than 0.2")
            }
            if percent == 100, let walk = ratios["walk the runs"], 1 / walk < 0.7 {
                table.misses.append("walking a full bitmap has \(1 / walk) of a copy's speed, less than 0.7")
            }
            if let harvest = ratios["double buffer"], harvest > 2 {
                table.misses.append("the double-buffered harvest of \(percent) % takes \(harvest) copies, more than 2")
            }
        }
    }
    return table
}

/// Which bits are set before each harvest.
private struct Shape {
    let percent: Double
    let bits: Int
    func fill(_ set: (Int) -> Void, whole: () -> Void) {
        if percent == 100 { return whole() }
        var random = Sequence64(seed: 7)
        for _ in 0..<Int(Double(bits) * percent / 100) { set(random.next(below: bits)) }
    }
}

/// A thread that sets bits all over until it is stopped.
private final class Setter: Sendable {
    private let stopping: Flag
    private let thread: Background<Void>

    init(seed: UInt64, bits: Int, _ set: @escaping @Sendable (Int) -> Void) {
        let stopping = Flag()
        self.stopping = stopping
        thread = Background("setter") {
            var random = Sequence64(seed: seed)
            while !stopping.isRaised { set(random.next(below: bits)) }
        }
    }
    func stop() {
        stopping.raise()
        thread.join()
    }
}

final class Flag: Sendable {
    private let raised = Atomic<Bool>(false)
    var isRaised: Bool { raised.load(ordering: .acquiring) }
    func raise() { raised.store(true, ordering: .releasing) }
}
