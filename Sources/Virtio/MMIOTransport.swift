// SPDX-License-Identifier: Apache-2.0
public import GuestMemory
internal import Synchronization

/// The virtio-mmio transport, version 2 (virtio 1.3, section 4.2), in front of one device.
///
/// Thread rules: every method may be called from any thread. Register accesses run one at a time and call the device
/// on the calling thread: a write of `QueueNotify` returns when the device has served the queue, and a reset waits for
/// that. The interrupt status and acknowledge registers and the configuration space do not wait for other registers.
/// Locks are taken in the order transport, device, interrupt line; a device's signals touch the last one only.
///
/// Error model: an access that makes no sense is ignored or reads as 0, and is counted. Nothing a driver writes traps.
public final class MMIOTransport: Sendable {
    private struct Queue {
        var registers: VirtQueueState
        var isReady = false
        /// Set while the device is active.
        var live: VirtQueue?
    }

    private struct State {
        var deviceFeaturesSelect: UInt32 = 0
        var driverFeaturesSelect: UInt32 = 0
        var driverFeatures: UInt64 = 0
        var queueSelect: UInt32 = 0
        var status: DeviceStatus = []
        /// A queue could not be set up: the device cannot start.
        var hasRefusedQueue = false
        var queues: [Queue]

        init(sizes: [UInt16]) {
            queues = sizes.map { size in
                Queue(
                    registers: VirtQueueState(
                        size: UInt32(size), descriptors: GuestAddress(0), available: GuestAddress(0),
                        used: GuestAddress(0)))
            }
        }

        /// The selected queue, if there is one with that number.
        var selected: Int? { queueSelect < UInt32(queues.count) ? Int(queueSelect) : nil }
    }

    public let device: any VirtioDevice
    private let memory: GuestMemory
    private let sizes: [UInt16]
    private let line: InterruptLine
    private let state: Mutex<State>
    private let tally = Mutex(MMIOCounters())

    /// - Parameter interrupt: raises an edge on the device's interrupt line. It is called from any thread, possibly
    ///   inside a call of `read` or `write`, with locks held: it must not call back into the transport or the device.
    public init(device: any VirtioDevice, memory: GuestMemory, interrupt: @escaping @Sendable () -> Void) {
        self.device = device
        self.memory = memory
        sizes = device.queueSizes
        line = InterruptLine(interrupt: interrupt)
        state = Mutex(State(sizes: sizes))
    }

    /// What drivers did wrong so far.
    public var counters: MMIOCounters { tally.withLock { $0 } }

    /// The device status, as the register reads.
    public var status: DeviceStatus {
        let status = state.withLock { $0.status }
        return line.current.needsReset ? status.union(.needsReset) : status
    }

    /// Interrupts again if an interrupt is pending, and lets the device look at every queue. Harmless at any time. To
    /// be called after a restore, when the interrupt controller has its state and before the vCPUs run: an edge or a
    /// notification that was lost between the two machines is made up for.
    public func kick() {
        line.repeatPending()
        state.withLock { state in
            guard isServing(state) else { return }
            for index in state.queues.indices where state.queues[index].live != nil { device.notify(queue: index) }
        }
    }

    /// A driver's read of `size` bytes at `offset` from the start of the register window.
    public func read(offset: UInt64, size: Int) -> UInt64 {
        if offset >= MMIO.configuration {
            guard let place = configurationOffset(offset, size) else { return 0 }
            let value = device.readConfiguration(offset: place, count: size)
            return size < 8 ? value & (1 << UInt64(8 * size) - 1) : value
        }
        // Section 4.2.2.2: the registers are read and written with 32 bits, aligned.
        guard size == 4, let register = MMIO.Register(rawValue: offset) else {
            count(\.badAccesses)
            return 0
        }
        return UInt64(read(register))
    }

    /// A driver's write of the low `size` bytes of `value` at `offset` from the start of the register window.
    public func write(offset: UInt64, size: Int, value: UInt64) {
        if offset >= MMIO.configuration {
            guard let place = configurationOffset(offset, size) else { return }
            return device.writeConfiguration(offset: place, count: size, value: value)
        }
        guard size == 4, let register = MMIO.Register(rawValue: offset) else { return count(\.badAccesses) }
        write(register, UInt32(truncatingIfNeeded: value))
    }

    private func configurationOffset(_ offset: UInt64, _ size: Int) -> Int? {
        guard size == 1 || size == 2 || size == 4 || size == 8, offset % UInt64(size) == 0, offset < MMIO.windowBytes
        else {
            count(\.badAccesses)
            return nil
        }
        return Int(offset - MMIO.configuration)
    }

    private func count(_ counter: WritableKeyPath<MMIOCounters, UInt64>) {
        tally.withLock { $0[keyPath: counter] &+= 1 }
    }

    private func read(_ register: MMIO.Register) -> UInt32 {
        switch register {
        case .magicValue: return MMIO.magic
        case .version: return MMIO.version
        case .deviceID: return device.deviceID
        case .vendorID: return MMIO.vendor
        case .interruptStatus: return line.current.pending
        case .configurationGeneration: return line.current.generation
        case .status: return status.rawValue
        // There are no shared memory regions: length and base are all ones (section 4.2.2).
        case .sharedMemoryLengthLow, .sharedMemoryLengthHigh, .sharedMemoryBaseLow, .sharedMemoryBaseHigh:
            return .max
        case .deviceFeatures:
            let half = state.withLock { $0.deviceFeaturesSelect }
            // 64 feature bits: the words above are empty.
            return half > 1 ? 0 : UInt32(truncatingIfNeeded: device.offeredFeatures >> (32 * UInt64(half)))
        case .queueSizeMax: return state.withLock { $0.selected.map { UInt32(sizes[$0]) } ?? 0 }
        case .queueReady:
            return state.withLock { state in state.selected.map { state.queues[$0].isReady ? 1 : 0 } ?? 0 }
        case .deviceFeaturesSelect, .driverFeatures, .driverFeaturesSelect, .queueSelect, .queueSize, .queueNotify,
            .interruptAcknowledge, .queueDescriptorsLow, .queueDescriptorsHigh, .queueDriverLow, .queueDriverHigh,
            .queueDeviceLow, .queueDeviceHigh, .sharedMemorySelect:
            // Write-only.
            count(\.badAccesses)
            return 0
        }
    }

    private func write(_ register: MMIO.Register, _ value: UInt32) {
        // Not behind the lock: an interrupt handler must not wait for a queue that another vCPU has served.
        if register == .interruptAcknowledge { return line.acknowledge(value) }
        state.withLock { state in
            switch register {
            case .deviceFeaturesSelect: state.deviceFeaturesSelect = value
            case .driverFeaturesSelect: state.driverFeaturesSelect = value
            case .driverFeatures: writeFeatures(&state, value)
            case .queueSelect: state.queueSelect = value
            case .queueSize: configure(&state) { $0.size = value }
            case .queueReady: writeReady(&state, value)
            case .queueNotify: notify(state, value)
            case .status: writeStatus(&state, value)
            case .queueDescriptorsLow: configure(&state) { $0.descriptors = $0.descriptors.with(low: value) }
            case .queueDescriptorsHigh: configure(&state) { $0.descriptors = $0.descriptors.with(high: value) }
            case .queueDriverLow: configure(&state) { $0.available = $0.available.with(low: value) }
            case .queueDriverHigh: configure(&state) { $0.available = $0.available.with(high: value) }
            case .queueDeviceLow: configure(&state) { $0.used = $0.used.with(low: value) }
            case .queueDeviceHigh: configure(&state) { $0.used = $0.used.with(high: value) }
            // There is no region to select.
            case .sharedMemorySelect: break
            case .interruptAcknowledge: break
            case .magicValue, .version, .deviceID, .vendorID, .deviceFeatures, .queueSizeMax, .interruptStatus,
                .sharedMemoryLengthLow, .sharedMemoryLengthHigh, .sharedMemoryBaseLow, .sharedMemoryBaseHigh,
                .configurationGeneration:
                // Read-only.
                count(\.badAccesses)
            }
        }
    }

    private func writeFeatures(_ state: inout State, _ value: UInt32) {
        // Section 3.1.1: not after FEATURES_OK.
        guard !state.status.contains(.featuresOK) else { return count(\.misplacedWrites) }
        switch state.driverFeaturesSelect {
        case 0: state.driverFeatures = state.driverFeatures & ~0xffff_ffff | UInt64(value)
        case 1: state.driverFeatures = state.driverFeatures & 0xffff_ffff | UInt64(value) << 32
        // A driver that knows more words than the device writes zeroes there.
        default: if value != 0 { count(\.misplacedWrites) }
        }
    }

    /// Changes a register of the selected queue, if its state allows.
    private func configure(_ state: inout State, _ change: (inout VirtQueueState) -> Void) {
        guard let index = state.selected, !state.queues[index].isReady, !state.status.contains(.driverOK) else {
            return count(\.misplacedWrites)
        }
        change(&state.queues[index].registers)
    }

    private func writeReady(_ state: inout State, _ value: UInt32) {
        guard let index = state.selected else { return count(\.misplacedWrites) }
        if value == 0 {
            state.queues[index].isReady = false
            // The device keeps its reference but gets nothing out of it any more.
            state.queues[index].live?.disable()
            state.queues[index].live = nil
            return
        }
        guard value == 1, !state.queues[index].isReady, !state.status.contains(.driverOK) else {
            return count(\.misplacedWrites)
        }
        do throws(VirtQueueError) {
            _ = try makeQueue(state, index)
            state.queues[index].isReady = true
        } catch {
            // Drivers need not read the register back, so this must come up again at DRIVER_OK.
            state.hasRefusedQueue = true
            count(\.refusedQueues)
        }
    }

    private func makeQueue(_ state: State, _ index: Int) throws(VirtQueueError) -> VirtQueue {
        try VirtQueue(
            memory: memory, state: state.queues[index].registers, maximumSize: sizes[index],
            features: state.driverFeatures)
    }

    private func isServing(_ state: State) -> Bool {
        state.status.contains(.driverOK) && !state.status.contains(.failed) && !line.current.needsReset
    }

    private func notify(_ state: State, _ value: UInt32) {
        guard isServing(state), value < UInt32(state.queues.count), state.queues[Int(value)].live != nil else {
            return count(\.misplacedWrites)
        }
        device.notify(queue: Int(value))
    }

    /// The status state machine (section 2.1 and 3.1.1).
    private func writeStatus(_ state: inout State, _ value: UInt32) {
        if value == 0 { return reset(&state) }
        let wanted = DeviceStatus(rawValue: value).intersection(.settable)
        // Bits are only ever added; a driver that gave up can only reset.
        guard wanted.isSuperset(of: state.status), !state.status.contains(.failed) else {
            return count(\.misplacedWrites)
        }
        state.status.formUnion(wanted.intersection([.acknowledge, .driver, .failed]))
        if state.status.contains(.failed) { return }
        if wanted.contains(.featuresOK), !state.status.contains(.featuresOK) {
            if acceptsFeatures(state) {
                state.status.insert(.featuresOK)
            } else {
                // The driver reads the bit back, finds it clear and gives up (section 3.1.1, step 6).
                count(\.refusedFeatures)
            }
        }
        guard wanted.contains(.driverOK), !state.status.contains(.driverOK) else { return }
        guard state.status.contains(.featuresOK) else { return count(\.misplacedWrites) }
        state.status.insert(.driverOK)
        do throws(VirtQueueError) {
            if state.hasRefusedQueue { return line.refuse() }
            try activate(&state)
            // Linux makes the balloon's first buffer of statistics available, and notifies, before DRIVER_OK. A device
            // does not look then (section 3.1.2), and nobody notifies again.
            for index in state.queues.indices where state.queues[index].live?.isEmpty == false {
                device.notify(queue: index)
            }
        } catch {
            // Cannot be: the queues were checked when they were made ready, and nothing could change since.
            line.refuse()
        }
    }

    private func acceptsFeatures(_ state: State) -> Bool {
        let features = state.driverFeatures
        return features & ~device.offeredFeatures == 0 && features & VirtioFeature.version1 != 0
            && device.accepts(features: features)
    }

    private func activate(_ state: inout State) throws(VirtQueueError) {
        var queues: [VirtQueue?] = []
        for index in state.queues.indices {
            queues.append(state.queues[index].isReady ? try makeQueue(state, index) : nil)
        }
        for index in state.queues.indices { state.queues[index].live = queues[index] }
        device.activate(features: state.driverFeatures, queues: queues, signals: line.begin())
    }

    private func reset(_ state: inout State) {
        // First the queues and signals: whatever threads the device has cannot reach the guest from here on.
        for queue in state.queues { queue.live?.disable() }
        line.reset()
        state = State(sizes: sizes)
        device.reset()
    }
}

// MARK: - Saved state

extension MMIOTransport {
    private static let stateVersion: UInt8 = 1

    /// Appends the transport's and the device's state. The vCPUs are stopped.
    public func save(into encoder: inout StateEncoder) {
        state.withLock { state in
            encoder.put(Self.stateVersion)
            encoder.put(device.deviceID)
            encoder.put(state.deviceFeaturesSelect)
            encoder.put(state.driverFeaturesSelect)
            encoder.put(state.driverFeatures)
            encoder.put(state.queueSelect)
            encoder.put(state.status.rawValue)
            encoder.put(state.hasRefusedQueue)
            let line = line.current
            encoder.put(line.pending)
            encoder.put(line.generation)
            encoder.put(line.needsReset)
            encoder.put(UInt16(state.queues.count))
            for queue in state.queues {
                encoder.put(queue.isReady)
                (queue.live?.state ?? queue.registers).encode(into: &encoder)
            }
            device.save(into: &encoder)
        }
    }

    /// Takes the state that `save` wrote, untrusted, and activates the device if it was active. Whatever was there
    /// before is gone; after an error the device is as after a reset.
    ///
    /// The driver is told that the configuration changed. The interrupt for it, and any that was pending, is raised
    /// here; `kick` raises it again, for machines that restore the interrupt controller only after the devices.
    public func restore(from decoder: inout StateDecoder) throws(StateError) {
        try state.withLock { (state) throws(StateError) in
            reset(&state)
            do throws(StateError) {
                try load(&state, from: &decoder)
            } catch {
                reset(&state)
                throw error
            }
        }
    }

    private func load(_ state: inout State, from decoder: inout StateDecoder) throws(StateError) {
        guard try decoder.take(UInt8.self) == Self.stateVersion else { throw StateError("unknown transport version") }
        guard try decoder.take(UInt32.self) == device.deviceID else { throw StateError("another kind of device") }
        state.deviceFeaturesSelect = try decoder.take()
        state.driverFeaturesSelect = try decoder.take()
        state.driverFeatures = try decoder.take()
        state.queueSelect = try decoder.take()
        let status = DeviceStatus(rawValue: try decoder.take())
        state.hasRefusedQueue = try decoder.takeBool()
        let pending = try decoder.take(UInt32.self), generation = try decoder.take(UInt32.self)
        let needsReset = try decoder.takeBool()
        guard status.isSubset(of: .settable), status.contains(.featuresOK) || !status.contains(.driverOK) else {
            throw StateError("device status \(status.rawValue) is impossible")
        }
        guard pending & ~(InterruptLine.usedBuffer | InterruptLine.configurationChange) == 0 else {
            throw StateError("interrupt status \(pending) is impossible")
        }
        guard !status.contains(.featuresOK) || acceptsFeatures(state) else {
            throw StateError("features 0x" + String(state.driverFeatures, radix: 16) + " are not all offered here")
        }
        guard try decoder.take(UInt16.self) == UInt16(sizes.count) else { throw StateError("another number of queues") }
        let isActive = status.contains(.driverOK) && !needsReset && !state.hasRefusedQueue
        for index in sizes.indices {
            state.queues[index].isReady = try decoder.takeBool()
            state.queues[index].registers = try VirtQueueState(from: &decoder)
            guard state.queues[index].isReady else { continue }
            do throws(VirtQueueError) { _ = try makeQueue(state, index) } catch {
                throw StateError("queue \(index): \(error)")
            }
        }
        try device.restore(from: &decoder)

        state.status = status
        line.restore(
            pending: isActive ? pending | InterruptLine.configurationChange : pending,
            generation: generation &+ 1, needsReset: needsReset || state.hasRefusedQueue && status.contains(.driverOK))
        guard isActive else { return }
        do throws(VirtQueueError) { try activate(&state) } catch { throw StateError("queues: \(error)") }
        line.repeatPending()
    }
}

extension GuestAddress {
    fileprivate func with(low: UInt32) -> GuestAddress { GuestAddress(rawValue & ~0xffff_ffff | UInt64(low)) }
    fileprivate func with(high: UInt32) -> GuestAddress { GuestAddress(rawValue & 0xffff_ffff | UInt64(high) << 32) }
}
