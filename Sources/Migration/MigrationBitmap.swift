// SPDX-License-Identifier: Apache-2.0
public import GuestMemory

/// The pages that are still to be sent, the pages of which the destination holds something, and the hint window.
///
/// The order of events that makes skipping safe is held in types: an `ArmedTracking` exists only while every tracker is
/// armed (W1), a `HintWindow` can only be opened with one, and each merge makes all windows opened before it stale (W2).
///
/// Thread rules: one thread, the migration's.
public final class MigrationBitmap {
    /// Pages to be sent. Kept exactly: zero means that the walk ends at once.
    public private(set) var dirtyCount = 0
    /// How many times dirty logs were merged. A window belongs to one generation.
    public private(set) var generation: UInt64 = 0
    /// Reports that came too late or answered another request.
    public private(set) var lateReports = 0
    /// Pages in those reports.
    public private(set) var droppedPages = 0

    private let memory: GuestMemory
    private let pages: PageBitmap
    private let ram: PageBitmap
    /// What the destination was told of each page so far.
    let told: ToldPages
    private var passedOver: PageBitmap { told.passedOver }
    private let remembersSkipped: Bool
    private let scratch: PageBitmap
    private var cursor = 0

    /// An empty bitmap over `memory`. `remembersSkipped`: keep which pages were masked and not sent since, for a
    /// verification.
    public init(_ memory: GuestMemory, remembersSkipped: Bool = true) {
        self.memory = memory
        self.remembersSkipped = remembersSkipped
        pages = PageBitmap(bitCount: memory.frameCount)
        ram = PageBitmap(bitCount: memory.frameCount)
        told = ToldPages(memory)
        scratch = PageBitmap(bitCount: memory.frameCount)
        for region in memory.regions { ram.set(region.range.pages) }
    }

    /// True if `page` is to be sent.
    public subscript(page: Int) -> Bool { pages[page] }

    /// Marks all RAM as to be sent.
    public func markAll() {
        generation &+= 1
        pages.formUnion(ram)
        dirtyCount = memory.ramPages
        cursor = 0
    }

    /// Collects what all trackers saw and marks it as to be sent. Returns how many pages they saw. Closes every window
    /// opened before, even if it throws.
    public func merge(_ tracking: borrowing ArmedTracking) throws(MigrationError) -> Int {
        generation &+= 1  // W2: a merge closes every window opened before it
        cursor = 0
        try tracking.collect(into: scratch)
        var (seen, added) = (0, 0)
        var next = scratch.firstWord
        while let index = next {
            next = scratch.nextWord(from: index + 1)
            let bits = scratch.word(index) & ram.word(index)
            if bits == 0 { continue }
            seen += bits.nonzeroBitCount
            added += (bits & ~pages.word(index)).nonzeroBitCount
            pages.merge(bits, intoWord: index)
        }
        scratch.clearAll()
        dirtyCount += added
        return seen
    }

    /// Takes the next run of pages to be sent: at most `limit`, all within one region of RAM. The caller must send them,
    /// or give the migration up. Nil, without a search, when nothing is left.
    public func takeRun(limit: Int) -> Range<Int>? {
        guard dirtyCount > 0 else { return nil }
        guard let found = pages.nextRun(from: cursor, limit: limit) ?? pages.nextRun(from: 0, limit: limit) else {
            return nil
        }
        var run = found
        // Regions may touch, but their mappings on the host do not.
        for region in memory.regions where region.range.pages.contains(run.lowerBound) {
            run = run.clamped(to: region.range.pages)
        }
        pages.clear(run)
        dirtyCount -= run.count
        cursor = run.upperBound
        return run
    }

    /// The next run, at or after `page`, of pages whose contents the destination was told: all RAM but what was skipped.
    /// At most `limit` pages, within one region.
    func nextTold(from page: Int, limit: Int) -> Range<Int>? {
        for region in memory.regions where region.range.pages.upperBound > page {
            let end = region.range.pages.upperBound
            var first = max(page, region.range.pages.lowerBound)
            while first < end, passedOver[first] { first += 1 }
            guard first < end else { continue }
            let next = min(passedOver.next(from: first) ?? end, end)
            return first..<min(next, first + limit)
        }
        return nil
    }

    // MARK: The hint window

    /// Opens a window and asks the guest. The trackers are armed, as `tracking` proves, before the guest looks (W1).
    public func ask(
        _ hinter: any FreePageHinter, tracking: borrowing ArmedTracking
    ) throws(PartFailure) -> HintWindow {
        // The generation is read before the request goes out: a merge in between would count against the window.
        let opened = generation
        try tracking.protectAll()  // W1: what was collected is protected before the guest looks
        return HintWindow(request: try hinter.request(), generation: opened)
    }

    /// What masking did.
    public struct Masked {
        /// False if the report was late or answers another request; then nothing was changed.
        public let isAccepted: Bool
        /// Pages that need not be sent now.
        public let skipped: Int
        /// Those of them of which the destination holds an older copy. Each needs a discard mark in the stream before
        /// the next page of the round (W6). Nil: none.
        public let stale: PageBitmap?
    }

    /// Clears the bits of pages the guest says are free, if the report answers the window's request and no dirty log was
    /// merged since. Memory itself is never touched: a page may be in use again by now (W4).
    public func mask(_ report: HintReport, _ window: consuming HintWindow) -> Masked {
        let isCurrent = window.generation == generation  // W2: no merge since the request
        let isAnswer = report.request == window.request  // W2: the answer to this request and no other
        guard isCurrent, isAnswer, report.pages.wordCount == pages.wordCount else {
            lateReports += 1
            droppedPages += report.pages.population
            return Masked(isAccepted: false, skipped: 0, stale: nil)
        }
        // The pages about to be masked that the destination holds; from now on it does not.
        let stale = told.held.take(inIntersection: pages, report.pages)
        if remembersSkipped { passedOver.formUnion(ofIntersection: pages, report.pages) }
        let skipped = pages.subtract(report.pages)  // W4: masking only
        dirtyCount -= skipped
        return Masked(isAccepted: true, skipped: skipped, stale: stale)
    }
}

/// What the destination was told of each page.
///
/// Thread rules: the lanes of a migration may call the methods side by side for pages of different chunks
/// (`LaneMap.chunkPages`), which share no word. The migration's own thread looks, and masks, only while the lanes are
/// quiet.
final class ToldPages: Sendable {
    /// Pages whose last word in the stream was data: what the destination holds of them is not zero.
    let held: PageBitmap
    /// Pages whose last word in the stream is that they were skipped.
    let passedOver: PageBitmap

    init(_ memory: GuestMemory) {
        held = PageBitmap(bitCount: memory.frameCount)
        passedOver = PageBitmap(bitCount: memory.frameCount)
    }

    /// To be called when data of `run` goes into the stream.
    func sentData(_ run: Range<Int>) {
        held.setOwn(run)
        passedOver.clearOwn(run)
    }
    /// To be called when a zero mark for `run` goes into the stream.
    func sentZero(_ run: Range<Int>) {
        held.clearOwn(run)
        passedOver.clearOwn(run)
    }
}

/// The right to mask with one report: for one request, made in one generation of the bitmap. Masking consumes it.
public struct HintWindow: ~Copyable, Sendable {
    /// The request that a report must answer.
    public let request: UInt32
    let generation: UInt64

    fileprivate init(request: UInt32, generation: UInt64) {
        self.request = request
        self.generation = generation
    }
}

/// Every tracker of one guest, armed. Ends tracking when it goes.
///
/// Thread rules: one thread, the migration's.
public struct ArmedTracking: ~Copyable {
    private let trackers: [any DirtyTracker]

    /// Arms `trackers` and the log of the VMM's own writes. When it returns, each later write to `memory` by anybody
    /// will be in some later collection. Throws `machineFailed`, with nothing left armed.
    public init(arming trackers: [any DirtyTracker], of memory: GuestMemory) throws(MigrationError) {
        let all = trackers + [WriteLogTracker(memory)]  // W3: the VMM itself writes guest memory too
        self.trackers = try ArmedTracking.armAll(all)
    }

    deinit { for tracker in trackers { tracker.disarm() } }

    private static func armAll(_ trackers: [any DirtyTracker]) throws(MigrationError) -> [any DirtyTracker] {
        for (index, tracker) in trackers.enumerated() {
            do {
                try tracker.arm()  // W1: before any window can be opened
            } catch {
                // This one too: some of its memory may be tracked already.
                for armed in trackers[...index] { armed.disarm() }
                throw .machineFailed(doing: "dirty tracking", why: error.what)
            }
        }
        return trackers
    }

    /// To be called before the pages of `run` are read for sending.
    func willSend(_ run: Range<Int>) throws(MigrationError) {
        for tracker in trackers {
            do { try tracker.willSend(run) } catch {
                throw .machineFailed(doing: "dirty tracking", why: error.what)
            }
        }
    }

    fileprivate func protectAll() throws(PartFailure) { for tracker in trackers { try tracker.protectAll() } }

    fileprivate func collect(into bitmap: PageBitmap) throws(MigrationError) {
        for tracker in trackers {
            do {
                try tracker.collect(into: bitmap)
            } catch {
                throw .machineFailed(doing: "reading the dirty log", why: error.what)
            }
        }
    }
}

/// The tracker of the VMM's own writes, which `GuestMemory` logs at all times (rule W3).
public final class WriteLogTracker: DirtyTracker {
    private let memory: GuestMemory

    public init(_ memory: GuestMemory) { self.memory = memory }

    /// Forgets the writes of the time before the migration: their bytes are in place, and all memory is sent after.
    public func arm() throws(PartFailure) {
        memory.writeLog.atomicDrain { _, _ in }
    }

    public func collect(into bitmap: PageBitmap) throws(PartFailure) {
        memory.writeLog.atomicDrain { index, bits in
            if index < bitmap.wordCount { bitmap.merge(bits, intoWord: index) }
        }
    }

    /// The log itself never stops; it costs an atomic operation for each write and nothing else.
    public func disarm() {}
}
