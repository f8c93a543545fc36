// SPDX-License-Identifier: Apache-2.0
import CLinux
import Migration

/// The guest driver in the whole chain; by itself it is tested by guest-driver/tests/run.
let guestDriverScenarios: [Scenario] = [
    Scenario(name: "walk-8g", memory: 20480, limit: 900, isQuick: false) { stage throws(Failure) in
        let source = try stage.boot("source", memory: "8192M", run: "idle")
        let destination = try stage.receive("destination", at: "unix:channel")
        let report = try stage.migrate(source, to: destination, at: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
        try stage.checkConsole(source)
        guard let figures = report.rounds.first?.figures else { throw Failure("no answer: \(report.hintRefusal ?? "no reason")") }
        say("\(figures.blocks) blocks, \(figures.pages >> 8) MiB, walk \(figures.walkNanoseconds) ns, longest hold \(figures.longestLockNanoseconds) ns")
        try expect(figures.pages > 7 << 18, "only \(figures.pages) pages of an idle guest's 8 GiB are free")
        try expect(figures.walkNanoseconds > 0 && figures.walkNanoseconds < 2_000_000, "the walk took \(figures.walkNanoseconds) ns")
        try stage.stop(destination)
    },
    Scenario(name: "driver-chain-6.12", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        let source = try stage.boot("source", memory: "256M", cpus: 2, run: "reload,\(memcheckGuest)", kernel: .backports)
        try expect(source.child.text.contains("kernel=6.12."), "the guest runs another kernel")
        try stage.verify(source, passes: 2)
        let destination = try stage.receive("destination", at: "unix:channel")
        let report = try stage.migrate(source, to: destination, at: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
        try expect(report.skippedPages > report.ramPages / 4, "only \(report.skippedPages) pages skipped: \(report.hintRefusal ?? "no answer")")
        try stage.verify(destination, passes: 9)
        try stage.stop(destination)
    },
]
