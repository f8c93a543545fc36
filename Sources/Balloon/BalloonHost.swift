// SPDX-License-Identifier: Apache-2.0
public import GuestMemory
internal import Virtio

/// What the host sees of the balloon at one moment.
public struct BalloonStatus: Sendable, Equatable {
    /// A driver is ready.
    public var hasDriver = false
    /// Negotiated, of `BalloonFeature`; 0 without a driver.
    public var features: UInt64 = 0
    /// Pages of 4 KiB that the host wants (`num_pages`) and that the driver says are in the balloon (`actual`).
    public var targetPages: UInt32 = 0
    public var actualPages: UInt32 = 0
    /// Pages that the inflate queue brought and the deflate queue did not take back.
    public var inflatedPages = 0
    public var method: HintMethod?
    /// What the guest fills its free pages with, if it says so.
    public var poison: UInt32?
    /// The driver may be holding hinted pages.
    public var hasHints = false
    public var statistics: BalloonStatistics?
    public var counters = BalloonCounters()
}

// The host's side of the device.
extension BalloonDevice {
    /// What came over the queues so far.
    public var counters: BalloonCounters { monitor.withLock { $0.counters } }

    public var status: BalloonStatus {
        monitor.withLock { state in
            BalloonStatus(
                hasDriver: state.signals != nil && !state.isBroken, features: state.features & BalloonFeature.all,
                targetPages: state.target, actualPages: state.actual, inflatedPages: state.lists.count,
                method: state.method, poison: state.features & BalloonFeature.pagePoison != 0 ? state.poison : nil,
                hasHints: state.hasHints, statistics: state.statistics.latest, counters: state.counters)
        }
    }

    /// Pages that the driver says are in the balloon (`actual`), each of 4 KiB.
    public var actualPages: UInt32 { monitor.withLock { $0.actual } }

    /// Pages of 4 KiB that the host wants in the balloon (`num_pages`).
    public var targetPages: UInt32 { monitor.withLock { $0.target } }

    /// Asks the driver to have this many pages of 4 KiB in the balloon (`num_pages`).
    public func setTarget(pages: UInt32) {
        let signals = monitor.withLock { state in
            state.target = pages
            return state.signals
        }
        signals?.configurationChanged()
    }

    /// Waits until the driver says that the balloon has `pages` pages, for at most `milliseconds`. False: it does not.
    public func waitForActual(pages: UInt32, milliseconds: Int) -> Bool {
        monitor.wait(milliseconds: milliseconds) { $0.actual == pages ? true : nil } ?? false
    }

    /// Gives all of the balloon's pages to the host again, if the guest would tell before it uses one. For the
    /// destination of a migration, where the host's huge pages may have filled what was left out. Any thread; the queues
    /// get their turn in between.
    public func releaseBalloon() {
        var place = 0, isOver = false
        while !isOver {
            isOver = monitor.withLock { state in
                // Until it has used a deflate request, which takes this lock, the device may modify the page.
                guard state.tellsHost, let run = state.lists.inflated.nextRun(from: place, limit: 4096) else { return true }
                place = run.upperBound
                let first = (run.lowerBound + releaseUnit - 1) & ~(releaseUnit - 1), end = run.upperBound & ~(releaseUnit - 1)
                if first < end { release([first..<end], &state) }
                return false
            }
        }
    }

    /// How often somebody shall ask for statistics, in milliseconds; 0: not by itself. The device only keeps it, and
    /// takes it along with its state.
    public var statisticsInterval: UInt32 {
        get { monitor.withLock { $0.statisticsInterval } }
        set { monitor.withLock { $0.statisticsInterval = newValue } }
    }

    /// Takes over what the host wants from the balloon of the machine before a reset.
    public func inheritWishes(of other: BalloonDevice) {
        let (target, interval) = other.monitor.withLock { ($0.target, $0.statisticsInterval) }
        statisticsInterval = interval
        setTarget(pages: target)
    }

    // MARK: The hint window

    /// How the driver can tell its free pages; nil if it cannot, or there is none.
    public var hintMethod: HintMethod? { monitor.withLock { $0.method } }

    /// Why no report of free pages can be had now, in words for an operator; nil if one can.
    public var refusal: String? {
        monitor.withLock { state in
            if state.isBroken { return "the guest's balloon driver broke its queue; the device waits for a reset" }
            if state.signals == nil { return "no balloon driver is ready in the guest" }
            if state.features & (BalloonFeature.freePageBitmap | BalloonFeature.freePageHint) == 0 {
                return "the guest's balloon driver negotiated neither FREE_PAGE_BITMAP nor FREE_PAGE_HINT; "
                    + "load lacuna_balloon in the guest"
            }
            if state.method == nil { return "the guest's balloon driver did not enable its queue for free pages" }
            if state.isPoisoning {
                return "the guest poisons its free pages (poison_val 0x\(String(state.poison, radix: 16))); "
                    + "skipped pages could not be filled with that"
            }
            return nil
        }
    }

    /// Asks for a report and returns the request's id. An earlier request is void from here on. The caller has armed
    /// dirty tracking before (rule W1). A driver that hints holds what it hinted until `releaseHints`, and is asked only
    /// when it has read that (`askWhatWaits`). Does not wait.
    public func openWindow() -> UInt32 {
        let frames = memory.frameCount
        let (request, signals) = monitor.withLock { state in
            let method = state.method ?? .bitmap
            func following(_ id: UInt32) -> UInt32 { id == .max ? Self.firstRequest : id + 1 }
            // Section 5.5.6.5.2: an id is not used again while the driver has not ended what it sends under it.
            let request = state.nextRequest == state.hintStream ? following(state.nextRequest) : state.nextRequest
            state.nextRequest = following(request)
            state.window = HintWindow(request: request, method: method, frames: frames)
            switch method {
            case .bitmap: state.bitmapCommand = request
            case .freePageHint:
                if state.doneDelay() == 0 {
                    state.done = DoneHandshake()
                    state.hintCommand = request
                } else {
                    state.done.queued = request
                }
                state.hasHints = true
            }
            state.counters.requests &+= 1
            return (request, state.signals)
        }
        // Whoever waits for an earlier request goes away empty-handed.
        monitor.wakeAll()
        signals?.configurationChanged()
        return request
    }

    /// Waits until the report that answers `request` is whole, for at most `milliseconds`. Nil: it did not come in
    /// time, the guest gave up or sent nonsense, the device was reset, the window is closed or another one was opened.
    /// Each report is handed out once. Of free page hints, those that came in time are a report.
    public func waitForReport(_ request: UInt32, milliseconds: Int) -> FreePageReport? {
        if waitForEnd(of: request, milliseconds: milliseconds) {
            let report: FreePageReport? = monitor.withLock { $0.window?.request == request ? $0.window?.take() : nil }
            stopHints(request)
            return report
        }
        var aftermath = Aftermath()
        let partial: FreePageReport? = monitor.withLock { state in
            guard let window = state.window, window.request == request, !state.isQuiesced else { return nil }
            if window.isPartial { complete(&state, &aftermath) }
            return state.window?.take()
        }
        finish(aftermath)
        if partial != nil { stopHints(request) }
        return partial
    }

    /// A driver that still hints for a request that is over does so for nothing (section 5.5.6.5.2).
    private func stopHints(_ request: UInt32) {
        let signals: DeviceSignals? = monitor.withLock { state in
            guard state.hintCommand == request else { return nil }
            state.hintCommand = Self.stop
            return state.signals
        }
        signals?.configurationChanged()
    }

    /// Ends the wish: chains that come later are dropped and counted (rule W2). To be called before the next merge of a
    /// dirty log. No effect if no window is open.
    public func closeWindow() {
        let signals: DeviceSignals? = monitor.withLock { state in
            guard let window = state.window else { return nil }
            state.window = nil  // W2: what comes from now on has no window to go into.
            switch window.method {
            case .bitmap: state.bitmapCommand = Self.stop
            case .freePageHint:
                state.done.queued = nil
                if !state.done.isUnread { state.hintCommand = Self.stop }
            }
            return state.signals
        }
        monitor.wakeAll()
        signals?.configurationChanged()
    }

    /// Closes the window and tells a driver that hints to give back to the guest what it holds (DONE). To be called at
    /// the end of every migration, however it ends. Writes no guest memory.
    public func releaseHints() {
        closeWindow()
        let signals: DeviceSignals? = monitor.withLock { state in
            guard state.hasHints else { return nil }
            state.hasHints = false
            state.hintCommand = Self.done
            state.done = DoneHandshake(isUnread: true)
            return state.signals
        }
        signals?.configurationChanged()
    }

    // MARK: - Saved state

    private static let stateVersion: UInt8 = 3

    /// Saves the configuration, the balloon's pages and the driver's buffer of statistics; never an open window: the
    /// request is the source's.
    public func save(into encoder: inout StateEncoder) {
        monitor.withLock { state in
            encoder.put(Self.stateVersion)
            encoder.put(state.target)
            encoder.put(state.actual)
            encoder.put(state.poison)
            encoder.put(state.nextRequest)
            encoder.put(state.hasHints)
            encoder.put(state.hintCommand == Self.done)
            encoder.put(state.hintStream ?? Self.stop)
            encoder.put(state.statisticsInterval)
            state.statistics.encode(into: &encoder)
            state.lists.encode(into: &encoder)
        }
    }

    public func restore(from decoder: inout StateDecoder) throws(StateError) {
        guard try decoder.take(UInt8.self) == Self.stateVersion else { throw StateError("unknown balloon version") }
        let target = try decoder.take(UInt32.self), actual = try decoder.take(UInt32.self)
        let poison = try decoder.take(UInt32.self), nextRequest = try decoder.take(UInt32.self)
        guard nextRequest >= Self.firstRequest else { throw StateError("request \(nextRequest) is none") }
        let hasHints = try decoder.takeBool(), isDone = try decoder.takeBool()
        let stream = try decoder.take(UInt32.self)
        guard stream != Self.done else { throw StateError("hints under an id that no driver says") }
        let interval = try decoder.take(UInt32.self)
        let statistics = try StatisticsQueue(from: &decoder)
        let lists = try PageLists(from: &decoder, ram: ram)
        monitor.withLock { state in
            state.target = target
            state.actual = actual
            state.poison = poison
            state.bitmapCommand = Self.stop
            // The migration that wanted the hints is over: the driver may let go of them. The transport tells it that
            // the configuration changed.
            state.hintCommand = hasHints || isDone ? Self.done : Self.stop
            state.done = DoneHandshake(isUnread: hasHints || isDone)
            state.hasHints = false
            state.hintStream = stream == Self.stop ? nil : stream
            state.window = nil
            // Goes on where the source was: the driver tells requests apart by their ids.
            state.nextRequest = nextRequest
            state.statisticsInterval = interval
            state.statistics = statistics
            state.lists = lists
        }
        monitor.wakeAll()
    }
}
