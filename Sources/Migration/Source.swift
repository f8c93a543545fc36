// SPDX-License-Identifier: Apache-2.0
internal import GuestMemory
internal import Synchronization

/// The source of one migration: sends a running guest to a `MigrationReceiver`.
///
/// Exactly one side runs the guest. Until the commit was handed to the connection every failure ends with the guest
/// running here again, and an error. Afterwards it runs here only if the destination itself says that it dropped it;
/// where nothing at all is heard the guest stays paused and the report's outcome is `unknown`.
///
/// Thread rules: `run` blocks the caller's thread and is called once; `cancel()` may be called from any thread.
public final class MigrationSource: Sendable {
    private enum Stage: Equatable { case open, cancelled, committing }

    private let guest: any OutgoingGuest
    private let trackers: [any DirtyTracker]
    private let hinter: (any FreePageHinter)?
    private let options: MigrationOptions
    private let progress: (@Sendable (MigrationProgress, MigrationRound?) -> Void)?
    private let state = Monitor<(stage: Stage, channel: ByteChannel?, lanes: SourceLanes?)>((.open, nil, nil))
    private let gate: SwitchOverGate

    /// `trackers` are those of all writers but the VMM itself, whose own log is always added (rule W3). `progress` is
    /// called on `run`'s thread, about every 200 ms and after each round, which it then gets too.
    public init(
        guest: any OutgoingGuest, trackers: [any DirtyTracker], hinter: (any FreePageHinter)? = nil,
        options: MigrationOptions = MigrationOptions(), progress: (@Sendable (MigrationProgress, MigrationRound?) -> Void)? = nil
    ) {
        self.guest = guest
        self.trackers = trackers
        self.hinter = hinter
        self.options = options
        self.progress = progress
        gate = SwitchOverGate(isOpen: !options.pauseBeforeSwitchOver)
    }

    /// Lets a migration with `pauseBeforeSwitchOver` stop the guest and finish. From any thread, at any time.
    public func allowSwitchOver() { gate.open() }

    /// Calls the migration off, if the destination was not told to take the guest yet; tells whether it was in time.
    /// `run` then throws `cancelled`, with the guest running here.
    @discardableResult public func cancel() -> Bool {
        state.update {
            guard $0.stage != .committing else { return false }
            $0.stage = .cancelled
            $0.channel?.interrupt()
            $0.lanes?.interrupt()
            return true
        }
    }

    /// Migrates. Throws with the guest running here (but see `MigrationError.notResumed`); returns with the guest
    /// paused here for good, or with the outcome `unknown`. With `options.connections` above 1, `connect` makes each of
    /// the data connections, on the caller's thread and to where `channel` leads; a `cancel()` waits for it.
    public func run(
        over channel: ByteChannel, connect: (() throws(MigrationError) -> ByteChannel)? = nil
    ) throws(MigrationError) -> MigrationReport {
        let lanes = options.connections > 1
            ? SourceLanes(count: min(options.connections, StreamLimits.lanes), control: channel) : nil
        let run = SourceRun(
            guest: guest, trackers: trackers, hinter: hinter, options: options, channel: channel, lanes: lanes, gate: gate,
            progress: progress)
        do throws(MigrationError) {
            let isCancelled = state.update {
                ($0.channel, $0.lanes) = (channel, lanes)
                return $0.stage == .cancelled
            }
            if isCancelled { throw .cancelled }
            try run.transfer(connect: connect)
            // From here on `cancel()` says no: the commit may not be interrupted half-way.
            let isCommitting = state.update {
                if $0.stage == .cancelled { return false }
                $0.stage = .committing
                return true
            }
            guard isCommitting else { throw .cancelled }
            try run.commit()
        } catch {
            let isCancelled = state.update {
                ($0.channel, $0.lanes) = (nil, nil)
                return $0.stage == .cancelled
            }
            lanes?.stop()
            // A lane that failed interrupted the first connection.
            let cause = error == .cancelled && !isCancelled ? lanes?.failure ?? error : error
            channel.clearInterrupt()
            // The lanes go last: their end must not come before the reason for it.
            defer { lanes?.close() }
            throw run.giveUp(cause)
        }
        state.update { ($0.channel, $0.lanes) = (nil, nil) }
        lanes?.close()
        channel.shutdown()
        return run.finishedReport()
    }
}

/// Whether the guest may be stopped yet.
final class SwitchOverGate: Sendable {
    private let opened: Atomic<Bool>
    init(isOpen: Bool) { opened = Atomic(isOpen) }
    func open() { opened.store(true, ordering: .releasing) }
    var isOpen: Bool { opened.load(ordering: .acquiring) }
}

/// One migration being sent; lives on one thread.
final class SourceRun {
    private static let progressNanoseconds: UInt64 = 200_000_000
    /// So many requests in a row without an answer, and the guest is not asked any more.
    private static let patience = 3

    private let guest: any OutgoingGuest
    private let trackers: [any DirtyTracker]
    private let hinter: (any FreePageHinter)?
    private let options: MigrationOptions
    private let channel: ByteChannel
    /// The data connections; nil: pages go over `channel` as well.
    private let lanes: SourceLanes?
    private let bandwidth: Bandwidth
    private let reader: FrameReader
    private let bitmap: MigrationBitmap
    private let pageSender: PageSender
    private var writer: FrameWriter { pageSender.writer }
    private let progress: (@Sendable (MigrationProgress, MigrationRound?) -> Void)?
    private var report = MigrationReport()
    private var round = MigrationRound(number: 0)
    private var phase = MigrationProgress.Phase.connecting
    private let started = monotonicNanoseconds()
    private var lastProgress: UInt64 = 0
    private var lastLook: UInt64 = 0
    private let firstByte: UInt64
    private var isPaused = false
    private var pausedAt: UInt64 = 0
    private var hasAsked = false
    private var unanswered = 0
    private let gate: SwitchOverGate
    private var convergence = Convergence()
    /// The time is up and the rest is to be sent with the guest stopped.
    private var isForced = false
    private var dirtyPagesPerSecond = 0.0

    init(
        guest: any OutgoingGuest, trackers: [any DirtyTracker], hinter: (any FreePageHinter)?, options: MigrationOptions,
        channel: ByteChannel, lanes: SourceLanes?, gate: SwitchOverGate,
        progress: (@Sendable (MigrationProgress, MigrationRound?) -> Void)?
    ) {
        self.gate = gate
        self.guest = guest
        self.trackers = trackers
        self.hinter = hinter
        self.options = options
        self.channel = channel
        self.lanes = lanes
        self.progress = progress
        bandwidth = Bandwidth(bytesPerSecond: options.bandwidthLimit)
        reader = FrameReader(channel)
        bitmap = MigrationBitmap(guest.memory, remembersSkipped: options.verify)
        pageSender = PageSender(
            memory: guest.memory, told: bitmap.told,
            writer: FrameWriter(channel, idleMilliseconds: options.idleTimeoutMilliseconds), channel: channel,
            bandwidth: bandwidth)
        firstByte = channel.bytesSent
        report.ramPages = guest.memory.ramPages
        report.connections = lanes?.count ?? 1
    }

    // MARK: The phases

    /// Everything up to the point where the destination could run the guest. Tracking ends with it.
    func transfer(connect: (() throws(MigrationError) -> ByteChannel)?) throws(MigrationError) {
        let description = guest.machineDescription
        guard description.count <= StreamLimits.descriptionBytes else {
            throw .machineFailed(
                doing: "describing the machine", why: "it takes more than \(StreamLimits.descriptionBytes) bytes")
        }
        showProgress()
        if lanes != nil, connect == nil {
            throw .machineFailed(doing: "opening data connections", why: "this channel is a single one")
        }
        try writer.send(.hello, count: UInt32(lanes?.count ?? 0), payload: description)
        channel.setDeadline(milliseconds: Double(options.idleTimeoutMilliseconds))
        let token = try expect(.ready, options.idleTimeoutMilliseconds)
        channel.setDeadline(milliseconds: nil)
        if let lanes, let connect {
            guard let token = JoinToken(token) else { throw .badStream("a ready frame without a token") }
            try lanes.open(
                token: token, memory: guest.memory, told: bitmap.told, bandwidth: bandwidth,
                idleMilliseconds: options.idleTimeoutMilliseconds, connect: connect)
        }

        let tracking = try ArmedTracking(arming: trackers, of: guest.memory)
        bitmap.markAll()
        if options.skipFreePages, hinter == nil { report.hintRefusal = "this machine has nothing to ask the guest with" }
        let dirtied = try sendRounds(tracking)
        // The guest need not work for us while it is being stopped (W8).
        if hasAsked { hinter?.stop() }
        try stopAndSendRest(tracking, dirtiedBefore: dirtied)
    }

    /// Rounds with the guest running, until the rest is small. Returns the pages seen dirty since the last round.
    private func sendRounds(_ tracking: borrowing ArmedTracking) throws(MigrationError) -> Int {
        phase = .rounds
        var number = 1
        while true {
            round = MigrationRound(number: number)
            let start = monotonicNanoseconds()
            // Not before the first round: every bit is set, and a merge could not add to that.
            if number > 1, try collectUntilWorthARound(tracking, after: number - 1) { return round.dirtied }
            round.throttlePercent = convergence.throttlePercent
            try hint(tracking)
            try sendRound(tracking, since: start)
            number += 1
        }
    }

    /// Collects what was dirtied. True if the guest is to be stopped now; false if another round is due.
    private func collectUntilWorthARound(
        _ tracking: borrowing ArmedTracking, after rounds: Int
    ) throws(MigrationError) -> Bool {
        round.dirtied = try bitmap.merge(tracking)
        judgeConvergence()
        let isLast = options.maxRounds > 0 && rounds >= options.maxRounds || rounds >= StreamLimits.rounds - 1
        // While nobody allows the switch-over and the rest is small, collecting is all there is to do. But a destination
        // that hears nothing for long gives up: a round now and then tells it that all is well.
        let waitsSince = monotonicNanoseconds(), patience = Double(options.idleTimeoutMilliseconds) / 4
        while isForced || isRestSmall || isLast {
            if gate.isOpen { return true }
            if milliseconds(since: waitsSince) > patience, rounds < StreamLimits.rounds - 1 { break }
            try waitAtGate()
            round.dirtied += try bitmap.merge(tracking)
        }
        phase = .rounds
        return false
    }

    /// Compares what the last round sent with what the guest dirtied meanwhile, and slows the vCPUs down if it must.
    private func judgeConvergence() {
        guard let last = report.rounds.last else { return }
        dirtyPagesPerSecond = Double(round.dirtied) / max(last.milliseconds, 1) * 1000
        guard options.autoConverge, !isRestSmall,
            convergence.judge(sentBytes: last.bytes, dirtiedBytes: UInt64(round.dirtied) &* 4096)
        else { return }
        report.throttlePercent = convergence.throttlePercent
        guest.throttle(percent: convergence.throttlePercent)
    }

    /// Everything but the rest is sent and nobody has allowed the switch-over yet: the rest is kept small at leisure.
    private func waitAtGate() throws(MigrationError) {
        phase = .waiting
        showProgress()
        try channel.sleep(nanoseconds: 100_000_000)
        try hearDestination()
        try checkTimeout()
    }

    /// Ends a migration that takes too long, or makes it end.
    private func checkTimeout() throws(MigrationError) {
        guard options.timeoutMilliseconds > 0, !isForced, !isPaused,
            milliseconds(since: started) > Double(options.timeoutMilliseconds)
        else { return }
        switch options.timeoutAction {
        case .cancel:
            throw .notConverging(
                milliseconds: options.timeoutMilliseconds, dirtiedPerSecond: Int(dirtyPagesPerSecond * Double(pageSize)),
                sentPerSecond: Int(measuredBytesPerSecond))
        case .force: isForced = true
        }
    }

    /// True if what is left can be expected to be sent within the downtime limit.
    private var isRestSmall: Bool {
        let seconds = Double(bitmap.dirtyCount * 4096) / bytesPerSecond
        return seconds * 1000 <= Double(options.downtimeLimitMilliseconds)
    }

    /// Bytes per second while sending; 0 until there is enough to tell.
    private var measuredBytesPerSecond: Double {
        lanes?.measuredBytesPerSecond ?? pageSender.measuredBytesPerSecond
    }
    /// What to expect of the connection: measured, or else a gigabit line.
    private var bytesPerSecond: Double { measuredBytesPerSecond > 0 ? measuredBytesPerSecond : 125_000_000 }
    /// Bytes sent over all connections.
    private var bytesSent: UInt64 { channel.bytesSent &+ (lanes?.bytesSent ?? 0) }

    /// Sends what the bitmap holds, and the round's end.
    private func sendRound(_ tracking: borrowing ArmedTracking, since start: UInt64) throws(MigrationError) {
        let before = bytesSent
        // A round that is cut short leaves its pages in the bitmap for the stopped one.
        while !isForced || isPaused, let run = bitmap.takeRun(limit: 1024) {
            // A page is tracked again before it is read. Nothing is collected any more once the guest was stopped.
            if !isPaused { try tracking.willSend(run) }  // W1
            if let lanes { try lanes.send(run, meanwhile: lookUp) } else { try pageSender.send(run, &round) }
            try keepUp()
        }
        if let lanes {
            try lanes.finishRound(round.number, meanwhile: lookUp)
            lanes.takeFigures(into: &round)
        }
        try pageSender.finishRound(round.number, &round)
        try keepUp()
        round.bytes &+= bytesSent &- before
        round.milliseconds = milliseconds(since: start)
        finish(round)
        showProgress(report.rounds.last)
    }

    /// Stops the guest and sends everything else.
    private func stopAndSendRest(_ tracking: borrowing ArmedTracking, dirtiedBefore: Int) throws(MigrationError) {
        phase = .stopped
        pausedAt = monotonicNanoseconds()
        // A destination that takes a byte now and then must not keep the guest standing: the time that the rest should
        // take, several times over, and then the guest runs on here.
        let expected = Double(bitmap.dirtyCount * pageSize) / bytesPerSecond * 1000
        let limit = Double(options.idleTimeoutMilliseconds) + 4 * expected
        channel.setDeadline(milliseconds: limit)
        lanes?.setDeadline(milliseconds: limit)
        // Before the call: a pause that fails half-way has to be taken back as well.
        isPaused = true
        do { try guest.pause() } catch { throw .machineFailed(doing: "pausing the guest", why: error.what) }
        // Not before: a guest that gets its pages back while it still runs here dirties them.
        if hasAsked { hinter?.finish() }
        hasAsked = false
        var mark = monotonicNanoseconds()
        func lap() -> Double {
            defer { mark = monotonicNanoseconds() }
            return milliseconds(since: mark)
        }
        report.downtime.pause = milliseconds(since: pausedAt)
        if convergence.throttlePercent > 0 { guest.throttle(percent: 0) }
        round = MigrationRound(number: report.rounds.count + 1)
        round.stopped = true
        round.dirtied = dirtiedBefore + (try bitmap.merge(tracking))
        let sections: [StateSection]
        do { sections = try guest.saveState() } catch { throw .machineFailed(doing: "saving the state", why: error.what) }
        // Saving may write guest memory (rings brought up to date): those pages too.
        round.dirtied += try bitmap.merge(tracking)
        report.downtime.collectAndSave = lap()
        bandwidth.lift()
        try sendRound(tracking, since: mark)  // W8: the stopped round never waits for the guest
        try lanes?.finish(rounds: report.rounds.count, meanwhile: lookUp)
        if options.verify { try sendChecksums() }
        report.downtime.memory = lap()
        phase = .state
        try send(sections)
        try expect(.loaded, options.idleTimeoutMilliseconds)
        report.downtime.state = lap()
    }

    /// Checksums of every page whose contents the destination was told.
    private func sendChecksums() throws(MigrationError) {
        var page = 0
        while let pages = bitmap.nextTold(from: page, limit: Verification.pagesInFrame) {
            guard let checksums = Verification.checksums(of: pages, in: guest.memory) else {
                throw .machineFailed(doing: "verifying memory", why: "pages at \(pages.lowerBound) are not RAM")
            }
            try writer.send(
                .verify, count: UInt32(truncatingIfNeeded: pages.count), address: UInt64(pages.lowerBound) << pageShift,
                payload: checksums)
            report.verifiedPages += pages.count
            page = pages.upperBound
        }
    }

    private func send(_ sections: [StateSection]) throws(MigrationError) {
        guard sections.count <= StreamLimits.sections else {
            throw .machineFailed(doing: "saving the state", why: "there are \(sections.count) sections")
        }
        for section in sections {
            let name = Array(section.name.utf8)
            report.stateBytes += name.count + section.bytes.count
            guard name.count >= 1, name.count <= StreamLimits.sectionNameBytes,
                section.bytes.count <= StreamLimits.sectionBytes, report.stateBytes <= StreamLimits.stateBytes
            else { throw .machineFailed(doing: "saving the state", why: "section '\(section.name)' is too large") }
            try writer.send(.state, count: UInt32(name.count), payload: name + section.bytes)
        }
        try writer.send(.stateEnd, count: UInt32(sections.count))
    }

    /// Gives the guest away. Throws only if the destination certainly does not have it.
    func commit() throws(MigrationError) {
        phase = .commit
        channel.setDeadline(milliseconds: nil)
        showProgress()
        let (start, before) = (monotonicNanoseconds(), channel.bytesSent)
        do {
            try writer.send(.commit)
        } catch {
            // Part of a commit is no commit, and what the kernel did not take never reaches the destination.
            if channel.bytesSent &- before < UInt64(FrameHeader.size) { throw error }
        }
        let answer: (type: FrameType, text: String, payload: [UInt8])
        do {
            // For the whole answer: one that comes a byte at a time must not keep the guest standing.
            channel.setDeadline(milliseconds: Double(options.commitTimeoutMilliseconds))
            answer = try readAnswer(options.commitTimeoutMilliseconds)
        } catch {
            return outcomeIsUnknown(error.description)
        }
        switch answer.type {
        case .committed:
            report.downtime.commit = milliseconds(since: start)
            report.downtimeMilliseconds = milliseconds(since: pausedAt)
        // A destination says so only after it dropped the guest, and never once it took the commit.
        case .failure: throw .peerFailed(answer.text)
        default: outcomeIsUnknown("the destination answered the commit with a \(answer.type) frame")
        }
    }

    private func outcomeIsUnknown(_ why: String) {
        report.outcome = .unknown
        report.outcomeReason =
            "the destination was told to take the guest and did not say whether it did (\(why)); look there, and resume "
            + "the guest here only once the destination has ended without it"
    }

    /// Takes the migration back; returns the error for the caller.
    func giveUp(_ cause: MigrationError) -> MigrationError {
        channel.setDeadline(milliseconds: nil)
        if convergence.throttlePercent > 0 { guest.throttle(percent: 0) }
        if hasAsked { hinter?.finish() }
        var failure = cause
        if isPaused {
            do {
                try guest.resume()
            } catch let trouble {
                failure = .notResumed(cause: cause.description, why: trouble.what)
            }
        }
        let lastWordMilliseconds = 500
        if cause == .cancelled {
            writer.sendLast(.cancel, idleMilliseconds: lastWordMilliseconds)
        } else if cause.isConnectionLoss {
            // The destination may have said why before it went. Where only a data connection is lost it may wait for our
            // word instead.
            let isLane = if case .laneFailed = cause { true } else { false }
            if failure == cause, let answer = try? readAnswer(isLane ? 50 : lastWordMilliseconds), answer.type == .failure {
                failure = .peerFailed(answer.text)
            } else if isLane {
                writer.sendLast(.failure, text: cause.description, idleMilliseconds: lastWordMilliseconds)
            }
        } else {
            writer.sendLast(.failure, text: cause.description, idleMilliseconds: lastWordMilliseconds)
        }
        channel.shutdown()
        return failure
    }

    // MARK: Hints

    /// Asks for the free pages, waits within bounds, and masks them. Whatever goes wrong only costs bytes.
    private func hint(_ tracking: borrowing ArmedTracking) throws(MigrationError) {
        let isDue = options.skipFreePages && isWorthAsking  // W7: in every round, under the same rules
        guard isDue, let hinter, unanswered < SourceRun.patience else { return }
        if let refusal = hinter.refusal {
            report.hintRefusal = report.hintRefusal ?? refusal
            return
        }
        report.hintMethod = hinter.method
        let start = monotonicNanoseconds()
        let window: HintWindow
        do {
            window = try bitmap.ask(hinter, tracking: tracking)
        } catch {
            report.hintRefusal = report.hintRefusal ?? error.what
            return
        }
        (round.asked, hasAsked) = (true, true)
        // A destination that hears nothing gives up.
        let patience = min(options.hintTimeoutMilliseconds, options.idleTimeoutMilliseconds / 2)
        let answer = hinter.wait(for: window.request, milliseconds: patience)
        round.hintLatencyMilliseconds = milliseconds(since: start)
        guard let answer else {
            unanswered += 1
            hinter.stop()
            if unanswered == SourceRun.patience {
                report.hintRefusal = "the guest left \(unanswered) requests in a row unanswered"
            }
            return
        }
        unanswered = 0
        let masked = bitmap.mask(answer, window)
        guard masked.isAccepted else { return }
        round.answered = true
        round.found = answer.pages.population
        round.skipped = masked.skipped
        round.figures = answer.figures
        if !report.rounds.contains(where: \.answered) { report.freePages = round.found }
        if let stale = masked.stale {
            let before = bytesSent
            if let lanes {
                try lanes.discard(stale, in: guest.memory, meanwhile: lookUp)  // W6: in order with the pages' data
            } else {
                try pageSender.discard(stale, &round)  // W6: the destination must not keep an older copy
            }
            round.bytes &+= bytesSent &- before
        }
    }

    private var isWorthAsking: Bool { bitmap.dirtyCount >= options.hintMinimumPages }

    // MARK: The destination's words

    /// Reads one frame from the destination, which is as hostile as any peer.
    private func readAnswer(
        _ idle: Int
    ) throws(MigrationError) -> (type: FrameType, text: String, payload: [UInt8]) {
        let header = try reader.header(idleMilliseconds: idle)
        let limit =
            switch header.type {
            case .refused, .failure: 0...StreamLimits.textBytes
            case .ready where lanes != nil: JoinToken.size...JoinToken.size
            default: 0...0
            }
        guard header.count == 0, header.address == 0, limit.contains(Int(header.payloadBytes))
        else { throw .badStream("a \(header.type) frame from the destination has numbers it may not have") }
        let payload = try reader.payload(of: header, idleMilliseconds: idle)
        return (header.type, printable(payload), payload)
    }

    /// Returns the payload.
    @discardableResult
    private func expect(_ type: FrameType, _ idle: Int) throws(MigrationError) -> [UInt8] {
        let answer = try readAnswer(idle)
        switch answer.type {
        case type: return answer.payload
        case .refused where type == .ready: throw .refused(answer.text)
        case .failure: throw .peerFailed(answer.text)
        default: throw .badStream("the destination sent a \(answer.type) frame instead of \(type)")
        }
    }

    /// Between batches: hears a destination that gave up, and reports progress.
    private func keepUp() throws(MigrationError) {
        // By the clock too: memory that is zero takes long to look at and little to send.
        let hasSent = lanes?.takePushed() ?? pageSender.takeFlushed()
        if hasSent || monotonicNanoseconds() &- lastLook >= SourceRun.progressNanoseconds { try lookUp() }
    }

    /// The same while there is nothing else to do.
    private func lookUp() throws(MigrationError) {
        lastLook = monotonicNanoseconds()
        if channel.isInterrupted { throw .cancelled }
        try checkTimeout()
        try hearDestination()
        if monotonicNanoseconds() &- lastProgress >= SourceRun.progressNanoseconds { showProgress() }
    }

    /// Throws if the destination gave up. Does not wait.
    private func hearDestination() throws(MigrationError) {
        guard reader.hasInput else { return }
        let answer = try readAnswer(options.idleTimeoutMilliseconds)
        guard answer.type == .failure else {
            throw .badStream("the destination sent a \(answer.type) frame while memory was being sent")
        }
        throw .peerFailed(answer.text)
    }

    // MARK: Figures

    private func finish(_ round: MigrationRound) {
        report.rounds.append(round)
        report.pagesSent += round.sent
        report.zeroPages += round.zero
        report.skippedPages += round.skipped
        report.discardedPages += round.discarded
        self.round = MigrationRound(number: round.number)
    }

    func finishedReport() -> MigrationReport {
        report.bytes = bytesSent &- firstByte
        report.lateReports = bitmap.lateReports
        report.droppedPages = bitmap.droppedPages
        report.totalMilliseconds = milliseconds(since: started)
        phase = .done
        showProgress()
        return report
    }

    private func showProgress(_ ended: MigrationRound? = nil) {
        guard let progress else { return }
        lastProgress = monotonicNanoseconds()
        let underWay = lanes?.figures ?? (sent: 0, zero: 0)
        progress(
            MigrationProgress(
                phase: phase, round: round.number, ramPages: report.ramPages, remainingPages: bitmap.dirtyCount,
                bytes: bytesSent &- firstByte, pagesSent: report.pagesSent + round.sent + underWay.sent,
                zeroPages: report.zeroPages + round.zero + underWay.zero, skippedPages: report.skippedPages + round.skipped,
                bytesPerSecond: measuredBytesPerSecond, dirtyPagesPerSecond: dirtyPagesPerSecond,
                throttlePercent: convergence.throttlePercent, milliseconds: milliseconds(since: started)),
            ended)
    }
}
