// SPDX-License-Identifier: Apache-2.0
internal import GuestMemory
internal import Virtio

/// The pages the guest has given up: what the inflate and deflate queues said (virtio 1.3, section 5.5.6).
struct PageLists {
    enum Direction {
        case inflate
        case deflate
    }

    /// What a list did.
    struct Outcome {
        /// Runs that can go back to the host, whole units of it, in ascending order.
        var released: [Range<Int>] = []
        /// What was wrong with it, for a log.
        var fault: String?
    }

    /// The most page numbers in one chain. Linux sends 256; the bound keeps the work for one chain short.
    static let maximumPages = 16384

    /// Pages in the balloon, by page frame. Only RAM.
    private(set) var inflated: PageBitmap
    /// How many they are.
    private(set) var count = 0

    init(frames: Int) { inflated = PageBitmap(bitCount: frames) }

    /// The pages of `other` that are still RAM.
    init(_ other: PageLists, within ram: PageBitmap) {
        self.init(frames: ram.bitCount)
        for index in 0..<min(ram.wordCount, other.inflated.wordCount) {
            inflated.store(other.inflated.word(index) & ram.word(index), inWord: index)
        }
        count = inflated.population
    }

    /// Takes one chain of 32-bit page frame numbers.
    ///
    /// - Parameter unit: pages that the host can only take back together, a power of two.
    mutating func accept(
        _ chain: DescriptorChain, _ direction: Direction, ram: PageBitmap, unit: Int, _ counters: inout BalloonCounters
    ) -> Outcome {
        switch direction {
        case .inflate: counters.inflateChains &+= 1
        case .deflate: counters.deflateChains &+= 1
        }
        let count = chain.readableBytes / 4
        var pages = [UInt32](repeating: 0, count: min(count, Self.maximumPages))
        do throws(ChainReadError) {
            guard chain.writable.isEmpty, chain.readableBytes % 4 == 0, count <= Self.maximumPages else {
                throw .tooShort(wanted: 0, left: chain.readableBytes)
            }
            var reader = chain.reader()
            try reader.take(count, into: &pages)
        } catch {
            counters.malformedLists &+= 1
            // Which pages the guest takes back cannot be told: then none counts as given up any more (rule W5).
            if direction == .deflate {
                inflated.clearAll()
                self.count = 0
            }
            return Outcome(fault: "a list of pages of \(chain.readableBytes) bytes, or with writable parts")
        }
        var outcome = Outcome(), strangers = 0, changed: [Int] = []
        changed.reserveCapacity(pages.count)
        for page in pages {
            let page = Int(page)
            guard page < ram.bitCount, ram[page] else {
                strangers += 1
                continue
            }
            switch (direction, inflated[page]) {
            case (.inflate, false):
                inflated.set(page..<page + 1)
                changed.append(page)
            case (.deflate, true):
                inflated.clear(page..<page + 1)
                changed.append(page)
            // Not discarded again: who knows what the driver has made of it since.
            case (.inflate, true): counters.pagesInflatedTwice &+= 1
            case (.deflate, false): counters.pagesNotInflated &+= 1
            }
        }
        counters.listedPagesNotRAM &+= UInt64(strangers)
        if strangers > 0 { outcome.fault = "\(strangers) pages in a list are not the guest's RAM" }
        switch direction {
        case .inflate:
            self.count += changed.count
            counters.inflatedPages &+= UInt64(changed.count)
            outcome.released = releasable(changed, unit: unit)
        case .deflate:
            self.count -= changed.count
            counters.deflatedPages &+= UInt64(changed.count)
        }
        return outcome
    }

    /// The runs of whole units among newly inflated pages. Linux takes a list's pages one by one, mostly side by side
    /// and in either order.
    private func releasable(_ pages: [Int], unit: Int) -> [Range<Int>] {
        var runs: [Range<Int>] = []
        for page in pages.sorted() {
            // A unit goes back with the page that completes it.
            let start = page & ~(unit - 1), whole = start..<start + unit
            if let last = runs.last, last.upperBound > page { continue }
            guard unit == 1 || inflated.nextRun(from: start, limit: unit) == whole else { continue }
            if let last = runs.last, last.upperBound == start {
                runs[runs.count - 1] = last.lowerBound..<whole.upperBound
            } else {
                runs.append(whole)
            }
        }
        return runs
    }

    // MARK: Saved state

    private static let asRuns: UInt8 = 0
    private static let asWords: UInt8 = 1

    /// As runs of pages or as the bitmap's words, whichever is shorter.
    func encode(into encoder: inout StateEncoder) {
        var runs: [Range<Int>] = [], place = 0
        while runs.count <= inflated.wordCount, let run = inflated.nextRun(from: place) {
            runs.append(run)
            place = run.upperBound
        }
        if runs.count > inflated.wordCount {
            encoder.put(Self.asWords)
            for index in 0..<inflated.wordCount { encoder.put(inflated.word(index)) }
            return
        }
        encoder.put(Self.asRuns)
        encoder.put(UInt32(runs.count))
        for run in runs {
            encoder.put(UInt32(run.lowerBound))
            encoder.put(UInt32(run.count))
        }
    }

    /// Takes runs or words, untrusted: runs ascending, and all within RAM. Work and memory are bounded by the bytes that
    /// are there.
    init(from decoder: inout StateDecoder, ram: PageBitmap) throws(StateError) {
        self.init(frames: ram.bitCount)
        switch try decoder.take(UInt8.self) {
        case Self.asWords:
            for index in 0..<inflated.wordCount { inflated.store(try decoder.take(UInt64.self), inWord: index) }
        case Self.asRuns:
            let count = try decoder.take(UInt32.self)
            var end = 0
            for _ in 0..<count {
                let start = Int(try decoder.take(UInt32.self)), length = Int(try decoder.take(UInt32.self))
                guard start >= end, length > 0, start + length <= ram.bitCount else {
                    throw StateError("balloon pages \(start) + \(length) are out of order or beyond the memory")
                }
                end = start + length
                inflated.set(start..<end)
            }
        case let other: throw StateError("balloon pages of form \(other)")
        }
        count = inflated.population
        guard inflated.intersectionCount(ram) == count else {
            throw StateError("the balloon holds pages that are not RAM")
        }
    }
}
