// SPDX-License-Identifier: Apache-2.0
internal import CLinux
internal import Virtio

/// The balloon's feature bits (virtio 1.3, section 5.5.3, and protocol/free-page-bitmap.md), as masks; and the names an
/// operator has for them and for those of the rings.
public enum BalloonFeature {
    /// The driver tells the device before it uses a page of the balloon again.
    public static let mustTellHost: UInt64 = 1 << 0
    /// There is a queue for statistics.
    public static let statistics: UInt64 = 1 << 1
    /// The guest may take pages back when it runs out of memory. A Linux guest then counts the balloon as used memory;
    /// without the feature its total shrinks.
    public static let deflateOnOOM: UInt64 = 1 << 2
    /// There is a queue for free page hints, and `free_page_hint_cmd_id` is valid.
    public static let freePageHint: UInt64 = 1 << 3
    /// `poison_val` is valid.
    public static let pagePoison: UInt64 = 1 << 4
    /// There is a queue on which the driver reports free pages by itself.
    public static let pageReporting: UInt64 = 1 << 5
    public static let freePageBitmap: UInt64 = 1 << UInt64(VIRTIO_BALLOON_F_FREE_PAGE_BITMAP)

    /// Every feature there is, with the name an operator knows it by.
    public static let names: [(name: String, mask: UInt64)] = [
        ("must-tell-host", mustTellHost), ("stats", statistics), ("deflate-on-oom", deflateOnOOM),
        ("free-page-hint", freePageHint), ("page-poison", pagePoison), ("page-reporting", pageReporting),
        ("free-page-bitmap", freePageBitmap), ("indirect", VirtioFeature.indirectDescriptors),
        ("event-index", VirtioFeature.eventIndex), ("packed", VirtioFeature.packedRing),
    ]
    /// All features, those of the rings included.
    public static let all = names.reduce(0) { $0 | $1.mask }
    /// Those that say how the rings look and not what the balloon can do.
    public static let rings = VirtioFeature.indirectDescriptors | VirtioFeature.eventIndex | VirtioFeature.packedRing
    /// What is offered unless the operator says otherwise: a balloon that the guest does not take back by itself, and no
    /// reporting, which costs a running guest a fault for each page that it takes into use again. Of the rings the
    /// simplest, which every front end knows.
    public static let standard =
        all & ~(deflateOnOOM | pageReporting | VirtioFeature.eventIndex | VirtioFeature.packedRing)
}

/// Offsets in the balloon's configuration space (virtio 1.3, section 5.5.4), in bytes. All fields are 32 bits,
/// little-endian.
enum ConfigurationField {
    static let pages = 0
    static let actual = 4
    static let hintCommand = 8
    static let poison = 12
    static let bitmapCommand = Int(VIRTIO_BALLOON_BITMAP_CMD_ID_OFFSET)
    static let bytes = 20
}

/// The rule of section 5.1 of protocol/free-page-bitmap.md that a chain breaks. Where it breaks several, the first in
/// the order of checks.
enum ReportFault: String, Error {
    case length
    case reserved
    case kind
    case flags
    case bits = "num_bits"
    case start = "start_pfn"
    /// Device-writable descriptors.
    case direction
}

/// A private copy of the header of a report's chain: `struct virtio_balloon_bitmap_hdr`. What is checked is the copy;
/// the guest cannot change it any more.
struct ReportHeader {
    static let figuresBytes = 40
    /// One more than the highest page frame number there is: addresses have 64 bits.
    static let pageFrames: UInt64 = 1 << 52

    enum Kind: UInt16 {
        case pages = 1
        case figures = 2
    }

    struct Flags: OptionSet {
        let rawValue: UInt16
        static let first = Flags(rawValue: UInt16(VIRTIO_BALLOON_BITMAP_FLAG_FIRST))
        static let last = Flags(rawValue: UInt16(VIRTIO_BALLOON_BITMAP_FLAG_LAST))
        static let failed = Flags(rawValue: UInt16(VIRTIO_BALLOON_BITMAP_FLAG_FAILED))
        static let known: Flags = [.first, .last, .failed]
    }

    /// The request this chain says it answers.
    let request: UInt32
    private let rawKind: UInt16
    let flags: Flags
    /// Page frame number of bit 0.
    let start: UInt64
    /// Bits that follow.
    let bits: UInt32
    private let reserved: UInt32

    /// Copies the header, each byte once. Checks nothing but that the bytes are there.
    init(from reader: inout ChainReader) throws(ReportFault) {
        do throws(ChainReadError) {
            request = try reader.take()
            rawKind = try reader.take()
            flags = Flags(rawValue: try reader.take())
            start = try reader.take()
            bits = try reader.take()
            reserved = try reader.take()
        } catch { throw .length }
    }

    /// Checks the copy, for a chain with `following` bytes after the header. Returns the kind.
    func check(following: Int) throws(ReportFault) -> Kind {
        guard reserved == 0 else { throw .reserved }
        guard let kind = Kind(rawValue: rawKind) else { throw .kind }
        // Figures are the last chain and the last chain is figures; giving up is the last word.
        guard flags.isSubset(of: .known), flags.contains(.last) == (kind == .figures),
            flags.contains(.last) || !flags.contains(.failed)
        else { throw .flags }
        switch kind {
        case .pages:
            guard bits > 0, bits % 64 == 0, bits <= VIRTIO_BALLOON_BITMAP_MAX_BITS else { throw .bits }
            // Cannot wrap: what is subtracted is at most 2^22.
            guard start % 64 == 0, start <= Self.pageFrames - UInt64(bits) else { throw .start }
            guard following == Int(bits / 8) else { throw .length }
        case .figures:
            guard bits == 0 else { throw .bits }
            guard start == 0 else { throw .start }
            guard following == Self.figuresBytes else { throw .length }
        }
        return kind
    }
}

extension FreePageFigures {
    /// Takes a `struct virtio_balloon_bitmap_figures`. They are only for show: nothing depends on them.
    init(from reader: inout ChainReader) throws(ReportFault) {
        let reserved: UInt32
        do throws(ChainReadError) {
            blocks = try reader.take()
            pages = try reader.take()
            walkNanoseconds = try reader.take()
            longestLockNanoseconds = try reader.take()
            batches = try reader.take()
            reserved = try reader.take()
        } catch { throw .length }
        guard reserved == 0 else { throw .reserved }
    }
}
