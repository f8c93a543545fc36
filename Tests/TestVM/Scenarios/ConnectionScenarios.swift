// SPDX-License-Identifier: Apache-2.0
import CLinux
import Migration

/// Memory over several connections.
let connectionScenarios: [Scenario] = [
    Scenario(name: "migrate-4-connections", memory: 2560, limit: 900, isQuick: false, body: fourConnections)
]

/// A guest under memcheck goes there and on over four connections, in several rounds, with hints and checksums. Before
/// that, a channel that is a single one has to say so.
private func fourConnections(_ stage: Stage) throws(Failure) {
    var source = try stage.boot("guest-0", memory: "256M", cpus: 2, run: "memcheck:25")
    try stage.verify(source, passes: 1)
    let refused = try stage.run(
        ["./lacuna", "migrate", "--control", source.control, "--to", "exec:cat", "--connections", "4"])
    try expect(refused.status == 2 && refused.text.contains("--connections"), "exec: with four connections: \(refused.text)")
    let far = try stage.run(
        ["./lacuna", "migrate", "--control", source.control, "--to", "tcp:127.0.0.1:1", "--connections", "17"])
    try expect(far.status == 2 && far.text.contains("--connections"), "17 connections: \(far.text)")

    var discarded = 0, later = 0
    for hop in 1...3 {
        let address = "tcp:127.0.0.1:\(4450 + hop)"
        let destination = try stage.receive("guest-\(hop)", at: address)
        let report = try stage.migrate(
            source, to: destination, at: address,
            flags: [
                "--connections", "4", "--skip-free-pages", "--hint-timeout", "5000", "--downtime", "20", "--bandwidth", "60M",
                "--max-rounds", "20", "--verify",
            ])
        try stage.checkConsole(source)
        say(
            "hop \(hop): \(report.connections) connections, \(report.bytes >> 20) MiB sent, \(report.skippedPages / 256) MiB skipped, "
                + "\(report.rounds.count) rounds, downtime \(Int(report.downtimeMilliseconds)) ms")
        try expect(report.connections == 4, "memory went over \(report.connections) connections")
        try expect(report.skippedPages > 0, "hop \(hop) skipped nothing: \(report.hintRefusal ?? "no answer")")
        try expect(report.verifiedPages > 0, "hop \(hop) verified nothing")
        discarded += report.discardedPages
        later += report.rounds.dropFirst().reduce(0) { $0 + $1.sent }
        // Nine passes include one that looks at every byte.
        try stage.verify(destination, passes: hop == 3 ? 17 : 9)
        source = destination
    }
    // Without these the connections would not have had to keep any order.
    try expect(later > 0 && discarded > 0, "\(later) pages in later rounds, \(discarded) discard marks")
    try stage.stop(source)
}
