// SPDX-License-Identifier: Apache-2.0
import Migration

/// Migrations under load with each way of finding dirty pages.
let trackerScenarios: [Scenario] = [
    trackerScenario("tracker-bitmap", ["--dirty-tracker", "bitmap"], isQuick: false),
    trackerScenario("tracker-manual", ["--dirty-tracker", "manual"], isQuick: false),
    // The smallest ring: it fills up many times in each migration.
    trackerScenario("tracker-ring", ["--dirty-tracker=ring", "--dirty-ring-size=1024"], isQuick: false),
    // Known pages, made dirty by two vCPUs, against what each tracker returns; with a ring, too, that is small and often full.
    Scenario(name: "bench-dirty-log", memory: 2048, limit: 600, isQuick: false) { stage throws(Failure) in
        let table = try bench(stage, "dirty-log", ["--memory", "256M"])
        for tracker in ["bitmap ", "manual ", "ring  ", "ring 1024 full"] {
            try expect(table.count { $0.hasPrefix(tracker) } == 12, "not twelve rows of \(tracker)")
        }
        let full = table.filter { $0.hasPrefix("ring 1024 full") }.compactMap { $0.split(separator: " ").dropLast(2).last.flatMap { Int($0) } }
        try expect(full.reduce(0, +) > 50, "the rings were hardly ever full: \(full)")
    },
    // Ten migrations with each tracker, compared byte for byte.
    Scenario(name: "bench-ping-pong", memory: 2048, limit: 600, isQuick: false) { stage throws(Failure) in
        let table = try bench(stage, "ping-pong", ["--memory", "64M", "--migrations", "10", "--bandwidth", "200M"])
        try expect(table.count == 1 + 3 * 11, "\(table.count) lines")
    },
    Scenario(name: "bench-first-dirty", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        let table = try bench(
            stage, "first-dirty", ["--kernel", "vmlinuz", "--initramfs", "initramfs.gz", "--memory", "256M"])
        for guest in ["idle", "loaded"] { try expect(table.contains { $0.hasPrefix(guest) }, "no row of \(guest)") }
    },
    Scenario(name: "bench-harvest", memory: 1024, limit: 600, isQuick: false) { stage throws(Failure) in
        // Only that it runs: an emulated CPU's times mean nothing, and the limits are checked outside.
        let table = try bench(stage, "harvest", ["--memory", "4G"], checks: false)
        try expect(table.count { $0.hasPrefix("double buffer") } == 10, "not ten rows of the double buffer")
    },
    Scenario(name: "tracker-bad-input", memory: 2048, limit: 300, isQuick: false) { stage throws(Failure) in
        for (options, part) in [
            (["--dirty-tracker", "guess"], "bitmap, manual or ring"), (["--dirty-ring-size", "1000"], "--dirty-ring-size"),
            (["--dirty-tracker", "ring", "--dirty-ring-size", "1500"], "power of two"),
            (["--dirty-ring-size", "2048"], "--dirty-tracker ring only"),
        ] {
            let child = try stage.run(["./lacuna", "run", "--kernel", "vmlinuz"] + options)
            try expect(child.status == 2 && child.lines.count == 1, "\(options): status \(child.status ?? -1): \(child.text)")
            try expect(child.text.contains(part), "\(options): '\(child.text)' does not say '\(part)'")
        }
    },
]

/// Runs a benchmark, which fails if it missed a limit or lost a page; returns its lines.
private func bench(_ stage: Stage, _ name: String, _ options: [String], checks: Bool = true) throws(Failure) -> [String] {
    let child = try stage.run(
        ["./lacuna", "bench", "dirty", name, "--json", "out/\(name).json"] + (checks ? ["--check"] : []) + options, seconds: 500)
    say(child.text)
    try expect(child.status == 0, "status \(child.status ?? -1)")
    return child.lines
}

/// Ten migrations of a guest with two vCPUs under memcheck; hints in every other one, traffic through vhost in half of
/// them, with and without hints.
private func trackerScenario(_ name: String, _ options: [String], isQuick: Bool) -> Scenario {
    Scenario(name: name, memory: 2560, limit: 1200, isQuick: isQuick, modules: ["vhost_vsock"]) { stage throws(Failure) in
        func address(_ round: Int) -> [String] { ["--vsock-cid", "\(100 + round)"] }
        var source = try stage.boot(
            "guest-0", memory: "256M", cpus: 2, run: "agent,memcheck:20", options: options + address(0))
        try stage.verify(source, passes: 1)
        var later = 0, blocks = 0, unanswered = 0
        for round in 1...10 {
            let channel = "unix:channel-\(round)", skips = round % 2 == 1, talks = round / 2 % 2 == 0
            let destination = try stage.receive("guest-\(round)", at: channel, more: options + address(round))
            var traffic: Child?
            if talks {
                let child = try stage.start("traffic-\(round)", ["./lacuna-scenarios", "vsock", "\(99 + round)", "1000", "0"])
                try stage.wait(child, for: "VSOCK blocks=", seconds: patience)
                traffic = child
            }
            let report = try stage.migrate(
                source, to: destination, at: channel, flags: skips ? ["--skip-free-pages", "--hint-timeout", "5000"] : [])
            try stage.checkConsole(source)
            if skips { try expect(report.skippedPages > 0, "migration \(round) skipped nothing: \(report.hintRefusal ?? "")") }
            later += report.rounds.dropFirst().reduce(0) { $0 + $1.dirtied }
            if let traffic {
                let status = try stage.waitForEnd(traffic, seconds: 60)
                try expect(status == 0, "traffic \(round): \(traffic.text)")
                let count = traffic.lines.last.flatMap { Int($0.split(separator: "=").last ?? "") } ?? 0
                try expect(count > 0, "traffic \(round): \(traffic.text)")
                blocks += count
            }
            try stage.verify(destination, passes: 2)
            // The agent's socket still listens, at the guest's new address.
            let after = try stage.run(["./lacuna-scenarios", "vsock", "\(100 + round)", "1000", "20"], seconds: patience)
            try expect(after.status == 0, "the agent after migration \(round): \(after.text)")
            unanswered += after.lines.count { $0.contains("cannot connect") }
            say(
                "migration \(round): \(report.bytes >> 20) MiB, \(report.rounds.count) rounds, dirtied \(report.rounds.map(\.dirtied)), downtime \(Int(report.downtimeMilliseconds)) ms, \(blocks) blocks of traffic and \(unanswered) unanswered connections so far")
            source = destination
        }
        // A tracker that sees nothing would pass a guest that writes nothing.
        try expect(later > 1000, "only \(later) pages were seen dirty: the guest was idle, or the tracker blind")
        try stage.verify(source, passes: 9)
        try stage.stop(source)
    }
}
