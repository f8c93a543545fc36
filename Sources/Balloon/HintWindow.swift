// SPDX-License-Identifier: Apache-2.0
internal import GuestMemory
internal import Virtio

/// One request for free pages and what has come in answer to it. A value: made when the request is issued, thrown away
/// when the window closes, and never saved (rule W2 of the design: nothing outlives a merge).
struct HintWindow {
    enum Stage {
        /// No chain yet.
        case waiting
        /// Between the first and the last chain.
        case collecting
        /// The whole report, until somebody takes it.
        case complete(FreePageReport)
        /// Taken, given up by the driver, or thrown away.
        case over
    }

    /// What a chain did.
    enum Outcome: Equatable {
        case taken
        /// That was the last one: the pages are ready to be reported.
        case last
        case failed
        case stale
        case late
        case malformed(ReportFault)
        /// Not the first, and no first came before.
        case misplaced
    }

    /// Words copied from the guest at a time: a page.
    private static let pieceWords = 512

    let request: UInt32
    let method: HintMethod
    private(set) var stage = Stage.waiting
    private let pages: PageBitmap
    private var figures: FreePageFigures?

    /// - Parameter frames: the bitmap's size in page frames.
    init(request: UInt32, method: HintMethod = .bitmap, frames: Int) {
        self.request = request
        self.method = method
        pages = PageBitmap(bitCount: frames)
    }

    var isPending: Bool {
        switch stage {
        case .waiting, .collecting: true
        case .complete, .over: false
        }
    }

    /// Reads one chain of the bitmap queue. `ram` has the bits of all pages that are RAM; bits for others are dropped
    /// and counted in `notRAM`.
    mutating func accept(_ chain: DescriptorChain, ram: PageBitmap, notRAM: inout UInt64) -> Outcome {
        guard isPending, method == .bitmap else { return .late }
        do throws(ReportFault) {
            var reader = chain.reader()
            // One too short for a header does not say which request it was meant for: malformed.
            let header = try ReportHeader(from: &reader)
            guard header.request == request else { return .stale }  // W2: only an answer to the current request counts.
            guard chain.writable.isEmpty else { throw .direction }
            // All that can be malformed comes before anything is changed.
            let kind = try header.check(following: reader.remaining)
            let figures = kind == .figures ? try FreePageFigures(from: &reader) : nil
            if header.flags.contains(.first) {
                // Begins anew: an abandoned report leaves nothing behind.
                pages.clearAll()
                stage = .collecting
            } else if case .waiting = stage {
                return .misplaced
            }
            guard let figures else {
                try collect(header, from: &reader, ram: ram, notRAM: &notRAM)
                return .taken
            }
            self.figures = figures
            return header.flags.contains(.failed) ? .failed : .last
        } catch { return .malformed(error) }
    }

    /// ORs a chain's words into the bitmap, a bounded piece at a time.
    private func collect(
        _ header: ReportHeader, from reader: inout ChainReader, ram: PageBitmap, notRAM: inout UInt64
    ) throws(ReportFault) {
        var piece = [UInt64](repeating: 0, count: Self.pieceWords)
        // Cannot overflow: the header bounds `start` plus the bits by 2^52.
        var place = header.start / 64
        var left = Int(header.bits / 64)
        while left > 0 {
            let count = min(left, Self.pieceWords)
            do throws(ChainReadError) { try reader.take(count, into: &piece) } catch { throw .length }
            for offset in 0..<count where piece[offset] != 0 {
                let word = place + UInt64(offset)
                let real = word < UInt64(pages.wordCount) ? piece[offset] & ram.word(Int(word)) : 0
                notRAM &+= UInt64((piece[offset] ^ real).nonzeroBitCount)
                guard real != 0 else { continue }
                pages.merge(real, intoWord: Int(word))
            }
            place += UInt64(count)
            left -= count
        }
    }

    // MARK: Free page hints (virtio 1.3, section 5.5.6.5)

    /// The driver began to hint in answer to this request.
    mutating func begin() { if case .waiting = stage { stage = .collecting } }

    /// Whether hints that follow the command id `stream` count: they answer this request, and it is still open (rule
    /// W2).
    func takesHints(of stream: UInt32) -> Bool {
        guard method == .freePageHint, stream == request, case .collecting = stage else { return false }
        return true
    }

    /// Adds hinted pages. Each hint stands for itself: a part of the hints is as good as all of them.
    mutating func add(_ run: Range<Int>) { pages.set(run) }

    /// Whether there is something to be had although the driver has not come to its end.
    var isPartial: Bool {
        guard method == .freePageHint, case .collecting = stage else { return false }
        return true
    }

    // MARK: The end

    /// Makes the report out of what was collected, together with pages that are free for another reason.
    mutating func complete(adding others: PageBitmap?) {
        if let others { pages.formUnion(others) }
        stage = .complete(FreePageReport(request: request, pages: pages, figures: figures))
    }

    /// Throws the report away.
    mutating func discard() { stage = .over }

    /// Hands the report over. It can be had once: its receiver owns the bitmap.
    mutating func take() -> FreePageReport? {
        guard case .complete(let report) = stage else { return nil }
        stage = .over
        return report
    }
}
