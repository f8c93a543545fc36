// SPDX-License-Identifier: Apache-2.0
internal import CLinux
public import GuestMemory
internal import Synchronization
public import Virtio

/// A virtio-vsock device (virtio 1.3, section 5.10) whose receive and transmit queues the kernel serves through
/// `/dev/vhost-vsock`. The event queue is served here.
///
/// Migration: while the machine is paused the kernel serves nothing. A restored device tells its driver
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: connections do not survive, listening sockets do, and the guest reads its
/// address anew, which may be another at the destination.
///
/// What the kernel logs are its writes to the used rings; its vhost-vsock passes no log for the buffers themselves.
/// `ReceiveHandover` knows which they were.
///
/// Thread rules: every method may be called from any thread; those of `VirtioDevice` as that protocol says.
@safe public final class VsockDevice: VirtioDevice {
    private struct State {
        /// Receive, transmit and event queue, while the driver is active.
        var queues: [VirtQueue?] = []
        var signals: DeviceSignals?
        var isMachineRunning = false
        /// The kernel serves the queues.
        var isServed = false
        /// Present while the kernel serves them, or is about to.
        var listener: Listener?
        /// The driver has to hear that its connections are gone.
        var owesReset = false
    }

    /// The guest's address.
    public let cid: UInt32
    private let memory: GuestMemory
    private let vhost: Mutex<VhostVsock?>
    private let state = Mutex(State())

    /// `cid` is 3 up to 2^32 - 2, and belongs to one guest of this host at a time.
    public init(memory: GuestMemory, cid: UInt32) throws(VhostError) {
        guard cid >= 3, cid < .max else { throw VhostError(call: "the vsock address \(cid)", errno: EINVAL) }
        self.memory = memory
        self.cid = cid
        let device = try VhostVsock(memory: memory, cid: cid)
        vhost = Mutex(device)
    }

    deinit { state.withLock { $0.listener?.end() } }

    // MARK: The device

    public var deviceID: UInt32 { 19 }
    /// Nothing but version 1: `ReceiveHandover` knows no indirect descriptors and no event index.
    public var offeredFeatures: UInt64 { VirtioFeature.version1 }
    public var queueSizes: [UInt16] { [128, 128, 16] }

    public func readConfiguration(offset: Int, count: Int) -> UInt64 {
        // The address, 64 bits.
        guard offset < 8 else { return 0 }
        return UInt64(cid) >> UInt64(8 * offset)
    }
    public func writeConfiguration(offset: Int, count: Int, value: UInt64) {}

    public func activate(features: UInt64, queues: [VirtQueue?], signals: DeviceSignals) {
        state.withLock { state in
            state.queues = queues
            state.signals = signals
            if state.owesReset { sendReset(&state) }
            update(&state)
        }
    }

    public func reset() {
        state.withLock { state in
            let wasRunning = state.isMachineRunning
            state.isMachineRunning = false
            update(&state)
            state.isMachineRunning = wasRunning
            (state.queues, state.signals, state.owesReset) = ([], nil, false)
        }
    }

    public func notify(queue: Int) {
        // New buffers in the event queue are for the day they are needed.
        guard queue < 2 else { return }
        vhost.withLock { $0?.kick(queue) }
    }

    public func save(into encoder: inout StateEncoder) { encoder.put(UInt8(1)) }

    public func restore(from decoder: inout StateDecoder) throws(StateError) {
        guard try decoder.take(UInt8.self) == 1 else { throw StateError("unknown version of the vsock device") }
        state.withLock { $0.owesReset = true }
    }

    /// virtio 1.3, section 5.10.6.6: the driver drops all connections and reads its address again.
    private func sendReset(_ state: inout State) {
        guard state.queues.count > 2, let events = state.queues[2], let chain = try? events.popChain() else { return }
        state.owesReset = false
        let transportReset: [UInt8] = [0, 0, 0, 0]
        events.push(head: chain.head, written: chain.write(transportReset))
        state.signals?.usedBuffer(queue: 2)
    }

    // MARK: The machine

    /// To be called before the vCPUs run for the first time: what may fail for want of something fails here.
    public func prepare() throws(VhostError) {
        try state.withLock { (state) throws(VhostError) in
            guard state.listener == nil, state.queues.prefix(2).compactMap({ $0 }).count == 2,
                let signals = state.signals, let vhost = vhost.withLock({ $0 })
            else { return }
            state.listener = try Listener(vhost, signals)
        }
    }

    /// To be called when the vCPUs begin to run.
    public func machineRuns() {
        state.withLock { state in
            state.isMachineRunning = true
            update(&state)
        }
    }

    /// To be called when the vCPUs stand still. When it returns, nothing here writes guest memory.
    public func machineStands() {
        state.withLock { state in
            state.isMachineRunning = false
            update(&state)
        }
    }

    /// Gives the address free. The device does nothing from here on.
    public func close() {
        machineStands()
        vhost.withLock { $0 = nil }
    }

    /// Starts or stops the kernel, according to what is wanted.
    private func update(_ state: inout State) {
        let queues = state.queues.prefix(2).compactMap { $0 }
        let shallServe = state.isMachineRunning && queues.count == 2
        if !shallServe {
            state.listener?.end()
            state.listener = nil
        }
        guard shallServe != state.isServed, let vhost = vhost.withLock({ $0 }) else { return }
        do throws(VhostError) {
            if shallServe {
                // Before the kernel starts: where there is no room for a thread, nothing has begun.
                if state.listener == nil, let signals = state.signals { state.listener = try Listener(vhost, signals) }
                try vhost.start(
                    queues.map { queue in
                        let saved = queue.state
                        return VhostRing(
                            size: queue.size, descriptors: saved.descriptors, available: saved.available, used: saved.used,
                            nextAvailable: saved.nextAvailable)
                    })
                state.isServed = true
            } else {
                state.isServed = false
                let bases = try vhost.stop(rings: 2)
                for (queue, base) in zip(queues, bases) {
                    // The kernel goes on from the used index that it finds in guest memory.
                    let used = try? memory.loadAcquire16(GuestAddress(queue.state.used.rawValue &+ 2))
                    queue.moveOn(nextAvailable: base, nextUsed: used ?? 0)
                }
            }
        } catch {
            // A guest whose rings the kernel does not take has a broken device, and only that.
            state.listener?.end()
            state.listener = nil
            state.signals?.needsReset()
        }
    }

    // MARK: Dirty pages

    /// Starts logging. What was written before is forgotten.
    public func startLog() throws(VhostError) {
        guard let vhost = vhost.withLock({ $0 }) else { return }
        try vhost.setLogging(true)
        vhost.receive.setLogging(true)
        vhost.takeLog { _, _ in }
    }

    public func endLog() {
        guard let vhost = vhost.withLock({ $0 }) else { return }
        vhost.receive.setLogging(false)
        try? vhost.setLogging(false)
    }

    /// ORs what was written since the last time into `bitmap`.
    public func collectDirty(into bitmap: PageBitmap) {
        guard let vhost = vhost.withLock({ $0 }) else { return }
        vhost.takeLog { index, bits in if index < bitmap.wordCount { bitmap.merge(bits, intoWord: index) } }
        vhost.receive.collect(into: bitmap)
    }
}

/// The thread that passes the kernel's calls on as interrupts.
private final class Listener: Sendable {
    private final class Body {
        let run: () -> Void
        init(_ run: @escaping () -> Void) { self.run = run }
    }
    private let ending: Int32
    private let thread: pthread_t

    init(_ vhost: VhostVsock, _ signals: DeviceSignals) throws(VhostError) {
        let ending = eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK))
        guard ending >= 0 else { throw VhostError(call: "eventfd", errno: lacuna_errno()) }
        let body = Body {
            while true {
                var polled = (vhost.calls + [ending]).map { pollfd(fd: $0, events: Int16(POLLIN), revents: 0) }
                // The kernel may have looked for a buffer in vain, and the driver kept silent about one meanwhile.
                let limit: Int32 = vhost.receive.isExhausted ? 10 : -1
                if unsafe poll(&polled, nfds_t(polled.count), limit) == 0 {
                    vhost.offerReceiveBuffers()
                    continue
                }
                var count: UInt64 = 0
                for index in 0..<2 where polled[index].revents != 0 {
                    unsafe _ = read(vhost.calls[index], &count, 8)
                    guard index == 0 else {
                        signals.usedBuffer(queue: index)
                        continue
                    }
                    // The driver may have been told to keep silent until now.
                    vhost.offerReceiveBuffers()
                    if vhost.receive.wantsInterrupt { signals.usedBuffer(queue: 0) }
                }
                if polled[2].revents != 0 { return }
            }
        }
        var thread = pthread_t()
        let argument = unsafe Unmanaged.passRetained(body)
        let result = unsafe pthread_create(
            &thread, nil,
            { argument in
                unsafe lacuna_name_thread("vsock")
                unsafe Unmanaged<Body>.fromOpaque(argument!).takeRetainedValue().run()
                return nil
            }, argument.toOpaque())
        guard result == 0 else {
            unsafe argument.release()
            CLinux.close(ending)
            throw VhostError(call: "pthread_create", errno: result)
        }
        self.ending = ending
        self.thread = thread
    }

    /// Ends the thread and waits for it. It holds no lock that a caller could hold. To be called once.
    func end() {
        var one: UInt64 = 1
        unsafe _ = write(ending, &one, 8)
        pthread_join(thread, nil)
        CLinux.close(ending)
    }
}
