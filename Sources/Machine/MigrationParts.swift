// SPDX-License-Identifier: Apache-2.0
import Balloon
public import GuestMemory
import KVM
public import Migration
import Synchronization

/// KVM's dirty log of all memory slots, collected and cleared in one step (`KVM_GET_DIRTY_LOG`).
final class KVMDirtyLog: DirtyTracker {
    private let vm: VirtualMachine
    private let slots: [MemorySlot]
    private let buffers: [PageBitmap]

    init(vm: VirtualMachine, slots: [MemorySlot]) {
        self.vm = vm
        self.slots = slots
        buffers = slots.map { PageBitmap(bitCount: Int($0.size / 4096)) }
    }

    func arm() throws(PartFailure) {
        do throws(KVMError) {
            // Setting the flag write-protects every page of the slot before the call returns. What a log of an earlier,
            // failed migration held went with that log when it was disarmed.
            for slot in slots { try vm.set(slot, logDirtyPages: true) }
        } catch { throw PartFailure("cannot start the dirty log: \(error)") }
    }

    func collect(into bitmap: PageBitmap) throws(PartFailure) {
        for (slot, buffer) in zip(slots, buffers) {
            let result: Result<Void, KVMError> = buffer.withUnsafeWords { words in
                do throws(KVMError) { return .success(try vm.getDirtyLog(slot, into: words)) } catch { return .failure(error) }
            }
            do { try result.get() } catch { throw PartFailure("cannot read the dirty log: \(error)") }
            // Slots begin and end on multiples of 64 pages, so words line up.
            let first = Int(slot.guestAddress / 4096 / 64)
            for index in 0..<buffer.wordCount {
                let bits = buffer.word(index)
                if bits != 0 { bitmap.merge(bits, intoWord: first + index) }
            }
        }
    }

    func disarm() { for slot in slots { try? vm.set(slot, logDirtyPages: false) } }
}

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

/// A running machine as the source of a migration.
public final class OutgoingMachine: OutgoingGuest {
    private let machine: Machine
    public init(_ machine: Machine) { self.machine = machine }

    public var memory: GuestMemory { machine.memory }
    public var machineDescription: [UInt8] { machine.description.encode() }
    /// Finds what the vCPUs and KVM itself write; what the devices write is in the memory's own log.
    public var trackers: [any DirtyTracker] { [KVMDirtyLog(vm: machine.vm, slots: machine.slots)] }
    public var hinter: any FreePageHinter { BalloonHinter(machine.balloon) }

    public func pause() throws(PartFailure) {
        guard machine.pause() else { throw PartFailure("the guest ended while it was being migrated") }
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
    private let made = Mutex<Machine?>(nil)

    /// `memorySize` and `vcpus`, where given, are what the operator allows; another machine is refused.
    public init(console: Int32, memorySize: UInt64?, vcpus: Int?) {
        self.console = console
        expected = (memorySize, vcpus)
    }

    /// The machine, once the source described it.
    public var machine: Machine? { made.withLock { $0 } }

    public func prepare(machineDescription: [UInt8]) throws(PartFailure) -> GuestMemory {
        try build(machineDescription, memory: nil)
    }

    /// Makes the machine of a snapshot, ready to start: with its memory mapped and read as it is touched, or, if `full`,
    /// read and checked now.
    public func restore(from snapshot: SnapshotReader, full: Bool) throws(PartFailure) {
        _ = try build(
            snapshot.machineDescription, memory: full ? try snapshot.readMemory() : try snapshot.mapMemory())
        try load(state: snapshot.sections)
    }

    private func build(_ machineDescription: [UInt8], memory: GuestMemory?) throws(PartFailure) -> GuestMemory {
        do {
            let description = try MachineDescription(decoding: machineDescription)
            let configuration = description.configuration
            if let size = expected.memorySize, size != configuration.memorySize {
                throw PartFailure(
                    "the guest has \(configuration.memorySize >> 20) MiB of memory and the destination was started for \(size >> 20) MiB; start it with --memory \(configuration.memorySize >> 20)M")
            }
            if let count = expected.vcpus, count != configuration.vcpus {
                throw PartFailure(
                    "the guest has \(configuration.vcpus) vCPUs and the destination was started for \(count); start it with --cpus \(configuration.vcpus)")
            }
            let machine = try Machine(configuration, console: console, cpuid: description.cpuid, memory: memory)
            guard description.virtioDevices == [machine.balloon.deviceID] else {
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
    }
    public func start() throws(PartFailure) {
        guard let machine else { throw PartFailure("there is no machine to start") }
        machine.resume()
    }
    public func discard() {
        let machine = made.withLock { machine in
            defer { machine = nil }
            return machine
        }
        machine?.end(.stopped)
    }
}
