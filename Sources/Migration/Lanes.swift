// SPDX-License-Identifier: Apache-2.0
internal import CLinux
package import GuestMemory

/// Which data connection ("lane") a page belongs to, for the whole migration, so that what is said of one page in
/// successive rounds is always said on one connection, in order.
package struct LaneMap: Sendable, Equatable {
    /// Pages that stay together: a frame's worth. A multiple of 64, so that no two lanes share a word of a bitmap.
    package static let chunkPages = 256
    /// 1 to `StreamLimits.lanes`.
    package let lanes: Int

    package init(lanes: Int) { self.lanes = lanes }

    /// The lane of `page`, from 1.
    package func lane(of page: Int) -> Int { page / LaneMap.chunkPages % lanes + 1 }

    /// True if all of `pages`, of which there is at least one, belong to `lane`.
    package func lane(_ lane: Int, owns pages: Range<Int>) -> Bool {
        guard self.lane(of: pages.lowerBound) == lane else { return false }
        // Chunks side by side belong to different lanes, where there are several.
        return lanes == 1 || pages.lowerBound / LaneMap.chunkPages == (pages.upperBound - 1) / LaneMap.chunkPages
    }

    /// Pages of RAM that belong to `lane`.
    package func pages(of lane: Int, in memory: GuestMemory) -> Int {
        let cycle = LaneMap.chunkPages * lanes, start = LaneMap.chunkPages * (lane - 1)
        /// Pages of the lane below `page`.
        func below(_ page: Int) -> Int {
            page / cycle * LaneMap.chunkPages + min(max(page % cycle - start, 0), LaneMap.chunkPages)
        }
        return memory.regions.reduce(0) { $0 + below($1.range.pages.upperBound) - below($1.range.pages.lowerBound) }
    }

    /// The parts of `run` that lie within one chunk each.
    package static func chunks(of run: Range<Int>, _ body: (Range<Int>) throws(MigrationError) -> Void) throws(MigrationError) {
        var page = run.lowerBound
        while page < run.upperBound {
            let end = min((page / chunkPages + 1) * chunkPages, run.upperBound)
            try body(page..<end)
            page = end
        }
    }
}

/// What shows that a connection was opened by the source that was told it: 16 random bytes.
package struct JoinToken: Sendable, Equatable {
    package static let size = 16
    package let bytes: [UInt8]

    /// Bytes from a peer; nil if it is another number of them.
    package init?(_ bytes: [UInt8]) {
        guard bytes.count == JoinToken.size else { return nil }
        self.bytes = bytes
    }

    /// A new one.
    package init() throws(MigrationError) {
        var bytes = [UInt8](repeating: 0, count: JoinToken.size)
        // Up to 256 bytes come whole or not at all.
        guard getrandom(&bytes, bytes.count, 0) == bytes.count else {
            throw .channelFailed("drawing a random token", errno: lacuna_errno())
        }
        self.bytes = bytes
    }

    /// Whether a connection's first frame may join a migration of `lanes` lanes, by its header alone.
    package static func mayJoin(_ header: FrameHeader, lanes: Int) -> Bool {
        header.type == .join && header.count >= 1 && Int(header.count) <= lanes && header.address == 0
            && Int(header.payloadBytes) == size
    }

    /// Compares in a time that does not depend on where the difference is: a peer may try as often as it likes.
    package func matches(_ other: [UInt8]) -> Bool {
        other.count == bytes.count && zip(bytes, other).reduce(UInt8(0)) { $0 | ($1.0 ^ $1.1) } == 0
    }
}
