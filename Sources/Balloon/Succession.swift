// SPDX-License-Identifier: Apache-2.0
public import GuestMemory

extension BalloonDevice {
    /// A device for the guest of `old`, over another view of its memory or for the time after a pause: what the host
    /// set, the configuration, the counters and the sequence of requests go on; queues, negotiated features and windows
    /// do not. A buffer of statistics that `old` keeps is not taken along: its queue has to begin where the used ring
    /// ends.
    ///
    /// - Parameter keepingPages: the driver goes on, too, so that the pages of the balloon are still in it. If it may
    ///   have been reset meanwhile they must not count as given up any more (rule W5).
    public convenience init(memory: GuestMemory, succeeding old: BalloonDevice, keepingPages: Bool) {
        self.init(memory: memory, features: old.features, log: old.log)
        let previous = old.monitor.withLock { $0 }
        monitor.withLock { state in
            state.target = previous.target
            state.actual = previous.actual
            state.poison = previous.poison
            state.nextRequest = previous.nextRequest
            // A driver that holds hinted pages is told DONE when it looks next: the request it knows is over.
            state.hasHints = false
            state.hintCommand = previous.hasHints ? Self.done : previous.hintCommand
            state.done = DoneHandshake(isUnread: state.hintCommand == Self.done)
            if keepingPages { state.hintStream = previous.hintStream }
            state.statistics.forgetBuffer(from: previous.statistics)
            state.statisticsInterval = previous.statisticsInterval
            state.counters = previous.counters
            state.complaints = previous.complaints
            if keepingPages { state.lists = PageLists(previous.lists, within: ram) }
        }
    }

    /// The driver may have hinted to a device before this one, of which nothing is known: it is told DONE when it looks.
    public func assumeHints() {
        monitor.withLock { state in
            state.hintCommand = Self.done
            state.done = DoneHandshake(isUnread: true)
        }
    }

    /// Whether the report that answers `request` may still come, or is there and was not taken: `request` is that of
    /// the window open now, and neither the driver nor the device gave up on it.
    public func isReportPending(_ request: UInt32) -> Bool {
        monitor.withLock { state in
            guard let window = state.window, window.request == request else { return false }
            if case .over = window.stage { return false }
            return true
        }
    }

    /// Whether the whole report that answers `request` is there, so that `waitForReport` hands it over at once.
    public func isReportComplete(_ request: UInt32) -> Bool {
        monitor.withLock { state in
            guard let window = state.window, window.request == request, case .complete = window.stage else { return false }
            return true
        }
    }
}
