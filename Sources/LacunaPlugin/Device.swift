// SPDX-License-Identifier: Apache-2.0
internal import Balloon
internal import CLacuna
internal import GuestMemory
internal import Synchronization
internal import Virtio

/// A device of the ABI: the balloon, and the part of a transport that every VMM has to keep for it.
///
/// Calls that change the set-up have the device to themselves (`gate`); the others run beside each other. Waiting for a
/// report happens outside, so that a driver's reset never waits for it.
final class PluginDevice: @unchecked Sendable {
    // Sendable: what is not constant is guarded by `gate` or a mutex.

    static let defaultLimit: UInt64 = 1 << 40
    static let maximumLimit: UInt64 = 1 << 46
    static let maximumRegions = 4096

    let host: Host
    private let limit: UInt64
    let gate = ReadWriteLock()

    // Guarded by `gate`.
    private(set) var memory: GuestMemory
    private(set) var hasMemory = false
    private(set) var balloon: BalloonDevice
    private var features: UInt64?
    private var queues: [VirtQueueState?]
    private var live: [VirtQueue?]
    private(set) var isActive = false

    struct Tracking {
        var isArmed = false
        /// Counts merges and disarmings: a window belongs to one generation.
        var generation: UInt64 = 0
        /// The handle of the open window.
        var window: UInt64?
    }
    let tracking = Mutex(Tracking())
    /// Which activation's signals are alive.
    private let epoch = Atomic<UInt64>(0)

    init(host: Host, limit: UInt64, features: UInt64) throws(PluginError) {
        self.host = host
        self.limit = limit
        memory = try Self.standIn()
        // Split rings: lacuna_queue has no place for the wrap counters of packed ones.
        let offered = features == 0 ? BalloonFeature.standard : features & ~VirtioFeature.packedRing
        // A driver that another process's device served knows the ids of that one.
        balloon = BalloonDevice(memory: memory, features: offered, firstRequest: .random(in: 2...(.max))) {
            host.log(LACUNA_LOG_WARNING, $0)
        }
        let count = balloon.queueSizes.count
        queues = Array(repeating: nil, count: count)
        live = Array(repeating: nil, count: count)
    }

    /// Before there is memory: a page frame that no queue can be in.
    private static func standIn() throws(PluginError) -> GuestMemory {
        do throws(GuestMemoryError) {
            return try GuestMemory(ranges: [GuestRange(start: GuestAddress(0), size: 64 * UInt64(pageSize))])
        } catch { throw PluginError(LACUNA_ERROR_RESOURCES, "\(error)") }
    }

    var queueCount: Int { balloon.queueSizes.count }
    var offeredFeatures: UInt64 { balloon.offeredFeatures }

    func checkQueue(_ index: UInt32) throws(PluginError) -> Int {
        guard index < UInt32(queueCount) else { throw .argument("there is no queue \(index)") }
        return Int(index)
    }

    // MARK: - Memory (writers)

    func setMemory(_ mappings: [(range: GuestRange, host: UnsafeMutableRawPointer)]) throws(PluginError) {
        let host = host, fresh: GuestMemory
        var hooks = BorrowedMemoryHooks(discard: nil) { host.markDirty($0.rawValue, $1) }
        if host.canDiscard { hooks.discard = { host.discard($0.rawValue, $1) } }
        do throws(GuestMemoryError) {
            fresh = try unsafe GuestMemory(borrowing: mappings, limit: limit, hooks: hooks)
        } catch { throw PluginError(LACUNA_ERROR_MEMORY, "\(error)") }
        // Looked at before anything is changed: the queues as they are now, in the new memory.
        if isActive { for index in live.indices { if let queue = live[index] { _ = try make(queue.state, fresh) } } }
        replace(memory: fresh, keepingPages: isActive)
        hasMemory = true
        if isActive { try start() }
    }

    /// Puts another balloon in the place of this one, which then touches no memory any more.
    private func replace(memory fresh: GuestMemory, keepingPages: Bool) {
        for index in live.indices {
            guard let queue = live[index] else { continue }
            queue.disable()
            queues[index] = queue.state
            // A buffer that was taken and not given back, that of the statistics, is taken again: served in order.
            queues[index]?.nextAvailable = queue.state.nextUsed
            live[index] = nil
        }
        epoch.add(1, ordering: .sequentiallyConsistent)
        let old = balloon
        memory = fresh
        balloon = BalloonDevice(memory: fresh, succeeding: old, keepingPages: keepingPages)
        // Ends what waits for a report, and waits for what is in the middle of a chain.
        old.reset()
    }

    private func make(_ state: VirtQueueState, _ memory: GuestMemory) throws(PluginError) -> VirtQueue {
        do throws(VirtQueueError) {
            return try VirtQueue(
                memory: memory, state: state, maximumSize: balloon.queueSizes[0], features: features ?? 0)
        } catch { throw PluginError(LACUNA_ERROR_QUEUE, "\(error)") }
    }

    // MARK: - The driver (writers)

    func setFeatures(_ wanted: UInt64) throws(PluginError) {
        guard !isActive else { throw .state("the driver is active; it has to reset the device first") }
        try checkFeatures(wanted)
        features = wanted
    }

    private func checkFeatures(_ wanted: UInt64) throws(PluginError) {
        guard wanted & ~offeredFeatures == 0 else {
            throw PluginError(
                LACUNA_ERROR_FEATURES, "features 0x\(String(wanted & ~offeredFeatures, radix: 16)) were not offered")
        }
        guard wanted & VirtioFeature.version1 != 0 else {
            throw PluginError(LACUNA_ERROR_FEATURES, "VIRTIO_F_VERSION_1 is required")
        }
        guard balloon.accepts(features: wanted) else {
            throw PluginError(LACUNA_ERROR_FEATURES, "these features do not go together")
        }
    }

    func setQueue(_ index: Int, _ state: VirtQueueState?) throws(PluginError) {
        guard !isActive else { throw .state("the driver is active; it has to reset the device first") }
        guard hasMemory else { throw .state("there is no memory yet; set it first") }
        if let state { _ = try make(state, memory) }
        queues[index] = state
    }

    /// Reader.
    func queueState(_ index: Int) -> VirtQueueState? { live[index]?.state ?? queues[index] }

    func activate() throws(PluginError) {
        guard !isActive else { throw .state("the driver is active already") }
        guard hasMemory, features != nil else { throw .state("memory and features have to be set first") }
        try start()
        isActive = true
    }

    private func start() throws(PluginError) {
        var made: [VirtQueue?] = []
        for state in queues { made.append(try state.map { state throws(PluginError) in try make(state, memory) }) }
        live = made
        let mine = epoch.add(1, ordering: .sequentiallyConsistent).newValue
        let isCurrent: @Sendable () -> Bool = { [self] in epoch.load(ordering: .sequentiallyConsistent) == mine }
        let host = host
        balloon.activate(
            features: features ?? 0, queues: live,
            signals: DeviceSignals(
                usedBuffer: { if isCurrent() { host.signalQueue($0) } },
                configurationChanged: { if isCurrent() { host.signalConfiguration() } },
                needsReset: {
                    guard isCurrent() else { return }
                    host.signalNeedsReset()
                    host.signalConfiguration()
                }))
        // A new target or the end of a request may have come with nobody there to be told.
        host.signalConfiguration()
    }

    func reset() {
        replace(memory: memory, keepingPages: false)
        balloon.writeConfiguration(offset: 4, count: 4, value: 0)
        balloon.writeConfiguration(offset: 12, count: 4, value: 0)
        for index in queues.indices { queues[index] = nil }
        features = nil
        isActive = false
    }

    /// Ends everything; `gate` is held for writing, and the handle is gone.
    func end() {
        reset()
        host.end()
        if let standIn = try? Self.standIn() { replace(memory: standIn, keepingPages: false) }
        hasMemory = false
    }

    // MARK: - State (writers)

    private static let stateVersion: UInt8 = 1

    func save() -> [UInt8] {
        var encoder = StateEncoder()
        encoder.put(Self.stateVersion)
        encoder.put(isActive)
        encoder.put(features ?? 0)
        encoder.put(UInt16(queues.count))
        for index in queues.indices {
            let state = queueState(index)
            encoder.put(state != nil)
            state?.encode(into: &encoder)
        }
        balloon.save(into: &encoder)
        return encoder.bytes
    }

    func load(_ bytes: [UInt8]) throws(PluginError) {
        guard !isActive else { throw .state("the driver is active; reset the device first") }
        guard hasMemory else { throw .state("there is no memory yet; set it first") }
        reset()
        do {
            var decoder = StateDecoder(bytes)
            guard try decoder.take(UInt8.self) == Self.stateVersion else { throw StateError("another version") }
            let wasActive = try decoder.takeBool(), chosen = try decoder.take(UInt64.self)
            guard try decoder.take(UInt16.self) == UInt16(queues.count) else { throw StateError("other queues") }
            if chosen != 0 || wasActive {
                try checkFeatures(chosen)
                features = chosen
            }
            for index in queues.indices where try decoder.takeBool() {
                let state = try VirtQueueState(from: &decoder)
                _ = try make(state, memory)
                queues[index] = state
            }
            try balloon.restore(from: &decoder)
            try decoder.finish()
            if wasActive { try activate() }
        } catch {
            reset()
            let why = (error as? PluginError)?.message ?? "\(error)"
            throw PluginError(LACUNA_ERROR_CORRUPT, "the saved state is no state of this device: \(why)")
        }
        if !isActive { host.signalConfiguration() }
    }

    // MARK: - Tracking

    func endWindow() {
        tracking.withLock { $0.generation &+= 1 }
        balloon.closeWindow()
    }
}
