// SPDX-License-Identifier: Apache-2.0
internal import CLinux
internal import Synchronization

/// A log of pages with two buffers: writers set bits in one while the other is emptied with plain copies, at the speed of
/// memory, instead of an atomic exchange for each word.
///
/// A writer that began before the switch may still set its bit in the buffer that is being emptied, where it can be
/// overwritten. It looks at the generation again afterwards, and sets the bit once more, in the new buffer. So a bit is
/// returned by the harvest under way, by the next, or by both; never by none.
///
/// Thread rules: `atomicSet` from any thread at any time; `harvest` from one thread at a time.
public final class DoubleBufferedLog: Sendable {
    private let buffers: [PageBitmap]
    private let generation = Atomic<Int>(0)

    public init(bitCount: Int) { buffers = [PageBitmap(bitCount: bitCount), PageBitmap(bitCount: bitCount)] }

    public var bitCount: Int { buffers[0].bitCount }

    public func atomicSet(_ page: Int) {
        var seen = generation.load(ordering: .sequentiallyConsistent)
        while true {
            buffers[seen & 1].atomicSet(page)
            // Sequentially consistent, after the bit: either this sees the switch, or the harvester sees the bit.
            let now = generation.load(ordering: .sequentiallyConsistent)
            if now == seen { return }
            seen = now
        }
    }

    /// Sets every bit, while nobody else uses the log.
    public func fill() { buffers[generation.load(ordering: .sequentiallyConsistent) & 1].set(0..<bitCount) }

    /// ORs every bit set so far into `target`, which has the same size, and clears it here. O(words that may be set).
    public func harvest(into target: PageBitmap) {
        precondition(target.wordCount == buffers[0].wordCount)
        let old = buffers[generation.wrappingAdd(1, ordering: .sequentiallyConsistent).oldValue & 1]
        for block in 0..<old.summaryCount {
            let marks = unsafe lacuna_load_relaxed_64(old.summary + block)
            if marks == 0 { continue }
            unsafe lacuna_or_and_clear(target.storage + block << 6, old.storage + block << 6, old.wordsInBlock(block))
            unsafe lacuna_store_relaxed_64(old.summary + block, 0)
            unsafe target.summary[block] |= marks
        }
    }
}
