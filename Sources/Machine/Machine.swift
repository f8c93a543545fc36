// SPDX-License-Identifier: Apache-2.0
public import Balloon
internal import CLinux
public import GuestMemory
import KVM
import Migration
import Synchronization
import Vhost
import Virtio

/// What a machine is made of.
public struct MachineConfiguration: Sendable, Equatable {
    /// Bytes of RAM, a multiple of 2 MiB, 64 MiB to 1 TiB.
    public var memorySize: UInt64
    /// 1 to 8.
    public var vcpus: Int
    /// What the balloon offers, of `BalloonFeature`.
    public var balloonFeatures = BalloonFeature.standard
    /// The path of a liblacuna.so to take the balloon from; not a property of the guest.
    public var balloonPlugin: String?
    /// The guest's vsock address on this host, 3 up; nil: a guest without vsock.
    public var vsockCID: UInt32?
    /// How this host finds dirty pages; not a property of the guest.
    public var dirtyTracking = DirtyTracking.bitmap
    /// What the guest's memory is made of here; no part of what a migration describes.
    public var backing = MemoryBacking.anonymous
    public init(memorySize: UInt64, vcpus: Int) {
        self.memorySize = memorySize
        self.vcpus = vcpus
    }

    func check() throws(MachineError) {
        guard (1...8).contains(vcpus) else { throw MachineError("\(vcpus) vCPUs; give 1 to 8 with --cpus") }
        guard memorySize % (2 << 20) == 0, memorySize >= 64 << 20, memorySize <= 1 << 40 else {
            throw MachineError("\(memorySize >> 20) MiB of guest memory; give a multiple of 2 MiB from 64M to 1024G with --memory")
        }
        guard balloonFeatures & ~BalloonFeature.all == 0 else {
            throw MachineError("the balloon has features that this release does not know; use the same release on both sides")
        }
    }
}

/// Why a machine ended.
public enum MachineEnd: Sendable, Equatable {
    /// The guest switched itself off.
    case poweredOff
    /// The guest asked for a reset (or crashed so hard that a PC would reset).
    case rebooted
    /// Ended from outside.
    case stopped
    /// It runs elsewhere now.
    case migrated
    /// It could not go on.
    case failed(String)
}

/// What a machine does at the moment.
public enum MachineActivity: String, Sendable {
    case running, paused, ended
}

/// A virtual machine: RAM, vCPUs with a thread each, a serial console, power management and a virtio balloon.
///
/// The devices work on the thread of the vCPU that touches them, so once the vCPUs are parked nothing but the migration
/// writes guest memory.
///
/// Thread rules: every method may be called from any thread, except that one thread at a time drives a migration.
public final class Machine: Sendable {
    public let configuration: MachineConfiguration
    public let memory: GuestMemory
    public let balloon: BalloonDevice
    /// In the balloon's place, if the configuration has one; the other then has no driver.
    public let plugin: PluginBalloon?
    let vm: VirtualMachine
    let cpuid: [CPUIDEntry]
    let vcpus: [VCPU]
    let slots: [MemorySlot]
    /// Only where dirty pages come from rings.
    let rings: DirtyRings?
    let serial: SerialPort
    let power: PowerManagement
    let transports: [MMIOTransport]
    let poller = StatisticsPoller()
    let vsock: VsockDevice?

    private struct Run {
        var wanted = Wanted.paused
        /// vCPU threads: made, standing still, and ended.
        var made = 0
        var parked = 0
        var gone = 0
        var end: MachineEnd?
        var threads: [pthread_t] = []
        /// Percent of the time that the vCPUs are kept from running; whether they are at the moment; and whether a
        /// thread sees to it.
        var throttle = 0
        var isHeldBack = false
        var hasThrottler = false
    }
    private enum Wanted { case running, paused, ended }
    private let run: Monitor<Run>
    /// Migrations that read the memory.
    let memoryReaders = Monitor(0)
    /// Held while the vCPU threads are made.
    private let making = Mutex(())

    /// Makes the machine; it neither has a kernel nor runs. `cpuid` is a migrating guest's; nil: what this host offers.
    /// The console's output goes to the descriptor `console` (negative: nowhere).
    public convenience init(_ configuration: MachineConfiguration, console: Int32) throws(MachineError) {
        try self.init(configuration, console: console, cpuid: nil)
    }

    /// `made` is memory with something in it already, of the layout that the configuration asks for.
    init(
        _ configuration: MachineConfiguration, console: Int32, cpuid wanted: [CPUIDEntry]?, memory made: GuestMemory? = nil
    ) throws(MachineError) {
        try configuration.check()
        self.configuration = configuration
        let system = try Machine.openKVM()
        let layout = Layout.ram(size: configuration.memorySize)
        if let made {
            guard made.regions.map(\.range) == layout else {
                throw MachineError("the memory is laid out otherwise than this release does it; use the release that saved it")
            }
            memory = made
        } else {
            memory = try configuration.backing.makeMemory(layout)
        }
        do throws(KVMError) {
            let offered = try CPUIDTemplate.make(system)
            if let wanted, let lack = CPUIDTemplate.missing(wanted, in: offered) {
                throw KVMError(call: "this host's CPU or KVM lacks \(lack), which the guest was booted with", errno: ENOTSUP)
            }
            cpuid = wanted ?? offered
            let vm = try system.makeVM()
            try configuration.dirtyTracking.prepare(vm)
            try vm.makeInterruptControllers()
            let slots = memory.regions.enumerated().map { number, region in
                MemorySlot(
                    number: UInt32(number), guestAddress: region.range.start.rawValue, size: region.range.size,
                    hostAddress: UInt(bitPattern: region.host))
            }
            for slot in slots { try vm.set(slot, logDirtyPages: false) }
            var made: [VCPU] = []
            for number in 0..<configuration.vcpus {
                made.append(
                    try vm.makeVCPU(
                        number, cpuid: CPUIDTemplate.entries(cpuid, vcpu: number, of: configuration.vcpus)))
            }
            let rings = made.compactMap(\.ring)
            self.rings = rings.isEmpty ? nil : DirtyRings(vm: vm, slots: slots, rings: rings)
            (vcpus, self.slots, self.vm) = (made, slots, vm)
        } catch { throw MachineError(error, while: "cannot make the virtual machine") }
        let vm = vm
        serial = SerialPort(output: console) { vm.setLine(Layout.serialLine, high: $0) }
        power = PowerManagement { vm.setLine(Layout.systemControlLine, high: $0) }
        balloon = BalloonDevice(
            memory: memory, features: configuration.balloonFeatures, reserved: Layout.firmwarePages,
            releaseUnit: made == nil ? configuration.backing.releaseUnit : 1,
            log: { message in logLine("balloon: \(message)") })
        balloon.setQuiesced(true)
        do throws(VhostError) {
            let memory = memory
            vsock = try configuration.vsockCID.map { cid throws(VhostError) in try VsockDevice(memory: memory, cid: cid) }
        } catch {
            let remedy = error.errno == EADDRINUSE ? "choose another --vsock-cid" : "load vhost_vsock, or leave out --vsock-cid"
            throw MachineError("cannot give the guest a vsock device: \(error); \(remedy)")
        }
        plugin = try configuration.balloonPlugin.map { [memory] path throws(MachineError) in
            try PluginBalloon(path: path, memory: memory, features: configuration.balloonFeatures)
        }
        let devices: [any VirtioDevice] = [plugin ?? balloon] + (vsock.map { [$0] } ?? [])
        transports = devices.enumerated().map { [memory] index, device in
            let pulse = EdgeLine(vm: vm, line: Layout.virtioLine + UInt32(index))
            return MMIOTransport(device: device, memory: memory) { pulse.raise() }
        }
        run = Monitor(Run())
        _ = lacuna_install_empty_handler(SIGUSR1)
    }

    /// Opens /dev/kvm and makes sure that it can run an unmodified kernel.
    static func openKVM() throws(MachineError) -> System {
        let system: System
        do throws(KVMError) { system = try System() } catch {
            let remedy =
                switch error.errno {
                case ENOENT: "load kvm_intel or kvm_amd, or switch virtualization on in the firmware"
                case EACCES: "add this user to the group that owns /dev/kvm"
                default: "KVM is needed to run a guest"
                }
            throw MachineError("no usable KVM: \(error); \(remedy)")
        }
        // A KVM without the CPU's help opens and makes VMs, and then cannot run a kernel as it is.
        let flags = try readFile("/proc/cpuinfo", what: "the CPU's description", remedy: "mount /proc")
        let text = String(decoding: flags, as: UTF8.self)
        guard text.split(whereSeparator: { $0 == " " || $0 == "\n" || $0 == "\t" }).contains(where: { $0 == "svm" || $0 == "vmx" })
        else {
            throw MachineError(
                "no usable KVM: /dev/kvm opens, but this CPU offers no hardware virtualization (neither svm nor vmx in /proc/cpuinfo); enable nested virtualization here, or run in the test bed (Tests/TestVM/bed)")
        }
        return system
    }

    /// Loads a kernel and points the first vCPU at it. `commandLine` goes to the kernel as it is.
    public func load(kernel: String, initramfs: String?, commandLine: String) throws(MachineError) {
        let loader = LinuxLoader(memory: memory, vcpus: configuration.vcpus, virtioDevices: transports.count)
        let entry = try loader.load(kernel: kernel, initramfs: initramfs, commandLine: commandLine)
        do throws(KVMError) { try loader.enter(vcpus[0], at: entry) } catch {
            throw MachineError(error, while: "cannot set up the first vCPU")
        }
        try makeThreads()
    }

    /// Makes the vCPUs' threads, which wait for `resume()`, and what the devices need to run. Whoever promises that this
    /// machine can run calls it before that: a host may have no room for another thread.
    func makeThreads() throws(MachineError) {
        try making.withLock { _ throws(MachineError) in
            for vcpu in vcpus[run.read(\.made)...] {
                // Counted before it is there: it may end before the next line.
                run.update { $0.made += 1 }
                do throws(MigrationError) {
                    try startThreadIfPossible(named: "vcpu\(vcpu.number)") { self.drive(vcpu) }
                } catch {
                    run.update { $0.made -= 1 }
                    throw MachineError("cannot make a thread for vCPU \(vcpu.number): \(error); allow this user more processes")
                }
            }
        }
        do throws(VhostError) { try vsock?.prepare() } catch {
            throw MachineError("cannot get the vsock device ready: \(error)")
        }
    }

    /// The tracker of what the vCPUs write, as configured. One migration at a time uses it.
    func makeDirtyTracker() -> any DirtyTracker {
        if let rings { return rings }
        if configuration.dirtyTracking == .manual {
            return ManualDirtyLog(vm: vm, slots: slots)
        }
        return KVMDirtyLog(vm: vm, slots: slots)
    }

    // MARK: Running

    public var activity: MachineActivity {
        run.read { state in
            if state.end != nil { return .ended }
            return state.wanted == .running ? .running : .paused
        }
    }

    /// Lets the vCPUs of a machine that was loaded run. No effect on a machine that has ended.
    public func resume() {
        balloon.setQuiesced(false)
        run.update { state in
            guard state.wanted == .paused else { return }
            state.wanted = .running
            vsock?.machineRuns()
        }
    }

    /// Parks every vCPU with its I/O complete. When it returns, no vCPU and no device touches guest memory. False if
    /// the machine has ended. Throws, with the guest running as before, if a vCPU does not stop within 10 s: nothing
    /// that a vCPU's thread does takes so long.
    @discardableResult
    public func pause() throws(MachineError) -> Bool {
        let wasRunning = run.update { state in
            defer { if state.wanted == .running { state.wanted = .paused } }
            return state.wanted == .running
        }
        guard let isParked = awaitParked() else {
            let parked = run.update { state in
                if wasRunning, state.wanted == .paused { state.wanted = .running }
                return state.parked
            }
            throw MachineError(
                "only \(parked) of \(vcpus.count) vCPUs stopped within \(Self.pauseMilliseconds / 1000) s, so the guest runs on; look for what this process waits for (cat /proc/\(getpid())/task/*/wchan)")
        }
        guard isParked else { return false }
        // Requests of the host's own write guest memory as well, and so does the kernel for vsock.
        balloon.setQuiesced(true)
        vsock?.machineStands()
        return true
    }

    /// How long a vCPU may take to stop.
    private static let pauseMilliseconds: UInt64 = 10_000

    /// Waits until every vCPU is parked; false if the machine has ended, nil if it takes too long.
    private func awaitParked() -> Bool? {
        let sliceMilliseconds: UInt64 = 100
        for _ in 0..<Self.pauseMilliseconds / sliceMilliseconds {
            // More than once: a signal that comes just before a system call does not interrupt it.
            kick()
            let isParked: Bool? = run.wait(nanoseconds: sliceMilliseconds * 1_000_000) { state in
                if state.end != nil { return false }
                return state.parked == state.made ? true : nil
            }
            if let isParked { return isParked }
        }
        return nil
    }

    /// Ends the machine for good. The first reason given stays.
    public func end(_ reason: MachineEnd) {
        run.update { state in
            if state.end == nil { state.end = reason }
            state.wanted = .ended
        }
        kick()
    }

    /// Waits until the machine has ended and its vCPU threads are gone.
    public func waitForEnd() -> MachineEnd {
        let end = run.wait { state -> MachineEnd? in
            guard let end = state.end else { return nil }
            return state.gone == state.made ? end : nil
        }
        // A guest's last words may still be on their way.
        serial.output.close(milliseconds: 1000)
        // Its address is free from here on, for the guest's next life.
        vsock?.close()
        // Whoever waits for the guest's answer has none to expect, and must not look at its rings for one.
        balloon.reset()
        return end
    }

    /// Gives the memory of a machine that has ended back to the host, whoever still has the machine: it reads as zero
    /// from then on. Waits for migrations under way, which end by themselves, up to 5 s.
    public func releaseMemory() {
        guard activity == .ended else { return }
        // A page that is read again costs memory again, and a huge page, if none is left, the process.
        let limitNanoseconds: UInt64 = 5_000_000_000
        _ = memoryReaders.wait(nanoseconds: limitNanoseconds) { $0 == 0 ? () : nil }
        for region in memory.regions {
            do throws(GuestMemoryError) { try memory.discard(pages: region.range.pages) } catch {
                logLine("the memory of a guest that ended stays: \(error)")
            }
        }
    }

    /// Bytes typed at the serial console.
    public func type(_ bytes: [UInt8]) { serial.receive(bytes) }

    /// Presses the ACPI power button: a guest that listens switches itself off in good order.
    public func pressPowerButton() { power.pressPowerButton() }

    /// Keeps the vCPUs from running for `percent` (0 to 99) of the time, so that the guest dirties less memory; 0 ends
    /// that. Interrupts wait meanwhile, as they would for a slow CPU.
    public func throttle(percent: Int) {
        let isFirst = run.update { state in
            state.throttle = max(0, min(percent, 99))
            if state.throttle == 0 { state.isHeldBack = false }
            guard state.throttle > 0, !state.hasThrottler else { return false }
            state.hasThrottler = true
            return true
        }
        // A guest that cannot be slowed down runs on, and the migration's time limit decides.
        if isFirst, !startThread(named: "throttle", { self.alternate() }) { run.update { $0.hasThrottler = false } }
    }

    /// Lets the vCPUs run for a while and holds them for a while, until there is no more throttle or no more guest.
    private func alternate() {
        let runNanoseconds: UInt64 = 10_000_000
        while true {
            let isOver: Bool? = run.wait(nanoseconds: runNanoseconds) { state in
                state.throttle == 0 || state.wanted == .ended ? true : nil
            }
            let percent = run.update { state in
                // Under one lock with the decision to go: a later call then starts another thread.
                if isOver == true || state.throttle == 0 || state.wanted == .ended {
                    (state.hasThrottler, state.isHeldBack) = (false, false)
                    return 0
                }
                state.isHeldBack = true
                return state.throttle
            }
            if percent == 0 { return }
            kick()
            _ = run.wait(nanoseconds: runNanoseconds * UInt64(percent) / UInt64(100 - percent)) { state -> Bool? in
                state.throttle == 0 || state.wanted == .ended ? true : nil
            }
            run.update { $0.isHeldBack = false }
        }
    }

    /// Gets every vCPU thread out of KVM_RUN, or keeps it from going in.
    private func kick() {
        // The flag first: a thread between its look at `wanted` and KVM_RUN then comes straight back.
        for vcpu in vcpus { vcpu.requestExit(true) }
        // Under the lock: a thread takes itself off the list before it goes, and a signal to one that is gone is not
        // allowed.
        run.read { state in for thread in state.threads { _ = lacuna_pthread_kill(thread, SIGUSR1) } }
    }

    private func drive(_ vcpu: VCPU) {
        run.update { $0.threads.append(pthread_self()) }
        // Not into KVM before the machine runs: until then the vCPU belongs to whoever loads its state.
        park()
        while true {
            // Cleared before the look at what is wanted: a request made after that look sets it again.
            vcpu.requestExit(false)
            switch run.read({ ($0.wanted, $0.isHeldBack) }) {
            case (.running, false): _ = perform(vcpu, vcpu.enter())
            case (.running, true): run.wait { $0.isHeldBack && $0.wanted == .running ? nil : () }
            case (.paused, _):
                // Pending I/O is completed by entering once more; an exit that this brings up is real work too.
                vcpu.requestExit(true)
                while perform(vcpu, vcpu.enter()) {}
                park()
                vcpu.noteClockStopped()
            case (.ended, _):
                run.update { state in
                    state.threads.removeAll { pthread_equal($0, pthread_self()) != 0 }
                    state.gone += 1
                }
                return
            }
        }
    }

    /// Keeps a vCPU's thread while the machine stands still.
    private func park() {
        run.update { $0.parked += 1 }
        run.wait { $0.wanted == .paused ? nil : () }
        run.update { $0.parked -= 1 }
    }

    /// Does what an exit asks for. False if it asked for nothing.
    private func perform(_ vcpu: VCPU, _ exit: VCPUExit) -> Bool {
        switch exit {
        case .io(let port, let size, let count, let isWrite):
            for element in 0..<count { portAccess(port, size: size, isWrite: isWrite, data: vcpu.ioData + element * size) }
            return true
        case .mmio(let address, let size, let isWrite):
            guard address >= Layout.virtioBase else {
                if !isWrite { vcpu.mmioValue = ~0 }
                return true
            }
            let index = Int((address - Layout.virtioBase) / Layout.virtioStride)
            let offset = (address - Layout.virtioBase) % Layout.virtioStride
            if index >= transports.count {
                if !isWrite { vcpu.mmioValue = ~0 }
            } else if isWrite {
                transports[index].write(offset: offset, size: size, value: vcpu.mmioValue)
            } else {
                vcpu.mmioValue = transports[index].read(offset: offset, size: size)
            }
            return true
        case .dirtyRingFull:
            rings?.relieve()
            return true
        case .halted, .interrupted: return false
        case .shutdown: end(.rebooted)
        case .failed(let reason): end(.failed("vCPU \(vcpu.number): \(reason)"))
        }
        return false
    }

    private func portAccess(_ port: UInt16, size: Int, isWrite: Bool, data: UnsafeMutableRawPointer) {
        var value: UInt32 = 0
        if isWrite { memcpy(&value, data, min(size, 4)) }
        switch port {
        case Layout.serialPort..<Layout.serialPort + 8:
            if isWrite { serial.write(port - Layout.serialPort, UInt8(truncatingIfNeeded: value)) }
            else { value = UInt32(serial.read(port - Layout.serialPort)) }
        case Layout.powerEvents..<Layout.powerControl + 2:
            if isWrite {
                if power.write(port: port, size: size, value: value) != nil { end(.poweredOff) }
            } else {
                value = power.read(port: port, size: size)
            }
        case Layout.resetPort where isWrite: if UInt8(truncatingIfNeeded: value) == Layout.resetValue { end(.rebooted) }
        default: if !isWrite { value = ~0 } // nothing there: the bus floats
        }
        if !isWrite { memcpy(data, &value, min(size, 4)) }
    }
}

/// An edge-triggered interrupt line. The lock keeps two pulses apart: overlapping, they would be one edge.
private final class EdgeLine: Sendable {
    private let vm: VirtualMachine
    private let line: UInt32
    private let lock = Mutex(())
    init(vm: VirtualMachine, line: UInt32) {
        self.vm = vm
        self.line = line
    }
    func raise() {
        lock.withLock { _ in
            vm.setLine(line, high: true)
            vm.setLine(line, high: false)
        }
    }
}
