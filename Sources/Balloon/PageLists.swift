// SPDX-License-Identifier: Apache-2.0
internal import GuestMemory
internal import Virtio

/// The pages the guest has given up: what the inflate and deflate queues said (virtio 1.3, section 5.5.6).
struct PageLists {
    enum Direction {
        case inflate
        case deflate
    }

    /// The most page numbers in one chain. Linux sends 256; the bound keeps the work for one chain short.
    static let maximumPages = 16384

    /// Pages in the balloon, by page frame. Only RAM.
    private(set) var inflated: PageBitmap

    init(frames: Int) { inflated = PageBitmap(bitCount: frames) }

    /// The pages of `other` that are still RAM.
    init(_ other: PageLists, within ram: PageBitmap) {
        self.init(frames: ram.bitCount)
        for index in 0..<min(ram.wordCount, other.inflated.wordCount) {
            inflated.store(other.inflated.word(index) & ram.word(index), inWord: index)
        }
    }

    /// Takes one chain of 32-bit page frame numbers.
    func accept(_ chain: DescriptorChain, _ direction: Direction, ram: PageBitmap, _ counters: inout BalloonCounters) {
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
            if direction == .deflate { inflated.clearAll() }
            return
        }
        for page in pages {
            let page = Int(page)
            guard page < ram.bitCount, ram[page] else {
                counters.listedPagesNotRAM &+= 1
                continue
            }
            let isIn = inflated[page]
            switch direction {
            case .inflate where !isIn:
                inflated.set(page..<page + 1)
                counters.inflatedPages &+= 1
            case .deflate where isIn:
                inflated.clear(page..<page + 1)
                counters.deflatedPages &+= 1
            case .inflate, .deflate: break
            }
        }
    }

    /// As runs of pages.
    func encode(into encoder: inout StateEncoder) {
        var runs: [Range<Int>] = [], place = 0
        while let run = inflated.nextRun(from: place) {
            runs.append(run)
            place = run.upperBound
        }
        encoder.put(UInt32(runs.count))
        for run in runs {
            encoder.put(UInt32(run.lowerBound))
            encoder.put(UInt32(run.count))
        }
    }

    /// Takes runs, untrusted: ascending, and all within RAM. Work and memory are bounded by the bytes that are there.
    init(from decoder: inout StateDecoder, ram: PageBitmap) throws(StateError) {
        self.init(frames: ram.bitCount)
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
        guard inflated.intersectionCount(ram) == inflated.population else {
            throw StateError("the balloon holds pages that are not RAM")
        }
    }
}
