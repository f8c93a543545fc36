// SPDX-License-Identifier: Apache-2.0
internal import CLinux

// Counting and finding. None of these changes a bit; the thread rules are those of `PageBitmap`.
extension PageBitmap {
    /// How many bits are set. O(words that may be set).
    public var population: Int {
        var count = 0
        for block in 0..<summaryCount where unsafe lacuna_load_relaxed_64(summary + block) != 0 {
            count += unsafe lacuna_popcount(storage + block << 6, wordsInBlock(block))
        }
        return count
    }

    /// Bits set in both bitmaps, which must have the same size.
    public func intersectionCount(_ other: PageBitmap) -> Int {
        precondition(other.wordCount == wordCount)
        var count = 0
        for block in 0..<summaryCount where unsafe summary[block] & other.summary[block] != 0 {
            for index in block << 6..<block << 6 + wordsInBlock(block) {
                unsafe count += (storage[index] & other.storage[index]).nonzeroBitCount
            }
        }
        return count
    }

    /// The first word at or after `index` with a bit set.
    public func nextWord(from index: Int) -> Int? {
        var index = max(index, 0)
        while index < wordCount {
            // The rest of this block, as far as its marks tell.
            let marks = unsafe lacuna_load_relaxed_64(summary + index >> 6) >> UInt64(index & 63)
            if marks == 0 {
                let block = unsafe lacuna_find_word(summary, index >> 6 + 1, summaryCount)
                index = block << 6
                continue
            }
            index += marks.trailingZeroBitCount
            // A mark may be old.
            if unsafe lacuna_load_relaxed_64(storage + index) != 0 { return index }
            index += 1
        }
        return nil
    }

    /// The first-dirty mark: the lowest word with a bit set. Exact, found through the summary.
    public var firstWord: Int? { nextWord(from: 0) }

    /// The last-dirty mark: the highest word with a bit set. Exact, found through the summary.
    public var lastWord: Int? {
        for block in (0..<summaryCount).reversed() {
            var marks = unsafe lacuna_load_relaxed_64(summary + block)
            while marks != 0 {
                let bit = 63 - marks.leadingZeroBitCount, index = block << 6 + bit
                if unsafe lacuna_load_relaxed_64(storage + index) != 0 { return index }
                marks &= ~(1 << UInt64(bit))
            }
        }
        return nil
    }

    /// The first set bit at or after `page`, found a word at a time.
    public func next(from page: Int) -> Int? {
        if page >= bitCount { return nil }
        let bits = word(page >> 6) & (~0 << UInt64(page & 63))
        if bits != 0 { return page & ~63 + bits.trailingZeroBitCount }
        guard let index = nextWord(from: page >> 6 + 1) else { return nil }
        return index << 6 + (unsafe lacuna_load_relaxed_64(storage + index)).trailingZeroBitCount
    }

    /// The first run of set bits at or after `page`, cut off at `limit` bits. Never empty: nil for a limit below 1.
    public func nextRun(from page: Int, limit: Int = .max) -> Range<Int>? {
        guard limit > 0, let start = next(from: page) else { return nil }
        let cut = limit < bitCount - start ? start + limit : bitCount
        // What is left of the first word, then whole words.
        let clear = ~word(start >> 6) >> UInt64(start & 63)
        if clear != 0 { return start..<min(start + clear.trailingZeroBitCount, cut) }
        let index = unsafe lacuna_find_hole(storage, start >> 6 + 1, (cut + 63) >> 6)
        let end = index << 6
        if end >= cut { return start..<cut }
        return start..<min(end + (~word(index)).trailingZeroBitCount, cut)
    }

    /// Hands each run of set bits to `body`, in ascending order. O(words that may be set + runs).
    public func forEachRun(_ body: (Range<Int>) -> Void) {
        var page = 0
        while let run = nextRun(from: page) {
            body(run)
            page = run.upperBound
        }
    }
}
