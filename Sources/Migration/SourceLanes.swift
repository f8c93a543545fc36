// SPDX-License-Identifier: Apache-2.0
internal import GuestMemory
internal import Synchronization

/// The data connections of one migration's source, each with a thread that looks for zero pages and sends.
///
/// Between `finishRound` and the next `send` or `discard` the lanes are quiet: nothing is queued or being sent, and
/// what they told the destination is in `ToldPages`.
///
/// Thread rules: one thread, the migration's, calls everything but `interrupt`, which is for any thread.
final class SourceLanes: Sendable {
    /// So many pieces of work may wait at a lane; each is about a chunk.
    private static let queueLimit = 32
    /// So many runs, or a chunk's worth of pages, are handed over at once.
    private static let runsInBatch = 64
    /// How often a wait looks up.
    private static let tickMilliseconds = 100

    /// What is to be done with some pages of one lane.
    private enum Work: Sendable {
        case pages([Range<Int>])
        case discard([Range<Int>])
        case roundEnd(Int)
        case end(rounds: Int)
    }

    private struct LaneState: Sendable {
        var queue: [Work] = []
        /// The thread has work in hand.
        var isBusy = false
        var isStopping = false
        /// The thread has returned, or was never started.
        var isGone = true
        var figures = MigrationRound(number: 0)
        var bytesPerSecond = 0.0
    }

    private final class Lane: Sendable {
        let number: Int
        let channel: ByteChannel
        let state = Monitor(LaneState())
        init(_ number: Int, _ channel: ByteChannel) {
            self.number = number
            self.channel = channel
        }
    }

    private struct State {
        var lanes: [Lane] = []
        var isInterrupted = false
        var failure: MigrationError?
    }

    private let map: LaneMap
    private let control: ByteChannel
    private let state = Mutex(State())
    /// Runs not handed over yet, by lane. Only the migration's thread looks.
    private let batches: Mutex<[(runs: [Range<Int>], pages: Int)]>
    private let pushed = Atomic<Bool>(false)

    /// No connection is made yet. A lane that fails interrupts `control`.
    init(count: Int, control: ByteChannel) {
        map = LaneMap(lanes: count)
        self.control = control
        batches = Mutex(Array(repeating: ([], 0), count: count))
    }

    /// Data connections that there are to be.
    var count: Int { map.lanes }
    private var lanes: [Lane] { state.withLock { $0.lanes } }

    // MARK: Life

    /// Makes all connections and joins them to the migration that `token` stands for.
    func open(
        token: JoinToken, memory: GuestMemory, told: ToldPages, bandwidth: Bandwidth, idleMilliseconds: Int,
        connect: () throws(MigrationError) -> ByteChannel
    ) throws(MigrationError) {
        for number in 1...map.lanes {
            try check()
            let lane: Lane
            do throws(MigrationError) {
                lane = Lane(number, try connect())
                let isWelcome = state.withLock {
                    if !$0.isInterrupted { $0.lanes.append(lane) }
                    return !$0.isInterrupted
                }
                guard isWelcome else { throw .cancelled }
                lane.channel.setDeadline(milliseconds: Double(idleMilliseconds))
                let writer = FrameWriter(lane.channel, idleMilliseconds: idleMilliseconds)
                try writer.send(.join, count: UInt32(number), payload: token.bytes)
                lane.channel.setDeadline(milliseconds: nil)
            } catch {
                try check()
                throw error == .cancelled ? error : .laneFailed(number: number, cause: error)
            }
            lane.state.update { $0.isGone = false }
            do {
                try startThreadIfPossible(named: "lane \(number)") { [self] in
                    // Made here: a sender belongs to its thread.
                    let writer = FrameWriter(lane.channel, idleMilliseconds: idleMilliseconds)
                    let sender = PageSender(
                        memory: memory, told: told, writer: writer, channel: lane.channel, bandwidth: bandwidth)
                    do throws(MigrationError) { try work(lane, sender) } catch { fail(lane, error) }
                    lane.state.update { $0.isGone = true }
                }
            } catch {
                lane.state.update { $0.isGone = true }
                throw error
            }
        }
    }

    /// Ends all waits, here and in the lanes, until `close`.
    func interrupt() {
        let lanes = state.withLock {
            $0.isInterrupted = true
            return $0.lanes
        }
        for lane in lanes {
            lane.channel.interrupt()
            lane.state.update { $0.isStopping = true }
        }
    }

    /// Waits until no thread touches guest memory any more. To be called on every path, before `close`.
    func stop() {
        interrupt()
        for lane in lanes { while lane.state.wait(milliseconds: 1000, until: { $0.isGone ? true : nil }) == nil {} }
    }

    /// Closes all connections; what was sent is still delivered.
    func close() { for lane in lanes { lane.channel.shutdown() } }

    /// The first thing that went wrong in a lane.
    var failure: MigrationError? { state.withLock { $0.failure } }

    private func fail(_ lane: Lane, _ error: MigrationError) {
        let isFirst = state.withLock {
            // An interruption is no failure of its own.
            guard $0.failure == nil, !$0.isInterrupted else { return false }
            $0.failure = .laneFailed(number: lane.number, cause: error)
            return true
        }
        guard isFirst else { return }
        interrupt()
        control.interrupt()
    }

    /// Throws if the lanes cannot go on.
    private func check() throws(MigrationError) {
        let (failure, isInterrupted) = state.withLock { ($0.failure, $0.isInterrupted) }
        if let failure { throw failure }
        if isInterrupted { throw .cancelled }
    }

    // MARK: Figures

    /// Bytes handed to the kernel, joins included.
    var bytesSent: UInt64 { lanes.reduce(0) { $0 &+ $1.channel.bytesSent } }
    /// Bytes per second of all lanes together, 0 until it is known.
    var measuredBytesPerSecond: Double { lanes.reduce(0) { $0 + $1.state.read(\.bytesPerSecond) } }

    /// Pages sent since the last `takeFigures`.
    var figures: (sent: Int, zero: Int) {
        lanes.reduce((0, 0)) { sum, lane in
            lane.state.read { (sum.0 + $0.figures.sent, sum.1 + $0.figures.zero) }
        }
    }

    /// Adds what the lanes did to `round`, and starts again from nothing.
    func takeFigures(into round: inout MigrationRound) {
        for lane in lanes {
            let done = lane.state.update { state in
                defer { state.figures = MigrationRound(number: 0) }
                return state.figures
            }
            round.sent += done.sent
            round.zero += done.zero
            round.discarded += done.discarded
        }
    }

    /// True if something was handed to a lane since the last call.
    func takePushed() -> Bool { pushed.exchange(false, ordering: .relaxed) }

    func setDeadline(milliseconds: Double?) { for lane in lanes { lane.channel.setDeadline(milliseconds: milliseconds) } }

    // MARK: Work

    /// Hands `run` to the lanes its pages belong to. `meanwhile` is called now and then while they have no room.
    func send(_ run: Range<Int>, meanwhile: () throws(MigrationError) -> Void) throws(MigrationError) {
        try LaneMap.chunks(of: run) { part throws(MigrationError) in
            let index = map.lane(of: part.lowerBound) - 1
            let ready: [Range<Int>]? = batches.withLock {
                $0[index].runs.append(part)
                $0[index].pages += part.count
                guard $0[index].pages >= LaneMap.chunkPages || $0[index].runs.count >= SourceLanes.runsInBatch else {
                    return nil
                }
                let runs = $0[index].runs
                $0[index] = ([], 0)
                return runs
            }
            if let ready { try push(.pages(ready), index, meanwhile) }
        }
    }

    /// Tells the destination to drop what it has of `stale`. The lanes are quiet.
    func discard(
        _ stale: PageBitmap, in memory: GuestMemory, meanwhile: () throws(MigrationError) -> Void
    ) throws(MigrationError) {
        var marks: [[Range<Int>]] = Array(repeating: [], count: map.lanes)
        for region in memory.regions {
            let ram = region.range.pages
            var page = ram.lowerBound
            while let run = stale.nextRun(from: page)?.clamped(to: ram), !run.isEmpty {
                try LaneMap.chunks(of: run) { part throws(MigrationError) in
                    marks[map.lane(of: part.lowerBound) - 1].append(part)
                }
                page = run.upperBound
            }
        }
        for (index, runs) in marks.enumerated() where !runs.isEmpty { try push(.discard(runs), index, meanwhile) }
    }

    /// Sends what is left of a round and its end on every lane, and waits until all of it is with the kernel.
    func finishRound(_ number: Int, meanwhile: () throws(MigrationError) -> Void) throws(MigrationError) {
        for index in 0..<map.lanes {
            let rest = batches.withLock { batches in
                defer { batches[index] = ([], 0) }
                return batches[index].runs
            }
            if !rest.isEmpty { try push(.pages(rest), index, meanwhile) }
            try push(.roundEnd(number), index, meanwhile)
        }
        for lane in lanes {
            try wait(lane, meanwhile) { $0.queue.isEmpty && !$0.isBusy || $0.isStopping ? true : nil }
        }
        try check()
    }

    /// Says on every lane that nothing more comes, and waits until the threads have returned.
    func finish(rounds: Int, meanwhile: () throws(MigrationError) -> Void) throws(MigrationError) {
        for index in 0..<map.lanes { try push(.end(rounds: rounds), index, meanwhile) }
        for lane in lanes { try wait(lane, meanwhile) { $0.isGone ? true : nil } }
        try check()
    }

    private func push(_ work: Work, _ index: Int, _ meanwhile: () throws(MigrationError) -> Void) throws(MigrationError) {
        let lane = lanes[index]
        try wait(lane, meanwhile) {
            if $0.isStopping { return true }
            guard $0.queue.count < SourceLanes.queueLimit else { return nil }
            $0.queue.append(work)
            return true
        }
        pushed.store(true, ordering: .relaxed)
        try check()
    }

    private func wait(
        _ lane: Lane, _ meanwhile: () throws(MigrationError) -> Void, until done: (inout LaneState) -> Bool?
    ) throws(MigrationError) {
        while lane.state.wait(milliseconds: SourceLanes.tickMilliseconds, wakes: true, until: done) == nil {
            try check()
            try meanwhile()
        }
    }

    /// A lane's thread.
    private func work(_ lane: Lane, _ sender: PageSender) throws(MigrationError) {
        while true {
            let next: Work?? = lane.state.wait(milliseconds: 60_000, wakes: true) { state -> Work?? in
                if state.isStopping { return .some(nil) }
                guard !state.queue.isEmpty else { return nil }
                state.isBusy = true
                return state.queue.removeFirst()
            }
            guard let next else { continue }
            guard let work = next else { throw .cancelled }
            var round = MigrationRound(number: 0)
            var isLast = false
            switch work {
            case .pages(let runs): for run in runs { try sender.send(run, &round) }
            case .discard(let runs): for run in runs { try sender.discard(run, &round) }
            case .roundEnd(let number): try sender.finishRound(number, &round)
            case .end(let rounds):
                try sender.finishLane(rounds: rounds)
                isLast = true
            }
            lane.state.update {
                $0.isBusy = false
                $0.figures.sent += round.sent
                $0.figures.zero += round.zero
                $0.figures.discarded += round.discarded
                $0.bytesPerSecond = sender.measuredBytesPerSecond
            }
            if isLast { return }
        }
    }
}
