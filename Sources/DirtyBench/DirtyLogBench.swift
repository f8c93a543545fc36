// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Machine
import Migration

extension BenchOptions {
    /// The ways to find dirty pages that are measured: of real vCPUs, or of threads on plain memory.
    var ways: [(name: String, tracking: DirtyTracking?)] {
        if plain { return [("write log", nil)] }
        return [("bitmap", .bitmap), ("manual", .manual), ("ring", .ring(entries: ringEntries))]
    }
}

/// `lacuna bench dirty dirty-log`: what one collection costs, against how much is dirty; and whether it finds exactly
/// the pages that the guest wrote.
func dirtyLogBench(_ options: BenchOptions) throws(BenchError) -> BenchTable {
    var table = BenchTable(
        "dirty-log",
        columns: [
            "tracker", "MiB", "guest", "dirty", "arm_us", "guest_us", "collect_us", "protect_us", "full_rings", "lost", "extra",
        ])
    var sizes: [UInt64] = [64 << 20, 256 << 20, 1 << 30, 2 << 30].filter { $0 <= options.memory }
    if sizes.isEmpty { sizes = [options.memory] }
    var ways = options.ways
    // What a ring costs that nobody empties in time.
    if !options.plain { ways.append((fullRing, .ring(entries: 1024))) }
    for (name, tracking) in ways {
        for size in sizes {
            if let tracking {
                let period = name == fullRing ? 60_000 : DirtyRings.usualPeriodMilliseconds
                let guest = try BareGuest(size: size, vcpus: 2, tracking: tracking, ringPeriod: period)
                try measure(
                    name, guest.memory, guest.pages, guest.makeTracker(), into: &table, fullRings: { guest.ringFigures.fullRings }
                ) { (value, list) throws(BenchError) in try guest.share(value, to: list) }
            } else {
                let memory = try plainMemory(size)
                try measure(name, memory, Int(size / 4096), WriteLogTracker(memory), into: &table, fullRings: { 0 }) { value, list in
                    for page in list { try? memory.store(value, at: GuestAddress(UInt64(page) << 12)) }
                }
            }
        }
    }
    return table
}

private let fullRing = "ring 1024 full"

func plainMemory(_ size: UInt64) throws(BenchError) -> GuestMemory {
    do { return try GuestMemory(ranges: [GuestRange(start: GuestAddress(0), size: size)]) } catch {
        throw BenchError("\(error)")
    }
}

private func measure(
    _ name: String, _ memory: GuestMemory, _ pages: Int, _ tracker: any DirtyTracker, into table: inout BenchTable,
    fullRings: () -> Int, write: @escaping @Sendable (UInt32, [UInt32]) throws(BenchError) -> Void
) throws(BenchError) {
    // Pages the host never gave out would make the first write dear, whoever tracks it.
    var value: UInt32 = 1
    try write(value, scattered(pages, of: pages, seed: 1))
    let found = PageBitmap(bitCount: memory.frameCount), expected = PageBitmap(bitCount: memory.frameCount)
    for count in [0, 1, pages / 100, pages / 10, pages] {
        let repetitions = count > 100_000 ? 1 : count > 20_000 ? 3 : 5
        var (guestTime, collectTime, protectTime): ([UInt64], [UInt64], [UInt64]) = ([], [], [])
        let ringsBefore = fullRings()
        do throws(PartFailure) {
            let armed = nanoseconds()
            try tracker.arm()
            try tracker.protectAll()
            let armTime = nanoseconds() - armed
            defer { tracker.disarm() }
            try tracker.collect(into: found)
            found.clearAll()
            var (lost, extra) = (0, 0)
            for repetition in 0..<repetitions {
                let list = scattered(count, of: pages, seed: UInt64(count + repetition + 2))
                expected.clearAll()
                for page in list { expected.set(Int(page)..<Int(page) + 1) }
                value &+= 1
                var failure: BenchError?
                guestTime.append(timed { do throws(BenchError) { try write(value, list) } catch { failure = error } })
                if let failure { throw PartFailure(failure.description) }
                let start = nanoseconds()
                try tracker.collect(into: found)
                let collected = nanoseconds()
                try tracker.protectAll()
                collectTime.append(collected - start)
                protectTime.append(nanoseconds() - collected)
                let common = found.intersectionCount(expected)
                lost += list.count - common
                extra += found.population - common
                found.clearAll()
            }
            table.add([
                .text(name), .count(pages / 256), .text("rests"), .count(count), .us(armTime), .us(median(guestTime)), .us(median(collectTime)),
                .us(median(protectTime)), .count(fullRings() - ringsBefore), .count(lost), .count(extra),
            ])
            if lost > 0 { table.misses.append("\(name), \(pages / 256) MiB, \(count) pages: \(lost) were lost") }
            if extra > 0 { table.misses.append("\(name), \(pages / 256) MiB, \(count) pages: \(extra) too many") }
        } catch { throw BenchError("\(name): \(error)") }
    }
    let last = value &+ 1
    try race(name, pages, tracker, found, expected, into: &table, fullRings: fullRings) { list throws(BenchError) in
        try write(last, list)
    }
}

/// One collection after the other while the guest writes: together they must return exactly what it wrote.
private func race(
    _ name: String, _ pages: Int, _ tracker: any DirtyTracker, _ found: PageBitmap, _ expected: PageBitmap,
    into table: inout BenchTable, fullRings: () -> Int, write: @escaping @Sendable ([UInt32]) throws(BenchError) -> Void
) throws(BenchError) {
    let list = scattered(pages / 10, of: pages, seed: 99), all = PageBitmap(bitCount: found.bitCount)
    expected.clearAll()
    for page in list { expected.set(Int(page)..<Int(page) + 1) }
    let ringsBefore = fullRings()
    do throws(PartFailure) {
        try tracker.arm()
        try tracker.protectAll()
        defer { tracker.disarm() }
        let done = Flag()
        let writer = Background("guest") { () -> (BenchError?, UInt64) in
            var failure: BenchError?
            let time = timed { do throws(BenchError) { try write(list) } catch { failure = error } }
            done.raise()
            return (failure, time)
        }
        var (collectTime, protectTime): ([UInt64], [UInt64]) = ([], [])
        var isLast = false
        repeat {
            // The last collection begins after the last write.
            isLast = done.isRaised
            let start = nanoseconds()
            try tracker.collect(into: found)
            let collected = nanoseconds()
            try tracker.protectAll()
            collectTime.append(collected - start)
            protectTime.append(nanoseconds() - collected)
            all.formUnion(found)
            found.clearAll()
        } while !isLast
        let (failure, guestTime) = writer.join()
        if let failure { throw PartFailure(failure.description) }
        let common = all.intersectionCount(expected)
        let (lost, extra) = (list.count - common, all.population - common)
        table.add([
            .text(name), .count(pages / 256), .text("writes"), .count(list.count), .us(0), .us(guestTime),
            .us(median(collectTime)), .us(median(protectTime)), .count(fullRings() - ringsBefore), .count(lost), .count(extra),
        ])
        if lost > 0 { table.misses.append("\(name), \(pages / 256) MiB, collected while it wrote: \(lost) were lost") }
        if extra > 0 { table.misses.append("\(name), \(pages / 256) MiB, collected while it wrote: \(extra) too many") }
    } catch { throw BenchError("\(name): \(error)") }
}
