// SPDX-License-Identifier: Apache-2.0
import Migration

/// `lacuna bench dirty ping-pong`: a guest that writes at a given rate goes back and forth, with each tracker; after
/// each migration both sides are compared byte for byte.
func pingPongBench(_ options: BenchOptions) throws(BenchError) -> BenchTable {
    var table = BenchTable(
        "ping-pong",
        columns: [
            "tracker", "MiB", "MiB_s", "migration", "ms", "downtime_ms", "rounds", "pages_sent", "full_rings", "different",
        ])
    for (name, tracking) in options.ways {
        var guest = try LoadGuest(size: options.memory, tracking: tracking, rate: options.rate, seed: 1)
        try guest.fill()
        guest.resume()
        var (times, downtimes): ([Double], [Double]) = ([], [])
        var (rounds, sent, full, different) = (0, 0, 0, 0)
        for number in 1...options.migrations {
            let place = LoadPlace(
                try LoadGuest(size: options.memory, tracking: tracking, rate: options.rate, seed: UInt64(number + 1)))
            var choices = MigrationOptions()
            choices.bandwidthLimit = Int(clamping: options.bandwidth)
            choices.downtimeLimitMilliseconds = options.downtime
            let (fullBefore, writes) = (guest.fullRings, guest.writes)
            let report = try migrate(guest, guest.trackers, to: place, choices)
            guard report.outcome == .completed, place.hasStarted else { throw BenchError("\(name): the guest did not arrive") }
            let differences = place.guest.differences(guest)
            if differences > 0 { table.misses.append("\(name), migration \(number): \(differences) pages differ") }
            if guest.writes == writes { table.misses.append("\(name), migration \(number): the guest wrote nothing") }
            times.append(report.totalMilliseconds)
            downtimes.append(report.downtimeMilliseconds)
            rounds += report.rounds.count
            sent += report.pagesSent
            full += guest.fullRings - fullBefore
            different += differences
            table.add(
                row(
                    name, options, "\(number)", report.totalMilliseconds, report.downtimeMilliseconds, report.rounds.count,
                    report.pagesSent, guest.fullRings - fullBefore, differences))
            guest = place.guest
            guest.resume()
        }
        do { try guest.pause() } catch { throw BenchError("\(name): \(error)") }
        let count = options.migrations
        table.add(
            row(
                name, options, "average", times.reduce(0, +) / Double(count), downtimes.reduce(0, +) / Double(count),
                rounds / count, sent / count, full / count, different))
    }
    return table
}

private func row(
    _ name: String, _ options: BenchOptions, _ migration: String, _ ms: Double, _ downtime: Double, _ rounds: Int, _ sent: Int,
    _ full: Int, _ different: Int
) -> [BenchValue] {
    [
        .text(name), .count(Int(options.memory >> 20)), .count(Int(options.rate >> 20)), .text(migration),
        .number(ms, decimals: 1), .number(downtime, decimals: 1), .count(rounds), .count(sent), .count(full), .count(different),
    ]
}
