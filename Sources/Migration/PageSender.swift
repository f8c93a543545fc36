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
    private let memory: GuestMemory
    /// What the balloon gave back stays with the host: the zero scan fills no hole.
    private let looker: MemoryLooker
    private let told: ToldPages
    private let channel: ByteChannel
    private let bandwidth: Bandwidth
    private var sleptNanoseconds: UInt64 = 0
    private var bytesFlushed = 0
    private var hasFlushed = false
    /// How long such a run may keep the connection silent.
    var silenceNanoseconds: UInt64 = 1_000_000_000
    private var lastFlush = monotonicNanoseconds()
    /// Zero pages found and not yet put into the stream: the run may still grow.
    private var zeroRun: Range<Int>?

    init(memory: GuestMemory, told: ToldPages, writer: FrameWriter, channel: ByteChannel, bandwidth: Bandwidth) {
        self.memory = memory
        looker = MemoryLooker(memory)
        self.told = told
        self.writer = writer
        self.channel = channel
        self.bandwidth = bandwidth
    }

    // MARK: Speed

    /// Bytes per second while sending; 0 until there is enough to tell.
    var measuredBytesPerSecond: Double {
        let seconds = Double(writer.writingNanoseconds &+ sleptNanoseconds) / 1e9
        // The first megabyte may have gone into the socket's buffer at the speed of memory.
        return bytesFlushed >= 1 << 20 && seconds > 0 ? Double(bytesFlushed) / seconds : 0
    }

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
        // A copy may be older than the memory, never older than this: the caller had the pages tracked before (W1), so a
        // guest that fills a hole or a page of zeroes after the look has it collected and sent again. In the stopped
        // round nobody fills any.
        looker.refresh()
        func isZeroPage(_ page: Int) -> Bool {
            // Cannot be nil: the run lies within a region.
            guard let bytes = looker.look(at: page, of: run) else { return false }
            return lacuna_is_zero(bytes, pageSize)
        }
        var page = run.lowerBound
        while page < run.upperBound {
            let first = page
            let isZero = isZeroPage(page)
            page += 1
            // One look at each page: what ends this stretch begins the next, and is looked at again only there.
            while page < run.upperBound, isZero || page - first < StreamLimits.pagesInFrame, isZeroPage(page) == isZero {
                page += 1
            }
            if isZero {
                try queueZero(first..<page)
                round.zero += page - first
            } else {
                try queueData(first..<page, host + (first - run.lowerBound) * pageSize)
                round.sent += page - first
            }
        }
        // A destination that hears nothing gives up, and a run of zero pages can grow for minutes.
        if zeroRun != nil, monotonicNanoseconds() &- lastFlush > silenceNanoseconds {
            try queueZeroRun()
            try flush()
        }
    }

    /// Tells the destination to drop what it has of `stale`.
    func discard(_ stale: PageBitmap, _ round: inout MigrationRound) throws(MigrationError) {
        for region in memory.regions {
            let ram = region.range.pages
            var page = ram.lowerBound
            while let run = stale.nextRun(from: page)?.clamped(to: ram), !run.isEmpty {
                try discard(run, &round)
                page = run.upperBound
            }
        }
    }

    /// The same for one run within a region.
    func discard(_ run: Range<Int>, _ round: inout MigrationRound) throws(MigrationError) {
        // What was found zero before this is to be said before it.
        try queueZeroRun()
        try queue(FrameHeader(.discard, pages: run))
        round.discarded += run.count
    }

    /// Sends what is left of a round, and its end.
    func finishRound(_ number: Int, _ round: inout MigrationRound) throws(MigrationError) {
        try queueZeroRun()
        try queue(FrameHeader(.roundEnd, count: UInt32(truncatingIfNeeded: number)))
        try flush()
    }

    /// Ends a data connection.
    func finishLane(rounds: Int) throws(MigrationError) {
        try queue(FrameHeader(.laneEnd, count: UInt32(truncatingIfNeeded: rounds)))
        try flush()
    }

    private func queueData(_ pages: Range<Int>, _ host: UnsafeMutableRawPointer) throws(MigrationError) {
        told.sentData(pages)
        let bytes = pages.count * pageSize
        try queue(FrameHeader(.pages, pages: pages, payloadBytes: UInt32(truncatingIfNeeded: bytes)), host)
    }

    private func queueZero(_ pages: Range<Int>) throws(MigrationError) {
        told.sentZero(pages)
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
        if writer.pendingBytes >= bandwidth.batchBytes { try flush() }
    }

    private func flush() throws(MigrationError) {
        let bytes = writer.pendingBytes
        guard bytes > 0 else { return }
        try writer.flush()
        lastFlush = monotonicNanoseconds()
        hasFlushed = true
        bytesFlushed += bytes
        let wait = bandwidth.pay(for: bytes)
        guard wait > 0 else { return }
        sleptNanoseconds &+= wait
        try channel.sleep(nanoseconds: wait)
    }
}
