// SPDX-License-Identifier: Apache-2.0

extension GuestMemory {
    /// Gives pages back to the host while the guest runs: they read as zero until somebody writes to them. Like any
    /// other write of the VMM's it is logged, so that a migration's destination does not keep what they held before
    /// (rules W3 and W6).
    ///
    /// Only for pages the guest has handed over and does not use before it is told: those of an inflate request or of a
    /// report of free pages that were not given back to the driver yet (rule W4: never because of a hint).
    ///
    /// Throws `notRAM`, and nothing is changed, if `pages` is not within one region. Any thread.
    public func release(pages: Range<Int>) throws(GuestMemoryError) {
        guard let first = UInt64(exactly: pages.lowerBound) else { throw .notRAM(GuestAddress(0), bytes: 0) }
        try discard(pages: pages)
        // Afterwards: a bit taken before would let the migration send the page as it was.
        logWrite(PageFrameNumber(first).address, bytes: pages.count * pageSize)
    }
}
