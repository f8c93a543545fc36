// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import GuestMemory
import Machine
import Migration
import Synchronization

/// `lacuna bench stream`, `zero-scan` and `mask`: what the engine makes of the machine, against the least that the same
/// bytes cost. Both sides of each comparison take turns, and the medians are compared.
enum SpeedBench {
    static let names = ["stream", "zero-scan", "mask"]

    /// One comparison.
    struct Row: Codable {
        var name: String
        /// What it is compared with.
        var against: String
        /// Bytes handled in each run.
        var bytes: Int
        var runs: Int
        /// Medians, in GiB a second.
        var ours: Double
        var bare: Double
        /// Ours / bare.
        var ratio: Double
        /// The least that `ratio` should be; absent where there is no goal.
        var goal: Double?
        var isMet: Bool { goal.map { ratio >= $0 } ?? true }
    }

    static func run(_ words: ArraySlice<String>) throws(Complaint) {
        let arguments = try Arguments(words.dropFirst(), options: ["memory", "runs", "json"], flags: ["check"])
        let runs = try arguments.integer("runs", in: 1...1000) ?? 9
        let memory = try arguments.size("memory")
        if let memory, memory < 16 << 20 || memory > 1 << 40 || memory % (1 << 20) != 0 {
            throw .usage("--memory takes whole MiB, from 16M to 1T")
        }
        let rows: [Row]
        switch words.first {
        case "stream": rows = try StreamBench.run(memory: Int(memory ?? 1 << 30), runs: runs)
        case "zero-scan": rows = [try ZeroScanBench.run(memory: Int(memory ?? 1 << 30), runs: runs)]
        default: rows = try MaskBench.run(memory: Int(memory ?? 64 << 30), runs: runs)
        }
        print(rows)
        if let path = arguments["json"] {
            let file = lacuna_open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o644)
            guard file >= 0, write(JSON.pretty(rows), to: file), close(file) == 0 else {
                throw Complaint("cannot write the figures to \(path): \(String(cString: strerror(errno))); choose another --json")
            }
        }
        let missed = rows.filter { !$0.isMet }.map(\.name)
        if arguments[flag: "check"], !missed.isEmpty { throw Complaint("below the goal: \(missed.joined(separator: ", "))") }
    }

    private static func print(_ rows: [Row]) {
        func two(_ value: Double) -> String {
            let hundredths = Int((value * 100).rounded())
            return "\(hundredths / 100).\(hundredths % 100 < 10 ? "0" : "")\(hundredths % 100)"
        }
        var text = "| what | against | MiB | runs | GiB/s | GiB/s bare | ratio | goal |\n|---|---|---|---|---|---|---|---|\n"
        for row in rows {
            text += "| \(row.name) | \(row.against) | \(two(Double(row.bytes) / 1_048_576)) | \(row.runs) | \(two(row.ours)) "
                + "| \(two(row.bare)) | \(two(row.ratio)) | \(row.goal.map { ">= \(two($0))" } ?? "") |\n"
        }
        write(Array(text.utf8), to: 1)
    }

    /// Runs both, in turn, and compares the medians of their seconds.
    static func compare(
        _ name: String, against: String, bytes: Int, runs: Int, goal: Double?, ours: () throws(Complaint) -> Double,
        bare: () throws(Complaint) -> Double
    ) throws(Complaint) -> Row {
        var mine: [Double] = [], others: [Double] = []
        // The first pair warms up: page tables, caches, the clock of the processor.
        for run in 0...runs {
            // Neither always finds what the other left in the caches.
            var (own, other) = (0.0, 0.0)
            if run % 2 == 0 { own = try ours() }
            other = try bare()
            if run % 2 == 1 { own = try ours() }
            guard run > 0 else { continue }
            mine.append(own)
            others.append(other)
        }
        func median(_ values: [Double]) -> Double { values.sorted()[values.count / 2] }
        let gibibytes = Double(bytes) / Double(1 << 30)
        let (own, other) = (gibibytes / median(mine), gibibytes / median(others))
        return Row(
            name: name, against: against, bytes: bytes, runs: runs, ours: own, bare: other, ratio: own / other, goal: goal)
    }

    static func seconds(_ body: () throws(Complaint) -> Void) throws(Complaint) -> Double {
        let start = nanoseconds()
        try body()
        return Double(nanoseconds() - start) / 1e9
    }

    static func nanoseconds() -> UInt64 {
        var now = timespec()
        clock_gettime(CLOCK_MONOTONIC, &now)
        return UInt64(now.tv_sec) * 1_000_000_000 + UInt64(now.tv_nsec)
    }

    static func memory(_ bytes: Int) throws(Complaint) -> GuestMemory {
        do { return try GuestMemory(ranges: [GuestRange(start: GuestAddress(0), size: UInt64(bytes))]) } catch {
            throw Complaint("\(error)")
        }
    }
}

/// A guest that is memory and nothing else, on both sides.
private final class BareGuest: OutgoingGuest, IncomingGuest {
    let memory: GuestMemory
    init(_ memory: GuestMemory) { self.memory = memory }
    var machineDescription: [UInt8] { [] }
    func pause() {}
    func resume() {}
    func saveState() -> [StateSection] { [] }
    func prepare(machineDescription: [UInt8]) -> GuestMemory { memory }
    func load(state: [StateSection]) {}
    func start() {}
    func discard() {}
}

/// Two ends of a stream, with the buffers that migrations have.
private enum Line {
    /// Connected unix sockets.
    static func pair() throws(Complaint) -> (Int32, Int32) {
        var ends: [Int32] = [0, 0]
        guard socketpair(AF_UNIX, lacuna_SOCK_STREAM_CLOEXEC, 0, &ends) == 0 else {
            throw Complaint("cannot make a socket pair: \(String(cString: strerror(errno)))")
        }
        for end in ends {
            var bytes: Int32 = 4 << 20
            setsockopt(end, SOL_SOCKET, SO_SNDBUF, &bytes, socklen_t(MemoryLayout<Int32>.size))
            setsockopt(end, SOL_SOCKET, SO_RCVBUF, &bytes, socklen_t(MemoryLayout<Int32>.size))
        }
        return (ends[0], ends[1])
    }
}

/// Runs `body` on a thread while the caller goes on; `join` waits for it.
private final class Task: Sendable {
    private let done = Mutex<Complaint??>(nil)
    private let wakeup: Int32

    init(_ body: @escaping @Sendable () throws(Complaint) -> Void) {
        wakeup = eventfd(0, Int32(EFD_CLOEXEC))
        let isStarted = startThread(named: "bench") { [self] in
            var complaint: Complaint?
            do throws(Complaint) { try body() } catch { complaint = error }
            done.withLock { $0 = .some(complaint) }
            var one: UInt64 = 1
            _ = CLinux.write(wakeup, &one, 8)
        }
        if !isStarted { exit(1) }
    }
    func join() throws(Complaint) {
        var count: UInt64 = 0
        while CLinux.read(wakeup, &count, 8) < 0, errno == EINTR {}
        close(wakeup)
        if let complaint = done.withLock({ $0 }) ?? nil { throw complaint }
    }
}

private enum StreamBench {
    static func run(memory bytes: Int, runs: Int) throws(Complaint) -> [SpeedBench.Row] {
        let source = try SpeedBench.memory(bytes)
        fill(source)
        // Into fresh memory, as it is, and into memory that the kernel has put pages behind already: there the socket
        // costs most of the time, and not these pages.
        var rows: [SpeedBench.Row] = []
        for (name, isWarm) in [("stream", false), ("stream, warm memory", true)] {
            rows.append(
                try SpeedBench.compare(
                    name, against: "write and read of 1 MiB", bytes: bytes, runs: runs, goal: 0.8,
                    ours: { () throws(Complaint) in try migrate(source, bytes, isWarm) },
                    bare: { () throws(Complaint) in try copy(source, bytes, isWarm) }))
        }
        return rows
    }

    /// Nothing that is zero, or the same as its neighbour.
    private static func fill(_ memory: GuestMemory) {
        let region = memory.regions[0]
        let words = region.host.assumingMemoryBound(to: UInt64.self)
        var value: UInt64 = 0x9e37_79b9_7f4a_7c15
        for index in 0..<Int(region.range.size) / 8 {
            words[index] = value | 1
            value = value &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        }
    }

    /// The engine's own way, from one memory into another. Seconds.
    private static func migrate(_ source: GuestMemory, _ bytes: Int, _ isWarm: Bool) throws(Complaint) -> Double {
        let (near, far) = try Line.pair()
        let target = try SpeedBench.memory(bytes)
        if isWarm { memset(target.regions[0].host, 1, bytes) }
        let channels: (ByteChannel, ByteChannel)
        do throws(MigrationError) {
            channels = (try ByteChannel(adopting: near, name: "bench"), try ByteChannel(adopting: far, name: "bench"))
        } catch { throw Complaint("\(error)") }
        let seconds = try SpeedBench.seconds { () throws(Complaint) in
            let receiver = Task { () throws(Complaint) in
                do throws(MigrationError) {
                    _ = try MigrationReceiver(guest: BareGuest(target)).run(over: channels.1)
                } catch { throw Complaint("receiving: \(error)") }
            }
            do throws(MigrationError) {
                _ = try MigrationSource(guest: BareGuest(source), trackers: []).run(over: channels.0)
            } catch { throw Complaint("sending: \(error)") }
            try receiver.join()
        }
        try compareEnds(source, target, bytes)
        return seconds
    }

    /// The least there is to do: the same bytes over the same socket, by two threads. Seconds.
    private static func copy(_ source: GuestMemory, _ bytes: Int, _ isWarm: Bool) throws(Complaint) -> Double {
        let (near, far) = try Line.pair()
        defer {
            close(near)
            close(far)
        }
        let target = try SpeedBench.memory(bytes)
        if isWarm { memset(target.regions[0].host, 1, bytes) }
        let seconds = try SpeedBench.seconds { () throws(Complaint) in
            let receiver = Task { () throws(Complaint) in
                try move(bytes) { offset, count in CLinux.read(far, target.regions[0].host + offset, count) }
            }
            try move(bytes) { offset, count in CLinux.write(near, source.regions[0].host + offset, count) }
            try receiver.join()
        }
        try compareEnds(source, target, bytes)
        return seconds
    }

    private static func move(_ bytes: Int, _ body: (Int, Int) -> Int) throws(Complaint) {
        var offset = 0
        while offset < bytes {
            let count = body(offset, min(1 << 20, bytes - offset))
            if count < 0, errno == EINTR { continue }
            guard count > 0 else { throw Complaint("the socket failed: \(String(cString: strerror(errno)))") }
            offset += count
        }
    }

    /// A fast way to nowhere is no way.
    private static func compareEnds(_ source: GuestMemory, _ target: GuestMemory, _ bytes: Int) throws(Complaint) {
        guard memcmp(source.regions[0].host, target.regions[0].host, bytes) == 0 else {
            throw Complaint("memory arrived wrong; please report this")
        }
    }
}

private enum ZeroScanBench {
    static func run(memory bytes: Int, runs: Int) throws(Complaint) -> SpeedBench.Row {
        let memory = try SpeedBench.memory(bytes)
        let host = memory.regions[0].host
        // Pages of its own everywhere, as in a guest that cleared its memory: reading untouched memory would find the
        // kernel's one zero page again and again, in the cache.
        memset(host, 1, bytes)
        memset(host, 0, bytes)
        return try SpeedBench.compare(
            "zero-scan", against: "OR of all words", bytes: bytes, runs: runs, goal: 0.8,
            ours: { () throws(Complaint) in try scan(memory) },
            bare: { () throws(Complaint) in
                try SpeedBench.seconds { () throws(Complaint) in
                    guard lacuna_or_words(host, bytes) == 0 else { throw Complaint("the memory changed") }
                }
            })
    }

    /// A migration of nothing but zero pages. Seconds.
    private static func scan(_ memory: GuestMemory) throws(Complaint) -> Double {
        let (near, far) = try Line.pair()
        let target = try SpeedBench.memory(memory.ramPages * pageSize)
        return try SpeedBench.seconds { () throws(Complaint) in
            do throws(MigrationError) {
                let channels = (
                    try ByteChannel(adopting: near, name: "bench"), try ByteChannel(adopting: far, name: "bench")
                )
                let receiver = Task { () throws(Complaint) in
                    do throws(MigrationError) {
                        _ = try MigrationReceiver(guest: BareGuest(target)).run(over: channels.1)
                    } catch { throw Complaint("receiving: \(error)") }
                }
                let report = try MigrationSource(guest: BareGuest(memory), trackers: []).run(over: channels.0)
                try? receiver.join()
                guard report.zeroPages == memory.ramPages else { throw .badStream("not all pages were zero") }
            } catch { throw Complaint("scanning: \(error)") }
        }
    }
}

private enum MaskBench {
    /// Answers each request with the same pages.
    private final class Hinter: FreePageHinter {
        let refusal: String? = nil
        let method = "bench"
        private let last = Atomic<UInt32>(1)
        func request() -> UInt32 { last.add(1, ordering: .relaxed).newValue }
        func wait(for request: UInt32, milliseconds: Int) -> HintReport? { nil }
        func stop() {}
    }

    static func run(memory bytes: Int, runs: Int) throws(Complaint) -> [SpeedBench.Row] {
        let memory = try SpeedBench.memory(bytes)
        // As in the first round, without and with what --verify has to remember.
        let bitmap = MigrationBitmap(memory, remembersSkipped: false), remembering = MigrationBitmap(memory)
        let free = PageBitmap(bitCount: memory.frameCount)
        // Three quarters are free, in blocks as a buddy allocator has them.
        var page = 0
        while page < memory.ramPages {
            free.set(page..<min(page + 768, memory.ramPages))
            page += 1024
        }
        let size = free.wordCount * 8, expected = free.population
        let words = UnsafeMutableRawPointer.allocate(byteCount: 2 * size, alignment: 4096), copy = words + size
        defer { words.deallocate() }
        memset(copy, 1, size)
        free.withUnsafeWords { lacuna_copy(words, $0.baseAddress, size) }
        let hinter = Hinter()
        do throws(MigrationError) {
            let tracking = try ArmedTracking(arming: [], of: memory)
            func mask(_ bitmap: MigrationBitmap) throws(Complaint) -> Double {
                bitmap.markAll()
                let window: HintWindow
                do throws(PartFailure) { window = try bitmap.ask(hinter, tracking: tracking) } catch {
                    throw Complaint("\(error)")
                }
                let report = HintReport(request: window.request, pages: free, figures: nil)
                let start = SpeedBench.nanoseconds()
                let skipped = bitmap.mask(report, window).skipped
                let took = SpeedBench.nanoseconds() - start
                guard skipped == expected else { throw Complaint("\(skipped) pages were masked, not \(expected)") }
                return Double(took) / 1e9
            }
            func bare() throws(Complaint) -> Double {
                try SpeedBench.seconds { () throws(Complaint) in lacuna_copy(copy, words, size) }
            }
            do throws(Complaint) {
                return [
                    try SpeedBench.compare(
                        "mask", against: "memcpy of the bitmap", bytes: size, runs: max(runs, 101), goal: 0.7,
                        ours: { () throws(Complaint) in try mask(bitmap) }, bare: bare),
                    try SpeedBench.compare(
                        "mask, to verify", against: "memcpy of the bitmap", bytes: size, runs: max(runs, 101), goal: nil,
                        ours: { () throws(Complaint) in try mask(remembering) }, bare: bare),
                ]
            } catch { throw .machineFailed(doing: "masking", why: error.description) }
        } catch { throw Complaint("\(error)") }
    }
}
