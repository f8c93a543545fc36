// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import Migration

/// Migrations between two network namespaces, as two hosts, with a cable between them that is no faster than a real one.
let twoHostScenarios: [Scenario] = [
    Scenario(
        name: "two-hosts-tcp", memory: 2560, limit: 600, isQuick: false, programs: ["ip", "tc"],
        modules: ["veth", "sch_netem"]
    ) { stage throws(Failure) in try backAndForth(stage, flags: ["--max-rounds", "10"]) },
    Scenario(
        name: "two-hosts-tcp-4", memory: 2560, limit: 600, isQuick: false, programs: ["ip", "tc"],
        modules: ["veth", "sch_netem"]
    ) { stage throws(Failure) in try backAndForth(stage, flags: ["--max-rounds", "10", "--connections", "4"]) },
    Scenario(
        name: "two-hosts-ssh", memory: 2560, limit: 600, isQuick: false, programs: ["ip", "tc", "ssh", "sshd", "ssh-keygen"],
        modules: ["veth", "sch_netem"]
    ) { stage throws(Failure) in try overSSH(stage) },
]

/// A network namespace that lives as long as the program that holds it.
struct TestHost {
    let child: Child
    let ipv4: String, ipv6: String
    let device: String

    /// What to put before a command so that it runs there; nothing without a host.
    static func command(on host: TestHost?) -> [String] {
        guard let host else { return [] }
        return ["busybox", "nsenter", "-t", "\(host.child.pid)", "-n"]
    }
}

/// Megabits in a second, one way. The delay makes a round trip of a few milliseconds.
private let cableRate = 400

/// Where a program is. busybox would take its own applet of that name, and sshd wants to be called by its full path.
func path(of program: String) throws(Failure) -> String {
    for folder in (getenv("PATH").map { String(cString: $0) } ?? "").split(separator: ":") {
        let path = "\(folder)/\(program)"
        if access(path, X_OK) == 0 { return path }
    }
    throw Failure("there is no program \(program) here")
}

extension Stage {
    /// Two hosts and the cable. Nothing of the machine's own network is touched.
    func twoHosts() throws(Failure) -> (near: TestHost, far: TestHost) {
        func host(_ name: String, _ number: Int) throws(Failure) -> TestHost {
            let child = try start(name, ["busybox", "unshare", "-n", "sh", "-c", "echo HOST-UP; exec sleep 2147483647"])
            try wait(child, for: "HOST-UP", seconds: 30)
            return TestHost(child: child, ipv4: "10.77.0.\(number)", ipv6: "fd77::\(number)", device: name)
        }
        let (near, far) = (try host("near", 1), try host("far", 2))
        let ip = try path(of: "ip"), tc = try path(of: "tc")
        func must(_ command: [String]) throws(Failure) {
            let child = try run(command)
            guard child.status == 0 else { throw Failure("\(command.joined(separator: " ")): \(child.text)") }
        }
        try must([
            ip, "link", "add", "name", near.device, "netns", "\(near.child.pid)", "type", "veth", "peer", "name", far.device,
            "netns", "\(far.child.pid)",
        ])
        for host in [near, far] {
            let there = TestHost.command(on: host)
            try must(there + [ip, "address", "add", "\(host.ipv4)/24", "dev", host.device])
            // Without duplicate address detection the address is there at once.
            try must(there + [ip, "address", "add", "\(host.ipv6)/64", "dev", host.device, "nodad"])
            try must(there + [ip, "link", "set", "lo", "up"])
            try must(there + [ip, "link", "set", host.device, "up"])
            try must(there + [tc, "qdisc", "add", "dev", host.device, "root", "netem", "rate", "\(cableRate)mbit", "delay", "2ms"])
        }
        return (near, far)
    }

    /// A migration from one host to the other, whose report must show that the bytes went through the cable.
    func migrate(
        _ source: Guest, to destination: Guest, throughCableAt address: String, flags: [String], on host: TestHost? = nil
    ) throws(Failure) -> MigrationReport {
        let report = try migrate(
            source, to: destination, at: address,
            flags: ["--skip-free-pages", "--hint-timeout", "5000"] + flags, on: host)
        let rate = Double(report.bytes) * 8 / 1e3 / report.totalMilliseconds
        say(
            "\(address): \(report.bytes >> 20) MiB in \(Int(report.totalMilliseconds)) ms, \(Int(rate)) Mbit/s on a cable of \(cableRate), downtime \(Int(report.downtimeMilliseconds)) ms"
        )
        // A tenth more: what still lies in the source's buffers when it is done counts as sent.
        try expect(rate <= Double(cableRate) * 1.1, "\(rate) Mbit/s is more than the cable carries")
        try expect(report.outcome == .completed && report.skippedPages > 0, "outcome \(report.outcome)")
        return report
    }
}

/// There over IPv4 and back over IPv6.
private func backAndForth(_ stage: Stage, flags: [String]) throws(Failure) {
    let (near, far) = try stage.twoHosts()
    let source = try stage.boot("source", memory: "256M", cpus: 2, run: "memcheck:15:20", on: near)
    try stage.verify(source, passes: 1)
    let there = try stage.receive("there", at: "tcp:\(far.ipv4):4444", on: far)
    _ = try stage.migrate(source, to: there, throughCableAt: "tcp:\(far.ipv4):4444", flags: flags)
    try stage.verify(there, passes: 9)
    let back = try stage.receive("back", at: "tcp:[\(near.ipv6)]:4444", on: near)
    _ = try stage.migrate(there, to: back, throughCableAt: "tcp:[\(near.ipv6)]:4444", flags: flags)
    try stage.verify(back, passes: 9)
    try stage.stop(back)
}

/// `exec:` with a real ssh between the hosts: encrypted, both ends authenticated, and nothing of lacuna listens on the
/// network.
private func overSSH(_ stage: Stage) throws(Failure) {
    let (near, far) = try stage.twoHosts()
    let here = try currentFolder()
    let config = try makeKeys(stage, here, far: far)
    // The server wants an account of its own and a folder of root's. Both are in a mount namespace of its own.
    let server = try stage.start(
        "sshd",
        TestHost.command(on: far) + [
            "busybox", "unshare", "-m", "sh", "-c",
            "mount --bind passwd /etc/passwd && mount -t tmpfs tmpfs /run && mkdir -p /run/sshd && exec \(try path(of: "sshd")) -D -e -f \(here)/sshd.conf",
        ])
    try stage.wait(server, for: "Server listening", seconds: 30)
    // ssh by itself, so that what fails later is not it.
    let ssh = try path(of: "ssh")
    let hello = try stage.run(TestHost.command(on: near) + [ssh, "-F", config, "far", "echo", "hello"])
    try expect(hello.lines == ["hello"] && hello.status == 0, "ssh alone: \(hello.text)")

    let source = try stage.boot("source", memory: "128M", cpus: 2, run: "memcheck:10:5", on: near)
    try stage.verify(source, passes: 1)
    func command(_ host: String) -> String {
        "exec:\(ssh) -F \(config) \(host) \(here)/lacuna relay unix:\(here)/incoming"
    }

    // A host with another key than the one that was noted is not the destination, whoever it is.
    let client = try stage.run(
        TestHost.command(on: near) + ["./lacuna", "migrate", "--control", source.control, "--to", command("stranger")],
        seconds: patience)
    try expect(client.status == 1, "the migration to a host with a wrong key ended with \(client.status ?? -1)")
    say("a stranger's key: \(client.text)")
    try expect(
        client.count("Host key verification failed") == 1, "ssh's own reason does not reach the operator: \(client.text)")
    try expect(try stage.isRunning(source), "the source does not run after ssh refused")

    let destination = try stage.receive("destination", at: "unix:\(here)/incoming", on: far)
    _ = try stage.migrate(source, to: destination, throughCableAt: command("far"), flags: ["--max-rounds", "3"], on: near)
    try expect(server.count("Accepted publickey") > 0, "sshd let nobody in: \(server.text)")
    try stage.verify(destination, passes: 9)
    try stage.stop(destination)
}

private func currentFolder() throws(Failure) -> String {
    guard let text = getcwd(nil, 0) else { throw Failure("getcwd: errno \(errno)") }
    defer { free(text) }
    return String(cString: text)
}

private func writeFile(_ name: String, _ text: String) throws(Failure) {
    do { try Data(text.utf8).write(to: URL(filePath: name)) } catch { throw Failure("\(name): \(error)") }
}

/// Keys of this run, the server's and the client's configuration. Returns the client's.
private func makeKeys(_ stage: Stage, _ here: String, far: TestHost) throws(Failure) -> String {
    for name in ["host", "user", "stranger"] {
        unlink("\(name).key")
        let child = try stage.run([try path(of: "ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", "\(name).key"])
        guard child.status == 0 else { throw Failure("ssh-keygen: \(child.text)") }
    }
    func publicKey(_ name: String) throws(Failure) -> String {
        let text: String
        do { text = try String(contentsOf: URL(filePath: "\(name).key.pub"), encoding: .utf8) } catch {
            throw Failure("\(name).key.pub: \(error)")
        }
        return text.split(separator: " ").prefix(2).joined(separator: " ")
    }
    try writeFile("passwd", "root:x:0:0:root:/root:/bin/sh\nsshd:x:65534:65534::/run/sshd:/bin/false\n")
    try writeFile("known", "far \(try publicKey("host"))\nstranger \(try publicKey("stranger"))\n")
    try writeFile(
        "sshd.conf",
        """
        ListenAddress \(far.ipv4)
        HostKey \(here)/host.key
        AuthorizedKeysFile \(here)/user.key.pub
        PermitRootLogin prohibit-password
        PasswordAuthentication no
        StrictModes no
        UsePAM no
        PidFile none

        """)
    func host(_ name: String) -> String {
        """
        Host \(name)
            HostName \(far.ipv4)
            HostKeyAlias \(name)
            User root
            IdentityFile \(here)/user.key
            IdentitiesOnly yes
            BatchMode yes
            StrictHostKeyChecking yes
            UserKnownHostsFile \(here)/known
            GlobalKnownHostsFile none

        """
    }
    try writeFile("ssh.conf", host("far") + host("stranger"))
    return "\(here)/ssh.conf"
}
