// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// Reads guest memory without giving it memory of the host's.
///
/// A page of a file that a balloon has given back is a hole. To read it through the mapping would fill the hole: of plain
/// pages with a page that the host wanted back, and of huge pages out of a pool that may be empty by now, which the kernel
/// answers with SIGBUS. So a file is read as a file. Private memory needs none of this: there a hole is read as the
/// kernel's one page of zeroes.
///
/// Thread rules: one thread; two lookers may look at the same memory.
@safe public final class MemoryLooker {
    /// Pages that are copied at once: as many as stay in a processor's own cache.
    public static let pagesAtOnce = 64
    private let memory: GuestMemory
    /// For copies; nil as long as none was needed.
    private var buffer: UnsafeMutableRawPointer?
    private var copied = 0..<0

    public init(_ memory: GuestMemory) { self.memory = memory }
    deinit { unsafe free(buffer) }

    /// Forgets what was copied. What is looked at next is as it is then.
    public func refresh() { copied = 0..<0 }

    /// The bytes of `page`, which is one of `run`, as they are or were since the last `refresh()`; nil if `run` does not
    /// lie within one region of RAM. The pointer is good until the next call.
    public func look(at page: Int, of run: Range<Int>) -> UnsafeRawPointer? {
        if copied.contains(page) { return unsafe UnsafeRawPointer(buffer! + (page - copied.lowerBound) * pageSize) }
        guard run.contains(page), page >= 0 else { return nil }
        let address = PageFrameNumber(UInt64(page)).address, count = min(run.upperBound - page, Self.pagesAtOnce)
        guard let host = unsafe memory.hostPointer(address, bytes: count * pageSize) else { return nil }
        guard let region = memory.regions.first(where: { $0.file != nil && $0.range.pages.contains(page) }),
            let file = region.file
        else { return UnsafeRawPointer(host) }
        if unsafe buffer == nil { unsafe buffer = aligned_alloc(pageSize, Self.pagesAtOnce * pageSize) }
        guard let buffer = unsafe buffer,
            unsafe file.copyOut(
                offset: address.rawValue - region.range.start.rawValue, into: buffer, bytes: count * pageSize)
        else { return UnsafeRawPointer(host) }
        copied = page..<page + count
        return UnsafeRawPointer(buffer)
    }
}
