// SPDX-License-Identifier: Apache-2.0
internal import Balloon
internal import CLacuna
internal import CLinux
internal import GuestMemory
internal import Synchronization

/// One request for free pages and its answer.
final class PluginWindow: Sendable {
    let device: PluginDevice
    /// The balloon that was asked; the device has another one after a reset.
    let balloon: BalloonDevice
    let request: UInt32
    let generation: UInt64
    private let report = Mutex<FreePageReport?>(nil)

    init(device: PluginDevice, balloon: BalloonDevice, request: UInt32, generation: UInt64) {
        self.device = device
        self.balloon = balloon
        self.request = request
        self.generation = generation
    }

    func wait(milliseconds: UInt32) throws(PluginError) -> FreePageReport {
        guard device.tracking.withLock({ $0.isArmed && $0.generation == generation }) else { throw Self.stale }
        if let report = report.withLock({ $0 }) { return report }
        // The device hands a report over once. Whoever comes first takes it for all, without waiting behind a lock.
        _ = balloon.waitForEnd(of: request, milliseconds: Int(min(milliseconds, 86_400_000)))
        let found = report.withLock { report -> FreePageReport? in
            report = report ?? balloon.waitForReport(request, milliseconds: 0)
            return report
        }
        if let found { return found }
        guard device.tracking.withLock({ $0.isArmed && $0.generation == generation }) else { throw Self.stale }
        if balloon.isReportPending(request) {
            throw PluginError(LACUNA_ERROR_TIMEOUT, "the guest did not answer within \(milliseconds) ms")
        }
        throw PluginError(LACUNA_ERROR_FAILED, "the guest gave up, sent nonsense, or its driver is gone")
    }

    private static let stale = PluginError(
        LACUNA_ERROR_STALE, "a dirty log was merged, or tracking ended, since the window was opened")

    /// Clears bits; checked by the caller of the ABI's function as far as the structure goes.
    func mask(_ bitmap: CallersBitmap) throws(PluginError) -> Int {
        // Held to the end, so that a merge on another thread waits for the last bit (rule W2).
        let result: Result<Int, PluginError> = device.tracking.withLock { tracking in
            guard tracking.isArmed, tracking.generation == generation else { return .failure(Self.stale) }
            guard let pages = report.withLock({ $0?.pages }) else {
                return .failure(.state("no report was waited for"))
            }
            return .success(bitmap.subtract(pages))
        }
        return try result.get()
    }
}

/// A bitmap in the caller's memory.
@safe struct CallersBitmap {
    let words: UnsafeMutablePointer<UInt64>
    let cleared: UnsafeMutablePointer<UInt64>?
    /// The page frame, of 4 KiB, of bit 0.
    let firstFrame: Int
    let bits: Int
    /// Frames to a bit: a power of two.
    let framesPerBit: Int
    let isShared: Bool

    /// Clears the bits whose frames are all set in `free`; returns how many that changed.
    func subtract(_ free: PageBitmap) -> Int {
        if let cleared = unsafe cleared { unsafe cleared.update(repeating: 0, count: (bits + 63) / 64) }
        guard framesPerBit == 1 else { return subtractLargePages(free) }
        return unsafe free.withUnsafeReadOnlyWords { mask -> Int in
            var count = 0, index = 0
            let whole = bits / 64
            if firstFrame % 64 == 0 {
                // Words line up. Blocks of 64 words without a bit are passed over.
                let offset = firstFrame / 64, run = max(0, min(whole, mask.count - offset))
                while index < run {
                    let stretch = free.stretch(fromBlock: (offset + index) / 64, before: (offset + run + 63) / 64)
                    let next = min(stretch.end * 64 - offset, run)
                    if stretch.mayHaveBits, let base = mask.baseAddress {
                        unsafe count += subtract(base + offset + index, at: index, next - index)
                    }
                    index = next
                }
            }
            while index * 64 < bits {
                // What is left: the odd bits at the end, or all of a bitmap that begins within a word.
                let frame = firstFrame + index * 64, place = frame / 64, shift = UInt64(frame % 64)
                guard place < mask.count else { break }
                var word = unsafe mask[place] >> shift
                if shift > 0, place + 1 < mask.count { unsafe word |= mask[place + 1] << (64 - shift) }
                if bits - index * 64 < 64 { word &= ~(~0 << UInt64(bits - index * 64)) }
                count += clear(word, index)
                index += 1
            }
            return count
        }
    }

    private func subtract(_ mask: UnsafePointer<UInt64>, at index: Int, _ count: Int) -> Int {
        if isShared {
            return unsafe lacuna_plugin_and_not_shared(words + index, mask, cleared.map { unsafe $0 + index }, count)
        }
        guard let cleared = unsafe cleared else { return unsafe lacuna_and_not(words + index, mask, count) }
        return unsafe lacuna_plugin_and_not_noting(words + index, mask, cleared + index, count)
    }

    private func clear(_ mask: UInt64, _ index: Int) -> Int {
        let gone = unsafe lacuna_plugin_and_not_word(words + index, mask, isShared ? 1 : 0)
        if let cleared = unsafe cleared { unsafe cleared[index] |= gone }
        return gone.nonzeroBitCount
    }

    private func subtractLargePages(_ free: PageBitmap) -> Int {
        var count = 0, place = firstFrame
        let end = firstFrame + bits * framesPerBit
        while let run = free.nextRun(from: place), run.lowerBound < end {
            place = run.upperBound
            // Whole pages of the caller's within the run.
            let first = (max(run.lowerBound, firstFrame) - firstFrame + framesPerBit - 1) / framesPerBit
            let last = (min(run.upperBound, end) - firstFrame) / framesPerBit
            if first < last { for bit in first..<last { count += clear(1 << UInt64(bit % 64), bit / 64) } }
        }
        return count
    }
}
