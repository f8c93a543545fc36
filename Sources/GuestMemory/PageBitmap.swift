// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// A bitmap with one bit for each 4 KiB page of the guest-physical address space, from page frame 0 up to `bitCount`;
/// holes simply never have their bits set. 64-bit words, least significant bit first: the layout of KVM's dirty log and
/// of the free-page bitmap protocol.
///
/// A summary with one bit for each word lets the searching and merging operations pass over 64 clean words (16 MiB of
/// guest memory) with one look. A summary bit may stand for a word that is clear, never the other way round.
///
/// Thread rules: the operations named `atomic…` may run at the same time as each other, from any thread. The others
/// need the bitmap to themselves (or only atomic readers beside them).
@safe public final class PageBitmap: @unchecked Sendable {
    // Sendable by the thread rules above; the storage never moves and is freed only in deinit.
    let storage: UnsafeMutablePointer<UInt64>
    /// One bit a word of `storage`.
    let summary: UnsafeMutablePointer<UInt64>
    let summaryCount: Int
    /// Bits in the bitmap, a multiple of 64.
    public let bitCount: Int
    /// Words in the bitmap.
    public let wordCount: Int

    /// An all-clear bitmap of at least `bitCount` bits (rounded up to whole words).
    public init(bitCount: Int) {
        precondition(bitCount >= 0)
        wordCount = (bitCount + 63) / 64
        self.bitCount = wordCount * 64
        summaryCount = (wordCount + 63) / 64
        unsafe storage = .allocate(capacity: max(wordCount, 1))
        unsafe storage.initialize(repeating: 0, count: max(wordCount, 1))
        unsafe summary = .allocate(capacity: max(summaryCount, 1))
        unsafe summary.initialize(repeating: 0, count: max(summaryCount, 1))
    }

    deinit {
        unsafe storage.deallocate()
        unsafe summary.deallocate()
    }

    public subscript(page: Int) -> Bool {
        precondition(page >= 0 && page < bitCount)
        return unsafe lacuna_load_relaxed_64(storage + page >> 6) >> UInt64(page & 63) & 1 == 1
    }

    /// The word that holds bits `64 * index ..< 64 * index + 64`.
    public func word(_ index: Int) -> UInt64 {
        precondition(index >= 0 && index < wordCount)
        return unsafe lacuna_load_relaxed_64(storage + index)
    }

    // MARK: Changing

    /// Sets the bits of `pages`. O(words touched).
    public func set(_ pages: Range<Int>) {
        precondition(pages.lowerBound >= 0 && pages.upperBound <= bitCount)
        if pages.isEmpty { return }
        unsafe lacuna_set_range(storage, pages.lowerBound, pages.upperBound)
        unsafe lacuna_set_range(summary, pages.lowerBound >> 6, (pages.upperBound - 1) >> 6 + 1)
    }

    /// Clears the bits of `pages`. O(words touched).
    public func clear(_ pages: Range<Int>) {
        precondition(pages.lowerBound >= 0 && pages.upperBound <= bitCount)
        if pages.isEmpty { return }
        unsafe lacuna_clear_range(storage, pages.lowerBound, pages.upperBound)
        // Words wholly inside are clear now; those at the ends may hold other pages.
        var first = pages.lowerBound >> 6, end = (pages.upperBound - 1) >> 6 + 1
        if unsafe storage[first] != 0 { first += 1 }
        if first < end, unsafe storage[end - 1] != 0 { end -= 1 }
        if first < end { unsafe lacuna_clear_range(summary, first, end) }
    }

    public func clearAll() {
        for block in 0..<summaryCount where unsafe summary[block] != 0 {
            unsafe (storage + block << 6).update(repeating: 0, count: wordsInBlock(block))
            unsafe summary[block] = 0
        }
    }

    /// ORs `bits` into a word.
    public func merge(_ bits: UInt64, intoWord index: Int) {
        precondition(index >= 0 && index < wordCount)
        unsafe storage[index] |= bits
        if bits != 0 { unsafe summary[index >> 6] |= 1 << UInt64(index & 63) }
    }

    /// Stores `bits` as a word.
    public func store(_ bits: UInt64, inWord index: Int) {
        precondition(index >= 0 && index < wordCount)
        unsafe storage[index] = bits
        let mark = 1 << UInt64(index & 63) as UInt64
        if bits != 0 { unsafe summary[index >> 6] |= mark } else { unsafe summary[index >> 6] &= ~mark }
    }

    /// Clears the bits of one word that `bits` has set.
    public func remove(_ bits: UInt64, fromWord index: Int) {
        precondition(index >= 0 && index < wordCount)
        store(unsafe storage[index] & ~bits, inWord: index)
    }

    /// ORs `other` into this bitmap. Both must have the same size. O(words that `other` has set).
    public func formUnion(_ other: PageBitmap) {
        precondition(other.wordCount == wordCount)
        for block in 0..<summaryCount {
            let marks = unsafe other.summary[block]
            if marks == 0 { continue }
            unsafe lacuna_or(storage + block << 6, other.storage + block << 6, wordsInBlock(block))
            unsafe summary[block] |= marks
        }
    }

    /// Clears every bit that `other` has set; returns how many that were. Both must have the same size. O(words that
    /// both may have set).
    @discardableResult
    public func subtract(_ other: PageBitmap) -> Int {
        precondition(other.wordCount == wordCount)
        var count = 0
        forWords(ofBlocks: { unsafe summary[$0] & other.summary[$0] }) { first, words in
            count += unsafe lacuna_and_not(storage + first, other.storage + first, words)
        }
        return count
    }

    /// Sets every bit that both `a` and `b` have set. All must have the same size. O(words that both may have set).
    public func formUnion(ofIntersection a: PageBitmap, _ b: PageBitmap) {
        precondition(a.wordCount == wordCount && b.wordCount == wordCount)
        forWords(ofBlocks: { unsafe a.summary[$0] & b.summary[$0] }) { first, words in
            unsafe lacuna_or_and(storage + first, a.storage + first, b.storage + first, words)
            for block in first >> 6..<(first + words + 63) >> 6 {
                unsafe summary[block] |= a.summary[block] & b.summary[block]
            }
        }
    }

    /// Clears every bit that both `a` and `b` have set too; returns those, or nil if there are none. All must have the
    /// same size. O(words that all three may have set).
    public func take(inIntersection a: PageBitmap, _ b: PageBitmap) -> PageBitmap? {
        precondition(a.wordCount == wordCount && b.wordCount == wordCount)
        var taken: PageBitmap?
        forWords(ofBlocks: { unsafe summary[$0] & a.summary[$0] & b.summary[$0] }) { first, words in
            let into = taken ?? PageBitmap(bitCount: bitCount)
            let any = unsafe lacuna_take_and(
                storage + first, a.storage + first, b.storage + first, into.storage + first, words)
            guard any else { return }
            for block in first >> 6..<(first + words + 63) >> 6 {
                unsafe into.summary[block] = summary[block] & a.summary[block] & b.summary[block]
            }
            taken = into
        }
        return taken
    }

    /// Calls `body` with the words of each stretch of blocks for which `marks` is not zero.
    private func forWords(ofBlocks marks: (_ block: Int) -> UInt64, _ body: (_ first: Int, _ count: Int) -> Void) {
        var block = 0
        while block < summaryCount {
            guard marks(block) != 0 else {
                block += 1
                continue
            }
            let first = block
            while block < summaryCount, marks(block) != 0 { block += 1 }
            body(first << 6, min(block << 6, wordCount) - first << 6)
        }
    }

    /// The words as bytes, for a system call or a vector loop. Not for keeping. The summary is made anew afterwards, at
    /// the cost of reading the words once.
    public func withUnsafeWords<Result>(_ body: (UnsafeMutableBufferPointer<UInt64>) throws -> Result) rethrows -> Result {
        defer { unsafe lacuna_summarize(storage, summary, wordCount) }
        return unsafe try body(UnsafeMutableBufferPointer(start: storage, count: wordCount))
    }

    /// The words, to be read only. Not for keeping.
    public func withUnsafeReadOnlyWords<Result>(
        _ body: (UnsafeBufferPointer<UInt64>) throws -> Result
    ) rethrows -> Result { unsafe try body(UnsafeBufferPointer(start: storage, count: wordCount)) }

    /// How far the blocks of 64 words from `block` on, and before `end`, are alike: each without a bit, or each perhaps with
    /// some.
    public func stretch(fromBlock block: Int, before end: Int) -> (mayHaveBits: Bool, end: Int) {
        precondition(block >= 0 && block < end && end <= summaryCount)
        let mayHaveBits = unsafe summary[block] != 0
        var next = block + 1
        while next < end, unsafe (summary[next] != 0) == mayHaveBits { next += 1 }
        return (mayHaveBits, next)
    }

    // MARK: At the same time as others

    /// Sets the bits of `pages` while others may do this and `clearOwn` to pages of other words. Whoever searches or
    /// merges has to wait until they are done.
    public func setOwn(_ pages: Range<Int>) {
        precondition(pages.lowerBound >= 0 && pages.upperBound <= bitCount)
        if pages.isEmpty { return }
        unsafe lacuna_set_range(storage, pages.lowerBound, pages.upperBound)
        let first = pages.lowerBound >> 6, last = (pages.upperBound - 1) >> 6
        for block in first >> 6...last >> 6 {
            var marks = ~UInt64(0)
            if block == first >> 6 { marks &= ~0 << UInt64(first & 63) }
            if block == last >> 6 { marks &= ~0 >> UInt64(63 - last & 63) }
            // The marks of 64 words, some of which are others': a lost one would hide bits from every search.
            if unsafe lacuna_load_64(summary + block) & marks != marks {
                unsafe _ = lacuna_fetch_or_64(summary + block, marks)
            }
        }
    }

    /// Clears the bits of `pages`, side by side with others as `setOwn`. The summary keeps its marks.
    public func clearOwn(_ pages: Range<Int>) {
        precondition(pages.lowerBound >= 0 && pages.upperBound <= bitCount)
        if pages.isEmpty { return }
        unsafe lacuna_clear_range(storage, pages.lowerBound, pages.upperBound)
    }

    /// Sets one bit while others may set or take bits of the same word.
    public func atomicSet(_ page: Int) {
        precondition(page >= 0 && page < bitCount)
        // Sequentially consistent, like the two exchanges below: whoever takes the bit also sees the write to the page
        // that came before it, and of "bit set, summary seen" here and "summary taken, word taken" there, either this
        // thread sees the summary taken or the other one sees the bit.
        unsafe _ = lacuna_fetch_or_64(storage + page >> 6, 1 << UInt64(page & 63))
        let index = page >> 6, mark = 1 << UInt64(index & 63) as UInt64
        if unsafe lacuna_load_64(summary + index >> 6) & mark == 0 {
            unsafe _ = lacuna_fetch_or_64(summary + index >> 6, mark)
        }
    }

    /// Clears one bit while others may set or take bits of the same word.
    public func atomicClear(_ page: Int) {
        precondition(page >= 0 && page < bitCount)
        unsafe _ = lacuna_fetch_and_64(storage + page >> 6, ~(1 << UInt64(page & 63)))
    }

    /// Takes a whole word: returns its bits and leaves zero, in one step.
    public func atomicTake(word index: Int) -> UInt64 {
        precondition(index >= 0 && index < wordCount)
        // A clean word costs one plain load and leaves its cache line shared.
        if unsafe lacuna_load_relaxed_64(storage + index) == 0 { return 0 }
        return unsafe lacuna_exchange_64(storage + index, 0)
    }

    /// Takes every bit set, a word at a time, and hands each word that had some to `body`. A bit set meanwhile is taken
    /// now or next time. Clean stretches cost one look for 64 words.
    public func atomicDrain(_ body: (_ index: Int, _ bits: UInt64) -> Void) {
        for block in 0..<summaryCount {
            if unsafe lacuna_load_relaxed_64(summary + block) == 0 { continue }
            // The mark before the word: a setter that finds its mark gone sets it again.
            var marks = unsafe lacuna_exchange_64(summary + block, 0)
            while marks != 0 {
                let index = block << 6 + marks.trailingZeroBitCount
                marks &= marks &- 1
                let bits = unsafe lacuna_exchange_64(storage + index, 0)
                if bits != 0 { body(index, bits) }
            }
        }
    }

    func wordsInBlock(_ block: Int) -> Int { min(64, wordCount - block << 6) }
}
