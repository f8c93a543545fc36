// SPDX-License-Identifier: Apache-2.0
internal import CLinux
package import GuestMemory

// The wire format, as protocol/migration-stream.md specifies it: 32-byte headers, some followed by a payload.

/// What a frame says. The comment names who sends it.
package enum FrameType: UInt8, CaseIterable, Sendable {
    /// Source: the machine's description, as payload.
    case hello = 1
    /// Destination: the machine can be built here; memory may come.
    case ready = 2
    /// Destination: it cannot; the reason as payload.
    case refused = 3
    /// Source: `count` pages from `address` on, as payload.
    case pages = 4
    /// Source: `count` pages from `address` on are zero.
    case zero = 5
    /// Source: whatever was sent of these pages is void; they read as zero (rule W6).
    case discard = 6
    /// Source: round `count` is complete.
    case roundEnd = 7
    /// Source: one section of the machine's state; the first `count` bytes of the payload are its name.
    case state = 8
    /// Source: all `count` sections were sent.
    case stateEnd = 9
    /// Destination: everything is loaded and the guest could run.
    case loaded = 10
    /// Source: the guest is yours.
    case commit = 11
    /// Destination: the guest is mine.
    case committed = 12
    /// Source: the migration is off.
    case cancel = 13
    /// Either: something failed before the commit; the reason as payload.
    case failure = 14
    /// Source: the CRC-32C of each of `count` pages from `address` on, as payload.
    case verify = 15
    /// Source, first on a data connection: this is number `count`; the token of `ready` as payload.
    case join = 16
    /// Source, last on a data connection: its `count` rounds are complete.
    case laneEnd = 17
}

/// What a receiver accepts at most. A sender keeps to the same.
package enum StreamLimits {
    /// Pages in one `pages` frame: 1 MiB of payload.
    package static let pagesInFrame = 256
    package static let descriptionBytes = 64 << 10
    package static let textBytes = 4096
    package static let sectionNameBytes = 255
    package static let sectionBytes = 16 << 20
    package static let stateBytes = 64 << 20
    package static let sections = 4096
    package static let rounds = 100_000
    /// Data connections beside the first one.
    package static let lanes = 16
}

/// The fixed part of every frame, 32 bytes little-endian.
package struct FrameHeader: Equatable, Sendable {
    /// "LACN" as it stands in the stream.
    package static let magic: UInt32 = 0x4e43_414c
    package static let version = 1
    package static let size = 32

    package var type: FrameType
    /// Pages, a round's number, sections or bytes of a name, by type; otherwise 0.
    package var count: UInt32 = 0
    /// Guest-physical address of the first page; otherwise 0.
    package var address: UInt64 = 0
    /// Bytes that follow the header.
    package var payloadBytes: UInt32 = 0
    /// CRC-32C of the payload; 0 for pages, whose bytes change while they are being sent.
    package var payloadChecksum: UInt32 = 0

    package init(
        _ type: FrameType, count: UInt32 = 0, address: UInt64 = 0, payloadBytes: UInt32 = 0, payloadChecksum: UInt32 = 0
    ) {
        self.type = type
        self.count = count
        self.address = address
        self.payloadBytes = payloadBytes
        self.payloadChecksum = payloadChecksum
    }

    /// A frame about the pages `pages`.
    package init(_ type: FrameType, pages: Range<Int>, payloadBytes: UInt32 = 0) {
        self.init(
            type, count: UInt32(truncatingIfNeeded: pages.count), address: UInt64(pages.lowerBound) << pageShift,
            payloadBytes: payloadBytes)
    }

    /// Writes the 32 bytes.
    package func encode(into bytes: UnsafeMutableRawPointer) {
        bytes.storeBytes(of: FrameHeader.magic.littleEndian, as: UInt32.self)
        bytes.storeBytes(of: type.rawValue, toByteOffset: 4, as: UInt8.self)
        bytes.storeBytes(of: 0, toByteOffset: 5, as: UInt8.self)
        bytes.storeBytes(of: UInt16(FrameHeader.version).littleEndian, toByteOffset: 6, as: UInt16.self)
        bytes.storeBytes(of: count.littleEndian, toByteOffset: 8, as: UInt32.self)
        bytes.storeBytes(of: payloadBytes.littleEndian, toByteOffset: 12, as: UInt32.self)
        bytes.storeBytes(of: address.littleEndian, toByteOffset: 16, as: UInt64.self)
        bytes.storeBytes(of: payloadChecksum.littleEndian, toByteOffset: 24, as: UInt32.self)
        bytes.storeBytes(of: lacuna_crc32c(0, bytes, 28).littleEndian, toByteOffset: 28, as: UInt32.self)
    }

    /// Reads 32 untrusted bytes. Throws `wrongVersion` or `badStream`.
    package init(decoding bytes: UnsafeRawPointer) throws(MigrationError) {
        func word(_ offset: Int) -> UInt32 {
            UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: offset, as: UInt32.self))
        }
        guard word(0) == FrameHeader.magic else { throw .badStream("a frame does not begin with the magic number") }
        guard word(28) == lacuna_crc32c(0, bytes, 28) else { throw .badStream("a frame header's checksum is wrong") }
        let version = Int(word(4) >> 16)
        guard version == FrameHeader.version else { throw .wrongVersion(version) }
        guard let type = FrameType(rawValue: UInt8(truncatingIfNeeded: word(4))) else {
            throw .badStream("frame type \(word(4) & 0xff) does not exist")
        }
        guard word(4) >> 8 & 0xff == 0 else { throw .badStream("a frame has flags that do not exist") }
        self.init(
            type, count: word(8), address: UInt64(word(16)) | UInt64(word(20)) << 32, payloadBytes: word(12),
            payloadChecksum: word(24))
    }

    /// The pages the frame is about, if they are all RAM and within one region; nil for anything else a peer may write.
    package func pages(in memory: GuestMemory) -> Range<Int>? {
        guard count > 0, address % UInt64(pageSize) == 0 else { return nil }
        // Neither overflows: the frame number is below 2^52 and the count below 2^32.
        let first = Int(address >> pageShift)
        let pages = first..<first + Int(count)
        return memory.isRAM(pages: pages) ? pages : nil
    }
}

/// Puts frames together and sends many of them with one system call, without copying the pages.
///
/// Thread rules: one thread. The memory behind queued pages must stay mapped until `flush`.
final class FrameWriter {
    private static let headerLimit = 128
    private let channel: ByteChannel
    private let headers: UnsafeMutableRawPointer
    private let vectors: UnsafeMutableBufferPointer<iovec>
    private var headerCount = 0
    private var vectorCount = 0
    private let idleMilliseconds: Int
    /// Bytes queued and not yet sent.
    private(set) var pendingBytes = 0
    /// True after a write failed part of the way: whatever came next could not be told from the rest of the last frame.
    private(set) var isBroken = false
    /// Nanoseconds spent in writing.
    private(set) var writingNanoseconds: UInt64 = 0

    init(_ channel: ByteChannel, idleMilliseconds: Int) {
        self.channel = channel
        self.idleMilliseconds = idleMilliseconds
        headers = .allocate(byteCount: FrameHeader.size * FrameWriter.headerLimit, alignment: 16)
        vectors = .allocate(capacity: 2 * FrameWriter.headerLimit)
        vectors.initialize(repeating: iovec())
    }

    deinit {
        headers.deallocate()
        vectors.deallocate()
    }

    /// No more frames fit: the next one must be preceded by a flush.
    var isFull: Bool { headerCount == FrameWriter.headerLimit }

    /// Queues a frame; `payload` must stay where it is until the flush. Not when `isFull`.
    func queue(_ header: FrameHeader, payload: UnsafeMutableRawPointer? = nil) {
        let place = headers + headerCount * FrameHeader.size
        header.encode(into: place)
        headerCount += 1
        // Frames without payload lie side by side and share a vector.
        if vectorCount > 0, vectors[vectorCount - 1].iov_base + vectors[vectorCount - 1].iov_len == place {
            vectors[vectorCount - 1].iov_len += FrameHeader.size
        } else {
            push(place, FrameHeader.size)
        }
        if let payload { push(payload, Int(header.payloadBytes)) }
        pendingBytes += FrameHeader.size + Int(header.payloadBytes)
    }

    private func push(_ base: UnsafeMutableRawPointer, _ bytes: Int) {
        vectors[vectorCount] = iovec(iov_base: base, iov_len: bytes)
        vectorCount += 1
    }

    /// Sends what is queued.
    func flush() throws(MigrationError) { try flush(idleMilliseconds) }

    private func flush(_ idleMilliseconds: Int) throws(MigrationError) {
        guard vectorCount > 0 else { return }
        let start = monotonicNanoseconds()
        let (sentBefore, size) = (channel.bytesSent, UInt64(pendingBytes))
        defer { writingNanoseconds &+= monotonicNanoseconds() &- start }
        let part = UnsafeMutableBufferPointer(rebasing: vectors[..<vectorCount])
        (headerCount, vectorCount, pendingBytes) = (0, 0, 0)
        do {
            try channel.writeAll(vectors: part, idleMilliseconds)
        } catch {
            let sent = channel.bytesSent &- sentBefore
            isBroken = isBroken || (sent > 0 && sent < size)
            throw error
        }
    }

    /// Drops what is queued.
    func clear() { (headerCount, vectorCount, pendingBytes) = (0, 0, 0) }

    /// Sends one frame with the checksum of its payload, after all queued ones.
    func send(
        _ type: FrameType, count: UInt32 = 0, address: UInt64 = 0, payload: [UInt8] = [],
        idleMilliseconds limit: Int? = nil
    ) throws(MigrationError) {
        if isFull { try flush() }
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: max(payload.count, 1), alignment: 16)
        defer { buffer.deallocate() }
        buffer.copyBytes(from: payload)
        let checksum = payload.isEmpty ? 0 : lacuna_crc32c(0, buffer.baseAddress, payload.count)
        queue(
            FrameHeader(
                type, count: count, address: address, payloadBytes: UInt32(truncatingIfNeeded: payload.count),
                payloadChecksum: checksum),
            payload: payload.isEmpty ? nil : buffer.baseAddress)
        try flush(limit ?? idleMilliseconds)
    }

    /// Sends a last frame if the stream still stands at a frame's boundary; errors no longer matter then.
    func sendLast(_ type: FrameType, text: String = "", idleMilliseconds: Int) {
        clear()
        guard !isBroken else { return }
        let bytes = Array(text.utf8.prefix(StreamLimits.textBytes))
        try? send(type, payload: bytes, idleMilliseconds: idleMilliseconds)
    }
}

/// Takes frames out of a channel: headers out of a small read-ahead buffer, payloads straight to their place.
///
/// Thread rules: one thread, and the only reader of its channel.
final class FrameReader {
    // One page: enough for many headers in one read, and little of a payload is ever copied twice.
    private static let aheadBytes = 4096
    private let channel: ByteChannel
    private let ahead: UnsafeMutableRawPointer
    private let vectors: UnsafeMutablePointer<iovec>
    private var start = 0
    private var end = 0

    init(_ channel: ByteChannel) {
        self.channel = channel
        ahead = .allocate(byteCount: FrameReader.aheadBytes, alignment: 16)
        vectors = .allocate(capacity: 2)
        vectors.initialize(repeating: iovec(), count: 2)
    }

    deinit {
        ahead.deallocate()
        vectors.deallocate()
    }

    /// True if something can be read without waiting.
    var hasInput: Bool { end > start || channel.isReadable }

    /// The next header, checked as far as a header can be by itself.
    func header(idleMilliseconds: Int) throws(MigrationError) -> FrameHeader {
        while end - start < FrameHeader.size {
            if start > 0 {
                memmove(ahead, ahead + start, end - start)
                (start, end) = (0, end - start)
            }
            var vector = iovec(iov_base: ahead + end, iov_len: FrameReader.aheadBytes - end)
            end += try channel.readSome(vectors: &vector, 1, idleMilliseconds)
        }
        defer { start += FrameHeader.size }
        return try FrameHeader(decoding: ahead + start)
    }

    /// The payload of the header just read, to `place`.
    func payload(to place: UnsafeMutableRawPointer, bytes: Int, idleMilliseconds: Int) throws(MigrationError) {
        var filled = min(bytes, end - start)
        memcpy(place, ahead + start, filled)
        start += filled
        while filled < bytes {
            // The buffer is empty here: what comes after the payload may go there with the same system call.
            (start, end) = (0, 0)
            vectors[0] = iovec(iov_base: place + filled, iov_len: bytes - filled)
            vectors[1] = iovec(iov_base: ahead, iov_len: FrameReader.aheadBytes)
            let got = try channel.readSome(vectors: vectors, 2, idleMilliseconds)
            end = max(0, got - (bytes - filled))
            filled += got - end
        }
    }

    /// The payload of a frame other than `pages`, its checksum checked. The caller has bounded its length.
    func payload(of header: FrameHeader, idleMilliseconds: Int) throws(MigrationError) -> [UInt8] {
        let count = Int(header.payloadBytes)
        guard count > 0 else {
            guard header.payloadChecksum == 0 else { throw .badStream("an empty payload has a checksum") }
            return []
        }
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: count, alignment: 16)
        defer { buffer.deallocate() }
        try payload(to: buffer.baseAddress!, bytes: count, idleMilliseconds: idleMilliseconds)
        guard header.payloadChecksum == lacuna_crc32c(0, buffer.baseAddress, count) else {
            throw .badStream("the checksum of a \(header.type) frame's payload is wrong")
        }
        return Array(buffer)
    }
}
