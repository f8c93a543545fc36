// SPDX-License-Identifier: Apache-2.0
public import GuestMemory
public import Virtio

/// The traditional memory balloon (virtio 1.3, section 5.5), whole, with free page bitmaps
/// (protocol/free-page-bitmap.md).
///
/// Inflated and reported pages go back to the host before the driver hears that they were taken, and never later: from
/// then on the guest may use them again.
///
/// The host asks which pages the guest has free with `openWindow`, `waitForReport`, `closeWindow` and `releaseHints`;
/// rules W1 to W8 of the hint window say when it may. This class answers for the device's side of W2, W4 and W5: a
/// report answers the request of the window that is open now, nothing is done to a page because of it, and pages of the
/// balloon are in it only if the guest cannot be using them.
///
/// Thread rules: every method may be called from any thread. Queues are served on the thread that calls `notify`;
/// between two chains others get their turn. Guest memory is written on the threads that call `notify`,
/// `waitForReport`, `requestStatistics` and `setQuiesced(false)`; while the device is quiesced the last three leave it
/// alone.
///
/// Error model: a broken virtqueue asks the driver for a reset. Anything else a driver does wrong is dropped, counted,
/// and logged at a bounded rate.
public final class BalloonDevice: VirtioDevice {
    private static let queueSize: UInt16 = 256
    /// Ids below mean that there is no request.
    static let firstRequest: UInt32 = 2
    static let stop: UInt32 = 0
    static let done: UInt32 = 1

    struct State {
        // What the driver negotiated. Empty without a driver.
        var features: UInt64 = 0
        var queues: [VirtQueue?] = []
        var map = QueueMap()
        var signals: DeviceSignals?
        var isBroken = false
        // The configuration space.
        var target: UInt32 = 0
        var actual: UInt32 = 0
        var poison: UInt32 = 0
        /// `free_page_bitmap_cmd_id` and `free_page_hint_cmd_id`.
        var bitmapCommand: UInt32 = stop
        var hintCommand: UInt32 = stop

        var nextRequest = firstRequest
        var window: HintWindow?
        /// The driver may be holding hinted pages until it is told DONE.
        var hasHints = false
        var done = DoneHandshake()
        /// The command id that the driver's hints belong to.
        var hintStream: UInt32?
        var lists: PageLists
        var statistics = StatisticsQueue()
        var statisticsInterval: UInt32 = 0
        /// The machine stands still: guest memory must not be written.
        var isQuiesced = false
        var counters = BalloonCounters()
        var complaints = Complaints()

        var isPoisoning: Bool { features & BalloonFeature.pagePoison != 0 && poison != 0 }
        var tellsHost: Bool { features & BalloonFeature.mustTellHost != 0 }

        /// How the driver at hand can tell its free pages; nil: it cannot. The bitmap, if it can do both.
        var method: HintMethod? {
            if map.number(of: .bitmap) != nil { return .bitmap }
            return map.number(of: .hints) != nil ? .freePageHint : nil
        }

        /// Forgets the driver; what the host set stays.
        mutating func forgetDriver(frames: Int) {
            self = State(
                target: target, nextRequest: nextRequest, lists: PageLists(frames: frames),
                statisticsInterval: statisticsInterval, isQuiesced: isQuiesced, counters: counters,
                complaints: complaints)
        }
    }

    let memory: GuestMemory
    /// The pages that are the guest's RAM, as a mask for what a guest claims.
    let ram: PageBitmap
    /// Pages that go back to the host only together.
    let releaseUnit: Int
    let monitor: Monitor<State>
    let features: UInt64
    let log: @Sendable (String) -> Void

    /// - Parameters:
    ///   - features: the balloon's features to offer, of `BalloonFeature`.
    ///   - reserved: page frames of RAM that belong to the machine and not to the guest, such as its firmware tables.
    ///   - releaseUnit: pages that the host can only take back together: a power of two, of which every region of RAM is
    ///     a multiple. 512 for memory of 2 MiB pages.
    ///   - firstRequest: the id of the first request, 2 or more. A driver takes an id that it knows for no new request, so a
    ///     device that may follow another one before the same driver begins somewhere else.
    ///   - log: takes a line on what the driver did wrong. Called on any thread, a bounded number of times a second,
    ///     with no lock held.
    public init(
        memory: GuestMemory, features: UInt64 = BalloonFeature.standard, reserved: Range<Int> = 0..<0,
        releaseUnit: Int = 1, firstRequest: UInt32 = 2, log: @escaping @Sendable (String) -> Void = { _ in }
    ) {
        precondition(releaseUnit > 0 && releaseUnit & (releaseUnit - 1) == 0 && firstRequest >= Self.firstRequest)
        self.memory = memory
        self.features = features & BalloonFeature.all
        self.releaseUnit = releaseUnit
        self.log = log
        ram = PageBitmap(bitCount: memory.frameCount)
        for region in memory.regions { ram.set(region.range.pages) }
        ram.clear(reserved.clamped(to: 0..<ram.bitCount))
        monitor = Monitor(State(nextRequest: firstRequest, lists: PageLists(frames: memory.frameCount)))
    }

    // MARK: - VirtioDevice

    public var deviceID: UInt32 { 5 }

    public var offeredFeatures: UInt64 { VirtioFeature.version1 | features }

    public var queueSizes: [UInt16] { Array(repeating: Self.queueSize, count: QueueMap.queueCount) }

    public func activate(features: UInt64, queues: [VirtQueue?], signals: DeviceSignals) {
        monitor.withLock { state in
            state.features = features
            state.queues = queues
            state.map = QueueMap(features: features, isEnabled: queues.map { $0 != nil })
            state.signals = signals
            state.isBroken = false
        }
    }

    public func reset() {
        monitor.withLock { $0.forgetDriver(frames: memory.frameCount) }
        monitor.wakeAll()
    }

    /// A driver's read of up to 256 bytes of the configuration space, all as they are at one moment; those outside it are
    /// 0. Gives no signals.
    public func readConfiguration(offset: Int, bytes count: Int) -> [UInt8] {
        let count = min(max(count, 0), 256)
        let (fields, wakes): ([UInt32], Bool) = monitor.withLock { state in
            let fields = [state.target, state.actual, state.hintCommand, state.poison, state.bitmapCommand]
            return (fields, state.noteRead(offset: offset, count: count))
        }
        if wakes { monitor.wakeAll() }
        return (0..<count).map { byte in
            let (place, overflow) = offset.addingReportingOverflow(byte)
            guard !overflow, place >= 0, place < ConfigurationField.bytes else { return 0 }
            return UInt8(truncatingIfNeeded: fields[place / 4] >> UInt32(place % 4 * 8))
        }
    }

    public func readConfiguration(offset: Int, count: Int) -> UInt64 {
        readConfiguration(offset: offset, bytes: min(count, 8)).reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }

    public func writeConfiguration(offset: Int, count: Int, value: UInt64) {
        let count = min(max(count, 0), 8)
        writeConfiguration(
            offset: offset, bytes: (0..<count).map { UInt8(truncatingIfNeeded: value >> UInt64($0 * 8)) })
    }

    /// A driver's write of any number of bytes, all at one moment; those that are not the driver's are ignored.
    public func writeConfiguration(offset: Int, bytes: [UInt8]) {
        let changed = monitor.withLock { state in
            let before = state.actual
            for (index, byte) in bytes.enumerated() {
                let bits = UInt32(byte)
                let (place, overflow) = offset.addingReportingOverflow(index)
                let shift = UInt32(place & 3) * 8
                switch overflow || place < 0 ? nil : place & ~3 {
                case ConfigurationField.actual: state.actual = state.actual & ~(0xff << shift) | bits << shift
                case ConfigurationField.poison: state.poison = state.poison & ~(0xff << shift) | bits << shift
                default: state.counters.ignoredConfigurationBytes &+= 1
                }
            }
            return state.actual != before
        }
        if changed { monitor.wakeAll() }
    }

    /// What is to be done without the lock after chains were served.
    struct Aftermath {
        /// Of the activation the chains belong to; dead after a reset.
        var signals: DeviceSignals?
        var used: Set<Int> = []
        var needsReset = false
        var tellsConfiguration = false
        /// Somebody may be waiting for what came.
        var wakes = false
        var messages: [String] = []

        mutating func note(_ message: String, _ state: inout State) {
            if let line = state.complaints.admit(message, now: monotonicNanoseconds()) { messages.append(line) }
        }
    }

    func finish(_ aftermath: Aftermath) {
        if aftermath.wakes { monitor.wakeAll() }
        for message in aftermath.messages { log(message) }
        guard let signals = aftermath.signals else { return }
        for queue in aftermath.used { signals.usedBuffer(queue: queue) }
        if aftermath.tellsConfiguration { signals.configurationChanged() }
        if aftermath.needsReset { signals.needsReset() }
    }

    public func notify(queue index: Int) {
        var aftermath = Aftermath()
        func serve(atMost limit: Int) -> Bool {
            for _ in 0..<limit where !monitor.withLock({ self.serve(index, &$0, &aftermath) }) { return true }
            return false
        }
        // At the time of the notification no more chains than the queue's size can wait. Of later ones the device is
        // told, unless the driver goes by the event index, which was left behind: those it has to find by itself. A
        // driver that adds as fast as the device serves gets no more than that out of one notification.
        if !serve(atMost: Int(Self.queueSize)) {
            let rest = monitor.withLock { state in
                state.queues.indices.contains(index) ? state.queues[index]?.askForLaterNotification() : nil
            }
            _ = serve(atMost: rest ?? 0)
        }
        finish(aftermath)
    }

    /// Takes one chain off a queue, uses it, and gives it back. False if there is none, or the queue is of no use.
    private func serve(_ index: Int, _ state: inout State, _ aftermath: inout Aftermath) -> Bool {
        guard !state.isBroken, state.queues.indices.contains(index), let queue = state.queues[index] else {
            return false
        }
        aftermath.signals = state.signals
        guard let role = state.map.role(of: index) else {
            state.counters.strayNotifications &+= 1
            return false
        }
        do throws(VirtQueueError) {
            guard let chain = try queue.popChain() else { return false }
            switch role {
            case .inflate: takeList(chain, .inflate, &state, &aftermath)
            case .deflate: takeList(chain, .deflate, &state, &aftermath)
            case .statistics:
                // The device keeps the buffer.
                takeStatistics(chain, &state, &aftermath)
                return true
            case .hints: takeHints(chain, &state, &aftermath)
            case .reporting: takeReportedPages(chain, &state, &aftermath)
            case .bitmap: takeReport(chain, &state, &aftermath)
            }
            queue.push(chain.token, written: 0)
            if queue.wantsInterrupt { aftermath.used.insert(index) }
            if role == .hints || role == .bitmap { aftermath.wakes = true }
            if role == .hints, state.hasToReadAgain() { aftermath.tellsConfiguration = true }
            return true
        } catch {
            state.counters.brokenQueues &+= 1
            state.isBroken = true
            state.window?.discard()
            aftermath.note("the \(role) queue is broken: \(error); the device needs a reset", &state)
            aftermath.needsReset = true
            aftermath.wakes = true
            return false
        }
    }

    // MARK: - Inflated and reported pages

    private func takeList(
        _ chain: DescriptorChain, _ direction: PageLists.Direction, _ state: inout State, _ aftermath: inout Aftermath
    ) {
        let outcome = state.lists.accept(chain, direction, ram: ram, unit: releaseUnit, &state.counters)
        if let fault = outcome.fault { aftermath.note(fault, &state) }
        // The other pages of a unit were acknowledged earlier: the guest may be using them unless it would have told.
        guard releaseUnit == 1 || state.tellsHost else { return }
        release(outcome.released, &state)
    }

    /// Gives pages back to the host. The chain that brought them was not used yet: the guest keeps its hands off them.
    func release(_ runs: [Range<Int>], _ state: inout State) {
        for run in runs {
            // Cannot fail: the pages were compared with RAM, and a run that spans two regions is taken apart here.
            for region in memory.regions {
                let part = run.clamped(to: region.range.pages)
                guard !part.isEmpty, (try? memory.release(pages: part)) != nil else { continue }
                state.counters.releases &+= 1
                state.counters.releasedPages &+= UInt64(part.count)
            }
        }
    }

    /// A report of free pages (section 5.5.6.7): device-writable buffers that are the pages themselves.
    private func takeReportedPages(_ chain: DescriptorChain, _ state: inout State, _ aftermath: inout Aftermath) {
        state.counters.reportingChains &+= 1
        var runs: [Range<Int>] = [], isWhole = chain.readable.isEmpty
        for segment in chain.writable.sorted(by: { $0.address < $1.address }) {
            let pages = wholePages(segment, unit: 1)
            isWhole = isWhole && pages.count * pageSize == Int(segment.length)
            state.counters.reportedFreePages &+= UInt64(pages.count)
            let whole = wholePages(segment, unit: releaseUnit)
            // Nothing of the machine's own, whatever the guest says.
            guard !whole.isEmpty, ram.nextRun(from: whole.lowerBound, limit: whole.count) == whole else {
                state.counters.listedPagesNotRAM &+= UInt64(pages.count)
                continue
            }
            if let last = runs.last, last.upperBound == whole.lowerBound {
                runs[runs.count - 1] = last.lowerBound..<whole.upperBound
            } else {
                runs.append(whole)
            }
        }
        guard isWhole else {
            state.counters.malformedReportings &+= 1
            return aftermath.note("a report of free pages with readable parts, or of parts of pages", &state)
        }
        // Section 5.5.6.7.2: a reported page may only be changed to the poison value, and it does not read as that
        // once it is gone. Zero it does.
        guard !state.isPoisoning else {
            state.counters.reportedPagesKept &+= UInt64(runs.reduce(0) { $0 + $1.count })
            return
        }
        release(runs, &state)
    }

    /// The units of pages that lie wholly within a segment.
    private func wholePages(_ segment: GuestSegment, unit: Int) -> Range<Int> {
        let bytes = UInt64(unit * pageSize), start = segment.address.rawValue
        // Cannot overflow: the segment is RAM, which ends below 2^52.
        let first = (start + bytes - 1) / bytes, end = (start + UInt64(segment.length)) / bytes
        return first < end ? Int(first) * unit..<Int(end) * unit : 0..<0
    }

    // MARK: - Statistics

    private func takeStatistics(_ chain: DescriptorChain, _ state: inout State, _ aftermath: inout Aftermath) {
        state.counters.statisticsBuffers &+= 1
        let isGood = state.statistics.accept(
            chain, now: wallClockMilliseconds(), unknown: &state.counters.unknownStatistics)
        if !isGood {
            state.counters.malformedStatistics &+= 1
            aftermath.note("statistics of \(chain.readableBytes) bytes, or with writable parts", &state)
        }
        if let old = state.statistics.buffer {
            // Section 5.5.6.3.1: there is one buffer at most. The older one goes back.
            state.counters.extraStatisticsBuffers &+= 1
            giveStatisticsBack(old, &state, &aftermath)
        }
        state.statistics.buffer = chain.token
        if state.statistics.isWanted { askForStatistics(&state, &aftermath) }
        aftermath.wakes = true
    }

    private func giveStatisticsBack(_ token: BufferToken, _ state: inout State, _ aftermath: inout Aftermath) {
        guard let number = state.map.number(of: .statistics), let queue = state.queues[number] else { return }
        queue.push(token, written: 0)
        if queue.wantsInterrupt { aftermath.used.insert(number) }
        aftermath.signals = state.signals
    }

    /// Sends the request that is wanted, if it can be sent now.
    private func askForStatistics(_ state: inout State, _ aftermath: inout Aftermath) {
        guard !state.isQuiesced, !state.isBroken, let token = state.statistics.buffer else { return }
        state.statistics.buffer = nil
        state.statistics.isWanted = false
        giveStatisticsBack(token, &state, &aftermath)
    }

    /// Asks the driver for statistics. Returns the number of the latest ones so far (0: none): the answer has a higher
    /// one. Nil if the driver did not negotiate `STATS_VQ`, or there is none. Requests that are not answered yet are one
    /// request.
    public func requestStatistics() -> UInt64? {
        var aftermath = Aftermath()
        defer { finish(aftermath) }
        return monitor.withLock { state in
            guard state.map.number(of: .statistics) != nil, !state.isBroken else { return nil }
            // Without a buffer at hand an answer is on its way already, or the driver's first buffer is.
            if state.statistics.buffer != nil {
                state.statistics.isWanted = true
                askForStatistics(&state, &aftermath)
            }
            return state.statistics.latest?.number ?? 0
        }
    }

    /// Waits for statistics later than `number`, for at most `milliseconds`.
    public func waitForStatistics(after number: UInt64, milliseconds: Int) -> BalloonStatistics? {
        monitor.wait(milliseconds: milliseconds) { state in
            state.statistics.latest.flatMap { $0.number > number ? $0 : nil }
        }
    }

    /// While the machine stands still nothing may write guest memory: what the host asks for waits until it goes on.
    public func setQuiesced(_ isQuiesced: Bool) {
        var aftermath = Aftermath()
        monitor.withLock { state in
            state.isQuiesced = isQuiesced
            if state.statistics.isWanted { askForStatistics(&state, &aftermath) }
        }
        finish(aftermath)
    }

    // MARK: - Free page hints and bitmaps

    /// A chain of the hint queue: a command id to read, or pages that the device may write.
    private func takeHints(_ chain: DescriptorChain, _ state: inout State, _ aftermath: inout Aftermath) {
        state.counters.hintChains &+= 1
        if !chain.readable.isEmpty { takeHintCommand(chain, &state, &aftermath) }
        guard !chain.writable.isEmpty else { return }
        guard let stream = state.hintStream else {
            state.counters.misplacedHints &+= 1
            return aftermath.note("free page hints without a command id before them", &state)
        }
        guard state.window?.takesHints(of: stream) == true else {  // W2: the answer to the open request and no other.
            state.counters.staleHints &+= 1
            return
        }
        for segment in chain.writable {
            let pages = wholePages(segment, unit: 1)
            guard !pages.isEmpty, ram.nextRun(from: pages.lowerBound, limit: pages.count) == pages else {
                state.counters.reportedPagesNotRAM &+= UInt64(pages.count)
                continue
            }
            state.counters.hintedPages &+= UInt64(pages.count)
            state.window?.add(pages)  // W4: nothing is done to the page itself.
        }
    }

    private func takeHintCommand(_ chain: DescriptorChain, _ state: inout State, _ aftermath: inout Aftermath) {
        var reader = chain.reader()
        guard chain.readableBytes == 4, let id = try? reader.take(UInt32.self), id != Self.done else {
            state.counters.malformedHints &+= 1
            // What the hints that follow belong to cannot be told.
            state.hintStream = nil
            return aftermath.note("a command id of \(chain.readableBytes) bytes, or none for a driver to send", &state)
        }
        let ended = state.hintStream
        state.hintStream = id == Self.stop ? nil : id
        guard id == Self.stop else {
            // An id of before, or one that nobody gave out: its hints will not count.
            if id != state.window?.request { state.counters.staleHints &+= 1 }
            if state.window?.request == id, state.window?.method == .freePageHint { state.window?.begin() }
            return
        }
        if let ended, state.window?.takesHints(of: ended) == true { complete(&state, &aftermath) }
    }

    private func takeReport(_ chain: DescriptorChain, _ state: inout State, _ aftermath: inout Aftermath) {
        state.counters.reportChains &+= 1
        guard var window = state.window else {
            state.counters.lateChains &+= 1
            return
        }
        state.window = nil
        let outcome = window.accept(chain, ram: ram, notRAM: &state.counters.reportedPagesNotRAM)
        switch outcome {
        case .taken, .last: break
        case .stale: state.counters.staleChains &+= 1
        case .late: state.counters.lateChains &+= 1
        case .misplaced: state.counters.misplacedReportChains &+= 1
        case .malformed(let fault):
            state.counters.malformedReportChains &+= 1
            state.counters.reportsVoid &+= 1
            window.discard()
            aftermath.note("a malformed report of free pages: \(fault.rawValue)", &state)
        case .failed:
            state.counters.reportsFailed &+= 1
            window.discard()
        }
        state.window = window
        if outcome == .last { complete(&state, &aftermath) }
    }

    /// Makes a report of what the open window has, or throws it away.
    func complete(_ state: inout State, _ aftermath: inout Aftermath) {
        if state.isPoisoning {  // W6: skipped pages would not read as the guest expects.
            // It was not so when the window was opened, or the host did not ask for the refusal.
            state.counters.reportsVoid &+= 1
            state.window?.discard()
            return
        }
        let balloon = balloonPages(&state, &aftermath)
        // A deflate queue that broke just now ends the report, too.
        if state.isBroken {
            state.window?.discard()
            return
        }
        state.counters.balloonPagesReported &+= UInt64(balloon?.population ?? 0)
        state.counters.reportsCompleted &+= 1
        state.window?.complete(adding: balloon)  // W4: that is all: no page is discarded or written because of a bit.
    }

    /// The pages of the balloon, if they may be masked like free ones (rule W5): the guest does not use a page of the
    /// balloon before it has told so, and all that it has told is known.
    private func balloonPages(_ state: inout State, _ aftermath: inout Aftermath) -> PageBitmap? {
        let tells = state.tellsHost  // W5: without it pages come back unannounced.
        guard tells else { return nil }
        let isDrained = drainDeflate(&state, &aftermath)  // W5: what waits in the deflate queue is the guest's again.
        return isDrained ? state.lists.inflated : nil
    }

    /// Serves the deflate queue until it is empty. False if it is not: it broke, or it fills as fast as it is emptied.
    private func drainDeflate(_ state: inout State, _ aftermath: inout Aftermath) -> Bool {
        // A driver that does not have the queue cannot take pages back, nor is it one that gave any.
        guard let number = state.map.number(of: .deflate) else { return false }
        for _ in 0...Int(Self.queueSize) where !serve(number, &state, &aftermath) { return !state.isBroken }
        return false
    }
}
