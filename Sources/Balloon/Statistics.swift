// SPDX-License-Identifier: Apache-2.0
internal import CLinux
internal import GuestMemory
internal import Virtio

/// What a guest can tell of its memory (virtio 1.3, section 5.5.6.4; `VIRTIO_BALLOON_S_…` of Linux's
/// `virtio_balloon.h` for those from 10 on).
public enum StatisticTag: UInt16, Sendable, CaseIterable {
    /// Bytes, since the guest booted.
    case swapIn, swapOut
    /// Numbers, since the guest booted.
    case majorFaults, minorFaults
    /// Bytes, now.
    case free, total, available, caches
    /// Numbers, since the guest booted.
    case hugePageAllocations, hugePageFailures, oomKills, allocationStalls
    /// Pages, since the guest booted.
    case asyncScans, directScans, asyncReclaims, directReclaims

    /// As in the reference.
    public var name: String { "\(self)" }
}

/// One buffer of statistics.
public struct BalloonStatistics: Sendable, Equatable {
    /// What the driver supplied; it chooses. Every value is the guest's word.
    public let values: [StatisticTag: UInt64]
    /// When it came, in milliseconds since 1970 by the host's clock.
    public let time: UInt64
    /// Counts the buffers of one device from 1.
    public let number: UInt64
}

/// The statistics queue, which works the wrong way round: the device keeps the driver's one buffer until it wants new
/// figures, and gives it back to ask.
struct StatisticsQueue {
    /// Linux sends 16 entries at most; the bound leaves room for tags to come.
    private static let maximumEntries = 256
    private static let entryBytes = 10

    /// The driver's buffer, kept to be given back with the next request.
    var buffer: BufferToken?
    /// A request was made that could not be sent: there is no buffer here, or guest memory must not be written now.
    var isWanted = false
    private(set) var latest: BalloonStatistics?

    /// Reads a buffer. False if it is malformed; it is kept all the same, or there would be nothing to ask with.
    mutating func accept(_ chain: DescriptorChain, now: UInt64, unknown: inout UInt64) -> Bool {
        let count = chain.readableBytes / Self.entryBytes
        guard chain.writable.isEmpty, chain.readableBytes % Self.entryBytes == 0, count <= Self.maximumEntries else {
            return false
        }
        var values: [StatisticTag: UInt64] = [:]
        var reader = chain.reader()
        for _ in 0..<count {
            guard let tag = try? reader.take(UInt16.self), let value = try? reader.take(UInt64.self) else {
                return false
            }
            if let known = StatisticTag(rawValue: tag) { values[known] = value } else { unknown &+= 1 }
        }
        latest = BalloonStatistics(values: values, time: now, number: (latest?.number ?? 0) &+ 1)
        return true
    }

    func encode(into encoder: inout StateEncoder) {
        encoder.put(buffer != nil)
        (buffer ?? BufferToken(head: 0, slots: 0)).encode(into: &encoder)
        encoder.put(isWanted)
        encoder.put(latest?.number ?? 0)
        encoder.put(latest?.time ?? 0)
        encoder.put(UInt16(latest?.values.count ?? 0))
        for tag in StatisticTag.allCases {
            guard let value = latest?.values[tag] else { continue }
            encoder.put(tag.rawValue)
            encoder.put(value)
        }
    }

    init() {}

    /// Takes the figures over, and the wish for new ones, but not the buffer.
    mutating func forgetBuffer(from other: StatisticsQueue) {
        latest = other.latest
        isWanted = other.isWanted
    }

    /// Untrusted. Whether the buffer is one of the queue's is for the queue to check when it is given back.
    init(from decoder: inout StateDecoder) throws(StateError) {
        let hasBuffer = try decoder.takeBool(), token = try BufferToken(from: &decoder)
        if hasBuffer { buffer = token }
        isWanted = try decoder.takeBool()
        let number = try decoder.take(UInt64.self), time = try decoder.take(UInt64.self)
        let count = try decoder.take(UInt16.self)
        var values: [StatisticTag: UInt64] = [:]
        for _ in 0..<count {
            guard let tag = StatisticTag(rawValue: try decoder.take()), values[tag] == nil else {
                throw StateError("a statistic that is none, or twice")
            }
            values[tag] = try decoder.take()
        }
        if number > 0 { latest = BalloonStatistics(values: values, time: time, number: number) }
    }
}

/// Milliseconds since 1970, for people to read: the clock can be set.
func wallClockMilliseconds() -> UInt64 {
    var time = timespec()
    unsafe clock_gettime(CLOCK_REALTIME, &time)
    return UInt64(clamping: time.tv_sec) &* 1000 &+ UInt64(clamping: time.tv_nsec / 1_000_000)
}

/// Nanoseconds of a clock that nobody sets.
func monotonicNanoseconds() -> UInt64 {
    var time = timespec()
    unsafe clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(clamping: time.tv_sec) &* 1_000_000_000 &+ UInt64(clamping: time.tv_nsec)
}
