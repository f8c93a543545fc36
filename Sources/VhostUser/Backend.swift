// SPDX-License-Identifier: Apache-2.0
internal import Balloon
internal import GuestMemory
internal import Synchronization
internal import Virtio

/// The back end's side of the vhost-user protocol for one balloon, without its sockets: messages in, replies out.
///
/// Whatever changes the device's set-up only leaves a mark; `settle` then makes the device anew out of all that was
/// said. A front end may say it in any order, and in the middle of a migration.
///
/// Thread rules: the service's thread only.
final class Backend {
    /// The most bytes of guest-physical address space.
    private let addressLimit: UInt64
    private(set) var device: BalloonDevice
    /// The guest's memory; before the front end sent any, a stand-in that no ring can reach.
    private(set) var memory: GuestMemory
    private var table = MemoryTable()
    private var features: UInt64 = 0
    private var protocolFeatures: UInt64 = 0
    private var log: SharedDirtyLog?
    private var status: UInt8 = 0
    private(set) var rings: [Ring]
    let signals = SignalBox()
    /// What is live is not what the front end wants.
    private var isUnsettled = false
    /// The guest's driver may have begun anew.
    private var driverMayBeGone = false
    /// A driver was served, so that what it may be holding is known.
    private var hasServed = false
    /// The rings that the driver was last told with, as long as they are not stopped; none after its memory changed.
    private var toldRings: Set<Int> = []
    var complain: RateLimitedLog
    /// Figures for an operator.
    private(set) var messages: UInt64 = 0
    private(set) var refusedMessages: UInt64 = 0
    private(set) var frontEnds: UInt64 = 0

    init(
        features: UInt64, addressLimit: UInt64, log sink: @escaping @Sendable (String) -> Void
    ) throws(VhostUserFailure) {
        self.addressLimit = addressLimit
        complain = RateLimitedLog(sink)
        memory = try Self.standIn()
        // A packed ring does not say how far it got, so that a device that takes over could not know.
        // A driver that another process served knows the ids of that one: it would not look at the same id again, or
        // would answer it with what it has lying there.
        device = BalloonDevice(
            memory: memory, features: features & ~VirtioFeature.packedRing, firstRequest: .random(in: 2...(.max)), log: sink)
        rings = Array(repeating: Ring(), count: device.queueSizes.count)
    }

    private static func standIn() throws(VhostUserFailure) -> GuestMemory {
        do throws(GuestMemoryError) {
            return try GuestMemory(ranges: [GuestRange(start: GuestAddress(0), size: 64 * UInt64(pageSize))])
        } catch { throw VhostUserFailure("\(error)") }
    }

    /// Whether the device is before a driver.
    var isLive: Bool { rings.contains { $0.live != nil } }

    /// Why no report can be had, besides the device's own reasons.
    var refusal: String? {
        guard table.regions.isEmpty == false else { return "no front end has sent the guest's memory" }
        if let refusal = device.refusal { return refusal }
        guard signals.state.withLock({ $0.backendChannel != nil }) else {
            return "the front end takes no configuration changes (BACKEND_REQ was not negotiated)"
        }
        return nil
    }

    private var offeredFeatures: UInt64 {
        device.offeredFeatures | VhostFeature.logAll | VhostFeature.protocolFeatures
    }

    // MARK: - Messages

    /// Obeys one message. Returns the reply's payload, or nil if there is none.
    func handle(_ message: Message) -> [UInt8]? {
        var reader = PayloadReader(message)
        messages &+= 1
        do throws(Refusal) {
            guard let request = Request(rawValue: message.request) else { throw Refusal("it is not known here") }
            if let payload = try obey(request, message, &reader) { return payload }
            if request == .setLogBase, protocolFeatures & ProtocolFeature.sharedLog != 0 { return word(0) }
            return acknowledgement(message, 0)
        } catch {
            refusedMessages &+= 1
            complain("message \(message.request) refused: \(error)")
            // Where the front end waits for an answer it gets one: an empty payload says that there is none.
            if Request(rawValue: message.request)?.hasReply == true { return [] }
            if message.request == Request.setLogBase.rawValue, protocolFeatures & ProtocolFeature.sharedLog != 0 {
                return word(1)
            }
            return acknowledgement(message, 1)
        }
    }

    private func acknowledgement(_ message: Message, _ code: UInt64) -> [UInt8]? {
        message.wantsReply && protocolFeatures & ProtocolFeature.replyAck != 0 ? word(code) : nil
    }

    private func word(_ value: UInt64) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.put(value)
        return bytes
    }

    /// The one descriptor of a message that must have exactly one.
    private func onlyDescriptor(_ message: Message) throws(Refusal) -> OwnedDescriptor {
        guard message.descriptors.count == 1 else {
            throw Refusal("it came with \(message.descriptors.count) descriptors instead of 1")
        }
        return message.descriptors[0]
    }

    private func obey(
        _ request: Request, _ message: Message, _ reader: inout PayloadReader
    ) throws(Refusal) -> [UInt8]? {
        switch request {
        case .setMemoryTable, .setLogBase, .setLogDescriptor, .setRingKick, .setRingCall, .setRingError,
            .setBackendChannel, .addMemoryRegion:
            break
        case .removeMemoryRegion where message.descriptors.count == 1:
            // The specification lets it carry the region's descriptor.
            break
        default:
            guard message.descriptors.isEmpty else {
                throw Refusal("it came with \(message.descriptors.count) descriptors, which it has no use for")
            }
        }
        switch request {
        case .getFeatures: return try reply(&reader, offeredFeatures)
        case .getProtocolFeatures: return try reply(&reader, ProtocolFeature.offered)
        case .getQueueCount: return try reply(&reader, UInt64(rings.count))
        case .getMaximumMemorySlots: return try reply(&reader, UInt64(MemoryTable.maximumRegions))
        case .getStatus:
            let needsReset = signals.state.withLock { $0.needsReset }
            return try reply(&reader, UInt64(status) | (needsReset ? UInt64(DeviceStatus.needsReset.rawValue) : 0))
        case .setFeatures: try setFeatures(try single(&reader))
        case .setProtocolFeatures:
            let wanted = try single(&reader)
            guard wanted & ~ProtocolFeature.offered == 0 else { throw Refusal("protocol features that were not offered") }
            protocolFeatures = wanted
        case .setOwner: try reader.finish()
        case .resetOwner, .resetDevice:
            try reader.finish()
            forgetDriver()
        case .setStatus: try setStatus(try single(&reader))
        case .setMemoryTable: try setMemoryTable(message, &reader)
        case .addMemoryRegion: try addMemoryRegion(message, &reader)
        case .removeMemoryRegion: try removeMemoryRegion(&reader)
        case .setLogBase: try setLogBase(message, &reader)
        case .setLogDescriptor:
            // Names an eventfd for log updates, which nothing waits for.
            _ = try onlyDescriptor(message)
        case .setBackendChannel:
            let channel = try onlyDescriptor(message)
            guard protocolFeatures & ProtocolFeature.backendChannel != 0, channel.kind == 0o140000 else {
                throw Refusal("a back-end channel has to be negotiated, and a socket")
            }
            signals.state.withLock { $0.backendChannel = channel }
        case .getConfiguration: return try getConfiguration(&reader)
        case .setConfiguration: try setConfiguration(&reader)
        case .setRingSize, .setRingBase, .setRingAddress, .getRingBase, .setRingEnable, .setRingKick, .setRingCall,
            .setRingError:
            return try obeyForRing(request, message, &reader)
        }
        return nil
    }

    private func reply(_ reader: inout PayloadReader, _ value: UInt64) throws(Refusal) -> [UInt8] {
        try reader.finish()
        return word(value)
    }

    /// A payload of one 64-bit word.
    private func single(_ reader: inout PayloadReader) throws(Refusal) -> UInt64 {
        let value = try reader.take(UInt64.self)
        try reader.finish()
        return value
    }

    private func setFeatures(_ wanted: UInt64) throws(Refusal) {
        guard wanted & ~offeredFeatures == 0 else {
            throw Refusal("features 0x\(String(wanted & ~offeredFeatures, radix: 16)) were not offered")
        }
        // The log comes and goes with migrations, with the device running.
        if (features ^ wanted) & ~VhostFeature.logAll != 0 { isUnsettled = true }
        features = wanted
        applyLog()
    }

    private func setStatus(_ value: UInt64) throws(Refusal) {
        guard value <= 0xff else { throw Refusal("status \(value)") }
        if value == 0 {
            // A front end says so when it stops the device, whether or not the driver reset it.
            forgetDriver()
        } else {
            status = UInt8(value)
        }
    }

    /// Stops every ring for good: what is to run again is set up again.
    private func forgetDriver() {
        for index in rings.indices {
            rings[index].stop()
            rings[index].isEnabled = false
        }
        signals.end()
        signals.state.withLock { $0.needsReset = false }
        status = 0
        driverMayBeGone = true
        isUnsettled = true
    }

    // MARK: - Memory

    private func setMemoryTable(_ message: Message, _ reader: inout PayloadReader) throws(Refusal) {
        let count = Int(try reader.take(UInt32.self))
        _ = try reader.take(UInt32.self)
        guard count == message.descriptors.count, count > 0 else {
            throw Refusal("\(count) regions with \(message.descriptors.count) descriptors")
        }
        var wanted = MemoryTable()
        for file in message.descriptors { try wanted.add(try MemoryTable.read(&reader, file: file)) }
        // User-mode Linux sends all entries it has room for, whatever their number says.
        guard reader.remaining % MemoryTable.entryBytes == 0 else { return try reader.finish() }
        try use(wanted)
    }

    private func addMemoryRegion(_ message: Message, _ reader: inout PayloadReader) throws(Refusal) {
        _ = try reader.take(UInt64.self)
        var wanted = table
        try wanted.add(try MemoryTable.read(&reader, file: try onlyDescriptor(message)))
        try reader.finish()
        try use(wanted)
    }

    private func removeMemoryRegion(_ reader: inout PayloadReader) throws(Refusal) {
        _ = try reader.take(UInt64.self)
        let guest = try reader.take(UInt64.self), size = try reader.take(UInt64.self)
        let user = try reader.take(UInt64.self)
        _ = try reader.take(UInt64.self)
        try reader.finish()
        var wanted = table
        try wanted.remove(guest: guest, size: size, user: user)
        try use(wanted)
    }

    /// All or nothing: after a refusal the old table stands.
    private func use(_ wanted: MemoryTable) throws(Refusal) {
        let fresh: GuestMemory
        if wanted.regions.isEmpty {
            do throws(VhostUserFailure) { fresh = try Self.standIn() } catch { throw Refusal("\(error)") }
        } else {
            do throws(GuestMemoryError) { fresh = try GuestMemory(sharing: wanted.mappings, limit: addressLimit) } catch {
                throw Refusal("\(error)")
            }
        }
        table = wanted
        memory = fresh
        applyLog()
        toldRings = []
        isUnsettled = true
    }

    private func setLogBase(_ message: Message, _ reader: inout PayloadReader) throws(Refusal) {
        let size = try reader.take(UInt64.self), offset = try reader.take(UInt64.self)
        try reader.finish()
        guard protocolFeatures & ProtocolFeature.sharedLog != 0 else { throw Refusal("LOG_SHMFD was not negotiated") }
        let file = try onlyDescriptor(message)
        do throws(GuestMemoryError) {
            log = try SharedDirtyLog(descriptor: file.number, offset: offset, bytes: size)
        } catch { throw Refusal("\(error)") }
        applyLog()
    }

    private func applyLog() { memory.setSharedLog(features & VhostFeature.logAll != 0 ? log : nil) }

    // MARK: - Configuration space

    /// The specification's limit for a configuration space.
    private static let configurationBytes: UInt32 = 256

    private func configurationPlace(_ reader: inout PayloadReader) throws(Refusal) -> (Int, Int, UInt32) {
        let offset = try reader.take(UInt32.self), size = try reader.take(UInt32.self)
        let flags = try reader.take(UInt32.self)
        guard protocolFeatures & ProtocolFeature.configuration != 0 else { throw Refusal("CONFIG was not negotiated") }
        guard size > 0, size <= Self.configurationBytes, offset <= Self.configurationBytes - size,
            reader.remaining == Int(size)
        else { throw Refusal("\(size) bytes at \(offset) of the configuration, with \(reader.remaining) in the payload") }
        return (Int(offset), Int(size), flags)
    }

    private func getConfiguration(_ reader: inout PayloadReader) throws(Refusal) -> [UInt8] {
        let (offset, size, flags) = try configurationPlace(&reader)
        var reply: [UInt8] = []
        reply.put(UInt32(offset))
        reply.put(UInt32(size))
        reply.put(flags)
        return reply + device.readConfiguration(offset: offset, bytes: size)
    }

    private func setConfiguration(_ reader: inout PayloadReader) throws(Refusal) {
        let (offset, size, _) = try configurationPlace(&reader)
        device.writeConfiguration(offset: offset, bytes: Array(try reader.take(bytes: size)))
    }

    // MARK: - Rings

    private static let noDescriptor: UInt64 = 1 << 8

    private func obeyForRing(
        _ request: Request, _ message: Message, _ reader: inout PayloadReader
    ) throws(Refusal) -> [UInt8]? {
        let hasFile = request == .setRingKick || request == .setRingCall || request == .setRingError
        let word: UInt64 = hasFile ? try single(&reader) : UInt64(try reader.take(UInt32.self))
        let number = hasFile ? Int(word & 0xff) : Int(word)
        guard rings.indices.contains(number) else { throw Refusal("there is no ring \(number)") }
        if hasFile {
            guard word & ~(Self.noDescriptor | 0xff) == 0 else { throw Refusal("ring 0x\(String(word, radix: 16))") }
            let isBare = word & Self.noDescriptor != 0
            guard message.descriptors.count == (isBare ? 0 : 1) else {
                throw Refusal("it came with \(message.descriptors.count) descriptors instead of \(isBare ? 0 : 1)")
            }
            try setFile(request, number, message.descriptors.first)
            return nil
        }
        if request == .setRingAddress {
            try setAddresses(number, &reader)
            return nil
        }
        let value = try reader.take(UInt32.self)
        try reader.finish()
        switch request {
        case .setRingSize:
            guard value > 0, value <= UInt32(device.queueSizes[number]) else { throw Refusal("a ring of \(value) descriptors") }
            if rings[number].size != value { isUnsettled = true }
            rings[number].size = value
        case .setRingBase:
            guard value <= UInt16.max else { throw Refusal("an index of \(value)") }
            rings[number].stop()
            rings[number].base = UInt16(value)
            isUnsettled = true
        case .getRingBase:
            rings[number].stop()
            toldRings.remove(number)
            rings[number].kick = nil
            signals.state.withLock { $0.calls[number] = nil }
            if !isLive { driverMayBeGone = true }
            isUnsettled = true
            var reply: [UInt8] = []
            reply.put(UInt32(number))
            reply.put(UInt32(rings[number].base))
            return reply
        case .setRingEnable:
            guard value <= 1 else { throw Refusal("\(value) is neither on nor off") }
            if rings[number].isEnabled != (value == 1) { isUnsettled = true }
            rings[number].isEnabled = value == 1
        default: break
        }
        return nil
    }

    private func setFile(_ request: Request, _ number: Int, _ file: OwnedDescriptor?) throws(Refusal) {
        if let file {
            guard file.carriesEvents else { throw Refusal("a descriptor that carries no events") }
            file.setNonBlocking()
        }
        switch request {
        case .setRingKick:
            guard let file else { throw Refusal("polling a ring is not possible here; send a kick descriptor") }
            if rings[number].kick == nil { isUnsettled = true }
            rings[number].kick = file
            // Without the protocol features there is no ENABLE, and a ring begins enabled.
            if features & VhostFeature.protocolFeatures == 0, !rings[number].isEnabled {
                rings[number].isEnabled = true
                isUnsettled = true
            }
        case .setRingCall:
            // What was signalled on the descriptor before this one may not have been heard any more.
            signals.state.withLock { state in
                state.calls[number] = file
                file?.signal()
            }
        default: signals.state.withLock { $0.errors[number] = file }
        }
    }

    private func setAddresses(_ number: Int, _ reader: inout PayloadReader) throws(Refusal) {
        let flags = try reader.take(UInt32.self)
        let descriptors = try reader.take(UInt64.self), used = try reader.take(UInt64.self)
        let available = try reader.take(UInt64.self)
        // Where the used ring is in the guest: known here from the memory table.
        _ = try reader.take(UInt64.self)
        try reader.finish()
        // VHOST_VRING_F_LOG: with LOG_ALL every write is logged anyhow.
        guard flags & ~1 == 0 else { throw Refusal("flags 0x\(String(flags, radix: 16))") }
        let addresses = Ring.Addresses(descriptors: descriptors, used: used, available: available)
        guard addresses != rings[number].addresses else { return }
        rings[number].addresses = addresses
        isUnsettled = true
    }

    // MARK: - The device

    /// Makes the device serve what the front end set up. To be called before a kick is looked at, and before the
    /// service sleeps.
    func settle() {
        guard isUnsettled else { return }
        isUnsettled = false
        let told = toldRings
        toldRings = []
        for index in rings.indices { rings[index].stop() }
        signals.end()
        device = BalloonDevice(memory: memory, succeeding: device, keepingPages: !driverMayBeGone)
        // Not the status: QEMU's generic device never says DRIVER_OK, and its rings are enabled all the same.
        guard features & VirtioFeature.version1 != 0, !table.regions.isEmpty, device.accepts(features: features) else { return }
        var queues: [VirtQueue?] = []
        for index in rings.indices {
            rings[index].live = rings[index].isStarted ? makeQueue(index) : nil
            queues.append(rings[index].live)
        }
        guard isLive else { return }
        driverMayBeGone = false
        // One that ran before this process did may be holding what it hinted.
        if !hasServed, queues.contains(where: { $0.map { $0.state.nextUsed != 0 } ?? false }) { device.assumeHints() }
        hasServed = true
        let live = signals.begin()
        device.activate(
            features: features & ~(VhostFeature.logAll | VhostFeature.protocolFeatures), queues: queues, signals: live)
        // A new target or the end of a request may have come with nobody there to be told. Only if something began:
        // QEMU 11 stops ring after ring and then crashes when it finds a configuration change in its channel.
        let served = Set(rings.indices.filter { rings[$0].live != nil })
        if !served.isSubset(of: told) { live.configurationChanged() }
        toldRings = served
        // What the driver made available before has had its kick.
        for index in rings.indices where rings[index].live != nil { device.notify(queue: index) }
    }

    private func makeQueue(_ index: Int) -> VirtQueue? {
        let ring = rings[index]
        do {
            guard let addresses = ring.addresses, let descriptors = table.guestAddress(ofUser: addresses.descriptors),
                let available = table.guestAddress(ofUser: addresses.available),
                let used = table.guestAddress(ofUser: addresses.used)
            else { throw Refusal("its addresses are not in the memory that was sent") }
            // The used ring knows how far a device before this one got; buffers it took and did not give back are
            // taken again.
            let nextUsed = try memory.loadAcquire16(GuestAddress(used.rawValue &+ 2))
            return try VirtQueue(
                memory: memory,
                state: VirtQueueState(
                    size: ring.size, descriptors: descriptors, available: available, used: used, nextAvailable: nextUsed,
                    nextUsed: nextUsed),
                maximumSize: device.queueSizes[index], features: features)
        } catch {
            complain("ring \(index) cannot be served: \(error)")
            signals.state.withLock { $0.errors[index]?.signal() }
            return nil
        }
    }

    /// The driver made buffers available.
    func kicked(_ index: Int) {
        guard let kick = rings[index].kick else { return }
        if !kick.drain() {
            rings[index].kick = nil
            complain("the kick descriptor of ring \(index) is of no use any more")
            return
        }
        settle()
        if rings[index].live != nil { device.notify(queue: index) }
    }

    /// A front end is there.
    func connected() { frontEnds &+= 1 }

    /// The front end is gone: nothing of its memory or descriptors is kept. What the host and the guest's driver told
    /// the balloon stays for the next one.
    func disconnect() {
        forgetDriver()
        rings = Array(repeating: Ring(), count: rings.count)
        signals.state.withLock { state in
            state.calls = [:]
            state.errors = [:]
            state.backendChannel = nil
            state.configurationChanged = false
        }
        table = MemoryTable()
        features = 0
        protocolFeatures = 0
        log = nil
        if let standIn = try? Self.standIn() { memory = standIn }
        settle()
    }
}
