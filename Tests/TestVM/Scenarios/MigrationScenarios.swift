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
]

/// Migrates one guest `hops` times while memcheck rewrites, frees and reallocates its pages. The channel is narrow, so
/// that there are several rounds and pages that were sent in one are free in the next.
func chain(_ stage: Stage, kernel: String, hops: Int) throws(Failure) {
    var source = try stage.boot("guest-0", memory: "256M", run: "memcheck:25", more: kernel)
    try expect(
        source.child.lines.contains { $0.contains("GUEST-BOOTED") }, "the guest does not say that it booted")
    try stage.verify(source, passes: 1)
    var discarded = 0, laterSkipped = 0
    for hop in 1...hops {
        let address = "unix:channel-\(hop)"
        let destination = try stage.receive("guest-\(hop)", at: address)
        let report = try stage.migrate(
            source, to: destination, at: address,
            flags: ["--skip-free-pages", "--hint-timeout", "5000", "--downtime", "20", "--bandwidth", "60M"])
        try stage.checkConsole(source)
        try expect(report.skippedPages > 0, "hop \(hop) skipped nothing: \(report.hintRefusal ?? "no answer")")
        discarded += report.discardedPages
        laterSkipped += report.rounds.dropFirst().reduce(0) { $0 + $1.skipped }
        // Nine passes: one of them reads every byte, the others allocate and expect zeros.
        try stage.verify(destination, passes: hop == hops ? 17 : 9)
        source = destination
    }
    say("\(hops) migrations, \(laterSkipped) pages skipped in later rounds, \(discarded) of them with a discard mark")
    // Without such pages the scenario would show nothing about later rounds.
    try expect(discarded > 0, "no page that had been sent was free in a later round")
    try stage.stop(source)
}
