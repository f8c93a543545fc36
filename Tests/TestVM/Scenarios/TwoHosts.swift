// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import Migration

/// Migrations between two network namespaces, as two hosts, with a cable between them that is no faster than a real one.
let twoHostScenarios: [Scenario] = [
    Scenario(
        name: "two-hosts-tcp", memory: 2560, limit: 600, isQuick: false, programs: ["ip", "tc"],
        modules: ["veth", "sch_netem"]
    ) { stage throws(Failure) in try backAndForth(stage, flags: []) },
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
        _ source: Guest, to destination: Guest, throughCableAt address: String, flags: [String]
    ) throws(Failure) -> MigrationReport {
        let report = try migrate(
            source, to: destination, at: address,
            flags: ["--skip-free-pages", "--hint-timeout", "5000", "--max-rounds", "10"] + flags)
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
