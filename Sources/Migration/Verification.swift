// SPDX-License-Identifier: Apache-2.0
internal import CLinux
internal import GuestMemory

/// Checksums of pages, sent while the guest stands still, for a destination to compare with what it holds.
enum Verification {
    /// Pages in one `verify` frame.
    static let pagesInFrame = 4096
    static let checksumBytes = 4

    /// CRC-32C of each page of `pages`, little-endian, one after the other. Nil if they are not all within a region.
    static func checksums(of pages: Range<Int>, in memory: GuestMemory) -> [UInt8]? {
        // On both sides: a hole in the memory's file is as good as a page of zeroes, and stays a hole.
        let looker = MemoryLooker(memory)
        guard pages.lowerBound >= 0, memory.isRAM(pages: pages) else { return nil }
        return encode(pages.map { page in looker.look(at: page, of: pages).map { lacuna_crc32c(0, $0, pageSize) } ?? 0 })
    }

    /// Checksums as a frame carries them.
    static func encode(_ checksums: [UInt32]) -> [UInt8] {
        var encoder = StateEncoder()
        for checksum in checksums { encoder.put(checksum) }
        return encoder.bytes
    }

    /// The first page whose checksum is not the one given, and how many there are. `checksums` has one for each page;
    /// `own` is nil where this side cannot tell.
    static func differences(_ pages: Range<Int>, _ checksums: [UInt8], _ own: [UInt8]?) -> (first: Int, count: Int)? {
        guard let own, own.count == checksums.count else { return (pages.lowerBound, pages.count) }
        if own == checksums { return nil }
        let different = (0..<pages.count).filter {
            own[checksumBytes * $0..<checksumBytes * ($0 + 1)] != checksums[checksumBytes * $0..<checksumBytes * ($0 + 1)]
        }
        return (pages.lowerBound + (different.first ?? 0), different.count)
    }
}
