// SPDX-License-Identifier: Apache-2.0
import Balloon
public import GuestMemory
import KVM
public import Migration
import Synchronization

/// The balloon as the migration's hinter: the free-page bitmap if the guest has our module, free page hints otherwise.
final class BalloonHinter: FreePageHinter {
    private let balloon: BalloonDevice
    init(_ balloon: BalloonDevice) { self.balloon = balloon }
    var refusal: String? { balloon.refusal }
    var method: String { (balloon.hintMethod ?? .bitmap).rawValue }
    func request() -> UInt32 { balloon.openWindow() }
    func wait(for request: UInt32, milliseconds: Int) -> HintReport? {
        guard let report = balloon.waitForReport(request, milliseconds: milliseconds) else { return nil }
        return HintReport(
            request: report.request, pages: report.pages,
            figures: report.figures.map {
                HintFigures(
                    blocks: $0.blocks, pages: $0.pages, walkNanoseconds: $0.walkNanoseconds,
                    longestLockNanoseconds: $0.longestLockNanoseconds, batches: $0.batches)
            })
    }
    func stop() { balloon.closeWindow() }
    func finish() { balloon.releaseHints() }
}

/// Ends a migration whose guest has ended: nothing is left of it to send, and its memory may be on its way back.
private final class LifeTracker: DirtyTracker {
    private let machine: Machine
    init(_ machine: Machine) { self.machine = machine }
    private func check() throws(PartFailure) {
        if machine.activity == .ended { throw PartFailure("the guest ended while it was being migrated") }
    }
    func arm() throws(PartFailure) { try check() }
    func collect(into bitmap: PageBitmap) throws(PartFailure) { try check() }
    func willSend(_ pages: Range<Int>) throws(PartFailure) { try check() }
    func disarm() {}
}

/// A running machine as the source of a migration.
public final class OutgoingMachine: OutgoingGuest {
    private let machine: Machine
    public init(_ machine: Machine) {
        self.machine = machine
        machine.memoryReaders.update { $0 += 1 }
    }
    deinit { machine.memoryReaders.update { $0 -= 1 } }

    public var memory: GuestMemory { machine.memory }
    public var machineDescription: [UInt8] { machine.description.encode() }
    /// Finds what the vCPUs and KVM itself write; what the devices write is in the memory's own log.
    public var trackers: [any DirtyTracker] {
        [machine.makeDirtyTracker()] + (machine.vsock.map { [VhostTracker($0)] } ?? []) + [LifeTracker(machine)]
    }
    public var hinter: any FreePageHinter { machine.plugin.map(PluginHinter.init) ?? BalloonHinter(machine.balloon) }

    public func pause() throws(PartFailure) {
        let isPaused: Bool
        do { isPaused = try machine.pause() } catch { throw PartFailure("\(error)") }
        guard isPaused else { throw PartFailure("the guest ended while it was being migrated") }
    }
    public func resume() { machine.resume() }
    public func throttle(percent: Int) { machine.throttle(percent: percent) }
    public func saveState() throws(PartFailure) -> [StateSection] { try machine.saveSections() }
}

/// A machine to be built from what a source describes.
public final class IncomingMachine: IncomingGuest {
    /// The descriptor of the serial console's output.
    public let console: Int32
    private let expected: (memorySize: UInt64?, vcpus: Int?)
    private let tracking: DirtyTracking
    private let vsockCID: UInt32?
    private let balloonPlugin: String?
    private let made = Mutex<Machine?>(nil)
    private let isFromFile = Mutex(false)
    private let backing: MemoryBacking

    /// `memorySize` and `vcpus`, where given, are what the operator allows; another machine is refused. `tracking` is for
    /// this machine's next migration; a guest with vsock gets the address `vsockCID` here. The balloon comes from
    /// `balloonPlugin`, the path of a liblacuna.so, if it did at the source.
    public init(
        console: Int32, memorySize: UInt64?, vcpus: Int?, tracking: DirtyTracking = .bitmap, vsockCID: UInt32? = nil,
        backing: MemoryBacking = .anonymous,
        balloonPlugin: String? = nil
    ) {
        self.console = console
        self.backing = backing
        expected = (memorySize, vcpus)
        self.tracking = tracking
        self.vsockCID = vsockCID
        self.balloonPlugin = balloonPlugin
    }

    /// The machine, once the source described it.
    public var machine: Machine? { made.withLock { $0 } }

    /// Gives the machine to an owner; from then on `machine` is nil. False if there is none.
    public func handOver(to owner: (Machine) -> Void) -> Bool {
        let machine = made.withLock { machine in
            defer { machine = nil }
            return machine
        }
        if let machine { owner(machine) }
        return machine != nil
    }

    public func prepare(machineDescription: [UInt8]) throws(PartFailure) -> GuestMemory {
        try build(machineDescription, memory: nil)
    }

    /// Makes the machine of a snapshot, ready to start: with its memory mapped and read as it is touched, or, if `full`,
    /// read and checked now.
    public func restore(from snapshot: SnapshotReader, full: Bool) throws(PartFailure) {
        _ = try build(
            snapshot.machineDescription, memory: full ? try snapshot.readMemory() : try snapshot.mapMemory())
        isFromFile.withLock { $0 = true }
        try load(state: snapshot.sections)
    }

    private func build(_ machineDescription: [UInt8], memory: GuestMemory?) throws(PartFailure) -> GuestMemory {
        do {
            let description = try MachineDescription(decoding: machineDescription)
            var configuration = description.configuration
            configuration.dirtyTracking = tracking
            configuration.balloonPlugin = balloonPlugin
            if description.virtioDevices.contains(vsockDeviceID) {
                guard let vsockCID else {
                    throw PartFailure("the guest has a vsock device, and the destination no address for it; start it with --vsock-cid")
                }
                configuration.vsockCID = vsockCID
            }
            try HostMemory.check(canHold: configuration.memorySize)
            configuration.backing = backing
            if let size = expected.memorySize, size != configuration.memorySize {
                throw PartFailure(
                    "the guest has \(configuration.memorySize >> 20) MiB of memory and the destination was started for \(size >> 20) MiB; start it with --memory \(configuration.memorySize >> 20)M")
            }
            if let count = expected.vcpus, count != configuration.vcpus {
                throw PartFailure(
                    "the guest has \(configuration.vcpus) vCPUs and the destination was started for \(count); start it with --cpus \(configuration.vcpus)")
            }
            let machine = try Machine(configuration, console: console, cpuid: description.cpuid, memory: memory)
            guard description.virtioDevices == machine.transports.map(\.device.deviceID) else {
                throw PartFailure("the guest has the virtio devices \(description.virtioDevices), which this side cannot build; use the same release on both")
            }
            made.withLock { $0 = machine }
            return machine.memory
        } catch let failure as PartFailure {
            throw failure
        } catch { throw PartFailure("\(error)") }
    }

    public func load(state: [StateSection]) throws(PartFailure) {
        guard let machine else { throw PartFailure("state arrived before the machine was described") }
        try machine.restoreSections(state)
        // Now, while the source can still have its guest back.
        do { try machine.makeThreads() } catch { throw PartFailure("\(error)") }
    }
    public func start() throws(PartFailure) {
        guard let machine else { throw PartFailure("there is no machine to start") }
        machine.resume()
        // Huge pages of the host come whole, with the balloon's pages in them. Not while the guest stands still for it;
        // and not out of a file's mapping, where each hole is a mapping of its own.
        if !isFromFile.withLock({ $0 }) {
            let balloon = machine.balloon
            startThread(named: "balloon") { balloon.releaseBalloon() }
        }
    }
    public func discard() {
        let machine = made.withLock { machine in
            defer { machine = nil }
            return machine
        }
        machine?.end(.stopped)
    }
}
