// SPDX-License-Identifier: Apache-2.0
import CLinux
import Migration

/// One end-to-end case on real KVM with a real guest.
struct Scenario: Sendable {
    let name: String
    /// Memory of the machine it runs in, MiB, and how long it may take there, seconds.
    let memory: Int, limit: Int
    let isQuick: Bool
    /// Programs of the machine that builds and modules of its kernel's tree that it needs there (`bed --program`,
    /// `bed --module`).
    var programs: [String] = [], modules: [String] = []
    /// It measures time, so nothing else is to run beside it.
    var isAlone = false
    /// Files of that machine (`bed --file`).
    var files: [String] = []
    let body: @Sendable (Stage) throws(Failure) -> Void
}

let memcheckGuest = "memcheck:15"

let scenarios = [
    chainScenarios,
    migrationScenarios,
    balloonScenarios,
    backingScenarios,
    figuresAgainstQEMU,
    faultScenarios,
    twoHostScenarios,
    trackerScenarios,
    roughScenarios,
    connectionScenarios,
    hostTroubleScenarios,
].flatMap(\.self)

/// The whole chain, end to end.
private let chainScenarios: [Scenario] = [
    Scenario(name: "power-off", memory: 2048, limit: 300, isQuick: true) { stage throws(Failure) in
        let guest = try stage.boot("guest", memory: "256M", cpus: 2, run: "poweroff", until: "GUEST-BOOTED")
        try expect(guest.child.text.contains("cpus=2"), "the guest did not find both CPUs")
        try expect(guest.child.text.contains("lacuna_balloon"), "the module is not loaded")
        let status = try stage.waitForEnd(guest.child, seconds: 60)
        try expect(status == 0, "status \(status) after the guest switched itself off")
    },
    Scenario(name: "reboot", memory: 2048, limit: 300, isQuick: false) { stage throws(Failure) in
        let guest = try stage.boot("guest", memory: "256M", run: "reboot", until: nil)
        try stage.wait(guest.child, for: "GUEST-BOOTED", count: 3, seconds: patience)
        try stage.stop(guest)
    },
    Scenario(name: "migrate-skip-unix", memory: 2560, limit: 600, isQuick: true) { stage throws(Failure) in
        try oneMigration(stage, address: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "5000"], cpus: 2, skips: true)
    },
    Scenario(name: "migrate-skip-tcp", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        try oneMigration(stage, address: "tcp:127.0.0.1:4444", flags: ["--skip-free-pages", "--hint-timeout", "5000"], cpus: 1, skips: true)
    },
    Scenario(name: "migrate-plain", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        try oneMigration(stage, address: "unix:channel", flags: [], cpus: 1, skips: false)
    },
    Scenario(name: "migrate-above-4g", memory: 9216, limit: 900, isQuick: false) { stage throws(Failure) in
        try oneMigration(
            stage, address: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "5000"], cpus: 1, skips: true, memory: "3584M",
            run: "memcheck:3")
    },
    Scenario(name: "ping-pong-20", memory: 2560, limit: 1500, isQuick: false) { stage throws(Failure) in
        var source = try stage.boot("guest-0", memory: "256M", cpus: 2, run: "memcheck:20")
        try stage.verify(source, passes: 1)
        for round in 1...20 {
            let address = "unix:channel-\(round)"
            let destination = try stage.receive("guest-\(round)", at: address)
            let report = try stage.migrate(source, to: destination, at: address, flags: ["--skip-free-pages", "--hint-timeout", "5000"])
            try stage.checkConsole(source)
            try expect(report.skippedPages > 0, "round \(round) skipped nothing: \(report.hintRefusal ?? "no answer from the guest")")
            try stage.verify(destination, passes: 2)
            say(
                "migration \(round): \(report.bytes >> 20) MiB sent, \(report.skippedPages / 256) MiB skipped, downtime \(Int(report.downtimeMilliseconds)) ms")
            source = destination
        }
        // Every eighth pass looks at every byte that memcheck holds.
        try stage.verify(source, passes: 9)
        try stage.stop(source)
    },
    Scenario(name: "no-module", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        let source = try stage.boot("source", memory: "256M", run: memcheckGuest, more: "lacuna.module=none")
        let destination = try stage.receive("destination", at: "unix:channel")
        let report = try stage.migrate(source, to: destination, at: "unix:channel", flags: ["--skip-free-pages"])
        try expect(report.hintRefusal != nil && report.skippedPages == 0, "the report does not say that the guest can't")
        try stage.verify(destination, passes: 2)
        try stage.stop(destination)
    },
    Scenario(name: "module-reload", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        try oneMigration(
            stage, address: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "5000"], cpus: 2, skips: true,
            run: "reload,\(memcheckGuest)")
    },
    Scenario(name: "bad-input", memory: 3072, limit: 900, isQuick: false, body: badInput),
]

func oneMigration(
    _ stage: Stage, address: String, flags: [String], cpus: Int, skips: Bool, memory: String = "256M", run: String = memcheckGuest
) throws(Failure) {
    let source = try stage.boot("source", memory: memory, cpus: cpus, run: run)
    try stage.verify(source, passes: 2)
    let destination = try stage.receive("destination", at: address)
    let report = try stage.migrate(source, to: destination, at: address, flags: flags)
    say(
        "\(report.bytes >> 20) MiB sent of \(report.ramPages / 256), \(report.skippedPages / 256) MiB skipped, \(report.rounds.count) rounds, \(Int(report.totalMilliseconds)) ms, downtime \(Int(report.downtimeMilliseconds)) ms"
    )
    try expect(report.outcome == .completed, "outcome \(report.outcome)")
    if skips {
        try expect(report.skippedPages > report.ramPages / 4, "only \(report.skippedPages) pages skipped: \(report.hintRefusal ?? "no answer")")
        try expect(report.rounds.first?.figures?.walkNanoseconds ?? 0 > 0, "the report lacks the module's figures")
    } else {
        try expect(report.skippedPages == 0, "pages were skipped without the flag")
    }
    // Nine passes include one that looks at every byte.
    try stage.verify(destination, passes: 9)
    try stage.stop(destination)
}

/// Each mistake gets one line that names cause and remedy, a status that is not zero, and costs the source nothing.
func badInput(_ stage: Stage) throws(Failure) {
    func refused(_ what: String, _ command: [String], _ parts: [String]) throws(Failure) {
        let child = try stage.run(command, seconds: patience)
        let lines = child.lines.filter { !$0.isEmpty && !$0.contains("waiting for a guest") }
        try expect(child.status != 0 && child.status ?? 128 < 128, "\(what): status \(child.status ?? -1)")
        try expect(lines.count == 1, "\(what): \(lines.count) lines: \(child.text)")
        for part in parts { try expect(lines[0].contains(part), "\(what): '\(lines[0])' does not say '\(part)'") }
        say("\(what): \(lines[0])")
    }
    let run = ["./lacuna", "run"], kernel = ["--kernel", "vmlinuz"], initramfs = ["--initramfs", "initramfs.gz"]
    try refused("missing kernel", run + ["--kernel", "nowhere"] + initramfs, ["nowhere", "--kernel"])
    try refused("no kernel", run + ["--kernel", "initramfs.gz"], ["bzImage", "--kernel"])
    try refused("unreadable initramfs", run + kernel + ["--initramfs", "/proc/self"], ["/proc/self", "--initramfs"])
    try refused("too little memory", run + kernel + initramfs + ["--memory", "64M"], ["--memory"])
    try refused("silly memory", run + kernel + ["--memory", "1M"], ["--memory"])
    try refused("too many CPUs", run + kernel + ["--cpus", "9"], ["--cpus"])
    try refused("unknown option", run + ["--kernal", "x"], ["--kernal", "--help"])
    try refused(
        "no usable KVM",
        ["busybox", "unshare", "-m", "sh", "-c", "mount --bind /dev/null /dev/kvm && ./lacuna run --kernel vmlinuz"], ["KVM"])

    let source = try stage.boot("source", memory: "256M", run: memcheckGuest)
    func migrate(_ to: String) -> [String] {
        ["./lacuna", "migrate", "--control", source.control, "--to", to, "--skip-free-pages", "--hint-timeout", "5000"]
    }
    try refused("busy control socket", run + kernel + initramfs + ["--control", source.control], ["another guest", "--control"])
    try refused("nobody listens", migrate("unix:nobody"), ["nobody", "lacuna receive"])
    try refused("bad address", migrate("carrier-pigeon"), ["carrier-pigeon", "unix:PATH"])
    try refused("no such guest", ["./lacuna", "status", "--control", "none.ctl"], ["none.ctl"])

    for (what, option) in [("other memory", ["--memory", "512M"]), ("other CPUs", ["--cpus", "3"])] {
        let destination = try stage.receive("destination", at: "unix:channel", more: option)
        try refused(what, migrate("unix:channel"), [option[0]])
        try expect(try stage.waitForEnd(destination.child, seconds: 30) != 0, "\(what): the destination did not fail")
        try expect(try stage.isRunning(source), "\(what): the source does not run")
        try stage.verify(source, passes: 1)
    }

    // Killed in the first round, held up by a narrow channel, so that it dies with a stream half sent.
    let destination = try stage.receive("destination", at: "unix:channel")
    let client = try stage.start("cut migrate", migrate("unix:channel") + ["--bandwidth", "1M"])
    // The destination has made its machine once it answers, which it does before any page is sent.
    while true {
        let status = try stage.run(["./lacuna", "status", "--control", source.control])
        if status.text.contains("\"migrating\"") { break }
        try expect(client.status == nil, "the migration ended by itself: \(client.text)")
    }
    stage.kill(destination.child)
    try expect(try stage.waitForEnd(client, seconds: 60) != 0, "a migration to a dead destination succeeded")
    say("cut stream: \(client.text)")
    try expect(try stage.isRunning(source), "cut stream: the source does not run")
    try stage.verify(source, passes: 2)

    // And the next attempt starts clean.
    let next = try stage.receive("next", at: "unix:channel")
    _ = try stage.migrate(source, to: next, at: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
    try stage.verify(next, passes: 9)
    try stage.stop(next)
}
