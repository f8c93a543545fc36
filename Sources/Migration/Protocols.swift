// SPDX-License-Identifier: Apache-2.0
public import GuestMemory

/// What a part of the machine reports when it cannot do what a migration asks of it.
public struct PartFailure: Error, Equatable, CustomStringConvertible {
    public let what: String
    public init(_ what: String) { self.what = what }
    public var description: String { what }
}

/// Finds the pages that one class of writer (the vCPUs, the VMM's devices, a vhost back end) dirtied.
///
/// Thread rules: called from the migration's thread only.
public protocol DirtyTracker: AnyObject, Sendable {
    /// Starts tracking from nothing. When it returns, every page of RAM is tracked (rule W1): each later write by this
    /// class of writer will be in some later collection.
    func arm() throws(PartFailure)
    /// ORs the pages dirtied since the last collection (or since `arm`) into `bitmap`, and tracks them anew. A write
    /// that this collection does not return will be in the next.
    func collect(into bitmap: PageBitmap) throws(PartFailure)
    /// The pages of `pages` are about to be read and sent. A tracker that does not protect what it collects in the same
    /// step does it here, or in `protectAll`; the others do nothing.
    func willSend(_ pages: Range<Int>) throws(PartFailure)
    /// The guest is about to be asked for its free pages. When it returns, every page that was collected is tracked anew
    /// (rule W1): a write after this will be in some later collection.
    func protectAll() throws(PartFailure)
    /// Ends tracking. No effect if it is not armed.
    func disarm()
}

extension DirtyTracker {
    public func willSend(_ pages: Range<Int>) throws(PartFailure) {}
    public func protectAll() throws(PartFailure) {}
}

/// The driver's own figures for one report.
public struct HintFigures: Codable, Sendable, Equatable {
    public var blocks: UInt64
    public var pages: UInt64
    /// Nanoseconds from the first lock taken to the last dropped, by the guest's clock.
    public var walkNanoseconds: UInt64
    /// Longest single hold of a zone lock, in nanoseconds.
    public var longestLockNanoseconds: UInt64
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

/// One whole report of free pages, the answer to one request.
public struct HintReport: Sendable {
    /// What `FreePageHinter.request` returned for the request this answers.
    public let request: UInt32
    /// Free pages, by page frame; as large as the guest memory's bitmaps. Never holds a page that is not RAM.
    public let pages: PageBitmap
    public let figures: HintFigures?
    public init(request: UInt32, pages: PageBitmap, figures: HintFigures?) {
        self.request = request
        self.pages = pages
        self.figures = figures
    }
}

/// Asks the guest which pages are free.
///
/// Thread rules: called from the migration's thread only.
public protocol FreePageHinter: AnyObject, Sendable {
    /// Nil if a request can be made now; otherwise why not, for the operator ("the guest's driver does not offer …").
    var refusal: String? { get }
    /// Which mechanism answers, for the migration's report ("bitmap").
    var method: String { get }
    /// Issues a new request; earlier ones are void. Returns its id.
    func request() throws(PartFailure) -> UInt32
    /// Waits for the whole report that answers `request`, for at most `milliseconds`. Nil: none came in time, or the
    /// guest gave up.
    func wait(for request: UInt32, milliseconds: Int) -> HintReport?
    /// Ends the wish: chains that come later are dropped and counted.
    func stop()
    /// Ends the wish, and lets the guest have again what it holds for the hints' sake. Called at the end of every
    /// migration that asked, successful or not, and maybe with the guest paused; must not wait for it.
    func finish()
}

extension FreePageHinter {
    public func finish() { stop() }
}

/// One named part of the machine's state (a vCPU's registers, a device), as bytes only its owner understands.
public struct StateSection: Sendable, Equatable {
    public let name: String
    public let bytes: [UInt8]
    public init(name: String, bytes: [UInt8]) {
        self.name = name
        self.bytes = bytes
    }
}

/// The machine as the source's migration engine sees it.
public protocol OutgoingGuest: AnyObject, Sendable {
    var memory: GuestMemory { get }
    /// What the destination must be able to build (memory layout, vCPUs, devices, features), encoded by the machine.
    /// At most 64 KiB.
    var machineDescription: [UInt8] { get }
    /// Stops all vCPUs and devices. When it returns nothing writes guest memory.
    func pause() throws(PartFailure)
    /// Lets the guest run on.
    func resume() throws(PartFailure)
    /// Keeps the vCPUs from running for `percent` (0 to 99) of the time; 0 ends that. Does not wait. A machine that
    /// cannot do it ignores the call.
    func throttle(percent: Int)
    /// The whole state besides memory, of the paused guest. May itself write guest memory; what it writes is in the
    /// trackers' next collection.
    func saveState() throws(PartFailure) -> [StateSection]
}

extension OutgoingGuest {
    public func throttle(percent: Int) {}
}

/// The machine as the destination's receiver sees it.
public protocol IncomingGuest: AnyObject, Sendable {
    /// Checks the source's machine description against what this side can build, and makes the memory: fresh, all
    /// zero. Throws with the reason for a refusal, in words for the source's operator.
    func prepare(machineDescription: [UInt8]) throws(PartFailure) -> GuestMemory
    /// `pages` of the memory that `prepare` returned were filled just now. For an owner that keeps them elsewhere. With
    /// several connections, both this and `dropped` are called by several threads at once, each for other pages.
    func received(pages: Range<Int>) throws(PartFailure)
    /// `pages`, which had been filled, read as zero again.
    func dropped(pages: Range<Int>) throws(PartFailure)
    /// The CRC-32C of each of `pages`, where the memory that `prepare` returned does not hold them; nil: it does.
    func checksums(of pages: Range<Int>) -> [UInt32]?
    /// Loads the state. The sections come from the peer and are untrusted. The guest must not run before `start`.
    func load(state: [StateSection]) throws(PartFailure)
    /// Runs the guest.
    func start() throws(PartFailure)
    /// Drops everything received so far. The guest must never run afterwards.
    func discard()
}

extension IncomingGuest {
    public func received(pages: Range<Int>) throws(PartFailure) {}
    public func dropped(pages: Range<Int>) throws(PartFailure) {}
    public func checksums(of pages: Range<Int>) -> [UInt32]? { nil }
}
