// SPDX-License-Identifier: Apache-2.0
import CLinux
import Migration

/// What an operator expects of a migration beyond that it works.
let migrationScenarios: [Scenario] = [
    Scenario(name: "init-on-free", memory: 2560, limit: 900, isQuick: false) { stage throws(Failure) in
        try chain(stage, kernel: "init_on_free=1 init_on_alloc=0", hops: 10)
    },
    Scenario(name: "init-nothing", memory: 2560, limit: 900, isQuick: false) { stage throws(Failure) in
        try chain(stage, kernel: "init_on_free=0 init_on_alloc=0", hops: 10)
    },
    Scenario(name: "init-on-alloc", memory: 2560, limit: 900, isQuick: false) { stage throws(Failure) in
        try chain(stage, kernel: "init_on_free=0 init_on_alloc=1", hops: 10)
    },
    Scenario(name: "page-poison", memory: 3072, limit: 900, isQuick: false, body: pagePoison),
    Scenario(name: "busy-guest", memory: 2560, limit: 900, isQuick: false, body: busyGuest),
    Scenario(name: "switch-over", memory: 2560, limit: 600, isQuick: false, body: switchOver),
    Scenario(name: "snapshot", memory: 4096, limit: 900, isQuick: true, body: snapshots),
]

/// A guest that dirties memory faster than the channel takes it: it stays when the time is over, and goes when it may be
/// slowed down.
private func busyGuest(_ stage: Stage) throws(Failure) {
    let source = try stage.boot("source", memory: "256M", run: memcheckGuest)
    try stage.verify(source, passes: 2)
    let narrow = ["--skip-free-pages", "--hint-timeout", "5000", "--bandwidth", "12M", "--downtime", "20"]

    let refuge = try stage.receive("refuge", at: "unix:refuge")
    let client = try stage.run(
        ["./lacuna", "migrate", "--control", source.control, "--to", "unix:refuge", "--timeout", "15000"] + narrow,
        seconds: patience)
    try expect(client.status == 1 && client.text.contains("given up after 15000 ms"), "no timeout: \(client.text)")
    say(client.text)
    try expect(try stage.waitForEnd(refuge.child, seconds: 30) != 0, "the destination did not end")
    try expect(try stage.isRunning(source), "the source does not run after the timeout")
    try stage.verify(source, passes: 2)

    let destination = try stage.receive("destination", at: "unix:channel")
    let report = try stage.migrate(
        source, to: destination, at: "unix:channel", flags: narrow + ["--auto-converge"])
    say("converged in \(report.rounds.count) rounds at \(report.throttlePercent) %, downtime \(Int(report.downtimeMilliseconds)) ms")
    try expect(report.throttlePercent > 0, "nothing had to be slowed down, so nothing was tried")
    try stage.verify(destination, passes: 9)
    try stage.stop(destination)
}

/// Waits for the word to switch over, can be called off meanwhile, and says where it stands.
private func switchOver(_ stage: Stage) throws(Failure) {
    let source = try stage.boot("source", memory: "256M", run: memcheckGuest)
    func control(_ command: String, _ more: String...) throws(Failure) -> Child {
        try stage.run(["./lacuna", command, "--control", source.control] + more)
    }
    func begin(_ name: String) throws(Failure) -> (client: Child, destination: Guest) {
        let destination = try stage.receive(name, at: "unix:\(name)")
        let client = try stage.start(
            "migrate to \(name)",
            ["./lacuna", "migrate", "--control", source.control, "--to", "unix:\(name)", "--skip-free-pages",
             "--hint-timeout", "5000", "--pause-before-switch-over", "--json", "report.json"])
        // The status is asked for again and again; each answer is an event of its own.
        let limit = now() + patience
        while true {
            let status = try control("migrate", "--status")
            if status.text.contains("\"waiting\"") { return (client, destination) }
            try expect(client.status == nil && now() < limit, "the migration never waited: \(client.text) \(status.text)")
        }
    }
    try expect(try control("cancel").status == 1, "a cancel without a migration succeeded")
    // Nobody comes: the wait can be ended in good order.
    try stage.stop(try stage.receive("nobody", at: "unix:nobody"))

    let first = try begin("first")
    try expect(try stage.run(["./lacuna", "status", "--control", source.control]).text.contains("\"migrating\""), "status does not say so")
    let second = try control("migrate", "--to", "unix:first")
    try expect(second.status == 1 && second.text.contains("already"), "two migrations at once: \(second.text)")
    try expect(try control("cancel").status == 0, "cancel failed")
    try expect(try stage.waitForEnd(first.client, seconds: 60) == 1, "a cancelled migration succeeded")
    try expect(try stage.waitForEnd(first.destination.child, seconds: 60) != 0, "the destination of a cancelled migration lives on")
    try stage.verify(source, passes: 2)

    let last = try begin("last")
    // The guest runs while it waits.
    try stage.verify(source, passes: 1)
    try expect(try control("switch-over").status == 0, "switch-over failed")
    try expect(try stage.waitForEnd(last.client, seconds: patience) == 0, "the migration failed: \(last.client.text)")
    try stage.wait(last.destination.child, for: "the guest runs here now", seconds: 30)
    try stage.verify(last.destination, passes: 9)
    try stage.stop(last.destination)
}

/// Migrates one guest `hops` times while memcheck rewrites, frees and reallocates its pages. The channel is narrow, so
/// that there are several rounds and pages that were sent in one are free in the next.
@discardableResult
func chain(
    _ stage: Stage, kernel: String, hops: Int, image: GuestKernel = .debian12, mustSkip: Bool = true
) throws(Failure) -> MigrationReport? {
    var source = try stage.boot("guest-0", memory: "256M", run: "memcheck:25", more: kernel, kernel: image)
    var last: MigrationReport?
    try expect(
        source.child.lines.contains { $0.contains("GUEST-BOOTED") }, "the guest does not say that it booted")
    try stage.verify(source, passes: 1)
    var discarded = 0, laterSkipped = 0
    for hop in 1...hops {
        let address = "unix:channel-\(hop)"
        let destination = try stage.receive("guest-\(hop)", at: address)
        let report = try stage.migrate(
            source, to: destination, at: address,
            flags: ["--skip-free-pages", "--hint-timeout", "5000", "--downtime", "20", "--bandwidth", "60M", "--max-rounds", "20", "--verify"])
        try stage.checkConsole(source)
        last = report
        try expect(report.skippedPages > 0 || !mustSkip, "hop \(hop) skipped nothing: \(report.hintRefusal ?? "no answer")")
        try expect(report.verifiedPages > 0, "hop \(hop) verified nothing")
        discarded += report.discardedPages
        laterSkipped += report.rounds.dropFirst().reduce(0) { $0 + $1.skipped }
        // Nine passes: one of them reads every byte, the others allocate and expect zeros.
        try stage.verify(destination, passes: hop == hops ? 17 : 9)
        source = destination
    }
    say("\(hops) migrations, \(laterSkipped) pages skipped in later rounds, \(discarded) of them with a discard mark")
    // Without such pages the scenario would show nothing about later rounds.
    try expect(discarded > 0 || !mustSkip, "no page that had been sent was free in a later round")
    try stage.stop(source)
    return last
}

/// A kernel that fills freed pages with a pattern and looks for it when they are used again. Skipped pages would read as
/// zero, so this guest is migrated whole, and the report says why.
private func pagePoison(_ stage: Stage) throws(Failure) {
    let report = try chain(
        stage, kernel: "page_poison=1 init_on_free=0 init_on_alloc=0", hops: 10, image: .generic, mustSkip: false)
    say("refusal: \(report?.hintRefusal ?? "none")")
    try expect(
        report?.skippedPages == 0 && report?.hintRefusal?.contains("poison") == true,
        "the report does not say that the guest poisons its pages: \(report?.hintRefusal ?? "no refusal")")
}
