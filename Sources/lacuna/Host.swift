// SPDX-License-Identifier: Apache-2.0
import Balloon
import CLinux
import Machine
import Migration

/// The commands that hold a guest: `run` and `receive`.
enum Host {
    /// What the guest boots, and boots again after a reset.
    private struct Kernel {
        let path: String
        let initramfs: String?
        let commandLine: String

        init?(_ arguments: Arguments) throws(Complaint) {
            guard let path = arguments["kernel"] else {
                if arguments["initramfs"] != nil || arguments["cmdline"] != nil { throw .usage("--kernel is missing") }
                return nil
            }
            self.path = path
            initramfs = arguments["initramfs"]
            commandLine = arguments["cmdline"] ?? "console=ttyS0"
        }
    }

    private static func openConsole(_ where: String) throws(Complaint) -> Int32 {
        switch `where` {
        case "stdio": return 1
        case "none": return -1
        case let place where place.hasPrefix("file:"):
            let path = String(place.dropFirst(5))
            let file = lacuna_open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o644)
            guard file >= 0 else {
                throw Complaint("cannot write the console to '\(path)': \(String(cString: strerror(errno))); choose another --console")
            }
            return file
        default: throw .usage("--console takes stdio, none or file:PATH, not '\(`where`)'")
        }
    }

    /// Hands what is typed here to the guest.
    private static func connectInput(to guest: RunningGuest) {
        var saved = termios()
        if isatty(0) == 1, tcgetattr(0, &saved) == 0 {
            var raw = saved
            // The guest's own line discipline does the editing; signals stay, so that ^C still ends this process.
            raw.c_lflag &= ~tcflag_t(ICANON | ECHO)
            tcsetattr(0, TCSANOW, &raw)
        }
        startThread(named: "console") {
            var buffer = [UInt8](repeating: 0, count: 256)
            while true {
                let count = buffer.withUnsafeMutableBytes { read(0, $0.baseAddress, $0.count) }
                if count < 0 && errno == EINTR { continue }
                if count <= 0 { return }
                guest.machine?.type(Array(buffer[..<count]))
            }
        }
    }

    /// Makes a machine with a kernel in it that `guest` is from here on.
    private static func boot(
        _ configuration: MachineConfiguration, _ kernel: Kernel, console: Int32, as guest: RunningGuest,
        balloonLike former: BalloonDevice? = nil
    ) throws(MachineError) {
        let machine = try Machine(configuration, console: console)
        if let former { machine.inheritBalloon(of: former) }
        try machine.load(kernel: kernel.path, initramfs: kernel.initramfs, commandLine: kernel.commandLine)
        guest.set(machine)
    }

    /// Sees the guest to its end, through all of its reboots. Nobody but `guest` has a reference to its machine: the
    /// memory of a guest that ended is to go.
    private static func finish(_ guest: RunningGuest, kernel: Kernel?, console: Int32) throws(Complaint) {
        while true {
            switch guest.machine?.waitForEnd() {
            case nil: return
            case .poweredOff, .stopped: return
            case .migrated:
                write(Array("lacuna: the guest runs on its destination now\n".utf8), to: 2)
                return
            case .failed(let reason): throw Complaint("the guest stopped: \(reason)")
            case .rebooted where guest.isStopping: return
            case .rebooted:
                guard let kernel else {
                    throw Complaint("the guest asked for a reboot and this process has no kernel to boot; give `lacuna receive` the same --kernel and --initramfs as `lacuna run`")
                }
                do throws(MachineError) { try reboot(guest, kernel, console: console) } catch {
                    throw Complaint("the guest cannot be rebooted: \(error)")
                }
                // A stop that looked for the guest before this line found the old machine, and left its mark.
                if guest.isStopping { guest.machine?.end(.stopped) }
                guest.machine?.resume()
            }
        }
    }

    /// Puts a new machine in the place of one that has ended.
    private static func reboot(_ guest: RunningGuest, _ kernel: Kernel, console: Int32) throws(MachineError) {
        guard let former = guest.machine else { return }
        // First: there need not be room for two guests, and of huge pages there are often just enough for one.
        former.releaseMemory()
        try boot(former.configuration, kernel, console: console, as: guest, balloonLike: former.balloon)
    }

    static func run(_ words: ArraySlice<String>) throws(Complaint) {
        let arguments = try Arguments(
            words,
            options: Arguments.trackerOptions.union([
                "kernel", "initramfs", "cmdline", "memory", "cpus", "control", "console", "balloon",
                "memory-backing",
            ]), flags: [])
        guard let kernel = try Kernel(arguments) else { throw .usage("--kernel is missing") }
        var configuration = MachineConfiguration(
            memorySize: try arguments.size("memory") ?? 512 << 20, vcpus: try arguments.integer("cpus", in: 1...8) ?? 1)
        configuration.backing = try memoryBacking(arguments)
        let balloon = try BalloonOption(parsing: arguments["balloon"])
        (configuration.balloonFeatures, configuration.balloonPlugin) = (balloon.features, balloon.plugin)
        configuration.dirtyTracking = try arguments.dirtyTracking()
        configuration.vsockCID = try arguments.vsockCID()
        let console = try openConsole(arguments["console"] ?? "stdio")
        let guest = RunningGuest()
        do throws(MachineError) { try boot(configuration, kernel, console: console, as: guest) } catch {
            throw Complaint("\(error)")
        }
        let control = arguments["control"]
        defer { if let control, guest.isServing { unlink(control) } }
        if let control { try guest.serve(at: control) }
        if console == 1 { connectInput(to: guest) }
        guest.machine?.resume()
        try finish(guest, kernel: kernel, console: console)
    }

    static func receive(_ words: ArraySlice<String>) throws(Complaint) {
        let arguments = try Arguments(
            words,
            options: Arguments.trackerOptions.union([
                "listen", "kernel", "initramfs", "cmdline", "memory", "cpus", "control", "console", "memory-backing",
                "balloon",
            ]), flags: [])
        let kernel = try Kernel(arguments)
        let incoming = IncomingMachine(
            console: try openConsole(arguments["console"] ?? "stdio"), memorySize: try arguments.size("memory"),
            vcpus: try arguments.integer("cpus", in: 1...8), tracking: try arguments.dirtyTracking(),
            vsockCID: try arguments.vsockCID(), backing: try memoryBacking(arguments),
            balloonPlugin: try BalloonOption(parsing: arguments["balloon"]).plugin)
        let text = try arguments.required("listen")
        let special = try SpecialChannel(parsing: text)
        if case .file(let path)? = special {
            return try resume(path, full: false, arguments, kernel)
        }
        let guest = RunningGuest()
        let control = arguments["control"]
        defer { if let control, guest.isServing { unlink(control) } }
        do {
            let channel: ByteChannel
            // It listens on until the source's other connections have come.
            var acceptor: ChannelListener?
            if let descriptor = try special?.open() {
                channel = try ByteChannel(adopting: descriptor, name: text)
                if let control { try guest.serve(at: control) }
            } else {
                let listener = try ChannelListener(try ChannelAddress(parsing: text))
                if let control { try guest.serve(at: control) }
                if !listener.address.isLocal {
                    write(Array("lacuna: this channel is neither encrypted nor authenticated; use it on a network that you trust, or use ssh (see exec: in the reference)\n".utf8), to: 2)
                }
                write(Array("lacuna: waiting for a guest at \(listener.address)\n".utf8), to: 2)
                guest.whileWaiting { listener.close() }
                channel = try listener.accept()
                acceptor = listener
            }
            let receiver = MigrationReceiver(guest: incoming)
            guest.whileWaiting { receiver.cancel() }
            _ = try receiver.run(over: channel, joining: acceptor)
        } catch MigrationError.cancelled where guest.isStopping {
            return
        } catch let complaint as Complaint {
            throw complaint
        } catch {
            throw Complaint("no guest was received: \(error)")
        }
        try hold(incoming, guest, kernel)
    }

    /// Runs the guest that has arrived, to its end.
    private static func hold(_ incoming: IncomingMachine, _ guest: RunningGuest, _ kernel: Kernel?) throws(Complaint) {
        guard incoming.handOver(to: guest.set) else { throw Complaint("no guest was received") }
        // A stop that came while the guest did has left its mark only.
        if guest.isStopping { guest.machine?.end(.stopped) }
        write(Array("lacuna: the guest runs here now\n".utf8), to: 2)
        if incoming.console == 1 { connectInput(to: guest) }
        try finish(guest, kernel: kernel, console: incoming.console)
    }

    static func restore(_ words: ArraySlice<String>) throws(Complaint) {
        let arguments = try Arguments(
            words, options: Arguments.trackerOptions.union(["kernel", "initramfs", "cmdline", "control", "console"]),
            flags: ["full"], operand: "the file")
        try resume(arguments.operand, full: arguments[flag: "full"], arguments, try Kernel(arguments))
    }

    /// Starts the guest of a snapshot.
    private static func resume(
        _ path: String, full: Bool, _ arguments: Arguments, _ kernel: Kernel?
    ) throws(Complaint) {
        let incoming = IncomingMachine(
            console: try openConsole(arguments["console"] ?? "stdio"), memorySize: nil, vcpus: nil,
            tracking: try arguments.dirtyTracking(), vsockCID: try arguments.vsockCID())
        let guest = RunningGuest()
        let control = arguments["control"]
        defer { if let control, guest.isServing { unlink(control) } }
        if let control { try guest.serve(at: control) }
        do throws(PartFailure) {
            try incoming.restore(from: try SnapshotReader(path: path), full: full)
            try incoming.start()
        } catch { throw Complaint(error.what) }
        try hold(incoming, guest, kernel)
    }

}
