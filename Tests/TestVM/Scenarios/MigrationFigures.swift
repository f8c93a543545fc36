// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import Migration

/// What `query-migrate` says at the end.
private struct QEMUReport: Decodable {
    struct Answer: Decodable {
        struct Memory: Decodable { var transferred: UInt64 }
        var status: String
        var totalTime: Double, downtime: Double
        var ram: Memory
        enum CodingKeys: String, CodingKey {
            case status, downtime, ram
            case totalTime = "total-time"
        }
    }
    var `return`: Answer
}

private struct Comparison: Codable {
    struct Side: Codable { var bytes: UInt64, total_ms: Double, downtime_ms: Double }
    var lacuna: Side, qemu: Side
    var bytes_per_byte_in_use: Double, total_ratio: Double, downtime_ratio: Double
}

/// An idle guest of 1 GiB that has filled three quarters of its memory and freed them again: ours with our module, QEMU's
/// with the stock driver and `free-page-hint=on`, which is the best that QEMU offers. The better of two turns, each for
/// itself: the first runs code that the emulated processor has not seen before.
func migrateAgainstQEMU(_ stage: Stage) throws(Failure) {
    let turns = [try compare(stage, turn: 1), try compare(stage, turn: 2)]
    func best(_ side: (Turn) -> Comparison.Side) -> Comparison.Side {
        let sides = turns.map(side)
        return .init(
            bytes: sides.map(\.bytes).min()!, total_ms: sides.map(\.total_ms).min()!, downtime_ms: sides.map(\.downtime_ms).min()!)
    }
    let (ours, theirs) = (best(\.lacuna), best(\.qemu))
    let figures = Comparison(
        lacuna: ours, qemu: theirs, bytes_per_byte_in_use: turns.map(\.bytesPerByteInUse).max()!,
        total_ratio: ours.total_ms / theirs.total_ms, downtime_ratio: ours.downtime_ms / theirs.downtime_ms)
    say(
        "bytes per byte in use \(two(figures.bytes_per_byte_in_use)) (at most 1.05), total time \(two(figures.total_ratio)) of "
            + "QEMU's (at most 0.25), downtime \(two(figures.downtime_ratio)) (at most 1)")
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
    mkdir("out", 0o755)
    do { try encoder.encode(figures).write(to: URL(filePath: "out/migrate.json")) } catch { throw Failure("out/migrate.json: \(error)") }
    try expect(figures.bytes_per_byte_in_use <= 1.05, "more bytes than memory in use")
    try expect(figures.total_ratio <= 0.25, "slower than a quarter of QEMU's time")
    try expect(figures.downtime_ratio <= 1, "a longer downtime than QEMU's")
}

private struct Turn {
    var lacuna: Comparison.Side, qemu: Comparison.Side
    var bytesPerByteInUse: Double
}

private func two(_ value: Double) -> String { "\((value * 100).rounded() / 100)" }

private func compare(_ stage: Stage, turn: Int) throws(Failure) -> Turn {
    let work = "dirty-then-free:75"

    let source = try stage.boot("lacuna-\(turn)", memory: "1G", run: work)
    let destination = try stage.receive("lacuna-destination-\(turn)", at: "unix:channel-\(turn)")
    let report = try stage.migrate(
        source, to: destination, at: "unix:channel-\(turn)", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
    let typed = try stage.run(["./lacuna", "type", "--control", destination.control, "--text", "view 7\\n"])
    try expect(typed.status == 0, typed.text)
    try stage.wait(destination.child, for: "GUEST-VIEW n=7", seconds: patience)
    try stage.stop(destination)

    let machine = [
        "-append", "console=ttyS0 quiet lacuna.run=\(work) lacuna.module=stock", "-object", "iothread,id=hints",
        "-device", "virtio-balloon-pci,free-page-hint=on,iothread=hints",
    ]
    let emulator = try stage.startQEMU("qemu-\(turn)", machine)
    try stage.wait(emulator, for: "GUEST-READY", seconds: patience)
    let other = try stage.startQEMU("qemu-destination-\(turn)", machine + ["-incoming", "defer"])
    let arrival = try MachineProtocol(of: other)
    _ = try arrival.ask(
        "{\"execute\":\"migrate-incoming\",\"arguments\":{\"uri\":\"unix:qemu-channel-\(turn)\"}}")
    let control = try MachineProtocol(of: emulator)
    _ = try control.ask(
        "{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":[{\"capability\":\"events\",\"state\":true}]}}")
    // As for ours: no limit on bandwidth, and 300 ms of downtime.
    _ = try control.ask(
        "{\"execute\":\"migrate-set-parameters\",\"arguments\":{\"max-bandwidth\":10737418240,\"downtime-limit\":300}}")
    _ = try control.ask("{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"unix:qemu-channel-\(turn)\"}}")
    try control.wait(for: "\"completed\"", not: "\"failed\"")
    var theirs: QEMUReport.Answer
    let limit = now() + 30
    // It sums up after the event, and does not say when it has.
    repeat {
        let answer = try control.ask("{\"execute\":\"query-migrate\"}")
        do { theirs = try JSONDecoder().decode(QEMUReport.self, from: Data(answer.utf8)).return } catch {
            throw Failure("QEMU's report: \(error): \(answer)")
        }
    } while theirs.totalTime == 0 && now() < limit
    try expect(try arrival.ask("{\"execute\":\"query-status\"}").contains("\"running\": true"), "QEMU's guest does not run")
    for child in [emulator, other] { stage.kill(child) }
    try expect(theirs.status == "completed" && theirs.totalTime > 0 && theirs.downtime > 0, "QEMU's report: \(theirs)")

    let used = Double(max(1, report.ramPages - report.freePages)) * 4096
    say("lacuna: \(report.bytes >> 20) MiB in \(Int(report.totalMilliseconds)) ms, downtime \(Int(report.downtimeMilliseconds)) ms")
    let parts = report.downtime
    say(
        "    of which pausing \(two(parts.pause)), collecting and saving \(two(parts.collectAndSave)), memory \(two(parts.memory)), "
            + "state \(two(parts.state)), commit \(two(parts.commit)) ms; \(report.rounds.last?.sent ?? 0) pages in the last round")
    say("QEMU: \(theirs.ram.transferred >> 20) MiB in \(Int(theirs.totalTime)) ms, downtime \(Int(theirs.downtime)) ms")
    return Turn(
        lacuna: .init(bytes: report.bytes, total_ms: report.totalMilliseconds, downtime_ms: report.downtimeMilliseconds),
        qemu: .init(bytes: theirs.ram.transferred, total_ms: theirs.totalTime, downtime_ms: theirs.downtime),
        bytesPerByteInUse: Double(report.bytes) / used)
}
