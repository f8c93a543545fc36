// SPDX-License-Identifier: Apache-2.0
internal import GuestMemory

/// Where further connections of a migration come from. `ChannelListener` is one.
public protocol ChannelAcceptor: AnyObject, Sendable {
    /// Waits for a connection, for at most `timeoutMilliseconds` (nil: for ever). Throws `timedOut`, `cancelled` after
    /// `close()`, or another error.
    func accept(timeoutMilliseconds: Int?) throws(MigrationError) -> ByteChannel
    /// Takes no more connections, and ends an `accept` under way. From any thread; no effect the second time.
    func close()
}

extension ChannelListener: ChannelAcceptor {}

/// The data connections of one migration's destination: takes connections until all lanes have joined, and has a thread
/// receive into guest memory from each.
///
/// A connection that does not know the token is closed and counted, and costs no more than a place among those whose
/// first frame is awaited; there is a limit on these, and on how long each may take.
///
/// Thread rules: one thread, the migration's, calls everything but `interrupt`, which is for any thread.
final class ReceivingLanes: Sendable {
    /// So many connections may be waited for to say who they are. The oldest makes room for the next: an honest source
    /// says it at once.
    private static let candidateLimit = 32
    private static let joinMilliseconds = 5_000

    private struct State {
        /// Connections that did not say yet who they are, oldest first.
        var candidates: [ByteChannel] = []
        /// By lane - 1.
        var joined: [ByteChannel?]
        /// Rounds of each lane that has ended.
        var rounds: [Int?]
        var strangers = 0
        var counts = ReceiveReport()
        var failure: MigrationError?
        var isClosing = false
        /// Threads that may still run.
        var threads = 0
    }

    private let map: LaneMap
    private let token: JoinToken
    private let place: ReceivedMemory
    private let control: ByteChannel
    private let acceptor: any ChannelAcceptor
    private let idle: Int
    private let state: Monitor<State>

    /// A lane that fails interrupts `control`.
    init(
        count: Int, token: JoinToken, place: ReceivedMemory, control: ByteChannel, acceptor: any ChannelAcceptor,
        idleMilliseconds: Int
    ) {
        map = LaneMap(lanes: count)
        self.token = token
        self.place = place
        self.control = control
        self.acceptor = acceptor
        idle = idleMilliseconds
        state = Monitor(
            State(joined: Array(repeating: nil, count: count), rounds: Array(repeating: nil, count: count)))
    }

    /// Begins to take connections.
    func start() throws(MigrationError) {
        try run(named: "lanes") { [self] in acceptAll() }
    }

    /// Ends everything under way.
    func interrupt() {
        let channels = state.update { state in
            state.isClosing = true
            return state.candidates + state.joined.compactMap { $0 }
        }
        acceptor.close()
        for channel in channels { channel.interrupt() }
    }

    /// Waits until nothing is received into memory any more. To be called on every path, before `close`.
    func stop() {
        interrupt()
        while state.wait(milliseconds: 1000, until: { $0.threads == 0 ? true : nil }) == nil {}
    }

    /// Closes all connections.
    func close() { for channel in state.read({ $0.joined }) { channel?.shutdown() } }

    /// The first thing that went wrong.
    var failure: MigrationError? { state.read(\.failure) }
    /// What came so far over all lanes: pages, marks, bytes.
    var counts: ReceiveReport {
        state.read {
            var counts = $0.counts
            counts.bytes = $0.joined.reduce(0) { $0 &+ ($1?.bytesReceived ?? 0) }
            counts.strangers = $0.strangers
            return counts
        }
    }

    /// Waits until the source has ended every lane, after `rounds` rounds each.
    func waitUntilEnded(rounds: Int) throws(MigrationError) {
        // Each lane has its idle limit, as has the joining, so this ends.
        while true {
            let ended: Result<[Int], MigrationError>? = state.wait(milliseconds: 1000) { state in
                if let failure = state.failure { return .failure(failure) }
                if state.isClosing { return .failure(.cancelled) }
                let rounds = state.rounds.compactMap { $0 }
                return rounds.count == state.rounds.count ? .success(rounds) : nil
            }
            guard let ended else { continue }
            for (index, own) in try ended.get().enumerated() where own != rounds {
                throw .laneFailed(
                    number: index + 1, cause: .badStream("it ended after \(own) rounds, and the migration after \(rounds)"))
            }
            return
        }
    }

    /// The next header of `reader`. Silence on one connection is none as long as something comes on another.
    func header(_ reader: FrameReader, idleMilliseconds: Int) throws(MigrationError) -> FrameHeader {
        while true {
            let before = bytesReceived
            do {
                return try reader.header(idleMilliseconds: idleMilliseconds)
            } catch {
                guard case .timedOut = error, bytesReceived != before else { throw error }
            }
        }
    }

    private var bytesReceived: UInt64 {
        state.read { $0.joined.reduce(control.bytesReceived) { $0 &+ ($1?.bytesReceived ?? 0) } }
    }

    // MARK: Joining

    private func run(named name: String, _ body: @escaping @Sendable () -> Void) throws(MigrationError) {
        state.update { $0.threads += 1 }
        do {
            try startThreadIfPossible(named: name) { [self] in
                body()
                state.update { $0.threads -= 1 }
            }
        } catch {
            state.update { $0.threads -= 1 }
            throw error
        }
    }

    private func acceptAll() {
        let start = monotonicNanoseconds()
        // Half of it: only this side knows which connections did not come, and the source, which waits for an answer with
        // the same limit, is to hear that from it.
        let limit = max(1, idle / 2)
        while true {
            let left = max(1, limit - Int(milliseconds(since: start)))
            do throws(MigrationError) {
                try admit(try acceptor.accept(timeoutMilliseconds: left))
            } catch {
                let missing = state.read { $0.joined.count { $0 == nil } }
                // Whoever joins last closes the acceptor.
                if missing == 0 { return }
                if case .timedOut = error {
                    fail(.timedOut("waiting for \(missing) of \(map.lanes) data connections", milliseconds: limit))
                } else {
                    fail(error)
                }
                return
            }
        }
    }

    private func admit(_ channel: ByteChannel) throws(MigrationError) {
        let (isWelcome, oldest) = state.update { state -> (Bool, ByteChannel?) in
            guard !state.isClosing else { return (false, nil) }
            state.candidates.append(channel)
            let isFull = state.candidates.count > ReceivingLanes.candidateLimit
            return (true, isFull ? state.candidates.removeFirst() : nil)
        }
        oldest?.shutdown()
        guard isWelcome else { return channel.shutdown() }
        try run(named: "lane") { [self] in
            let reader = FrameReader(channel)
            guard let lane = join(channel, reader) else {
                channel.shutdown()
                return
            }
            do throws(MigrationError) {
                try receive(lane, reader)
                channel.shutdown()
            } catch {
                // It stays open for now: its end must not come to the source before the reason for it.
                fail(.laneFailed(number: lane, cause: error))
            }
        }
    }

    /// The lane that a connection is, or nil if it is none of this migration's.
    private func join(_ channel: ByteChannel, _ reader: FrameReader) -> Int? {
        channel.setDeadline(milliseconds: Double(ReceivingLanes.joinMilliseconds))
        var number: Int?
        if let header = try? reader.header(idleMilliseconds: ReceivingLanes.joinMilliseconds),
            JoinToken.mayJoin(header, lanes: map.lanes),
            let bytes = try? reader.payload(of: header, idleMilliseconds: ReceivingLanes.joinMilliseconds),
            token.matches(bytes)
        { number = Int(header.count) }
        channel.setDeadline(milliseconds: nil)
        let (lane, leftOver) = state.update { state -> (Int?, [ByteChannel]?) in
            state.candidates.removeAll { $0 === channel }
            guard !state.isClosing else { return (nil, nil) }
            guard let number, state.joined[number - 1] == nil else {
                state.strangers += 1
                return (nil, nil)
            }
            state.joined[number - 1] = channel
            return (number, state.joined.contains { $0 == nil } ? nil : state.candidates)
        }
        if let leftOver {
            acceptor.close()
            for stranger in leftOver { stranger.shutdown() }
        }
        return lane
    }

    // MARK: Receiving

    private func receive(_ lane: Int, _ reader: FrameReader) throws(MigrationError) {
        var order = LaneOrder(lane: lane, map: map, memory: place.memory)
        var counts = ReceiveReport()
        while !order.hasEnded {
            let header = try header(reader, idleMilliseconds: idle)
            try order.accept(header)
            switch header.type {
            case .pages: counts.pages += try place.receive(header, from: reader, idleMilliseconds: idle)
            case .zero: counts.zeroPages += try place.drop(header)
            case .discard: counts.discardMarks += try place.drop(header)
            default:
                // A round's end, or the lane's.
                let (done, rounds) = (counts, order.hasEnded ? order.rounds : nil)
                counts = ReceiveReport()
                state.update {
                    $0.counts.pages += done.pages
                    $0.counts.zeroPages += done.zeroPages
                    $0.counts.discardMarks += done.discardMarks
                    $0.rounds[lane - 1] = rounds
                }
            }
        }
    }

    private func fail(_ error: MigrationError) {
        let isFirst = state.update { state in
            // An interruption is no failure of its own.
            guard state.failure == nil, !state.isClosing else { return false }
            state.failure = error
            return true
        }
        guard isFirst else { return }
        interrupt()
        control.interrupt()
    }
}
