// SPDX-License-Identifier: Apache-2.0
internal import CLinux
internal import Synchronization

/// Why guest memory could not be made or touched.
public enum GuestMemoryError: Error, Equatable, CustomStringConvertible {
    /// The ranges overlap, are empty, are not in ascending order, or are not multiples of 64 pages (256 KiB).
    case badLayout(String)
    /// mmap() failed with this errno.
    case cannotAllocate(bytes: UInt64, errno: Int32)
    /// Some byte of the access is not RAM: a hole, beyond the end, or across two regions.
    case notRAM(GuestAddress, bytes: Int)

    public var description: String {
        switch self {
        case .badLayout(let why): "guest memory layout: \(why)"
        case .cannotAllocate(let bytes, let errno):
            "cannot reserve \(bytes >> 20) MiB of guest memory (errno \(errno)); give the guest less with --memory"
        case .notRAM(let address, let bytes): "\(bytes) bytes at \(address) are not guest RAM"
        }
    }
}

/// What the owner of borrowed guest memory does about it. Called on any thread, with locks of the caller held.
public struct BorrowedMemoryHooks: Sendable {
    /// Gives whole pages back, so that they read as zero; false: that is not possible, and they are cleared instead.
    /// Nil: the memory is private and anonymous, and can be dropped as such.
    public var discard: (@Sendable (GuestAddress, Int) -> Bool)?
    /// Bytes were written.
    public var wrote: @Sendable (GuestAddress, Int) -> Void
    public init(discard: (@Sendable (GuestAddress, Int) -> Bool)?, wrote: @escaping @Sendable (GuestAddress, Int) -> Void) {
        self.discard = discard
        self.wrote = wrote
    }
}

/// The guest's RAM: one host mapping for each range of guest-physical addresses.
///
/// Every access is bounds-checked against the ranges; nothing here traps on an address that a guest chose. Writes are
/// entered into `writeLog` after the bytes are in place, so that a migration sees what the VMM itself dirtied (rule W3
/// of the hint window).
///
/// Thread rules: all methods may be called from any thread. The guest runs on the same memory at the same time, so a
/// value that was read once must be used from that copy, never read again.
@safe public final class GuestMemory: @unchecked Sendable {
    // Sendable: the mappings are fixed from init to deinit, and their bytes are by nature shared with the guest.

    /// A range of RAM and where the host has it mapped.
    @safe public struct Region: @unchecked Sendable {
        public let range: GuestRange
        /// The host's mapping of `range`, `range.size` bytes, valid as long as the `GuestMemory` lives.
        public let host: UnsafeMutableRawPointer
        /// What `host` maps, if that is a file of another process. It unmaps with its last user.
        let file: SharedFile?

        init(range: GuestRange, host: UnsafeMutableRawPointer, file: SharedFile? = nil) {
            self.range = range
            unsafe self.host = unsafe host
            self.file = file
        }
    }

    /// In ascending order, not overlapping.
    public let regions: [Region]
    /// Page frames from 0 to the end of the last region, holes included: the size of every bitmap over this memory.
    public let frameCount: Int
    /// Pages of RAM, holes excluded.
    public let ramPages: Int
    /// Pages that the VMM itself wrote; bits are set atomically, and taken by the migration.
    public let writeLog: PageBitmap
    /// A second log, in memory that another process reads, and whether there is one.
    private let sharedLog = Mutex<SharedDirtyLog?>(nil)
    private let hasSharedLog = Atomic<Bool>(false)
    /// Of memory that is somebody else's.
    private let hooks: BorrowedMemoryHooks?

    /// Maps zeroed, not yet populated memory for each range. Ranges are in ascending order and each a multiple of
    /// 64 pages, so that no word of a bitmap spans two regions.
    public init(ranges: [GuestRange]) throws(GuestMemoryError) {
        var regions: [Region] = []
        var end: UInt64 = 0
        for range in ranges {
            let unit = UInt64(pageSize) * 64
            guard range.size > 0, range.size % unit == 0, range.start.rawValue % unit == 0 else {
                throw .badLayout("the range at \(range.start) is not a multiple of 256 KiB")
            }
            guard range.start.rawValue >= end, range.start.advanced(by: range.size) != nil,
                range.start.rawValue + range.size <= 1 << 52
            else { throw .badLayout("the range at \(range.start) overlaps the one before it or is out of order") }
            end = range.start.rawValue + range.size
            let mapping = unsafe lacuna_mmap(
                Int(range.size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
            guard let host = unsafe mapping else {
                let code = lacuna_errno()
                for region in regions { unsafe munmap(region.host, Int(region.range.size)) }
                throw .cannotAllocate(bytes: range.size, errno: code)
            }
            unsafe regions.append(Region(range: range, host: host))
        }
        guard !regions.isEmpty else { throw .badLayout("there is no range") }
        hooks = nil
        self.regions = regions
        frameCount = Int(end >> pageShift)
        ramPages = Int(ranges.reduce(0) { $0 + $1.size } >> pageShift)
        writeLog = PageBitmap(bitCount: frameCount)
    }

    /// Maps files of another process as the guest's RAM, shared. Ranges may come in any order and begin on any page.
    /// Each descriptor is duplicated: the caller's stay its own. Nothing about the files is believed: what is not there
    /// is refused, and what is cut off later reads as zero once `SharedFile.survivesTruncation()` was called.
    ///
    /// - Parameter limit: bytes of guest-physical address space, which bounds the size of every bitmap.
    public convenience init(sharing mappings: [SharedMapping], limit: UInt64) throws(GuestMemoryError) {
        try self.init(mapping: mappings, isPrivate: false, limit: limit)
    }

    /// Like `init(sharing:limit:)`, but copy-on-write: the files give the first contents of the RAM, page by page as it
    /// is touched, and never change. Read-only descriptors will do. For a snapshot that is to run at once.
    public convenience init(restoring mappings: [SharedMapping], limit: UInt64 = 1 << 52) throws(GuestMemoryError) {
        try self.init(mapping: mappings, isPrivate: true, limit: limit)
    }

    private init(mapping mappings: [SharedMapping], isPrivate: Bool, limit: UInt64) throws(GuestMemoryError) {
        var regions: [Region] = []
        var end: UInt64 = 0
        for mapping in mappings.sorted(by: { $0.range.start < $1.range.start }) {
            let range = mapping.range
            try Self.check(range, after: end, limit: limit)
            end = range.start.rawValue + range.size
            let file = try SharedFile(mapping, isPrivate: isPrivate)
            unsafe regions.append(Region(range: range, host: file.host, file: file))
        }
        guard !regions.isEmpty else { throw .badLayout("there is no range") }
        hooks = nil
        self.regions = regions
        frameCount = Int(end >> pageShift)
        ramPages = regions.reduce(0) { $0 + $1.range.pages.count }
        writeLog = PageBitmap(bitCount: frameCount)
    }

    /// Uses mappings that are another's and stay so: who made them sees to it that they outlive this object and all that
    /// works with it. Ranges may come in any order and begin on any page.
    public init(
        borrowing mappings: [(range: GuestRange, host: UnsafeMutableRawPointer)], limit: UInt64,
        hooks: BorrowedMemoryHooks
    ) throws(GuestMemoryError) {
        var regions: [Region] = []
        var end: UInt64 = 0
        for unsafe (range, host) in unsafe mappings.sorted(by: { unsafe $0.range.start < $1.range.start }) {
            try Self.check(range, after: end, limit: limit)
            guard Int(bitPattern: host) % pageSize == 0 else {
                throw .badLayout("the range at \(range.start) is not mapped at a page's beginning")
            }
            end = range.start.rawValue + range.size
            unsafe regions.append(Region(range: range, host: host))
        }
        guard !regions.isEmpty else { throw .badLayout("there is no range") }
        self.hooks = hooks
        self.regions = regions
        frameCount = Int(end >> pageShift)
        ramPages = regions.reduce(0) { $0 + $1.range.pages.count }
        writeLog = PageBitmap(bitCount: frameCount)
    }

    /// Whole pages, in order, within the limit.
    private static func check(_ range: GuestRange, after end: UInt64, limit: UInt64) throws(GuestMemoryError) {
        let unit = UInt64(pageSize)
        guard range.size > 0, range.size % unit == 0, range.start.rawValue % unit == 0 else {
            throw .badLayout("the range at \(range.start) is not whole pages")
        }
        guard range.start.rawValue >= end else { throw .badLayout("the range at \(range.start) overlaps another") }
        guard range.size <= limit, range.start.rawValue <= limit - range.size else {
            throw .badLayout("the range at \(range.start) ends beyond the \(limit >> 20) MiB allowed")
        }
    }

    deinit {
        guard hooks == nil else { return }
        for region in regions where region.file == nil { unsafe munmap(region.host, Int(region.range.size)) }
    }

    /// Enters all later writes into `log` too, until this is called again; nil: no more. A write that is going on is in
    /// one or the other.
    public func setSharedLog(_ log: SharedDirtyLog?) {
        sharedLog.withLock { $0 = log }
        hasSharedLog.store(log != nil, ordering: .sequentiallyConsistent)
    }

    /// The host's view of `bytes` bytes of RAM, or nil if they are not all within one region.
    public func hostPointer(_ address: GuestAddress, bytes: Int) -> UnsafeMutableRawPointer? {
        guard bytes >= 0 else { return nil }
        for region in regions {
            let start = region.range.start.rawValue
            guard address.rawValue >= start else { continue }
            let offset = address.rawValue - start
            // Cannot overflow: offset <= size is checked first.
            if offset <= region.range.size, UInt64(bytes) <= region.range.size - offset {
                return unsafe region.host + Int(offset)
            }
        }
        return nil
    }

    /// True if `pages` lies within RAM.
    public func isRAM(pages: Range<Int>) -> Bool {
        for region in regions {
            let ram = region.range.pages
            if pages.lowerBound >= ram.lowerBound && pages.upperBound <= ram.upperBound { return true }
        }
        return false
    }

    /// True if page frame `page` is RAM.
    public func isRAM(page: Int) -> Bool {
        // Compared first: the end of the last page number's range would be beyond the largest integer.
        page < frameCount && isRAM(pages: page..<page + 1)
    }

    /// Copies guest memory out.
    public func read(_ address: GuestAddress, into buffer: UnsafeMutableRawBufferPointer) throws(GuestMemoryError) {
        guard let host = unsafe hostPointer(address, bytes: buffer.count) else {
            throw .notRAM(address, bytes: buffer.count)
        }
        if let base = buffer.baseAddress { unsafe lacuna_copy(base, host, buffer.count) }
    }

    /// Copies bytes into guest memory and logs the pages.
    public func write(_ bytes: UnsafeRawBufferPointer, at address: GuestAddress) throws(GuestMemoryError) {
        guard let host = unsafe hostPointer(address, bytes: bytes.count) else {
            throw .notRAM(address, bytes: bytes.count)
        }
        if let base = bytes.baseAddress { unsafe lacuna_copy(host, base, bytes.count) }
        logWrite(address, bytes: bytes.count)
    }

    /// Reads a trivial value, little-endian as it lies in memory.
    public func load<Value: BitwiseCopyable>(_ address: GuestAddress, as type: Value.Type) throws(GuestMemoryError) -> Value {
        guard let host = unsafe hostPointer(address, bytes: MemoryLayout<Value>.size) else {
            throw .notRAM(address, bytes: MemoryLayout<Value>.size)
        }
        return unsafe host.loadUnaligned(as: Value.self)
    }

    /// Writes a trivial value and logs the page.
    public func store<Value: BitwiseCopyable>(_ value: Value, at address: GuestAddress) throws(GuestMemoryError) {
        guard let host = unsafe hostPointer(address, bytes: MemoryLayout<Value>.size) else {
            throw .notRAM(address, bytes: MemoryLayout<Value>.size)
        }
        unsafe host.storeBytes(of: value, as: Value.self)
        logWrite(address, bytes: MemoryLayout<Value>.size)
    }

    /// Reads a 16-bit value with acquire order: what the other side wrote before it stored this value is visible after.
    /// `address` must be a multiple of 2.
    public func loadAcquire16(_ address: GuestAddress) throws(GuestMemoryError) -> UInt16 {
        guard address.rawValue & 1 == 0, let host = unsafe hostPointer(address, bytes: 2) else {
            throw .notRAM(address, bytes: 2)
        }
        return unsafe lacuna_load_acquire_16(host)
    }

    /// Writes a 16-bit value with release order, and logs the page. `address` must be a multiple of 2.
    public func storeRelease16(_ value: UInt16, at address: GuestAddress) throws(GuestMemoryError) {
        guard address.rawValue & 1 == 0, let host = unsafe hostPointer(address, bytes: 2) else {
            throw .notRAM(address, bytes: 2)
        }
        unsafe lacuna_store_release_16(host, value)
        logWrite(address, bytes: 2)
    }

    /// A full barrier: a store before it is visible to the guest before a load after it is made.
    public func fence() { lacuna_fence() }

    /// Enters the pages of a write into `writeLog`. To be called after the bytes are in place: a bit taken too early
    /// would let the migration send the page as it was before. Of an access that is not all RAM, what is beyond the last
    /// page frame is left out.
    public func logWrite(_ address: GuestAddress, bytes: Int) {
        guard bytes > 0, address.rawValue >> pageShift < UInt64(frameCount) else { return }
        let end = address.advanced(by: UInt64(bytes) - 1)?.rawValue ?? .max
        // Cannot overflow: page frames have 52 bits.
        let first = Int(address.rawValue >> pageShift), last = min(Int(end >> pageShift), frameCount - 1)
        for page in first...last { writeLog.atomicSet(page) }
        hooks?.wrote(address, bytes)
        guard hasSharedLog.load(ordering: .acquiring) else { return }
        // Under the lock, so that the log is not unmapped meanwhile.
        sharedLog.withLock { $0?.mark(first...last) }
    }

    /// Has the host put memory behind `pages` at once, which are all about to be written: a fault for each of them would
    /// cost more. Only a wish: where the host cannot, the faults come.
    public func populate(pages: Range<Int>) {
        let address = PageFrameNumber(UInt64(pages.lowerBound)).address, bytes = pages.count * pageSize
        guard let host = unsafe hostPointer(address, bytes: bytes) else { return }
        // MADV_POPULATE_WRITE, since Linux 5.14.
        unsafe _ = madvise(host, bytes, 23)
    }

    /// Gives pages back to the host: they read as zero afterwards. Only for pages the guest cannot be using: on a
    /// migration's destination before the guest starts, or pages the guest has handed to a balloon (rule W4: never
    /// because of a hint).
    public func discard(pages: Range<Int>) throws(GuestMemoryError) {
        let address = PageFrameNumber(UInt64(pages.lowerBound)).address, bytes = pages.count * pageSize
        guard let host = unsafe hostPointer(address, bytes: bytes) else { throw .notRAM(address, bytes: bytes) }
        if let region = regions.first(where: { $0.file != nil && $0.range.pages.contains(pages.lowerBound) }),
            let file = region.file
        {
            let offset = address.rawValue - region.range.start.rawValue
            if !file.discard(offset: offset, bytes: UInt64(bytes)) { unsafe memset(host, 0, bytes) }
            return
        }
        if let hook = hooks?.discard {
            if !hook(address, bytes) { unsafe memset(host, 0, bytes) }
            return
        }
        if unsafe madvise(host, bytes, MADV_DONTNEED) != 0 { unsafe memset(host, 0, bytes) }
    }
}
