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
    private let state = Mutex<(stage: Stage, channel: ByteChannel?, lanes: ReceivingLanes?)>((.open, nil, nil))

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
            $0.lanes?.interrupt()
            return true
        }
    }

    /// Receives the guest and starts it. Throws after `discard()`, except `notStarted`. A source that wants to send over
    /// several connections is refused unless there is an `acceptor` for them, which is closed once no more are due.
    public func run(
        over channel: ByteChannel, joining acceptor: (any ChannelAcceptor)? = nil
    ) throws(MigrationError) -> ReceiveReport {
        var run = ReceivingRun(
            guest: guest, channel: channel, acceptor: acceptor, options: options, progress: progress
        ) { lanes in
            self.state.withLock {
                $0.lanes = lanes
                if $0.stage == .cancelled { lanes.interrupt() }
            }
        }
        defer { acceptor?.close() }
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
            let isCancelled = state.withLock {
                ($0.channel, $0.lanes) = (nil, nil)
                return $0.stage == .cancelled
            }
            // Before the memory goes: when this returns, nothing is received into it any more.
            run.lanes?.stop()
            // First of all the guest: once the source hears of the failure, it lets its own copy run on.
            guest.discard()
            channel.clearInterrupt()
            let cause = isCancelled ? error : run.cause(of: error)
            run.explain(cause)
            run.lanes?.close()
            throw cause
        }
        state.withLock { ($0.channel, $0.lanes) = (nil, nil) }
        run.lanes?.stop()
        run.lanes?.close()
        // The guest is this side's now. An acknowledgement that does not get through leaves the source paused.
        run.report.acknowledged = run.acknowledge()
        run.takeCounts()
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
    private let acceptor: (any ChannelAcceptor)?
    private let register: (ReceivingLanes) -> Void
    /// The data connections, if the source announced any.
    private(set) var lanes: ReceivingLanes?
    private let reader: FrameReader
    private let writer: FrameWriter
    private let idle: Int
    private let progress: (@Sendable (ReceiveReport) -> Void)?
    private var order = StreamOrder()
    var report = ReceiveReport()

    init(
        guest: any IncomingGuest, channel: ByteChannel, acceptor: (any ChannelAcceptor)?, options: ReceiverOptions,
        progress: (@Sendable (ReceiveReport) -> Void)?, register: @escaping (ReceivingLanes) -> Void
    ) {
        self.guest = guest
        self.channel = channel
        self.acceptor = acceptor
        self.register = register
        self.progress = progress
        reader = FrameReader(channel)
        idle = options.idleTimeoutMilliseconds
        writer = FrameWriter(channel, idleMilliseconds: idle)
    }

    /// Returns when the commit has come; throws in every other case.
    mutating func receiveUntilCommit() throws(MigrationError) {
        let hello = try next(nil)
        let description = try reader.payload(of: hello, idleMilliseconds: idle)
        if order.lanes == 0 { acceptor?.close() }
        let memory: GuestMemory
        do {
            memory = try guest.prepare(machineDescription: description)
        } catch {
            throw .refused(error.what)
        }
        let place = ReceivedMemory(memory, of: guest)
        if order.lanes > 0 {
            guard let acceptor else {
                throw .refused("this destination takes one connection only; leave --connections out")
            }
            let token = try JoinToken()
            let lanes = ReceivingLanes(
                count: order.lanes, token: token, place: place, control: channel, acceptor: acceptor,
                idleMilliseconds: idle)
            self.lanes = lanes
            report.connections = order.lanes
            register(lanes)
            try lanes.start()
            try writer.send(.ready, payload: token.bytes)
        } else {
            try writer.send(.ready)
        }
        try receiveMemoryAndState(place)
        try writer.send(.loaded)
        _ = try next(memory)
    }

    /// Reads the next header, keeps the order, and ends the run if the source ends it.
    private mutating func next(_ memory: GuestMemory?) throws(MigrationError) -> FrameHeader {
        let header: FrameHeader
        if let lanes {
            header = try lanes.header(reader, idleMilliseconds: idle)
        } else {
            header = try reader.header(idleMilliseconds: idle)
        }
        try order.accept(header, memory: memory)
        switch header.type {
        case .cancel: throw .cancelledByPeer
        case .failure: throw .peerFailed(printable(try reader.payload(of: header, idleMilliseconds: idle)))
        default: return header
        }
    }

    private mutating func receiveMemoryAndState(_ place: ReceivedMemory) throws(MigrationError) {
        let memory = place.memory
        var sections: [StateSection] = []
        while order.phase != .decision {
            let header = try next(memory)
            switch header.type {
            case .pages: report.pages += try place.receive(header, from: reader, idleMilliseconds: idle)
            case .zero: report.zeroPages += try place.drop(header)
            case .discard: report.discardMarks += try place.drop(header)
            case .verify:
                guard let pages = header.pages(in: memory) else { throw .badStream("checksums outside RAM") }
                let checksums = try reader.payload(of: header, idleMilliseconds: idle)
                try lanes?.waitUntilEnded(rounds: order.rounds)
                let own = guest.checksums(of: pages).map(Verification.encode) ?? Verification.checksums(of: pages, in: memory)
                if let wrong = Verification.differences(pages, checksums, own) {
                    throw .notVerified(page: wrong.first, count: wrong.count)
                }
            case .state:
                sections.append(try receiveSection(header))
            case .roundEnd:
                report.rounds = order.rounds
                takeCounts()
                progress?(report)
            default:
                // A stateEnd. Memory is complete once every lane has ended too.
                try lanes?.waitUntilEnded(rounds: order.rounds)
            }
        }
        do {
            try guest.load(state: sections)
        } catch {
            throw .machineFailed(doing: "loading the state", why: error.what)
        }
    }

    /// Brings the report up to date with what all connections received.
    mutating func takeCounts() {
        report.bytes = channel.bytesReceived
        guard let counts = lanes?.counts else { return }
        report.bytes &+= counts.bytes
        (report.pages, report.zeroPages, report.discardMarks) = (counts.pages, counts.zeroPages, counts.discardMarks)
        report.strangers = counts.strangers
    }

    /// What was really to blame for `error`, once the lanes are closed.
    mutating func cause(of error: MigrationError) -> MigrationError {
        // A lane that failed interrupted this connection.
        guard let failure = lanes?.failure, error == .cancelled || error == failure else { return error }
        // A source that gives up says why here before it closes the lanes.
        guard failure.isConnectionLoss else { return failure }
        let lastWordMilliseconds = 500
        channel.setDeadline(milliseconds: Double(lastWordMilliseconds))
        defer { channel.setDeadline(milliseconds: nil) }
        while let header = try? reader.header(idleMilliseconds: lastWordMilliseconds),
            header.payloadBytes <= StreamLimits.sectionBytes,
            let payload = try? reader.payload(of: header, idleMilliseconds: lastWordMilliseconds)
        {
            if header.type == .cancel { return .cancelledByPeer }
            if header.type == .failure { return .peerFailed(printable(payload)) }
        }
        return failure
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

/// The memory of a guest that arrives, and which pages of it were written.
///
/// Thread rules: the lanes of a migration may call it side by side, for pages of different chunks, which share no word
/// of the bitmap.
final class ReceivedMemory: Sendable {
    let memory: GuestMemory
    private let guest: any IncomingGuest
    private let touched: PageBitmap

    init(_ memory: GuestMemory, of guest: any IncomingGuest) {
        self.memory = memory
        self.guest = guest
        touched = PageBitmap(bitCount: memory.frameCount)
    }

    /// Reads the payload of a `pages` frame to its place. Returns the number of pages.
    func receive(
        _ header: FrameHeader, from reader: FrameReader, idleMilliseconds: Int
    ) throws(MigrationError) -> Int {
        guard let pages = header.pages(in: memory),
            let host = memory.hostPointer(GuestAddress(header.address), bytes: pages.count * pageSize)
        else { throw .badStream("pages outside RAM") }
        // A few pages are not worth the system call.
        if pages.count >= 16, !touched[pages.lowerBound] { memory.populate(pages: pages) }
        touched.setOwn(pages)
        try reader.payload(to: host, bytes: pages.count * pageSize, idleMilliseconds: idleMilliseconds)
        do { try guest.received(pages: pages) } catch { throw .machineFailed(doing: "storing memory", why: error.what) }
        return pages.count
    }

    /// Makes the pages of a mark read as zero. Returns their number. A page nothing was ever written to is zero already,
    /// and stays without memory.
    func drop(_ header: FrameHeader) throws(MigrationError) -> Int {
        guard let pages = header.pages(in: memory) else { throw .badStream("a mark outside RAM") }
        var page = pages.lowerBound
        while page < pages.upperBound {
            let bits = touched.word(page >> 6) >> UInt64(page & 63)
            // A word at a time, and never beyond the run: a peer may send as many short marks as there are pages.
            guard bits != 0 else {
                page = (page | 63) + 1
                continue
            }
            let first = page + bits.trailingZeroBitCount
            guard first < pages.upperBound else { break }
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
            touched.clearOwn(first..<end)
            page = end
        }
        return pages.count
    }
}
