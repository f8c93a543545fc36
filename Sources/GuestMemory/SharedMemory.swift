// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// A part of a file that is a range of the guest's RAM.
public struct SharedMapping: Sendable {
    public let range: GuestRange
    /// An open file, the caller's.
    public let descriptor: Int32
    /// Where in the file the range begins, in bytes.
    public let offset: UInt64
    public init(range: GuestRange, descriptor: Int32, offset: UInt64) {
        self.range = range
        self.descriptor = descriptor
        self.offset = offset
    }
}

/// A mapping of another process's file, with a descriptor of its own. Unmaps and closes with its last user.
@safe public final class SharedFile: @unchecked Sendable {
    // Sendable: nothing changes between init and deinit but the bytes, which are shared by nature.

    /// The first byte of the range.
    let host: UnsafeMutableRawPointer
    private let descriptor: Int32
    private let offset: UInt64
    private let base: UnsafeMutableRawPointer
    private let length: Int
    private let slot: Int32
    private let isPrivate: Bool
    /// Bytes of the file's pages: only whole ones of them can go back.
    private let granule: UInt64

    /// From here on a file that its owner cuts short costs the process nothing but the bytes: it sets the handler of
    /// SIGBUS. For a program to call once; a library has no business with signals.
    public static func survivesTruncation() { _ = lacuna_guard_install() }

    init(_ mapping: SharedMapping, isPrivate: Bool = false) throws(GuestMemoryError) {
        var information = stat()
        let start = mapping.range.start, size = mapping.range.size
        guard unsafe fstat(mapping.descriptor, &information) == 0, information.st_mode & mode_t(S_IFMT) == mode_t(S_IFREG) else {
            throw .badLayout("the memory at \(start) is no file")
        }
        // The size is bounded by the caller, so that neither sum can overflow.
        guard mapping.offset <= UInt64(Int64.max) - size, mapping.offset + size <= UInt64(information.st_size) else {
            throw .badLayout("the file for the memory at \(start) is too short")
        }
        let granule = UInt64(lacuna_file_granule(mapping.descriptor))
        guard mapping.offset % UInt64(pageSize) == 0 else {
            throw .badLayout("the memory at \(start) begins at no page of its file")
        }
        // Huge pages are mapped whole: from the one that holds the first byte to the one that holds the last.
        let begin = mapping.offset & ~(granule - 1), end = (mapping.offset + size + granule - 1) & ~(granule - 1)
        let own = lacuna_duplicate(mapping.descriptor)
        guard own >= 0 else { throw .cannotAllocate(bytes: size, errno: lacuna_errno()) }
        guard let base = unsafe lacuna_mmap(
            Int(end - begin), PROT_READ | PROT_WRITE, (isPrivate ? MAP_PRIVATE : MAP_SHARED) | MAP_NORESERVE, own,
            off_t(begin))
        else {
            let code = lacuna_errno()
            close(own)
            throw .cannotAllocate(bytes: size, errno: code)
        }
        let slot = unsafe lacuna_guard_add(base, Int(end - begin), Int(granule))
        guard slot >= 0 else {
            unsafe munmap(base, Int(end - begin))
            close(own)
            throw .badLayout("there are too many ranges")
        }
        unsafe self.base = unsafe base
        unsafe host = unsafe base + Int(mapping.offset - begin)
        length = Int(end - begin)
        offset = mapping.offset
        descriptor = own
        self.slot = slot
        self.isPrivate = isPrivate
        self.granule = granule
    }

    deinit {
        // The guard goes last but one: nobody has the memory any more, and its addresses are not yet somebody else's.
        lacuna_guard_remove(slot)
        unsafe munmap(base, length)
        close(descriptor)
    }

    /// The file was shorter than it said: some bytes that were written are lost.
    var wasCutShort: Bool { lacuna_guard_was_hit(slot) }

    /// Gives whole pages back, so that they read as zero; false if the file system cannot. In bytes from the beginning
    /// of the range.
    func discard(offset place: UInt64, bytes: UInt64) -> Bool {
        if isPrivate {
            // MADV_DONTNEED would bring the file's bytes back: zeroes of our own take their place. Small ranges are
            // cleared instead: each new mapping splits the old one, and a process may have some 65 000 only.
            guard bytes >= 1 << 18 else { return false }
            let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
            return unsafe mmap(host + Int(place), Int(bytes), PROT_READ | PROT_WRITE, flags, -1, 0) == host + Int(place)
        }
        // Shared memory goes back by a hole in its file; other processes' mappings then read zeroes too. Before Linux 6.0
        // a hole in huge pages leaves the parts of pages at its ends as they were, and says nothing.
        let start = offset + place
        let hole = Self.wholePages(of: start..<start + bytes, granule: granule)
        guard !hole.isEmpty, lacuna_punch_hole(descriptor, hole.lowerBound, UInt64(hole.count)) == 0 else { return false }
        unsafe memset(host + Int(place), 0, Int(hole.lowerBound - start))
        unsafe memset(host + Int(hole.upperBound - offset), 0, Int(start + bytes - hole.upperBound))
        return true
    }

    /// The part of `bytes` that is whole pages of `granule` bytes, a power of two.
    static func wholePages(of bytes: Range<UInt64>, granule: UInt64) -> Range<UInt64> {
        // Cannot overflow: places in a file have 63 bits.
        let first = (bytes.lowerBound + granule - 1) & ~(granule - 1), end = bytes.upperBound & ~(granule - 1)
        return first < end ? first..<end : bytes.lowerBound..<bytes.lowerBound
    }
}

extension SharedFile {
    /// Copies bytes out of the file, from `place` bytes after the beginning of the range. A hole is read as zeroes and
    /// stays one, which a read of the mapping would fill. False if that cannot be done.
    func copyOut(offset place: UInt64, into buffer: UnsafeMutableRawPointer, bytes: Int) -> Bool {
        // What a private mapping holds need not be what its file holds.
        guard !isPrivate else { return false }
        var done = 0
        while done < bytes {
            let count = unsafe pread(descriptor, buffer + done, bytes - done, off_t(offset + place) + off_t(done))
            if count > 0 { done += count } else if count == 0 || lacuna_errno() != EINTR { return false }
        }
        return true
    }
}

extension GuestMemory {
    /// True if a shared file was found shorter than it was when it was mapped.
    public var wasCutShort: Bool { regions.contains { $0.file?.wasCutShort ?? false } }
}

/// A log of dirty pages in a file shared with the process that migrates the guest: one bit for each 4 KiB of
/// guest-physical memory, least significant first; bits are set atomically.
@safe public final class SharedDirtyLog: @unchecked Sendable {
    private let file: SharedFile
    /// Bits.
    private let count: Int

    /// Maps `bytes` bytes at `offset` of the file `descriptor`, which stays the caller's.
    public init(descriptor: Int32, offset: UInt64, bytes: UInt64) throws(GuestMemoryError) {
        // A bit for each page of 52 bits of address space.
        guard bytes > 0, bytes <= 1 << 37 else { throw .badLayout("a dirty log of \(bytes) bytes") }
        file = try SharedFile(
            SharedMapping(range: GuestRange(start: GuestAddress(0), size: bytes), descriptor: descriptor, offset: offset))
        count = Int(bytes) * 8
    }

    /// Sets the bits of `pages`; those beyond the end of the log are left out.
    public func mark(_ pages: ClosedRange<Int>) {
        guard pages.lowerBound >= 0 else { return }
        for page in pages.lowerBound...pages.upperBound {
            guard page < count else { return }
            unsafe lacuna_fetch_or_8(
                file.host.assumingMemoryBound(to: UInt8.self) + page >> 3, 1 << UInt8(page & 7))
        }
    }
}
