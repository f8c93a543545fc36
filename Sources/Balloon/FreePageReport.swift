// SPDX-License-Identifier: Apache-2.0
public import GuestMemory

/// The driver's own figures for one report; the guest may have made them up.
public struct FreePageFigures: Sendable, Codable, Equatable {
    /// Free blocks of any order.
    public var blocks: UInt64
    /// Pages reported, of 4 KiB.
    public var pages: UInt64
    /// From the first lock taken to the last one dropped, by the guest's clock.
    public var walkNanoseconds: UInt64
    /// The longest single hold of a zone lock.
    public var longestLockNanoseconds: UInt64
    /// How often a zone lock was taken.
    public var batches: UInt32

    public init(
        blocks: UInt64, pages: UInt64, walkNanoseconds: UInt64, longestLockNanoseconds: UInt64, batches: UInt32
    ) {
        self.blocks = blocks
        self.pages = pages
        self.walkNanoseconds = walkNanoseconds
        self.longestLockNanoseconds = longestLockNanoseconds
        self.batches = batches
    }
}

/// How a driver tells which pages are free.
public enum HintMethod: String, Sendable, Codable {
    /// protocol/free-page-bitmap.md: the guest looks and does not touch.
    case bitmap
    /// `VIRTIO_BALLOON_F_FREE_PAGE_HINT`: the guest allocates its free memory and holds it.
    case freePageHint = "free-page-hint"
}

/// One whole report of free pages: the answer to one request.
public struct FreePageReport: Sendable {
    /// The request it answers: what `BalloonDevice.openWindow` returned.
    public let request: UInt32
    /// Pages that were free at some moment since the request, by page frame, and pages that the balloon holds; as large
    /// as the guest memory's other bitmaps. Only pages that are RAM. The receiver has the bitmap for itself.
    public let pages: PageBitmap
    /// Nil if the driver sent none, or knows of none.
    public let figures: FreePageFigures?
}

/// What came over the balloon's queues, since the device was made.
public struct BalloonCounters: Sendable, Codable, Equatable {
    // Inflate and deflate.
    public var inflateChains: UInt64 = 0
    public var deflateChains: UInt64 = 0
    /// Pages newly put into the balloon.
    public var inflatedPages: UInt64 = 0
    /// Pages taken out of it.
    public var deflatedPages: UInt64 = 0
    /// Page numbers in either queue that are not RAM.
    public var listedPagesNotRAM: UInt64 = 0
    /// Lists with device-writable parts, of a length that is not a multiple of 4, or too long.
    public var malformedLists: UInt64 = 0

    /// Pages listed for inflation that were in the balloon already.
    public var pagesInflatedTwice: UInt64 = 0
    /// Pages listed for deflation that were not in the balloon.
    public var pagesNotInflated: UInt64 = 0

    // What went back to the host.
    /// Pages, inflated or reported.
    public var releasedPages: UInt64 = 0
    /// In so many runs.
    public var releases: UInt64 = 0

    // Free page reporting.
    public var reportingChains: UInt64 = 0
    /// Pages in them.
    public var reportedFreePages: UInt64 = 0
    /// Of those, pages left as they are because the guest expects its poison there.
    public var reportedPagesKept: UInt64 = 0
    /// Reports with readable parts, or of less than whole pages.
    public var malformedReportings: UInt64 = 0

    // Statistics.
    public var statisticsBuffers: UInt64 = 0
    /// Buffers of a wrong length or direction.
    public var malformedStatistics: UInt64 = 0
    /// Tags that nobody knows here.
    public var unknownStatistics: UInt64 = 0
    /// Buffers that came while the device still had one.
    public var extraStatisticsBuffers: UInt64 = 0

    // Free page hints.
    public var hintChains: UInt64 = 0
    /// Pages hinted in time.
    public var hintedPages: UInt64 = 0
    /// Command ids of a wrong length, or that a driver has no reason to send.
    public var malformedHints: UInt64 = 0
    /// Hints that followed no command id.
    public var misplacedHints: UInt64 = 0
    /// Command ids and hints for another request than the current one.
    public var staleHints: UInt64 = 0

    // Reports.
    public var requests: UInt64 = 0
    public var reportChains: UInt64 = 0
    public var reportsCompleted: UInt64 = 0
    /// The driver gave up.
    public var reportsFailed: UInt64 = 0
    /// Reports thrown away because a chain was malformed, or because the guest began to poison pages.
    public var reportsVoid: UInt64 = 0
    /// Chains for another request than the current one.
    public var staleChains: UInt64 = 0
    /// Chains that came with no window open, or after the end of their report.
    public var lateChains: UInt64 = 0
    public var malformedReportChains: UInt64 = 0
    /// Chains before any that begins a report.
    public var misplacedReportChains: UInt64 = 0
    /// Bits for pages that are not RAM.
    public var reportedPagesNotRAM: UInt64 = 0
    /// Pages in completed reports because the balloon holds them.
    public var balloonPagesReported: UInt64 = 0

    // The rest.
    /// Virtqueues found broken.
    public var brokenQueues: UInt64 = 0
    /// Notifications for queues that have no use.
    public var strayNotifications: UInt64 = 0
    /// Bytes written to configuration fields that are not the driver's.
    public var ignoredConfigurationBytes: UInt64 = 0

    public init() {}
}
