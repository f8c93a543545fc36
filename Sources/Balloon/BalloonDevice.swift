// SPDX-License-Identifier: Apache-2.0
public import GuestMemory
public import Virtio

/// The traditional memory balloon (virtio 1.3, section 5.5) with free page bitmaps (protocol/free-page-bitmap.md).
///
/// The host asks which pages the guest has free with `openWindow`, `waitForReport` and `closeWindow`; rules W1 to W8 of
/// the hint window say when it may. This class answers for the device's side of W2, W4 and W5: a report answers the
/// request of the window that is open now, nothing is done to a page because of it, and pages of the balloon are in it
/// only if the guest cannot be using them.
///
/// Thread rules: every method may be called from any thread. Queues are served on the thread that calls `notify`;
/// between two chains others get their turn.
///
/// Error model: a broken virtqueue asks the driver for a reset. Anything else a driver does wrong is dropped and
/// counted. Not for: discarding memory. Pages of the balloon are known, and stay in place.
public final class BalloonDevice: VirtioDevice {
    /// Queue numbers (section 5.5.2).
    private enum Queue {
        static let inflate = 0
        static let deflate = 1
        /// Behind those two: stats, hints and reporting (2 to 4), which are not offered, leave a gap before the bitmap
        /// queue for a driver that goes by the specification's numbers, and none for Linux.
        static let bitmapFixed = 5
        static let bitmapGapless = 2
    }

    private static let queueSize: UInt16 = 256
    /// Ids below mean that there is no request; 1 is reserved.
    static let firstRequest: UInt32 = 2
    static let stop: UInt32 = 0

    struct State {
        // What the driver negotiated. Empty without a driver.
        var features: UInt64 = 0
        var queues: [VirtQueue?] = []
        var bitmapQueue: Int?
        var signals: DeviceSignals?
        var isBroken = false
        // The configuration space.
        var target: UInt32 = 0
        var actual: UInt32 = 0
        var poison: UInt32 = 0
        var command: UInt32 = stop

        var nextRequest = firstRequest
        var window: HintWindow?
        var lists: PageLists
        var counters = BalloonCounters()

        var isPoisoning: Bool { features & BalloonFeature.pagePoison != 0 && poison != 0 }

        /// Forgets the driver; what the host set stays.
        mutating func forgetDriver(frames: Int) {
            self = State(target: target, nextRequest: nextRequest, lists: PageLists(frames: frames), counters: counters)
        }
    }

    private let memory: GuestMemory
    /// The pages that are RAM, as a mask for what a guest claims.
    let ram: PageBitmap
    let monitor: Monitor<State>

    public init(memory: GuestMemory) {
        self.memory = memory
        ram = PageBitmap(bitCount: memory.frameCount)
        for region in memory.regions { ram.set(region.range.pages) }
        monitor = Monitor(State(lists: PageLists(frames: memory.frameCount)))
    }

    /// What came over the queues so far.
    public var counters: BalloonCounters { monitor.withLock { $0.counters } }

    /// Pages that the driver says are in the balloon (`actual`), each of 4 KiB.
    public var actualPages: UInt32 { monitor.withLock { $0.actual } }

    /// Asks the driver to have this many pages of 4 KiB in the balloon (`num_pages`).
    public func setTarget(pages: UInt32) {
        let signals = monitor.withLock { state in
            state.target = pages
            return state.signals
        }
        signals?.configurationChanged()
    }

    // MARK: - The hint window

    /// Why no report of free pages can be had now, in words for an operator; nil if one can.
    public var refusal: String? {
        monitor.withLock { state in
            if state.isBroken { return "the guest's balloon driver broke its queue; the device waits for a reset" }
            if state.signals == nil { return "no balloon driver is ready in the guest" }
            if state.features & BalloonFeature.freePageBitmap == 0 {
                return "the guest's balloon driver did not negotiate FREE_PAGE_BITMAP; load lacuna_balloon in the guest"
            }
            if state.bitmapQueue == nil { return "the guest's balloon driver did not enable its bitmap queue" }
            if state.isPoisoning {
                return "the guest poisons its free pages (poison_val 0x\(String(state.poison, radix: 16))); "
                    + "skipped pages could not be filled with that"
            }
            return nil
        }
    }

    /// Asks for a report and returns the request's id. An earlier request is void from here on. The caller has armed
    /// dirty tracking before (rule W1).
    public func openWindow() -> UInt32 {
        let frames = memory.frameCount
        let (request, signals) = monitor.withLock { state in
            let request = state.nextRequest
            state.nextRequest = request == .max ? Self.firstRequest : request + 1
            state.window = HintWindow(request: request, frames: frames)
            state.command = request
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
    /// Each report is handed out once.
    public func waitForReport(_ request: UInt32, milliseconds: Int) -> FreePageReport? {
        let report: FreePageReport?? = monitor.wait(milliseconds: milliseconds) { state -> FreePageReport?? in
            guard let window = state.window, window.request == request else { return .some(nil) }
            return window.isPending ? .none : .some(state.window?.take())
        }
        return report ?? nil
    }

    /// Ends the wish: chains that come later are dropped and counted (rule W2). To be called before the next merge of a
    /// dirty log. No effect if no window is open.
    public func closeWindow() {
        let signals: DeviceSignals? = monitor.withLock { state in
            guard state.window != nil else { return nil }
            state.window = nil  // W2: what comes from now on has no window to go into.
            state.command = Self.stop
            return state.signals
        }
        monitor.wakeAll()
        signals?.configurationChanged()
    }

    // MARK: - VirtioDevice

    public var deviceID: UInt32 { 5 }

    public var offeredFeatures: UInt64 {
        VirtioFeature.version1 | VirtioFeature.indirectDescriptors | BalloonFeature.mustTellHost
            | BalloonFeature.pagePoison | BalloonFeature.freePageBitmap
    }

    public var queueSizes: [UInt16] { Array(repeating: Self.queueSize, count: Queue.bitmapFixed + 1) }

    public func activate(features: UInt64, queues: [VirtQueue?], signals: DeviceSignals) {
        monitor.withLock { state in
            state.features = features
            state.queues = queues
            state.signals = signals
            state.isBroken = false
            state.bitmapQueue = nil
            guard features & BalloonFeature.freePageBitmap != 0 else { return }
            // Protocol, section 3.2: the queues that are enabled tell the two ways of numbering apart.
            for index in [Queue.bitmapFixed, Queue.bitmapGapless] where index < queues.count && queues[index] != nil {
                state.bitmapQueue = index
                break
            }
        }
    }

    public func reset() {
        monitor.withLock { $0.forgetDriver(frames: memory.frameCount) }
        monitor.wakeAll()
    }

    public func readConfiguration(offset: Int, count: Int) -> UInt64 {
        let fields = monitor.withLock { [$0.target, $0.actual, 0, $0.poison, $0.command] }
        var value: UInt64 = 0
        for byte in 0..<min(max(count, 0), 8) {
            let (place, overflow) = offset.addingReportingOverflow(byte)
            guard !overflow, place >= 0, place < ConfigurationField.bytes else { continue }
            let bits = fields[place / 4] >> UInt32(place % 4 * 8) & 0xff
            value |= UInt64(bits) << UInt64(byte * 8)
        }
        return value
    }

    public func writeConfiguration(offset: Int, count: Int, value: UInt64) {
        monitor.withLock { state in
            for byte in 0..<min(max(count, 0), 8) {
                let bits = UInt32(truncatingIfNeeded: value >> UInt64(byte * 8) & 0xff)
                let (place, overflow) = offset.addingReportingOverflow(byte)
                let shift = UInt32(place & 3) * 8
                switch overflow || place < 0 ? nil : place & ~3 {
                case ConfigurationField.actual: state.actual = state.actual & ~(0xff << shift) | bits << shift
                case ConfigurationField.poison: state.poison = state.poison & ~(0xff << shift) | bits << shift
                default: state.counters.ignoredConfigurationBytes &+= 1
                }
            }
        }
    }

    /// What is to be done without the lock after chains were served.
    private struct Aftermath {
        /// Of the activation the chains belong to; dead after a reset.
        var signals: DeviceSignals?
        var used: Set<Int> = []
        var needsReset = false
    }

    public func notify(queue index: Int) {
        var aftermath = Aftermath()
        // At the time of the notification no more chains than the queue's size can wait; later ones have their own.
        var chains = 0
        while chains < Int(Self.queueSize), serveOne(index, &aftermath) { chains += 1 }
        guard let signals = aftermath.signals else { return }
        for queue in aftermath.used { signals.usedBuffer(queue: queue) }
        if aftermath.needsReset { signals.needsReset() }
    }

    /// Serves one chain. False if there is none, or the queue is of no use.
    private func serveOne(_ index: Int, _ aftermath: inout Aftermath) -> Bool {
        let (isServed, isReportOver) = monitor.withLock { state in
            (serve(index, &state, &aftermath), state.window.map { !$0.isPending } ?? false)
        }
        if isReportOver { monitor.wakeAll() }
        return isServed
    }

    /// Takes one chain off a queue, uses it, and gives it back.
    private func serve(_ index: Int, _ state: inout State, _ aftermath: inout Aftermath) -> Bool {
        guard !state.isBroken, state.queues.indices.contains(index), let queue = state.queues[index] else {
            return false
        }
        aftermath.signals = state.signals
        let isBitmap = index == state.bitmapQueue
        guard isBitmap || index == Queue.inflate || index == Queue.deflate else {
            state.counters.strayNotifications &+= 1
            return false
        }
        do throws(VirtQueueError) {
            guard let chain = try queue.popChain() else { return false }
            if isBitmap {
                takeReport(chain, &state, &aftermath)
            } else {
                let direction: PageLists.Direction = index == Queue.inflate ? .inflate : .deflate
                state.lists.accept(chain, direction, ram: ram, &state.counters)
            }
            queue.push(head: chain.head, written: 0)
            if queue.wantsInterrupt { aftermath.used.insert(index) }
            return true
        } catch {
            state.counters.brokenQueues &+= 1
            state.isBroken = true
            state.window?.discard()
            aftermath.needsReset = true
            return false
        }
    }

    private func takeReport(_ chain: DescriptorChain, _ state: inout State, _ aftermath: inout Aftermath) {
        state.counters.reportChains &+= 1
        guard var window = state.window else {
            state.counters.lateChains &+= 1
            return
        }
        switch window.accept(chain, ram: ram, notRAM: &state.counters.reportedPagesNotRAM) {
        case .taken: break
        case .stale: state.counters.staleChains &+= 1
        case .late: state.counters.lateChains &+= 1
        case .misplaced: state.counters.misplacedReportChains &+= 1
        case .malformed:
            state.counters.malformedReportChains &+= 1
            state.counters.reportsVoid &+= 1
            window.discard()
        case .failed:
            state.counters.reportsFailed &+= 1
            window.discard()
        case .last where state.isPoisoning:  // W6: skipped pages would not read as the guest expects.
            // It was not so when the window was opened, or the host did not ask for the refusal.
            state.counters.reportsVoid &+= 1
            window.discard()
        case .last:
            let balloon = balloonPages(&state, &aftermath)
            // A deflate queue that broke just now ends the report, too.
            if state.isBroken {
                window.discard()
                break
            }
            state.counters.balloonPagesReported &+= UInt64(balloon?.population ?? 0)
            state.counters.reportsCompleted &+= 1
            window.complete(adding: balloon)  // W4: that is all: no page is discarded or written because of a bit.
        }
        state.window = window
    }

    /// The pages of the balloon, if they may be masked like free ones (rule W5): the guest does not use a page of the
    /// balloon before it has told so, and all that it has told is known.
    private func balloonPages(_ state: inout State, _ aftermath: inout Aftermath) -> PageBitmap? {
        let tells = state.features & BalloonFeature.mustTellHost != 0  // W5: without it pages come back unannounced.
        guard tells else { return nil }
        let isDrained = drainDeflate(&state, &aftermath)  // W5: what waits in the deflate queue is the guest's again.
        return isDrained ? state.lists.inflated : nil
    }

    /// Serves the deflate queue until it is empty. False if it is not: it broke, or it fills as fast as it is emptied.
    private func drainDeflate(_ state: inout State, _ aftermath: inout Aftermath) -> Bool {
        // A driver that does not have the queue cannot take pages back, nor is it one that gave any.
        guard Queue.deflate < state.queues.count, state.queues[Queue.deflate] != nil else { return false }
        for _ in 0...Int(Self.queueSize) where !serve(Queue.deflate, &state, &aftermath) { return !state.isBroken }
        return false
    }

    // MARK: - Saved state

    private static let stateVersion: UInt8 = 1

    /// Saves the configuration and the balloon's pages, never an open window: the request is the source's.
    public func save(into encoder: inout StateEncoder) {
        monitor.withLock { state in
            encoder.put(Self.stateVersion)
            encoder.put(state.target)
            encoder.put(state.actual)
            encoder.put(state.poison)
            encoder.put(state.nextRequest)
            state.lists.encode(into: &encoder)
        }
    }

    public func restore(from decoder: inout StateDecoder) throws(StateError) {
        guard try decoder.take(UInt8.self) == Self.stateVersion else { throw StateError("unknown balloon version") }
        let target = try decoder.take(UInt32.self), actual = try decoder.take(UInt32.self)
        let poison = try decoder.take(UInt32.self), nextRequest = try decoder.take(UInt32.self)
        guard nextRequest >= Self.firstRequest else { throw StateError("request \(nextRequest) is none") }
        let lists = try PageLists(from: &decoder, ram: ram)
        monitor.withLock { state in
            state.target = target
            state.actual = actual
            state.poison = poison
            state.command = Self.stop
            state.window = nil
            // Goes on where the source was: the driver tells requests apart by their ids.
            state.nextRequest = nextRequest
            state.lists = lists
        }
        monitor.wakeAll()
    }
}
