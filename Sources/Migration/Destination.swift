// SPDX-License-Identifier: Apache-2.0
internal import GuestMemory
internal import Synchronization

/// What the operator of a destination chose.
public struct ReceiverOptions: Sendable, Codable, Equatable {
    /// How long the source may keep silent or take nothing.
    public var idleTimeoutMilliseconds = 60_000
    public init() {}
}

/// The destination of one migration.
///
/// Until the source's commit has arrived whole, anything that goes wrong ends in `IncomingGuest.discard()` and an error.
/// From then on the guest belongs to this side and is started, whatever becomes of the connection.
///
/// Thread rules: `run` blocks the caller's thread and is called once; `cancel()` may be called from any thread.
public final class MigrationReceiver: Sendable {
    private enum Stage: Equatable { case open, cancelled, committed }

    private let guest: any IncomingGuest
    private let options: ReceiverOptions
    private let progress: (@Sendable (ReceiveReport) -> Void)?
    private let state = Mutex<(stage: Stage, channel: ByteChannel?)>((.open, nil))

    /// `progress` is called on `run`'s thread after each round.
    public init(
        guest: any IncomingGuest, options: ReceiverOptions = ReceiverOptions(),
        progress: (@Sendable (ReceiveReport) -> Void)? = nil
    ) {
        self.guest = guest
        self.options = options
        self.progress = progress
    }

    /// Gives up, if the guest does not belong to this side yet; tells whether it did.
    @discardableResult public func cancel() -> Bool {
        state.withLock {
            guard $0.stage != .committed else { return false }
            $0.stage = .cancelled
            $0.channel?.interrupt()
            return true
        }
    }

    /// Receives the guest and starts it. Throws after `discard()`, except `notStarted`.
    public func run(over channel: ByteChannel) throws(MigrationError) -> ReceiveReport {
        var run = ReceivingRun(guest: guest, channel: channel, options: options, progress: progress)
        let started = monotonicNanoseconds()
        do throws(MigrationError) {
            let isCancelled = state.withLock {
                $0.channel = channel
                return $0.stage == .cancelled
            }
            if isCancelled { throw .cancelled }
            try run.receiveUntilCommit()
            let isMine = state.withLock {
                if $0.stage == .cancelled { return false }
                $0.stage = .committed
                return true
            }
            guard isMine else { throw .cancelled }
        } catch {
            state.withLock { $0.channel = nil }
            // First of all the guest: once the source hears of the failure, it lets its own copy run on.
            guest.discard()
            channel.clearInterrupt()
            run.explain(error)
            throw error
        }
        state.withLock { $0.channel = nil }
        // The guest is this side's now. An acknowledgement that does not get through leaves the source paused.
        run.report.acknowledged = run.acknowledge()
        run.report.bytes = channel.bytesReceived
        run.report.totalMilliseconds = milliseconds(since: started)
        do {
            try guest.start()
        } catch {
            throw .notStarted(why: error.what)
        }
        return run.report
    }
}

/// One migration being received; lives on one thread.
private struct ReceivingRun {
    private let guest: any IncomingGuest
    private let channel: ByteChannel
    private let reader: FrameReader
    private let writer: FrameWriter
    private let idle: Int
    private let progress: (@Sendable (ReceiveReport) -> Void)?
    private var order = StreamOrder()
    var report = ReceiveReport()

    init(
        guest: any IncomingGuest, channel: ByteChannel, options: ReceiverOptions,
        progress: (@Sendable (ReceiveReport) -> Void)?
    ) {
        self.guest = guest
        self.channel = channel
        self.progress = progress
        reader = FrameReader(channel)
        idle = options.idleTimeoutMilliseconds
        writer = FrameWriter(channel, idleMilliseconds: idle)
    }

    /// Returns when the commit has come; throws in every other case.
    mutating func receiveUntilCommit() throws(MigrationError) {
        let hello = try next(nil)
        let description = try reader.payload(of: hello, idleMilliseconds: idle)
        let memory: GuestMemory
        do {
            memory = try guest.prepare(machineDescription: description)
        } catch {
            throw .refused(error.what)
        }
        try writer.send(.ready)
        try receiveMemoryAndState(memory)
        try writer.send(.loaded)
        _ = try next(memory)
    }

    /// Reads the next header, keeps the order, and ends the run if the source ends it.
    private mutating func next(_ memory: GuestMemory?) throws(MigrationError) -> FrameHeader {
        let header = try reader.header(idleMilliseconds: idle)
        try order.accept(header, memory: memory)
        switch header.type {
        case .cancel: throw .cancelledByPeer
        case .failure: throw .peerFailed(printable(try reader.payload(of: header, idleMilliseconds: idle)))
        default: return header
        }
    }

    private mutating func receiveMemoryAndState(_ memory: GuestMemory) throws(MigrationError) {
        let touched = PageBitmap(bitCount: memory.frameCount)
        var sections: [StateSection] = []
        while order.phase != .decision {
            let header = try next(memory)
            switch header.type {
            case .pages:
                try receivePages(header, memory, touched)
            case .zero, .discard:
                guard let pages = header.pages(in: memory) else { throw .badStream("a mark outside RAM") }
                try drop(pages, memory, touched)
                if header.type == .zero { report.zeroPages += pages.count } else { report.discardMarks += pages.count }
            case .verify:
                guard let pages = header.pages(in: memory) else { throw .badStream("checksums outside RAM") }
                let checksums = try reader.payload(of: header, idleMilliseconds: idle)
                let own = guest.checksums(of: pages).map(Verification.encode) ?? Verification.checksums(of: pages, in: memory)
                if let wrong = Verification.differences(pages, checksums, own) {
                    throw .notVerified(page: wrong.first, count: wrong.count)
                }
            case .state:
                sections.append(try receiveSection(header))
            case .roundEnd:
                report.rounds = order.rounds
                report.bytes = channel.bytesReceived
                progress?(report)
            default:
                break  // A stateEnd, which the order has seen.
            }
        }
        do {
            try guest.load(state: sections)
        } catch {
            throw .machineFailed(doing: "loading the state", why: error.what)
        }
    }

    private mutating func receivePages(
        _ header: FrameHeader, _ memory: GuestMemory, _ touched: PageBitmap
    ) throws(MigrationError) {
        guard let pages = header.pages(in: memory),
            let host = memory.hostPointer(GuestAddress(header.address), bytes: pages.count * pageSize)
        else { throw .badStream("pages outside RAM") }
        touched.set(pages)
        try reader.payload(to: host, bytes: pages.count * pageSize, idleMilliseconds: idle)
        do { try guest.received(pages: pages) } catch { throw .machineFailed(doing: "storing memory", why: error.what) }
        report.pages += pages.count
    }

    /// Makes `pages` read as zero. A page nothing was ever written to is zero already, and stays without memory.
    private func drop(_ pages: Range<Int>, _ memory: GuestMemory, _ touched: PageBitmap) throws(MigrationError) {
        var page = pages.lowerBound
        while page < pages.upperBound {
            let bits = touched.word(page >> 6) >> UInt64(page & 63)
            // A word at a time, and never beyond the run: a peer may send as many short marks as there are pages.
            guard bits != 0 else {
                page = (page | 63) + 1
                continue
            }
            let first = page + bits.trailingZeroBitCount
            guard first < pages.upperBound else { return }
            var end = first + 1
            while end < pages.upperBound, touched[end] { end += 1 }
            do {
                try memory.discard(pages: first..<end)  // W6: nothing older may show through
            } catch {
                throw .machineFailed(doing: "dropping pages", why: error.description)
            }
            do { try guest.dropped(pages: first..<end) } catch {
                throw .machineFailed(doing: "dropping pages", why: error.what)
            }
            touched.clear(first..<end)
            page = end
        }
    }

    private func receiveSection(_ header: FrameHeader) throws(MigrationError) -> StateSection {
        let payload = try reader.payload(of: header, idleMilliseconds: idle)
        let nameBytes = payload.prefix(Int(header.count))
        guard let name = String(validating: nameBytes, as: UTF8.self) else {
            throw .badStream("the name of a state section is not UTF-8")
        }
        return StateSection(name: name, bytes: Array(payload.dropFirst(nameBytes.count)))
    }

    /// Sends the acknowledgement; false if the connection did not take it.
    func acknowledge() -> Bool {
        do {
            try writer.send(.committed)
        } catch {
            return false
        }
        return true
    }

    /// Tells the source why, as far as it still listens, and lets it read that before the connection goes.
    func explain(_ error: MigrationError) {
        let lingerMilliseconds = 500
        switch error {
        case .refused(let why): writer.sendLast(.refused, text: why, idleMilliseconds: lingerMilliseconds)
        case .wrongVersion: writer.sendLast(.refused, text: error.description, idleMilliseconds: lingerMilliseconds)
        case .cancelledByPeer, .peerFailed: break
        default: writer.sendLast(.failure, text: error.description, idleMilliseconds: lingerMilliseconds)
        }
        channel.finishWriting()
        channel.drain(milliseconds: lingerMilliseconds)
        channel.shutdown()
    }
}
