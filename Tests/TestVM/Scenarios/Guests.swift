// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import Migration

/// How long a boot, a migration or a few memcheck passes may take in an emulated CPU on a busy machine.
let patience: Double = 240

/// The kernels that the bed brings for guests.
enum GuestKernel: String {
    /// The one of Debian 12.
    case debian12 = "6.1"
    /// The one that bookworm-backports has for it.
    case backports = "6.12"
    /// Debian 12's for all machines and not for clouds: it has CONFIG_PAGE_POISONING.
    case generic = "6.1-generic"

    /// Those that every test of the driver runs on.
    static let allCases: [GuestKernel] = [.debian12, .backports]

    private var suffix: String { self == .debian12 ? "" : "-\(rawValue)" }
    var image: String { "vmlinuz\(suffix)" }
    var initramfs: String { "initramfs\(suffix).gz" }
    /// QEMU 7.2 sets the flags of `cmpxchg16b` wrong, on which newer kernels rely where the processor has it: they panic at
    /// some later time. Without it they use another way. No other host needs this.
    var workaround: String {
        self == .backports && getenv("LACUNA_BED").map { String(cString: $0) } == "emulated" ? " clearcpuid=cx16" : ""
    }
    /// What `uname -r` begins with.
    var release: String { rawValue + "." }
}

/// A guest that one `lacuna` process holds.
struct Guest {
    let child: Child
    let control: String
}

extension Stage {
    func boot(
        _ name: String, memory: String, cpus: Int = 1, run: String, more: String = "", until text: String? = "GUEST-READY",
        kernel: GuestKernel = .debian12, options: [String] = [], on host: TestHost? = nil
    ) throws(Failure) -> Guest {
        let control = "\(name).ctl"
        let child = try start(
            name,
            TestHost.command(on: host) + [
                "./lacuna", "run", "--kernel", kernel.image, "--initramfs", kernel.initramfs, "--memory", memory, "--cpus", "\(cpus)",
                "--control", control, "--cmdline", "console=ttyS0 quiet lacuna.run=\(run) \(more)\(kernel.workaround)",
            ] + options)
        if let text { try wait(child, for: text, seconds: patience) }
        return Guest(child: child, control: control)
    }

    func receive(
        _ name: String, at address: String, more: [String] = [], until text: String = "waiting for a guest",
        on host: TestHost? = nil
    ) throws(Failure) -> Guest {
        let control = "\(name).ctl"
        let child = try start(
            name, TestHost.command(on: host) + ["./lacuna", "receive", "--listen", address, "--control", control] + more)
        try wait(child, for: text, seconds: 30)
        return Guest(child: child, control: control)
    }

    /// Migrates and returns the report; both ends' messages are checked.
    func migrate(
        _ source: Guest, to destination: Guest, at address: String, flags: [String], on host: TestHost? = nil
    ) throws(Failure) -> MigrationReport {
        unlink("report.json")
        let client = try run(
            TestHost.command(on: host) + ["./lacuna", "migrate", "--control", source.control, "--to", address, "--json", "report.json"] + flags,
            seconds: patience)
        guard client.status == 0 else { throw Failure("migrate failed: \(client.text)") }
        let status = try waitForEnd(source.child, seconds: 30)
        guard status == 0 else { throw Failure("the source ended with status \(status)") }
        try wait(destination.child, for: "the guest runs here now", seconds: 30)
        return try readReport()
    }

    func readReport() throws(Failure) -> MigrationReport {
        do { return try JSONDecoder().decode(MigrationReport.self, from: try Data(contentsOf: URL(filePath: "report.json"))) } catch {
            throw Failure("report.json: \(error)")
        }
    }

    /// Waits until memcheck has verified `passes` more passes on this side; fails on a wrong byte or any kernel warning.
    func verify(_ guest: Guest, passes: Int) throws(Failure) {
        try wait(guest.child, for: "MEMCHECK pass=", from: guest.child.lines.count, count: passes, seconds: patience)
        try checkConsole(guest)
    }

    func checkConsole(_ guest: Guest) throws(Failure) {
        for sign in ["MEMCHECK WRONG", "GUEST-ERROR", "BUG:", "WARNING:", "Call Trace", "soft lockup", "Oops"] {
            if let line = guest.child.lines.first(where: { $0.contains(sign) }) { throw Failure("\(guest.child.name): \(line)") }
        }
    }

    func stop(_ guest: Guest) throws(Failure) {
        let client = try run(["./lacuna", "stop", "--control", guest.control])
        guard client.status == 0 else { throw Failure("stop failed: \(client.text)") }
        let status = try waitForEnd(guest.child, seconds: 30)
        guard status == 0 else { throw Failure("\(guest.child.name) ended with status \(status) after stop") }
    }

    func isRunning(_ guest: Guest) throws(Failure) -> Bool {
        let client = try run(["./lacuna", "status", "--control", guest.control])
        return client.status == 0 && client.text.contains("\"running\"")
    }
}

func expect(_ condition: Bool, _ what: @autoclosure () -> String) throws(Failure) {
    if !condition { throw Failure(what()) }
}
