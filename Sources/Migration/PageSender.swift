// SPDX-License-Identifier: Apache-2.0
internal import CLinux
internal import GuestMemory

/// Turns runs of pages into frames: zero pages into marks, the others into payload straight out of guest memory, with
/// many frames to a system call and no more than the allowed bytes per second.
///
/// A guest that writes to a page while it is being sent does no harm: the write came after the page's bit was collected,
/// so it is in the next collection.
///
/// Thread rules: one thread.
final class PageSender {
    let writer: FrameWriter
    /// False lifts the limit: every millisecond counts while the guest is stopped.
    var isThrottled: Bool
    private let memory: GuestMemory
    private let bitmap: MigrationBitmap
    private let channel: ByteChannel
    private let limit: Double
    private let batchBytes: Int
    /// Bytes that may be sent at once; negative: a debt to be slept off.
    private var allowance = 0.0
    private var lastRefill = monotonicNanoseconds()
    private var sleptNanoseconds: UInt64 = 0
    private var bytesFlushed = 0
    private var hasFlushed = false
    /// Zero pages found and not yet put into the stream: the run may still grow.
    private var zeroRun: Range<Int>?

    init(
        memory: GuestMemory, bitmap: MigrationBitmap, writer: FrameWriter, channel: ByteChannel, bytesPerSecond: Int
    ) {
        self.memory = memory
        self.bitmap = bitmap
        self.writer = writer
        self.channel = channel
        isThrottled = bytesPerSecond > 0
        // The floor keeps the pauses between batches well under the destination's patience.
        limit = Double(max(bytesPerSecond, 1 << 16))
        batchBytes = bytesPerSecond > 0 ? max(1 << 16, min(1 << 20, Int(limit / 20))) : 1 << 20
    }

    // MARK: Speed

    /// Bytes per second while sending; 0 until there is enough to tell.
    var measuredBytesPerSecond: Double {
        let seconds = Double(writer.writingNanoseconds &+ sleptNanoseconds) / 1e9
        // The first megabyte may have gone into the socket's buffer at the speed of memory.
        return bytesFlushed >= 1 << 20 && seconds > 0 ? Double(bytesFlushed) / seconds : 0
    }

    /// What to expect of the connection: measured, or else a gigabit line.
    var bytesPerSecond: Double { measuredBytesPerSecond > 0 ? measuredBytesPerSecond : 125_000_000 }

    /// True if something was sent since the last call.
    func takeFlushed() -> Bool {
        defer { hasFlushed = false }
        return hasFlushed
    }

    // MARK: Sending

    /// Queues and sends `run`, which lies within one region of RAM.
    func send(_ run: Range<Int>, _ round: inout MigrationRound) throws(MigrationError) {
        let address = PageFrameNumber(UInt64(run.lowerBound)).address
        guard let host = memory.hostPointer(address, bytes: run.count * pageSize) else {
            // Cannot be, as the bitmap holds RAM only; but a page whose bit was taken must never be left out in silence.
            throw .machineFailed(doing: "sending memory", why: "pages at \(address) are not RAM")
        }
        var page = run.lowerBound
        while page < run.upperBound {
            let first = page
            let isZero = lacuna_is_zero(host + (page - run.lowerBound) * pageSize, pageSize)
            page += 1
            // One look at each page: what ends this stretch begins the next, and is looked at again only there.
            while page < run.upperBound, isZero || page - first < StreamLimits.pagesInFrame,
                lacuna_is_zero(host + (page - run.lowerBound) * pageSize, pageSize) == isZero
            { page += 1 }
            if isZero {
                try queueZero(first..<page)
                round.zero += page - first
            } else {
                try queueData(first..<page, host + (first - run.lowerBound) * pageSize)
                round.sent += page - first
            }
        }
    }

    /// Tells the destination to drop what it has of `stale`.
    func discard(_ stale: PageBitmap, _ round: inout MigrationRound) throws(MigrationError) {
        for region in memory.regions {
            let ram = region.range.pages
            var page = ram.lowerBound
            while let run = stale.nextRun(from: page)?.clamped(to: ram), !run.isEmpty {
                try queue(FrameHeader(.discard, pages: run))
                round.discarded += run.count
                page = run.upperBound
            }
        }
    }

    /// Sends what is left of a round, and its end.
    func finishRound(_ number: Int, _ round: inout MigrationRound) throws(MigrationError) {
        try queueZeroRun()
        try queue(FrameHeader(.roundEnd, count: UInt32(truncatingIfNeeded: number)))
        try flush()
    }

    private func queueData(_ pages: Range<Int>, _ host: UnsafeMutableRawPointer) throws(MigrationError) {
        bitmap.sentData(pages)
        let bytes = pages.count * pageSize
        try queue(FrameHeader(.pages, pages: pages, payloadBytes: UInt32(truncatingIfNeeded: bytes)), host)
    }

    private func queueZero(_ pages: Range<Int>) throws(MigrationError) {
        bitmap.sentZero(pages)
        if let open = zeroRun, open.upperBound == pages.lowerBound,
            memory.isRAM(pages: open.lowerBound..<pages.upperBound)
        {
            zeroRun = open.lowerBound..<pages.upperBound
            return
        }
        try queueZeroRun()
        zeroRun = pages
    }

    private func queueZeroRun() throws(MigrationError) {
        guard let run = zeroRun else { return }
        zeroRun = nil
        try queue(FrameHeader(.zero, pages: run))
    }

    private func queue(_ header: FrameHeader, _ payload: UnsafeMutableRawPointer? = nil) throws(MigrationError) {
        if writer.isFull { try flush() }
        writer.queue(header, payload: payload)
        if writer.pendingBytes >= batchBytes { try flush() }
    }

    private func flush() throws(MigrationError) {
        let bytes = writer.pendingBytes
        guard bytes > 0 else { return }
        try writer.flush()
        hasFlushed = true
        bytesFlushed += bytes
        if isThrottled { try payFor(bytes) }
    }

    /// The token bucket: holds at most a tenth of a second's worth, and sleeps off what was sent beyond it.
    private func payFor(_ bytes: Int) throws(MigrationError) {
        let now = monotonicNanoseconds()
        allowance = min(allowance + Double(now &- lastRefill) / 1e9 * limit, limit / 10) - Double(bytes)
        lastRefill = now
        guard allowance < 0 else { return }
        let wait = UInt64(-allowance / limit * 1e9)
        sleptNanoseconds &+= wait
        try channel.sleep(nanoseconds: wait)
    }
}
