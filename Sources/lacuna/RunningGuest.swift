// SPDX-License-Identifier: Apache-2.0
import CLinux
import Machine
import Migration
import Synchronization

/// The guest of this process, and what its control socket lets others do with it.
final class RunningGuest: Sendable {
    private struct State {
        var machine: Machine?
        /// The migration under way, to call it off or let it finish.
        var source: MigrationSource?
        /// It goes to a file, which is no place for a guest to run.
        var goesToFile = false
        /// Some migration is being set up or under way.
        var migrating = false
        /// The guest is being paused or resumed.
        var isSwitching = false
        /// What is known of the migration under way, or of the last one.
        var migration: MigrationStatus?
        /// The guest is to end, whatever machine it is in by then.
        var isStopping = false
        /// Ends the wait for a guest; nil when there is none to wait for.
        var stopWaiting: (@Sendable () -> Void)?
        /// Why the guest stands still, where nobody asked for it.
        var reason: String?
        /// Where the control socket is.
        var controlPath: String?
    }
    private let state = Mutex(State())
    private var controlPath: String? { state.withLock { $0.controlPath } }
    /// The control socket is this guest's: nobody else's may be removed.
    var isServing: Bool { controlPath != nil }

    var machine: Machine? { state.withLock { $0.machine } }
    var isStopping: Bool { state.withLock { $0.isStopping } }
    func set(_ machine: Machine) {
        state.withLock {
            $0.machine = machine
            $0.stopWaiting = nil
        }
    }
    /// What a `stop` is to do as long as no guest has come. Called at once if it was asked for already.
    func whileWaiting(stopBy stop: @escaping @Sendable () -> Void) {
        let isLate = state.withLock {
            $0.stopWaiting = stop
            return $0.isStopping
        }
        if isLate { stop() }
    }

    /// Answers requests at `path` until the process ends.
    func serve(at path: String) throws(Complaint) {
        let listener = try LocalSocket.listen(path)
        state.withLock { $0.controlPath = path }
        startThread(named: "control") { [self] in
            while let peer = listener.accept() {
                do { try startThreadIfPossible(named: "control peer") { self.converse(peer) } } catch {
                    peer.offer(JSON.line(ControlReply(error: "\(error)")))
                }
            }
        }
    }

    private func converse(_ peer: LocalSocket) {
        while let line = peer.receiveLine(limit: LocalSocket.requestLimit) {
            do {
                let request: ControlRequest
                do { request = try JSON.decode(ControlRequest.self, line) } catch {
                    throw Complaint("that is no control request; use the same release of lacuna on both sides")
                }
                try answer(request, to: peer)
            } catch { peer.send(JSON.line(ControlReply(error: "\(error)"))) }
        }
    }

    private func current() throws(Complaint) -> Machine {
        guard let machine else { throw Complaint("there is no guest here yet: it has not arrived") }
        return machine
    }

    private func answer(_ request: ControlRequest, to peer: LocalSocket) throws {
        switch request.command {
        case .status:
            peer.send(JSON.line(ControlReply(done: true, status: status())))
            return
        case .migrate:
            try migrate(request, for: peer)
            return
        case .snapshot:
            try snapshot(request, for: peer)
            return
        case .migrationStatus:
            guard let migration = state.withLock({ $0.migration }) else {
                throw Complaint("this guest was not migrated since it came here")
            }
            peer.send(JSON.line(ControlReply(done: true, migration: migration)))
            return
        case .cancel:
            guard let source = state.withLock({ $0.source }) else { throw Complaint("this guest is not being migrated") }
            guard source.cancel() else { throw Complaint("too late: the destination was told to take the guest") }
        case .switchOver:
            guard let source = state.withLock({ $0.source }) else { throw Complaint("this guest is not being migrated") }
            source.allowSwitchOver()
        case .stop:
            if request.powerButton == true {
                try current().pressPowerButton()
                break
            }
            // The guest is to end, and nowhere to go on.
            if let source = state.withLock({ $0.goesToFile ? nil : $0.source }), !source.cancel() {
                throw Complaint("too late: the destination was told to take the guest; stop it there")
            }
            if state.withLock({ $0.stopWaiting == nil }) { _ = try current() }
            // Before the flag: a guest that reboots at this moment ends the process as soon as it sees that.
            peer.send(JSON.line(ControlReply(done: true)))
            // And the flag before the look: it is in another machine a moment later.
            let (stopWaiting, source, machine) = state.withLock { state in
                state.isStopping = true
                return (state.stopWaiting, state.goesToFile ? nil : state.source, state.machine)
            }
            source?.cancel()
            stopWaiting?()
            machine?.end(.stopped)
            return
        case .pause:
            try withoutMigration("pausing") { machine throws in
                guard try machine.pause() else { throw Complaint("the guest has ended") }
                state.withLock { $0.reason = "paused by the operator" }
            }
        case .resume:
            try withoutMigration("resuming") { machine throws in
                guard machine.activity != .ended else { throw Complaint("the guest has ended") }
                machine.resume()
                state.withLock { $0.reason = nil }
            }
        case .balloon:
            peer.send(JSON.line(ControlReply(done: true, balloon: try answerBalloon(request.balloon, try current()))))
            return
        case .type: try current().type(Array((request.text ?? "").utf8))
        }
        peer.send(JSON.line(ControlReply(done: true)))
    }

    func refuseDuringMigration(_ what: String) throws(Complaint) {
        if state.withLock({ $0.migrating }) { throw Complaint("the guest is being migrated; \(what) has to wait until that ends") }
    }

    /// Does something to the guest that no migration may begin beside.
    private func withoutMigration(_ what: String, _ body: (Machine) throws -> Void) throws {
        let machine = try current()
        try refuseDuringMigration(what)
        let isAlone = state.withLock { state in
            guard !state.migrating, !state.isSwitching else { return false }
            state.isSwitching = true
            return true
        }
        guard isAlone else { throw Complaint("the guest is being paused, resumed or migrated at this moment; try again") }
        defer { state.withLock { $0.isSwitching = false } }
        try body(machine)
    }

    private func status() -> MachineStatus {
        let (machine, migrating, reason) = state.withLock { ($0.machine, $0.migrating, $0.reason) }
        guard let machine else {
            return MachineStatus(activity: "waiting", reason: "no guest has arrived yet", memoryMiB: 0, vcpus: 0)
        }
        let activity = migrating && machine.activity == .running ? "migrating" : machine.activity.rawValue
        return MachineStatus(
            activity: activity, reason: reason, memoryMiB: machine.configuration.memorySize >> 20,
            vcpus: machine.configuration.vcpus, hintRefusal: machine.plugin.map(\.refusal) ?? machine.balloon.refusal)
    }

    /// Takes the right to be the one migration of this guest, and tells the guest to move.
    private func beginMigration(to place: String) throws(Complaint) -> Machine {
        let machine = try current()
        let (isFirst, isSwitching) = state.withLock { state in
            let (wasMigrating, isSwitching) = (state.migrating, state.isSwitching)
            if !wasMigrating, !isSwitching { state.migrating = true }
            return (!wasMigrating, isSwitching)
        }
        guard isFirst else { throw Complaint("this guest is being migrated already; wait until that ends") }
        guard !isSwitching else { throw Complaint("the guest is being paused or resumed at this moment; try again") }
        guard machine.activity == .running else {
            state.withLock { $0.migrating = false }
            throw Complaint("the guest is not running (\(machine.activity.rawValue)); resume it before you migrate it")
        }
        state.withLock { $0.migration = MigrationStatus(to: place) }
        return machine
    }

    /// Runs a migration that `beginMigration` allowed, and keeps what is known of it.
    private func follow(
        _ source: MigrationSource, toFile: Bool = false, _ body: () throws(MigrationError) -> MigrationReport
    ) throws(MigrationError) -> MigrationReport {
        let isStopping = state.withLock {
            $0.source = source
            $0.goesToFile = toFile
            return $0.isStopping
        }
        // A stop that came before this line did not see the migration.
        if isStopping { source.cancel() }
        do throws(MigrationError) {
            let report = try body()
            // The report has the rounds too.
            state.withLock {
                $0.migration?.report = report
                $0.migration?.rounds = []
            }
            return report
        } catch {
            // The one failure that leaves the guest paused: `status` has to show why.
            if case .notResumed = error { state.withLock { $0.reason = error.description } }
            throw error
        }
    }

    private func endMigration(_ error: (any Error)?) {
        state.withLock {
            ($0.migrating, $0.source) = (false, nil)
            $0.migration?.isUnderWay = false
            if let error { $0.migration?.error = "\(error)" }
        }
    }

    /// Progress goes to the client and into the status.
    private func observer(_ peer: LocalSocket) -> @Sendable (MigrationProgress, MigrationRound?) -> Void {
        { progress, round in
            self.state.withLock {
                $0.migration?.progress = progress
                if let round { $0.migration?.rounds.append(round) }
            }
            // Never waits: a client that stopped reading must not hold up the migration.
            peer.offer(JSON.line(ControlReply(progress: progress.line)))
        }
    }

    private func migrate(_ request: ControlRequest, for peer: LocalSocket) throws {
        let place = request.to ?? ""
        // Whatever comes of the request: a descriptor that the client passed is closed here.
        let passed = request.passesDescriptor == true ? try peer.receiveDescriptor() : nil
        let machine: Machine
        do { machine = try beginMigration(to: place) } catch {
            if let passed { close(passed) }
            throw error
        }
        do {
            let channel: ByteChannel
            var connect: (() throws(MigrationError) -> ByteChannel)?
            if let passed {
                channel = try ByteChannel(adopting: passed, name: place)
            } else {
                let address = try ChannelAddress(parsing: place)
                try refuseOwnSocket(address)
                channel = try ByteChannel.connect(to: address)
                connect = { () throws(MigrationError) in try ByteChannel.connect(to: address) }
            }
            let outgoing = OutgoingMachine(machine)
            let source = MigrationSource(
                guest: outgoing, trackers: outgoing.trackers, hinter: outgoing.hinter,
                options: (request.options ?? MigrationRequest()).options, progress: observer(peer))
            let report = try follow(source) { () throws(MigrationError) in try source.run(over: channel, connect: connect) }
            finish(report, at: place, machine, peer)
            endMigration(nil)
        } catch {
            endMigration(error)
            throw error
        }
    }

    private func finish(_ report: MigrationReport, at place: String, _ machine: Machine, _ peer: LocalSocket) {
        switch report.outcome {
        case .completed:
            state.withLock { $0.reason = "migrated to \(place)" }
            peer.send(JSON.line(ControlReply(done: true, report: report)))
            machine.end(.migrated)
        case .unknown:
            let reason =
                "paused: whether the guest runs at \(place) is unknown (\(report.outcomeReason ?? "no answer")); look there, and resume here only once the destination has ended without it"
            state.withLock { $0.reason = reason }
            peer.send(JSON.line(ControlReply(error: reason, report: report)))
        }
    }

    private func snapshot(_ request: ControlRequest, for peer: LocalSocket) throws {
        let path = request.to ?? ""
        guard path.hasPrefix("/") else { throw Complaint("the snapshot's path '\(path)' is not absolute") }
        let machine = try beginMigration(to: "file:\(path)")
        do {
            let job = SnapshotJob(
                of: machine, to: path, options: (request.options ?? MigrationRequest()).options, progress: observer(peer))
            let isLast = request.endsAfterwards == true
            let report = try follow(job.source, toFile: true) { () throws(MigrationError) in try job.run(keepsPaused: isLast) }
            if isLast { state.withLock { $0.reason = "saved to \(path)" } }
            // A guest that went to the file stays a migrating one until it has ended here: nobody may resume it.
            if !isLast { endMigration(nil) }
            peer.send(JSON.line(ControlReply(done: true, report: report)))
            if isLast {
                machine.end(.migrated)
                endMigration(nil)
            }
        } catch {
            endMigration(error)
            throw error
        }
    }
}

extension RunningGuest {
    /// A guest cannot move to where it is. Its control socket is the only thing of this process that listens.
    private func refuseOwnSocket(_ address: ChannelAddress) throws(Complaint) {
        guard case .unix(let path) = address, let own = controlPath else { return }
        var (there, here) = (stat(), stat())
        guard stat(path, &there) == 0, stat(own, &here) == 0, there.st_ino == here.st_ino, there.st_dev == here.st_dev
        else { return }
        throw Complaint("\(address) is this guest's own control socket; give the address that `lacuna receive` listens at")
    }
}

extension MigrationRequest {
    /// The operator's choices, and the standard for the others.
    var options: MigrationOptions {
        var options = MigrationOptions()
        options.skipFreePages = skipFreePages
        if let value = downtimeMilliseconds { options.downtimeLimitMilliseconds = value }
        if let value = hintTimeoutMilliseconds { options.hintTimeoutMilliseconds = value }
        if let value = bandwidth { options.bandwidthLimit = Int(clamping: value) }
        if let value = timeoutMilliseconds { options.timeoutMilliseconds = value }
        if let value = timeoutAction { options.timeoutAction = value }
        if let value = maxRounds { options.maxRounds = value }
        if let value = connections { options.connections = value }
        options.autoConverge = autoConverge
        options.pauseBeforeSwitchOver = pauseBeforeSwitchOver
        options.verify = verify
        return options
    }
}

extension MigrationProgress {
    /// One line for a person.
    var line: String {
        func mib(_ bytes: Double) -> String { String(Int((bytes / 1_048_576).rounded())) }
        return "\(phase.rawValue) \(round): \(mib(Double(remainingPages) * 4096)) MiB left, \(mib(Double(bytes))) MiB sent, "
            + "\(mib(Double(skippedPages) * 4096)) MiB skipped, \(mib(bytesPerSecond)) MiB/s, "
            + "\(mib(dirtyPagesPerSecond * 4096)) MiB/s dirtied" + (throttlePercent > 0 ? ", vCPUs slowed by \(throttlePercent) %" : "")
            + (phase == .waiting ? "; waiting for lacuna switch-over" : "")
    }
}
