// SPDX-License-Identifier: Apache-2.0
import CLinux
import GuestMemory
import Machine
import Migration

/// `lacuna bench dirty first-dirty`: in each sync of a migration, where the first and the last dirty word of each slot
/// are, and what knowing that saves of a scan from the slot's first word to its last.
func firstDirtyBench(_ options: BenchOptions) throws(BenchError) -> BenchTable {
    var table = BenchTable(
        "first-dirty",
        columns: [
            "guest", "sync", "slot", "words", "dirty_pages", "first_word", "last_word", "saved_by_first_pct",
            "saved_by_both_pct", "saved_by_summary_pct",
        ])
    for loaded in [false, true] {
        let name = loaded ? "loaded" : "idle"
        let watch = options.kernel == nil || options.plain
            ? try watchLoadGuest(options, loaded: loaded) : try watchLinux(options, loaded: loaded)
        for (number, sync) in watch.enumerated() {
            for (slot, seen) in sync.enumerated() where seen.words > 0 {
                func saved(_ scanned: Int) -> BenchValue {
                    .number(100 * Double(seen.words - scanned) / Double(seen.words), decimals: 2)
                }
                // With nothing dirty, either mark saves the whole scan.
                let first = seen.first ?? seen.words, last = seen.last ?? seen.words - 1
                table.add([
                    .text(name), .count(number + 1), .count(slot), .count(seen.words), .count(seen.pages),
                    .text(seen.first.map(String.init) ?? "-"), .text(seen.last.map(String.init) ?? "-"),
                    saved(seen.words - first), saved(max(0, last + 1 - first)), saved(seen.summaryCost),
                ])
            }
        }
    }
    return table
}

/// What one collection found in one slot, by words counted from the slot's first.
struct SlotSight: Sendable {
    var words = 0
    var pages = 0
    var first: Int?
    var last: Int?
    /// Words read by a scan that goes by the summary: its own words, and those it points at.
    var summaryCost = 0
}

/// Passes everything through, and looks at what is collected.
private final class WatchingTracker: DirtyTracker {
    private let inner: any DirtyTracker
    private let memory: GuestMemory
    private let scratch: PageBitmap
    private let sights = Monitor<[[SlotSight]]>([])

    init(_ inner: any DirtyTracker, _ memory: GuestMemory) {
        self.inner = inner
        self.memory = memory
        scratch = PageBitmap(bitCount: memory.frameCount)
    }
    var all: [[SlotSight]] { sights.read { $0 } }

    func arm() throws(PartFailure) { try inner.arm() }
    func willSend(_ pages: Range<Int>) throws(PartFailure) { try inner.willSend(pages) }
    func protectAll() throws(PartFailure) { try inner.protectAll() }
    func disarm() { inner.disarm() }
    func collect(into bitmap: PageBitmap) throws(PartFailure) {
        try inner.collect(into: scratch)
        let sight = memory.regions.map { region in
            let words = region.range.pages.lowerBound / 64..<region.range.pages.upperBound / 64
            var sight = SlotSight(words: words.count, summaryCost: (words.count + 63) / 64)
            for index in words {
                let bits = scratch.word(index)
                if bits == 0 { continue }
                sight.first = sight.first ?? index - words.lowerBound
                sight.last = index - words.lowerBound
                sight.pages += bits.nonzeroBitCount
                sight.summaryCost += 1
                bitmap.merge(bits, intoWord: index)
            }
            return sight
        }
        scratch.clearAll()
        sights.update { $0.append(sight) }
    }
}

private func watchLoadGuest(_ options: BenchOptions, loaded: Bool) throws(BenchError) -> [[SlotSight]] {
    let tracking: DirtyTracking? = options.plain ? nil : .bitmap
    let rate = loaded ? options.rate : 256 << 10
    let guest = try LoadGuest(size: options.memory, tracking: tracking, rate: rate, seed: 3)
    let place = LoadPlace(try LoadGuest(size: options.memory, tracking: tracking, rate: rate, seed: 4))
    try guest.fill()
    guest.resume()
    let watch = WatchingTracker(guest.trackers.first ?? WriteLogTracker(guest.memory), guest.memory)
    var choices = MigrationOptions()
    choices.downtimeLimitMilliseconds = 1
    choices.maxRounds = 5
    choices.bandwidthLimit = Int(clamping: options.bandwidth)
    _ = try migrate(guest, [watch], to: place, choices)
    return watch.all
}

/// A real Linux guest, in this process at both ends.
private func watchLinux(_ options: BenchOptions, loaded: Bool) throws(BenchError) -> [[SlotSight]] {
    guard let kernel = options.kernel else { throw BenchError("--kernel is missing") }
    do {
        var ends: [Int32] = [0, 0]
        guard pipe(&ends) == 0 else { throw BenchError("cannot make a pipe for the guest's console") }
        defer { for end in ends { close(end) } }
        let machine = try Machine(MachineConfiguration(memorySize: options.memory, vcpus: 1), console: ends[1])
        let commandLine = loaded ? options.loadedCommandLine : options.idleCommandLine
        try machine.load(kernel: kernel, initramfs: options.initramfs, commandLine: commandLine)
        machine.resume()
        defer { machine.end(.stopped) }
        try wait(for: options.readyText, from: ends[0])
        // The console is not read any more; a guest that prints must not fill the pipe and stand still.
        let drain = ends[0]
        startThread(named: "console") {
            var buffer = [UInt8](repeating: 0, count: 4096)
            while read(drain, &buffer, buffer.count) > 0 {}
        }
        let outgoing = OutgoingMachine(machine)
        let incoming = IncomingMachine(console: ends[1], memorySize: nil, vcpus: nil)
        let watch = WatchingTracker(outgoing.trackers[0], machine.memory)
        var choices = MigrationOptions()
        choices.downtimeLimitMilliseconds = 1
        choices.maxRounds = 5
        choices.bandwidthLimit = Int(clamping: options.bandwidth)
        let report = try migrate(outgoing, [watch], to: incoming, choices)
        incoming.machine?.end(.stopped)
        _ = incoming.machine?.waitForEnd()
        guard report.outcome == .completed else { throw BenchError("the guest did not arrive") }
        return watch.all
    } catch let error as BenchError { throw error } catch { throw BenchError("\(error)") }
}

private func wait(for text: String, from descriptor: Int32) throws(BenchError) {
    var seen: [UInt8] = [], buffer = [UInt8](repeating: 0, count: 4096)
    let wanted = Array(text.utf8)
    while true {
        let count = read(descriptor, &buffer, buffer.count)
        if count <= 0 { throw BenchError("the guest's console ended before it said '\(text)'") }
        seen += buffer[..<count]
        if seen.indices.contains(where: { seen[$0...].starts(with: wanted) }) { return }
        seen = Array(seen.suffix(wanted.count))
    }
}
