// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import Migration

/// Little memory, full disks, wrong addresses: what an operator meets sooner or later.
let roughScenarios: [Scenario] = [
    Scenario(name: "destination-memory", memory: 3072, limit: 600, isQuick: false, body: destinationMemory),
    Scenario(name: "rough", memory: 3072, limit: 600, isQuick: false, body: rough),
]

/// What a process has in memory, KiB: private pages and its part of shared ones.
private func resident(_ child: Child) throws(Failure) -> Int {
    let file = "/proc/\(child.pid)/smaps_rollup"
    let text: String
    do { text = try String(contentsOf: URL(filePath: file), encoding: .utf8) } catch { throw Failure("\(file): \(error)") }
    guard let line = text.split(separator: "\n").first(where: { $0.hasPrefix("Pss:") }),
        let number = line.split(separator: " ").compactMap({ Int($0) }).first
    else { throw Failure("\(file) has no Pss: \(text)") }
    return number
}

/// A destination holds what the guest uses and no more: neither skipped pages nor zero pages cost memory there.
private func destinationMemory(_ stage: Stage) throws(Failure) {
    // The guest filled most of its memory and freed it again; then it does little, so that what is measured stays so.
    let source = try stage.boot("source", memory: "1G", run: "dirty-then-free:75,memcheck:10:2")
    try stage.verify(source, passes: 1)
    let before = try resident(source.child)
    let destination = try stage.receive("destination", at: "unix:channel")
    let report = try stage.migrate(
        source, to: destination, at: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
    let after = try resident(destination.child)
    let inUse = (report.ramPages - report.freePages) * 4
    let hundredths = after * 100 / inUse
    say(
        "\(before / 1024) MiB resident at the source, \(after / 1024) at the destination, \(inUse / 1024) in use in the guest: \(hundredths / 100).\(hundredths % 100 < 10 ? "0" : "")\(hundredths % 100) (goal: at most 1.15)"
    )
    try expect(before > 3 * inUse, "the source's process holds too little for this to show anything")
    try expect(after * 100 <= inUse * 115, "the destination holds more than 1.15 of what the guest uses")
    try stage.verify(destination, passes: 9)
    try stage.stop(destination)
}

private func rough(_ stage: Stage) throws(Failure) {
    var source = try stage.boot("source", memory: "256M", run: memcheckGuest)
    try stage.verify(source, passes: 1)
    func migrate(_ to: String, _ more: [String] = []) -> [String] {
        ["./lacuna", "migrate", "--control", source.control, "--to", to, "--skip-free-pages", "--hint-timeout", "5000"] + more
    }
    /// The attempt fails with `words` in its one line, and the guest runs on with its memory right.
    func refused(_ what: String, _ to: String, _ words: [String], more: [String] = []) throws(Failure) {
        let client = try stage.run(migrate(to, more), seconds: patience)
        say("\(what): \(client.text)")
        try expect(client.status == 1, "\(what): status \(client.status ?? -1)")
        try expect(client.lines.count == 1, "\(what): \(client.lines.count) lines")
        for word in words { try expect(client.text.contains(word), "\(what): '\(client.text)' does not say '\(word)'") }
        try expect(try stage.isRunning(source), "\(what): the source does not run")
        try stage.verify(source, passes: 8)
    }

    try refused("to oneself", "unix:\(source.control)", ["own control socket", "lacuna receive"])
    let other = try stage.boot("other", memory: "128M", run: "idle")
    try refused("to another guest's control socket", "unix:\(other.control)", ["not lacuna"])
    try expect(try stage.isRunning(other), "the other guest does not run after it was taken for a destination")

    // A second guest to a destination that already has one coming.
    let shared = try stage.receive("shared", at: "unix:shared.sock")
    let first = try stage.start("first", migrate("unix:shared.sock", ["--pause-before-switch-over"]))
    try stage.waitUntilMigrating(source, first)
    let second = try stage.run(
        ["./lacuna", "migrate", "--control", other.control, "--to", "unix:shared.sock"], seconds: patience)
    say("a second guest to one destination: \(second.text)")
    try expect(
        second.status == 1 && second.text.contains("lacuna receive"), "a second guest: \(second.text)")
    try expect(try stage.isRunning(other), "the second guest does not run where it was")
    let cancel = try stage.run(["./lacuna", "cancel", "--control", source.control])
    try expect(cancel.status == 0, "cancel: \(cancel.text)")
    try expect(try stage.waitForEnd(first, seconds: 60) == 1, "the cancelled migration succeeded")
    try expect(try stage.waitForEnd(shared.child, seconds: 60) != 0, "its destination lives on")
    try stage.stop(other)

    // A destination that may not have the memory says so before anything is sent.
    let poor = try stage.start(
        "poor",
        ["busybox", "sh", "-c", "ulimit -v 220000; exec ./lacuna receive --listen unix:poor.sock --control poor.ctl"])
    try stage.wait(poor, for: "waiting for a guest", seconds: 30)
    try refused("no address space there", "unix:poor.sock", ["refused", "256 MiB", "--memory"])
    try expect(try stage.waitForEnd(poor, seconds: 30) != 0, "the poor destination ended well")
    try expect(poor.text.contains("no guest was received"), "the poor destination does not say why: \(poor.text)")

    // One that has it only in theory is killed by its kernel while memory comes, long before the guest would stop.
    let starved = try stage.start(
        "starved",
        [
            "busybox", "unshare", "-m", "sh", "-c",
            """
            mkdir -p groups && mount -t cgroup2 none groups && echo +memory >groups/cgroup.subtree_control &&
            mkdir -p groups/lacuna-starved && echo 24M >groups/lacuna-starved/memory.max &&
            echo $$ >groups/lacuna-starved/cgroup.procs &&
            exec ./lacuna receive --listen unix:starved.sock --control starved.ctl
            """,
        ])
    try stage.wait(starved, for: "waiting for a guest", seconds: 30)
    try refused("killed there for want of memory", "unix:starved.sock", ["closed by the other side"])
    try expect(try stage.waitForEnd(starved, seconds: 30) == 128 + SIGKILL, "it was not killed: \(starved.text)")
    _ = try stage.run([
        "busybox", "unshare", "-m", "sh", "-c", "mount -t cgroup2 none groups && rmdir groups/lacuna-starved",
    ])

    // A report that cannot be written is no reason to lose the guest, and none to keep silent.
    try refused("a report where nothing can be", "unix:nobody.sock", ["/proc/nowhere/report.json", "--json"],
        more: ["--json", "/proc/nowhere/report.json"])
    let destination = try stage.receive("destination", at: "unix:full.sock")
    let client = try stage.run(migrate("unix:full.sock", ["--json", "/dev/full"]), seconds: patience)
    say("a full disk for the report: \(client.text)")
    try expect(
        client.status == 1 && client.text.contains("the migration is completed") && client.text.contains("No space left"),
        "a full disk: status \(client.status ?? -1), '\(client.text)'")
    try expect(try stage.waitForEnd(source.child, seconds: 30) == 0, "the source did not end")
    try stage.wait(destination.child, for: "the guest runs here now", seconds: 30)
    try stage.verify(destination, passes: 9)
    source = destination

    // A console that cannot be written to costs the guest its words and nothing else.
    let mute = try stage.start(
        "mute",
        ["./lacuna", "receive", "--listen", "unix:mute.sock", "--control", "mute.ctl", "--console", "file:/dev/full"])
    try stage.wait(mute, for: "waiting for a guest", seconds: 30)
    let muted = Guest(child: mute, control: "mute.ctl")
    _ = try stage.migrate(source, to: muted, at: "unix:mute.sock", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
    let last = try stage.receive("last", at: "unix:last.sock")
    _ = try stage.migrate(muted, to: last, at: "unix:last.sock", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
    try stage.verify(last, passes: 9)
    try stage.stop(last)
}

extension Stage {
    /// Until the destination has the hello, and with it its one connection.
    func waitUntilMigrating(_ source: Guest, _ client: Child) throws(Failure) {
        let limit = now() + patience
        while true {
            let status = try run(["./lacuna", "migrate", "--status", "--control", source.control])
            if status.text.contains("\"waiting\"") { return }
            try expect(client.status == nil && now() < limit, "the migration never came to wait: \(client.text) \(status.text)")
        }
    }
}
