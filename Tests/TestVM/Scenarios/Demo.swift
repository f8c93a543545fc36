// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import Migration

/// The figures that the demonstration writes.
struct DemoFigures: Codable {
    struct Side: Codable {
        var bytes: UInt64
        var total_ms: Double
        var downtime_ms: Double
        var skipped_pages: Int?
    }
    var ram_pages: Int
    var free_pages: Int
    var plain: Side
    var skip: Side
    var verified: Bool
}

/// Fills most of a guest's memory, frees it, and migrates it: once as it is, once without the free pages.
func demo(memory: String, stage: Stage) throws(Failure) -> Bool {
    func once(_ name: String, flags: [String]) throws(Failure) -> MigrationReport {
        say("\(name): booting a guest of \(memory), filling 75 % of it and freeing it again …")
        let source = try stage.boot("\(name)-source", memory: memory, run: "dirty-then-free:75,memcheck:2")
        try stage.verify(source, passes: 2)
        let destination = try stage.receive("\(name)-destination", at: "unix:\(name)")
        say("\(name): migrating …")
        let report = try stage.migrate(source, to: destination, at: "unix:\(name)", flags: flags)
        try stage.checkConsole(source)
        say("\(name): \(report.bytes >> 20) MiB on the wire; verifying every byte that the guest's checker holds …")
        try stage.verify(destination, passes: 9)
        try stage.stop(destination)
        return report
    }
    let plain = try once("plain", flags: [])
    let skip = try once("skip", flags: ["--skip-free-pages", "--hint-timeout", "5000"])

    func row(_ label: String, _ a: String, _ b: String) -> String {
        func left(_ text: String, _ width: Int) -> String { text + String(repeating: " ", count: max(0, width - text.count)) }
        func right(_ text: String, _ width: Int) -> String { String(repeating: " ", count: max(0, width - text.count)) + text }
        return left(label, 24) + right(a, 14) + right(b, 22)
    }
    func mib(_ bytes: UInt64) -> String {
        let tenths = (bytes * 10 + 524_288) / 1_048_576
        return "\(tenths / 10).\(tenths % 10) MiB"
    }
    func ms(_ value: Double) -> String { "\(Int(value.rounded())) ms" }
    say("")
    say(row("guest of \(memory)", "plain", "--skip-free-pages"))
    say(row("bytes on the wire", mib(plain.bytes), mib(skip.bytes)))
    say(row("pages sent", "\(plain.pagesSent)", "\(skip.pagesSent)"))
    say(row("zero pages", "\(plain.zeroPages)", "\(skip.zeroPages)"))
    say(row("pages skipped", "\(plain.skippedPages)", "\(skip.skippedPages)"))
    say(row("total time", ms(plain.totalMilliseconds), ms(skip.totalMilliseconds)))
    say(row("downtime", ms(plain.downtimeMilliseconds), ms(skip.downtimeMilliseconds)))
    say(row("memory verified", "yes", "yes"))
    if let figures = skip.rounds.first?.figures {
        say("")
        say(
            "The guest found \(figures.pages) free pages in \(figures.blocks) blocks in \(figures.walkNanoseconds / 1000) us, "
                + "holding a zone lock for at most \(figures.longestLockNanoseconds / 1000) us.")
    }
    let used = UInt64(max(0, skip.ramPages - skip.freePages)) * 4096
    let toUsed = Double(skip.bytes) / Double(max(1, used)), fewer = Double(plain.bytes) / Double(max(1, skip.bytes))
    func two(_ value: Double) -> String { let hundredths = Int((value * 100).rounded()); return "\(hundredths / 100).\(hundredths % 100 < 10 ? "0" : "")\(hundredths % 100)" }
    say("Bytes per byte in use (RAM - free pages at the hint): \(two(toUsed)) (goal: at most 1.05)")
    say("Bytes against the plain migration: \(two(fewer)) times fewer (goal: at least 8)")

    let figures = DemoFigures(
        ram_pages: skip.ramPages, free_pages: skip.freePages,
        plain: .init(bytes: plain.bytes, total_ms: plain.totalMilliseconds, downtime_ms: plain.downtimeMilliseconds),
        skip: .init(
            bytes: skip.bytes, total_ms: skip.totalMilliseconds, downtime_ms: skip.downtimeMilliseconds,
            skipped_pages: skip.skippedPages), verified: true)
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
    mkdir("out", 0o755)
    do { try encoder.encode(figures).write(to: URL(filePath: "out/demo.json")) } catch { throw Failure("out/demo.json: \(error)") }
    return toUsed <= 1.05 && fewer >= 8
}
