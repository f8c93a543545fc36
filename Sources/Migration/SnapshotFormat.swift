// SPDX-License-Identifier: Apache-2.0
internal import CLinux
internal import GuestMemory

// The snapshot file, as protocol/snapshot-file.md specifies it: a header of one page, the RAM at fixed places with holes
// where it is zero or free, then what the machine is made of, its state, and a checksum for each page.

/// A part of the guest's RAM and where it lies in the file.
struct SnapshotRegion: Equatable, Sendable {
    var range: GuestRange
    /// Bytes from the file's beginning; a multiple of 2 MiB, so that huge pages can map it.
    var offset: UInt64
}

/// The first page of the file.
struct SnapshotHeader: Equatable, Sendable {
    static let magic: UInt64 = 0x5041_4e53_4e43_414c  // "LACNSNAP" as it stands in the file
    static let version: UInt32 = 1
    static let size = 4096
    static let regionLimit = 64
    static let alignment: UInt64 = 2 << 20
    /// Of the machine's description and state together.
    static let metadataLimit = StreamLimits.stateBytes + StreamLimits.descriptionBytes + (1 << 20)

    var regions: [SnapshotRegion]
    var fileSize: UInt64 = 0
    var metadataOffset: UInt64 = 0
    var metadataBytes: UInt32 = 0
    var metadataChecksum: UInt32 = 0
    var tableOffset: UInt64 = 0
    var tableBytes: UInt64 = 0
    var tableChecksum: UInt32 = 0

    /// Lays RAM out one region after the other.
    init(layout: [GuestRange]) {
        var offset = SnapshotHeader.alignment
        regions = []
        for range in layout {
            regions.append(SnapshotRegion(range: range, offset: offset))
            offset += (range.size + SnapshotHeader.alignment - 1) & ~(SnapshotHeader.alignment - 1)
        }
        metadataOffset = offset
    }

    var ramPages: Int { regions.reduce(0) { $0 + $1.range.pages.count } }

    func encode() -> [UInt8] {
        var encoder = StateEncoder()
        encoder.put(SnapshotHeader.magic)
        encoder.put(SnapshotHeader.version)
        encoder.put(UInt32(regions.count))
        encoder.put(fileSize)
        encoder.put(metadataOffset)
        encoder.put(metadataBytes)
        encoder.put(metadataChecksum)
        encoder.put(tableOffset)
        encoder.put(tableBytes)
        encoder.put(tableChecksum)
        encoder.put(UInt32(0))
        for region in regions {
            encoder.put(region.range.start.rawValue)
            encoder.put(region.range.size)
            encoder.put(region.offset)
        }
        for _ in encoder.bytes.count..<SnapshotHeader.size - 4 { encoder.put(UInt8(0)) }
        encoder.put(checksum(encoder.bytes))
        return encoder.bytes
    }

    /// Reads an untrusted page. Whatever it returns can be computed with: no sum overflows, every part lies within
    /// `fileSize`, regions are ascending, and nothing is larger than a machine can be.
    init(decoding bytes: [UInt8]) throws(StateError) {
        guard bytes.count == SnapshotHeader.size else { throw StateError("the file has no whole header") }
        var decoder = StateDecoder(bytes)
        guard try decoder.take(UInt64.self) == SnapshotHeader.magic else { throw StateError("the file is no snapshot") }
        var tail = StateDecoder(Array(bytes.suffix(4)))
        guard try tail.take(UInt32.self) == checksum(Array(bytes.dropLast(4))) else {
            throw StateError("the header is damaged")
        }
        let version = try decoder.take(UInt32.self)
        guard version == SnapshotHeader.version else {
            throw StateError("the file is of version \(version) and this release knows version \(SnapshotHeader.version)")
        }
        let count = try decoder.take(UInt32.self)
        guard (1...UInt32(SnapshotHeader.regionLimit)).contains(count) else { throw StateError("\(count) memory regions") }
        regions = []
        fileSize = try decoder.take()
        metadataOffset = try decoder.take()
        metadataBytes = try decoder.take()
        metadataChecksum = try decoder.take()
        tableOffset = try decoder.take()
        tableBytes = try decoder.take()
        tableChecksum = try decoder.take()
        guard try decoder.take(UInt32.self) == 0 else { throw StateError("the header has a field of a later version") }
        var (guestEnd, fileEnd): (UInt64, UInt64) = (0, UInt64(SnapshotHeader.size))
        let limit: UInt64 = 1 << 52
        for _ in 0..<count {
            let (start, size, offset) = (try decoder.take(UInt64.self), try decoder.take(UInt64.self), try decoder.take(UInt64.self))
            guard start >= guestEnd, start % (1 << 18) == 0, size % (1 << 18) == 0, size > 0, start < limit, size < limit,
                offset >= fileEnd, offset % SnapshotHeader.alignment == 0, offset < limit
            else { throw StateError("the memory region at \(GuestAddress(start)) is laid out wrong") }
            (guestEnd, fileEnd) = (start + size, offset + size)
            regions.append(SnapshotRegion(range: GuestRange(start: GuestAddress(start), size: size), offset: offset))
        }
        guard fileSize < limit, metadataOffset >= fileEnd, metadataOffset < limit,
            Int(metadataBytes) <= SnapshotHeader.metadataLimit, tableOffset >= metadataOffset + UInt64(metadataBytes),
            tableOffset < limit, tableBytes == UInt64(ramPages) * 4, tableOffset + tableBytes == fileSize
        else { throw StateError("the header's parts do not fit together") }
    }
}

/// What the file says besides memory.
struct SnapshotMetadata: Equatable, Sendable {
    var description: [UInt8]
    var sections: [StateSection]

    func encode() -> [UInt8] {
        var encoder = StateEncoder()
        encoder.put(description)
        encoder.put(UInt32(sections.count))
        for section in sections {
            encoder.put(section.name)
            encoder.put(section.bytes)
        }
        return encoder.bytes
    }

    init(description: [UInt8], sections: [StateSection]) {
        self.description = description
        self.sections = sections
    }

    init(decoding bytes: [UInt8]) throws(StateError) {
        var decoder = StateDecoder(bytes)
        description = try decoder.takeBlob(limit: StreamLimits.descriptionBytes)
        let count = try decoder.take(UInt32.self)
        guard count <= StreamLimits.sections else { throw StateError("\(count) state sections") }
        sections = []
        for _ in 0..<count {
            let name = try decoder.takeString(limit: StreamLimits.sectionNameBytes)
            sections.append(StateSection(name: name, bytes: try decoder.takeBlob(limit: StreamLimits.sectionBytes)))
        }
        try decoder.finish()
    }
}

/// CRC-32C.
func checksum(_ bytes: [UInt8]) -> UInt32 { bytes.withUnsafeBytes { lacuna_crc32c(0, $0.baseAddress, $0.count) } }
