// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// A bitmap with one bit for each 4 KiB page of the guest-physical address space, from page frame 0 up to `bitCount`;
/// holes simply never have their bits set. 64-bit words, least significant bit first: the layout of KVM's dirty log and
/// of the free-page bitmap protocol.
///
/// Thread rules: the operations named `atomic…` may run at the same time as each other, from any thread. The others
/// need the bitmap to themselves (or only atomic readers beside them).
@safe public final class PageBitmap: @unchecked Sendable {
    // Sendable by the thread rules above; the storage never moves and is freed only in deinit.
    @usableFromInline let storage: UnsafeMutablePointer<UInt64>
    /// Bits in the bitmap, a multiple of 64.
    public let bitCount: Int
    /// Words in the bitmap.
    public let wordCount: Int

    /// An all-clear bitmap of at least `bitCount` bits (rounded up to whole words).
    public init(bitCount: Int) {
        precondition(bitCount >= 0)
        wordCount = (bitCount + 63) / 64
        self.bitCount = wordCount * 64
        unsafe storage = .allocate(capacity: max(wordCount, 1))
        unsafe storage.initialize(repeating: 0, count: max(wordCount, 1))
    }

    deinit { unsafe storage.deallocate() }

    public subscript(page: Int) -> Bool {
        precondition(page >= 0 && page < bitCount)
        return unsafe lacuna_load_relaxed_64(storage + page >> 6) >> UInt64(page & 63) & 1 == 1
    }

    /// The word that holds bits `64 * index ..< 64 * index + 64`.
    public func word(_ index: Int) -> UInt64 {
        precondition(index >= 0 && index < wordCount)
        return unsafe lacuna_load_relaxed_64(storage + index)
    }

    /// How many bits are set. O(words).
    public var population: Int { unsafe lacuna_popcount(storage, wordCount) }

    /// Sets the bits of `pages`. O(words touched).
    public func set(_ pages: Range<Int>) {
        unsafe update(pages) { word, mask in unsafe word.pointee |= mask }
    }

    /// Clears the bits of `pages`. O(words touched).
    public func clear(_ pages: Range<Int>) {
        unsafe update(pages) { word, mask in unsafe word.pointee &= ~mask }
    }

    public func clearAll() { unsafe storage.update(repeating: 0, count: wordCount) }

    private func update(_ pages: Range<Int>, _ apply: (UnsafeMutablePointer<UInt64>, UInt64) -> Void) {
        precondition(pages.lowerBound >= 0 && pages.upperBound <= bitCount)
        if pages.isEmpty { return }
        let first = pages.lowerBound >> 6, last = (pages.upperBound - 1) >> 6
        for index in first...last {
            var mask = ~UInt64(0)
            if index == first { mask &= ~0 << UInt64(pages.lowerBound & 63) }
            if index == last { mask &= ~0 >> UInt64(63 - (pages.upperBound - 1) & 63) }
            unsafe apply(storage + index, mask)
        }
    }

    /// Sets one bit while others may set or take bits of the same word.
    public func atomicSet(_ page: Int) {
        precondition(page >= 0 && page < bitCount)
        // Acquire-release: whoever takes the bit also sees the write to the page that came before it.
        unsafe _ = lacuna_fetch_or_64(storage + page >> 6, 1 << UInt64(page & 63))
    }

    /// Takes a whole word: returns its bits and leaves zero, in one step.
    public func atomicTake(word index: Int) -> UInt64 {
        precondition(index >= 0 && index < wordCount)
        // A clean word costs one plain load and leaves its cache line shared.
        if unsafe lacuna_load_relaxed_64(storage + index) == 0 { return 0 }
        return unsafe lacuna_exchange_64(storage + index, 0)
    }

    /// ORs `bits` into a word.
    public func merge(_ bits: UInt64, intoWord index: Int) {
        precondition(index >= 0 && index < wordCount)
        unsafe storage[index] |= bits
    }

    /// Stores `bits` as a word.
    public func store(_ bits: UInt64, inWord index: Int) {
        precondition(index >= 0 && index < wordCount)
        unsafe storage[index] = bits
    }

    /// Clears the bits of one word that `bits` has set.
    public func remove(_ bits: UInt64, fromWord index: Int) {
        precondition(index >= 0 && index < wordCount)
        unsafe storage[index] &= ~bits
    }

    /// ORs `other` into this bitmap. Both must have the same size.
    public func formUnion(_ other: PageBitmap) {
        precondition(other.wordCount == wordCount)
        for index in 0..<wordCount { unsafe storage[index] |= other.storage[index] }
    }

    /// Clears every bit that `other` has set; returns how many that were. Both must have the same size.
    @discardableResult
    public func subtract(_ other: PageBitmap) -> Int {
        precondition(other.wordCount == wordCount)
        return unsafe lacuna_and_not(storage, other.storage, wordCount)
    }

    /// Bits set in both bitmaps.
    public func intersectionCount(_ other: PageBitmap) -> Int {
        precondition(other.wordCount == wordCount)
        var count = 0
        for index in 0..<wordCount { unsafe count += (storage[index] & other.storage[index]).nonzeroBitCount }
        return count
    }

    /// The first set bit at or after `page`, found a word at a time.
    public func next(from page: Int) -> Int? {
        if page >= bitCount { return nil }
        var index = page >> 6
        var bits = word(index) & (~0 << UInt64(page & 63))
        while bits == 0 {
            index += 1
            if index == wordCount { return nil }
            bits = unsafe lacuna_load_relaxed_64(storage + index)
        }
        return index << 6 + bits.trailingZeroBitCount
    }

    /// The first run of set bits at or after `page`, cut off at `limit` bits. Never empty: nil for a limit below 1.
    public func nextRun(from page: Int, limit: Int = .max) -> Range<Int>? {
        guard limit > 0, let start = next(from: page) else { return nil }
        var end = start
        while end < bitCount {
            let clear = ~word(end >> 6) >> UInt64(end & 63)
            let ones = clear == 0 ? 64 - end & 63 : min(clear.trailingZeroBitCount, 64 - end & 63)
            end += ones
            if clear != 0 || end - start >= limit { break }
        }
        let length = min(end - start, limit)
        return start..<start + length
    }

    /// The words as bytes, for a system call or a vector loop. Not for keeping.
    public func withUnsafeWords<Result>(_ body: (UnsafeMutableBufferPointer<UInt64>) throws -> Result) rethrows -> Result {
        unsafe try body(UnsafeMutableBufferPointer(start: storage, count: wordCount))
    }
}
