// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import Migration

/// The balloon as the stock Linux driver drives it, on each kernel that the bed brings.
let balloonScenarios: [Scenario] = GuestKernel.allCases.flatMap { kernel in
    func scenario(
        _ name: String, memory: Int = 2560, limit: Int = 600, _ body: @escaping @Sendable (Stage, GuestKernel) throws(Failure) -> Void
    ) -> Scenario {
        Scenario(name: "\(name)-\(kernel.rawValue)", memory: memory, limit: limit, isQuick: false) { stage throws(Failure) in
            try body(stage, kernel)
        }
    }
    return [
        Scenario(name: "boot-\(kernel.rawValue)", memory: 2048, limit: 300, isQuick: true) { stage throws(Failure) in
            let guest = try stage.boot("guest", memory: "256M", cpus: 2, run: "poweroff", until: "GUEST-BOOTED", kernel: kernel)
            try expect(guest.child.text.contains("kernel=\(kernel.release)"), "the guest runs another kernel")
            try expect(guest.child.text.contains("lacuna_balloon"), "the module is not loaded")
            let status = try stage.waitForEnd(guest.child, seconds: 60)
            try expect(status == 0, "status \(status) after the guest switched itself off")
        },
        scenario("balloon-inflate", memory: 3072, inflateAndDeflate),
        scenario("balloon-statistics", statistics),
        scenario("balloon-reporting", reporting),
        scenario("balloon-oom", deflateOnOOM),
        scenario("balloon-hint", hintByHand),
        scenario("balloon-migration", migrateInTheMiddle),
        scenario("balloon-hints-20", limit: 1500, twentyMigrations),
        scenario("balloon-packed") { stage, kernel throws(Failure) in
            try everything(stage, kernel, rings: "packed,event-index")
        },
    ]
} + [
    Scenario(name: "balloon-event-index-6.1", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        try everything(stage, .debian12, rings: "event-index")
    }
]

/// Memory of other kinds; the guest does not see them, so one kernel will do.
let backingScenarios: [Scenario] = ["memfd", "hugepages"].map { kind in
    Scenario(name: "balloon-\(kind)", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in try backing(stage, kind) }
}

/// The memory as the guest sees it.
private struct View {
    let values: [String: Int]
    /// Bytes, from a figure in kB.
    func bytes(_ name: String) -> Int { (values[name] ?? 0) << 10 }
    subscript(name: String) -> Int { values[name] ?? 0 }
}

/// `lacuna balloon status --json`, as far as it matters here.
private struct Status: Decodable {
    struct Counters: Decodable {
        var inflatedPages = 0, deflatedPages = 0, releasedPages = 0, releases = 0, reportedFreePages = 0, hintedPages = 0
        var listedPagesNotRAM = 0, malformedLists = 0, malformedStatistics = 0, unknownStatistics = 0, malformedReportings = 0
        var malformedHints = 0, misplacedHints = 0, brokenQueues = 0, pagesInflatedTwice = 0, pagesNotInflated = 0

        /// What a correct driver never causes.
        var faults: Int {
            listedPagesNotRAM + malformedLists + malformedStatistics + unknownStatistics + malformedReportings + malformedHints
                + misplacedHints + brokenQueues + pagesInflatedTwice + pagesNotInflated
        }
    }
    var features: [String]
    var targetBytes: Int, actualBytes: Int, inflatedBytes: Int, residentBytes: Int
    var hasHints: Bool
    var hintMethod: String?
    var statistics: Statistics?
    var counters: Counters
}

private struct Statistics: Decodable {
    var values: [String: Int]
    var time: Int
    var number: Int
}

private struct Hint: Decodable {
    var method: String
    var freeBytes: Int
}

extension Stage {
    fileprivate func balloon<Answer: Decodable>(_ guest: Guest, _ type: Answer.Type, _ words: String...) throws(Failure) -> Answer {
        let client = try run(["./lacuna", "balloon"] + words + ["--control", guest.control, "--json"], seconds: patience)
        guard client.status == 0 else { throw Failure("balloon \(words.joined(separator: " ")): \(client.text)") }
        do { return try JSONDecoder().decode(Answer.self, from: Data(client.text.utf8)) } catch {
            throw Failure("balloon \(words.joined(separator: " ")): \(error): \(client.text)")
        }
    }

    fileprivate func status(_ guest: Guest) throws(Failure) -> Status { try balloon(guest, Status.self, "status") }

    /// Types a command at the guest's console.
    fileprivate func type(_ guest: Guest, _ text: String) throws(Failure) {
        let client = try run(["./lacuna", "type", "--control", guest.control, "--text", text + "\\n"])
        guard client.status == 0 else { throw Failure("type: \(client.text)") }
    }

    fileprivate func view(_ guest: Guest) throws(Failure) -> View {
        let start = guest.child.lines.count
        try type(guest, "view \(start)")
        let line = try wait(guest.child, for: "GUEST-VIEW n=\(start) ", from: start, seconds: patience).line
        var values: [String: Int] = [:]
        for word in line.split(separator: " ") {
            let parts = word.split(separator: "=")
            if parts.count == 2, let value = Int(parts[1]) { values[String(parts[0])] = value }
        }
        return View(values: values)
    }

    /// The VMM's resident memory in bytes, as the kernel it runs on counts it.
    fileprivate func resident(_ guest: Guest) throws(Failure) -> Int {
        guard let bytes = FileManager.default.contents(atPath: "/proc/\(guest.child.pid)/status") else {
            throw Failure("\(guest.child.name) has no status")
        }
        for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n") where line.hasPrefix("VmRSS:") {
            if let kb = line.split(whereSeparator: { $0 == " " || $0 == "\t" }).dropFirst().first.flatMap({ Int($0) }) {
                return kb << 10
            }
        }
        throw Failure("\(guest.child.name) has no VmRSS")
    }

    /// The device's view, as soon as the driver says what its lists said. In between the two differ: the driver tells of
    /// pages first and of their number then, and compaction gives a page before it takes one.
    fileprivate func settled(_ guest: Guest) throws(Failure) -> Status {
        var status = try status(guest)
        try until("the balloon's pages and their number agree") { () throws(Failure) in
            if status.actualBytes != status.inflatedBytes { status = try self.status(guest) }
            return status.actualBytes == status.inflatedBytes
        }
        return status
    }

    /// Asks again until `done`; the answers take their time.
    fileprivate func until(_ what: String, _ done: () throws(Failure) -> Bool) throws(Failure) {
        let limit = now() + patience
        while !(try done()) { try expect(now() < limit, "\(what): not within \(Int(patience)) s") }
    }
}

private func mib(_ bytes: Int) -> Int { (bytes + (1 << 19)) >> 20 }

private let stock = "lacuna.module=stock"
private func offering(_ features: String) -> [String] { ["--balloon", features] }

/// 75 % of a guest that has used all of its memory go to the host, and come back.
private func inflateAndDeflate(_ stage: Stage, _ kernel: GuestKernel) throws(Failure) {
    let guest = try stage.boot(
        "guest", memory: "1G", cpus: 1, run: "dirty-then-free:100", more: stock, kernel: kernel, options: offering("must-tell-host,stats"))
    let size = 768 << 20
    let (before, residentBefore) = (try stage.view(guest), try stage.resident(guest))
    var start = now()
    _ = try stage.balloon(guest, Status.self, "set", "--size", "768M", "--wait", "200000")
    let inflating = now() - start
    let full = try stage.settled(guest)
    let (during, residentDuring) = (try stage.view(guest), try stage.resident(guest))
    say("inflated 768 MiB in \(Int(inflating * 1000)) ms: resident \(mib(residentBefore)) -> \(mib(residentDuring)) MiB, \(full.counters.releases) releases")
    try expect(full.actualBytes == size && full.inflatedBytes == size, "the balloon holds \(full.inflatedBytes) and says \(full.actualBytes)")
    // Each page that compaction has moved was released where it went.
    let least = size >> 12, most = least + during["balloon_migrate"]
    try expect((least...most).contains(full.counters.releasedPages), "\(full.counters.releasedPages) pages were released, not \(least) to \(most)")
    try expect(residentBefore - residentDuring >= size / 100 * 95, "resident memory fell by \(mib(residentBefore - residentDuring)) MiB only")
    try expect(before.bytes("MemTotal") - during.bytes("MemTotal") == size, "MemTotal \(before.bytes("MemTotal")) -> \(during.bytes("MemTotal"))")
    try expect(before.bytes("MemFree") - during.bytes("MemFree") > size / 100 * 90, "MemFree \(before.bytes("MemFree")) -> \(during.bytes("MemFree"))")
    try expect(during["balloon_inflate"] - before["balloon_inflate"] == size >> 12, "balloon_inflate \(during["balloon_inflate"])")

    start = now()
    let empty = try stage.balloon(guest, Status.self, "set", "--size", "0", "--wait", "200000")
    say("deflated in \(Int((now() - start) * 1000)) ms")
    let after = try stage.view(guest)
    try expect(empty.actualBytes == 0 && empty.inflatedBytes == 0, "the balloon still holds \(empty.inflatedBytes)")
    try expect(after.bytes("MemTotal") == before.bytes("MemTotal"), "MemTotal \(before.bytes("MemTotal")) -> \(after.bytes("MemTotal"))")
    // What the CPUs hold back does not count as free: with 6.12 tens of megabytes after so much was freed.
    func free(_ view: View) -> Int { view.bytes("MemFree") + view["held"] << 12 }
    try expect(free(after) > free(before) - (32 << 20), "free \(free(before)) -> \(free(after))")
    try expect(after["balloon_deflate"] == during["balloon_inflate"], "balloon_deflate \(after["balloon_deflate"])")
    try expect(empty.counters.faults == 0, "faults: \(empty.counters)")
    // What came back is memory like any other.
    try stage.type(guest, "memcheck --percent 50 --passes 2")
    try stage.wait(guest.child, for: "MEMCHECK done", seconds: patience)
    try stage.checkConsole(guest)
    try stage.stop(guest)
}

/// The guest's own figures, once and at an interval.
private func statistics(_ stage: Stage, _ kernel: GuestKernel) throws(Failure) {
    let guest = try stage.boot("guest", memory: "256M", run: "idle", more: stock, kernel: kernel)
    let first = try stage.balloon(guest, Statistics.self, "stats")
    let view = try stage.view(guest)
    say("statistics: \(first.values.sorted { $0.key < $1.key }.map { "\($0.key) \($0.value)" }.joined(separator: ", "))")
    // Linux 6.1 knows ten figures and 6.12 all sixteen, of which those that the kernel is not configured for are missing.
    let names = ["free", "total", "available", "caches", "majorFaults", "minorFaults"] + (kernel == .backports ? ["oomKills", "directReclaims"] : [])
    for name in names { try expect(first.values[name] != nil, "no statistic \(name)") }
    try expect(first.values["total"] == view.bytes("MemTotal"), "total \(first.values["total"] ?? 0), and MemTotal \(view.bytes("MemTotal"))")
    let difference = abs((first.values["free"] ?? 0) - view.bytes("MemFree"))
    try expect(difference < 16 << 20, "free \(first.values["free"] ?? 0), and MemFree \(view.bytes("MemFree"))")

    // The guest takes memory, and the next figures show it.
    try stage.type(guest, "memcheck --mib 64 --passes 0 --hz 1 &")
    try stage.wait(guest.child, for: "MEMCHECK pass=1 ", seconds: patience)
    let second = try stage.balloon(guest, Statistics.self, "stats", "--interval", "200")
    try expect(second.number > first.number && second.time >= first.time, "the second answer is not later")
    try expect((first.values["free"] ?? 0) - (second.values["free"] ?? 0) > 48 << 20, "64 MiB less do not show")
    try stage.until("polling") { () throws(Failure) in (try stage.status(guest).statistics?.number ?? 0) >= second.number + 3 }
    // Switched off: one answer may be on its way, and then there are no more than those that are asked for.
    let third = try stage.balloon(guest, Statistics.self, "stats", "--interval", "0")
    let fourth = try stage.balloon(guest, Statistics.self, "stats"), fifth = try stage.balloon(guest, Statistics.self, "stats")
    try expect(fourth.number <= third.number + 2 && fifth.number == fourth.number + 1, "answers \(third.number), \(fourth.number), \(fifth.number)")
    try expect(try stage.status(guest).counters.faults == 0, "the device saw faults")
    try stage.checkConsole(guest)
    try stage.stop(guest)
}

/// A guest that frees memory gives it to the host by itself.
private func reporting(_ stage: Stage, _ kernel: GuestKernel) throws(Failure) {
    let guest = try stage.boot(
        "guest", memory: "512M", run: "idle", more: stock, kernel: kernel, options: offering("must-tell-host,page-reporting"))
    /// Waits until more than `least` bytes were reported since `start`, and no more come. The driver looks every two seconds
    /// as long as it finds something: after three looks without anything there was nothing left.
    func quiet(since start: Int, least: Int) throws(Failure) -> Int {
        var (pages, changed) = (start, now())
        try stage.until("reporting") { () throws(Failure) in
            let reported = try stage.status(guest).counters.reportedFreePages
            if reported != pages { (pages, changed) = (reported, now()) }
            return (pages - start) << 12 > least && now() - changed > 6
        }
        return pages
    }
    // What it found free after booting was never touched, and gives nothing back: the measurement begins when that is done.
    _ = try quiet(since: 0, least: 0)
    let residentAtFirst = try stage.resident(guest)
    try stage.type(guest, "dirty-then-free 75")
    try stage.wait(guest.child, for: "DIRTY-THEN-FREE filled=", seconds: patience)
    // The resident memory first: pages reported between the two count against the test.
    let resident = try stage.resident(guest), before = try stage.status(guest).counters.reportedFreePages
    let reported = (try quiet(since: before, least: 200 << 20) - before) << 12, after = try stage.resident(guest)
    let view = try stage.view(guest)
    say("\(mib(reported)) MiB reported, resident \(mib(residentAtFirst)) -> \(mib(resident)) -> \(mib(after)) MiB, MemFree \(mib(view.bytes("MemFree"))) MiB")
    // A block that grows while its parts are being reported is reported again, whole: up to 12 MiB more than had been touched.
    let touched = min(reported, resident - residentAtFirst)
    try expect(touched > 200 << 20, "only \(mib(touched)) MiB were touched")
    try expect(resident - after >= touched / 100 * 95, "resident memory fell by \(mib(resident - after)) of \(mib(touched)) MiB only")
    // Nothing is missing in the guest: the pages are its own.
    try expect(view.bytes("MemFree") > 380 << 20, "MemFree \(view.bytes("MemFree"))")
    try stage.type(guest, "memcheck --percent 70 --passes 3")
    try stage.wait(guest.child, for: "MEMCHECK done", seconds: patience)
    try expect(try stage.status(guest).counters.faults == 0, "the device saw faults")
    try stage.checkConsole(guest)
    try stage.stop(guest)
}

/// A guest that runs out of memory takes pages back instead of killing a process.
private func deflateOnOOM(_ stage: Stage, _ kernel: GuestKernel) throws(Failure) {
    let guest = try stage.boot(
        "guest", memory: "256M", run: "idle", more: stock, kernel: kernel, options: offering("must-tell-host,stats,deflate-on-oom"))
    let before = try stage.view(guest)
    let full = try stage.balloon(guest, Status.self, "set", "--size", "128M", "--wait", "200000")
    let during = try stage.view(guest)
    // With this feature the guest counts the balloon as used and not as gone.
    try expect(during.bytes("MemTotal") == before.bytes("MemTotal"), "MemTotal changed")
    try expect(before.bytes("MemFree") - during.bytes("MemFree") > 112 << 20, "MemFree did not fall")
    let residentFull = try stage.resident(guest)
    // A file in memory that is larger than what is left.
    let size = mib(during.bytes("MemFree")) + 48
    try stage.type(guest, "mount -t tmpfs -o size=100% tmpfs /tmp; dd if=/dev/urandom of=/tmp/f bs=1M count=\(size); wc -c < /tmp/f | sed s/^/SIZE-IS-/")
    try stage.wait(guest.child, for: "SIZE-IS-\(size << 20)", seconds: patience)
    // The guest counts a page when it takes it, the device when it is told. Of a page that compaction moves the device is
    // told twice, that it came and that it went; the guest counts it once, and apart from the others.
    var after = try stage.view(guest), status = try stage.settled(guest)
    try stage.until("the guest's and the device's counts agree") { () throws(Failure) in
        (after, status) = (try stage.view(guest), try stage.settled(guest))
        return status.counters.inflatedPages == after["balloon_inflate"] + after["balloon_migrate"]
            && status.counters.deflatedPages == after["balloon_deflate"] + after["balloon_migrate"]
    }
    say("\(size) MiB needed with \(mib(during.bytes("MemFree"))) MiB free: the balloon went from \(mib(full.actualBytes)) to \(mib(status.actualBytes)) MiB, \(after["balloon_migrate"]) pages moved")
    try expect(after["oom_kill"] == 0, "\(after["oom_kill"]) processes were killed")
    try expect(after["balloon_deflate"] > 0, "nothing was deflated")
    try expect(status.actualBytes < full.actualBytes, "the balloon still holds \(status.inflatedBytes)")
    try expect(try stage.resident(guest) > residentFull, "the VMM's memory did not grow with the guest's")
    try expect(status.counters.faults == 0, "faults: \(status.counters)")
    try stage.checkConsole(guest)
    try stage.stop(guest)
}

/// Hints without a migration: the guest finds its free memory, lends it, and has it back.
private func hintByHand(_ stage: Stage, _ kernel: GuestKernel) throws(Failure) {
    let guest = try stage.boot("guest", memory: "256M", run: "idle", more: stock, kernel: kernel)
    try expect(try stage.status(guest).hintMethod == "free-page-hint", "the driver cannot hint")
    let before = try stage.view(guest)
    let hint = try stage.balloon(guest, Hint.self, "hint", "--wait", "60000")
    say("\(mib(hint.freeBytes)) MiB hinted of \(mib(before.bytes("MemFree"))) MiB free")
    try expect(hint.method == "free-page-hint" && hint.freeBytes > before.bytes("MemFree") / 100 * 70, "\(hint.freeBytes) bytes hinted")
    try stage.until("the guest's memory") { () throws(Failure) in
        try stage.view(guest).bytes("MemFree") > before.bytes("MemFree") - (16 << 20)
    }
    // And again: ids go up, and nothing was lost.
    let again = try stage.balloon(guest, Hint.self, "hint", "--wait", "60000")
    try expect(again.freeBytes > before.bytes("MemFree") / 100 * 60, "\(again.freeBytes) bytes hinted the second time")
    let status = try stage.status(guest)
    try expect(status.counters.faults == 0 && !status.hasHints, "faults: \(status.counters)")
    try stage.checkConsole(guest)
    try stage.stop(guest)
}

/// The machine moves in the middle of an inflate, with statistics polled; then with a full balloon.
private func migrateInTheMiddle(_ stage: Stage, _ kernel: GuestKernel) throws(Failure) {
    let source = try stage.boot("source", memory: "512M", run: "memcheck:20", more: stock, kernel: kernel)
    try stage.verify(source, passes: 1)
    let total = try stage.view(source).bytes("MemTotal")
    let polled = try stage.balloon(source, Statistics.self, "stats", "--interval", "200")
    _ = try stage.balloon(source, Status.self, "set", "--size", "256M")
    let destination = try stage.receive("destination", at: "unix:channel")
    _ = try stage.migrate(source, to: destination, at: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
    try stage.checkConsole(source)
    let arrived = try stage.status(destination)
    say("arrived with \(mib(arrived.actualBytes)) MiB of 256 in the balloon")
    try stage.until("the rest of the inflate") { () throws(Failure) in try stage.status(destination).actualBytes == 256 << 20 }
    let full = try stage.settled(destination)
    try expect(full.inflatedBytes == 256 << 20 && full.counters.faults == 0, "the balloon holds \(full.inflatedBytes): \(full.counters)")
    try expect(total - (try stage.view(destination).bytes("MemTotal")) == 256 << 20, "MemTotal does not show the balloon")
    try stage.until("polling at the destination") { () throws(Failure) in
        (try stage.status(destination).statistics?.number ?? 0) > polled.number + 3
    }
    try stage.verify(destination, passes: 9)

    // With the balloon full its pages are skipped with the free ones (W5): the report has more than the hints.
    let next = try stage.receive("next", at: "unix:next")
    let report = try stage.migrate(destination, to: next, at: "unix:next", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
    try expect(report.hintMethod == "free-page-hint", "hints by \(report.hintMethod ?? "nothing"): \(report.hintRefusal ?? "")")
    try expect(report.skippedPages >= 256 << 8, "\(report.skippedPages) pages skipped, fewer than the balloon has")
    // The host's huge pages that the guest's own pages came into held some of the balloon's, too: they go back.
    try stage.until("resident memory at the destination below 320 MiB") { () throws(Failure) in try stage.resident(next) < 320 << 20 }
    let moved = try stage.settled(next)
    try expect(moved.inflatedBytes == 256 << 20, "the balloon was lost: it holds \(moved.inflatedBytes)")
    let empty = try stage.balloon(next, Status.self, "set", "--size", "0", "--wait", "200000")
    try expect(empty.counters.faults == 0 && empty.inflatedBytes == 0, "faults: \(empty.counters)")
    try expect(try stage.view(next).bytes("MemTotal") == total, "MemTotal did not come back")
    try stage.verify(next, passes: 9)
    try stage.stop(next)
}

/// Memory that is a file, of plain and of huge pages, goes back as well.
private func backing(_ stage: Stage, _ kind: String) throws(Failure) {
    func host(_ name: String) throws(Failure) -> Int {
        guard let bytes = FileManager.default.contents(atPath: "/proc/meminfo") else { throw Failure("no /proc/meminfo") }
        for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n") where line.hasPrefix("\(name):") {
            return line.split(separator: " ").dropFirst().first.flatMap { Int($0) } ?? 0
        }
        return 0
    }
    func setPool(_ pages: Int) throws(Failure) {
        do { try Data("\(pages)".utf8).write(to: URL(filePath: "/proc/sys/vm/nr_hugepages")) } catch { throw Failure("nr_hugepages: \(error)") }
    }
    if kind == "hugepages" {
        try setPool(160)
        let free = try host("HugePages_Free")
        try expect(free == 160, "only \(free) huge pages to be had")
    }
    /// Bytes that the host has given to the guest.
    func taken(_ guest: Guest) throws(Failure) -> Int {
        kind == "hugepages" ? (try host("HugePages_Total") - (try host("HugePages_Free"))) << 21 : try stage.resident(guest)
    }
    let guest = try stage.boot(
        "guest", memory: "256M", run: "dirty-then-free:100", more: stock, options: offering("must-tell-host,stats") + ["--memory-backing", kind])
    let before = try taken(guest)
    let full = try stage.balloon(guest, Status.self, "set", "--size", "160M", "--wait", "200000")
    let after = try taken(guest), released = full.counters.releasedPages << 12
    say("\(kind): 160 MiB inflated, \(mib(released)) MiB released, \(mib(before)) -> \(mib(after)) MiB")
    try expect(released > 96 << 20 && released % (kind == "hugepages" ? 2 << 20 : 4096) == 0, "\(released) bytes were released")
    // Not all of it had been touched: what counts is that no more is left than the rest of the guest, and the VMM itself.
    try expect(after < (256 << 20) - released + (16 << 20), "\(mib(after)) MiB are still the guest's")
    // Others take all that it gave back. To look through the whole memory costs none of it.
    if kind == "hugepages" {
        try setPool(160 - (try host("HugePages_Free")))
        let free = try host("HugePages_Free")
        try expect(free == 0, "\(free) huge pages are left")
    }
    let client = try stage.run(["./lacuna", "snapshot", "full.snap", "--control", guest.control, "--verify"], seconds: patience)
    try expect(client.status == 0, "snapshot: \(client.text)")
    let during = try taken(guest)
    say("\(mib(during)) MiB after a snapshot of everything")
    try expect(during < after + (16 << 20), "a snapshot made \(mib(during)) MiB out of \(mib(after))")
    if kind == "hugepages" { try setPool(160) }
    _ = try stage.balloon(guest, Status.self, "set", "--size", "0", "--wait", "200000")
    try stage.type(guest, "memcheck --percent 70 --passes 9")
    try stage.wait(guest.child, for: "MEMCHECK done", seconds: patience)
    let destination = try stage.receive("destination", at: "unix:channel", more: ["--memory-backing", "memfd"])
    _ = try stage.migrate(guest, to: destination, at: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "10000"])
    try stage.type(destination, "memcheck --percent 50 --passes 9")
    try stage.wait(destination.child, for: "MEMCHECK done", seconds: patience)
    try stage.checkConsole(destination)
    try stage.stop(destination)
}

/// Every queue once, over rings of another kind, with a migration in between.
private func everything(_ stage: Stage, _ kernel: GuestKernel, rings: String) throws(Failure) {
    let source = try stage.boot(
        "source", memory: "256M", run: memcheckGuest, more: stock, kernel: kernel,
        options: offering("must-tell-host,stats,free-page-hint,page-reporting,\(rings)"))
    let features = try stage.status(source).features
    for ring in rings.split(separator: ",") { try expect(features.contains(String(ring)), "the driver did not take \(ring): \(features)") }
    try stage.until("a report") { () throws(Failure) in try stage.status(source).counters.reportedFreePages > 0 }
    _ = try stage.balloon(source, Status.self, "set", "--size", "64M", "--wait", "200000")
    _ = try stage.balloon(source, Statistics.self, "stats")
    _ = try stage.balloon(source, Hint.self, "hint", "--wait", "60000")
    let destination = try stage.receive("destination", at: "unix:channel")
    let report = try stage.migrate(source, to: destination, at: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "10000"])
    try stage.checkConsole(source)
    // The balloon's pages, and hints besides: the driver was told DONE only just before, and has to have seen it.
    say("\(report.skippedPages / 256) MiB skipped, 64 of them in the balloon")
    try expect(
        report.hintMethod == "free-page-hint" && report.skippedPages > 64 << 8 + 16 << 8, "\(report.skippedPages) pages skipped")
    // The device goes on where it was, in every ring.
    _ = try stage.balloon(destination, Statistics.self, "stats")
    let empty = try stage.balloon(destination, Status.self, "set", "--size", "0", "--wait", "200000")
    try expect(empty.inflatedBytes == 0 && empty.counters.faults == 0, "faults: \(empty.counters)")
    _ = try stage.balloon(destination, Hint.self, "hint", "--wait", "60000")
    try stage.verify(destination, passes: 9)
    try stage.stop(destination)
}

/// Twenty migrations with the stock driver's hints, every byte of memcheck's verified.
private func twentyMigrations(_ stage: Stage, _ kernel: GuestKernel) throws(Failure) {
    var source = try stage.boot("guest-0", memory: "256M", cpus: 2, run: "memcheck:20", more: stock, kernel: kernel)
    try stage.verify(source, passes: 1)
    var later = 0
    for round in 1...20 {
        let address = "unix:channel-\(round)"
        let destination = try stage.receive("guest-\(round)", at: address)
        // A narrow channel every other time: more rounds, and hints in them.
        let narrow = round % 2 == 0 ? ["--bandwidth", "60M", "--downtime", "20"] : []
        let report = try stage.migrate(
            source, to: destination, at: address, flags: ["--skip-free-pages", "--hint-timeout", "10000"] + narrow)
        try stage.checkConsole(source)
        try expect(report.hintMethod == "free-page-hint" && report.hintRefusal == nil, "hints by \(report.hintMethod ?? "nothing"): \(report.hintRefusal ?? "")")
        try expect(report.skippedPages > 8192, "round \(round) skipped \(report.skippedPages) pages")
        later += report.rounds.dropFirst().reduce(0) { $0 + $1.skipped }
        try stage.verify(destination, passes: 2)
        // What the driver held for the hints is the guest's again.
        let free = try stage.view(destination).bytes("MemFree")
        try expect(free > 64 << 20, "\(mib(free)) MiB free after the migration")
        try expect(try stage.status(destination).counters.faults == 0, "the device saw faults")
        say("migration \(round): \(report.bytes >> 20) MiB sent, \(report.skippedPages / 256) MiB skipped in \(report.rounds.count) rounds, downtime \(Int(report.downtimeMilliseconds)) ms")
        source = destination
    }
    say("\(later) pages skipped in later rounds")
    // Every eighth pass looks at every byte that memcheck holds.
    try stage.verify(source, passes: 9)
    try stage.stop(source)
}
