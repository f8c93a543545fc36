// SPDX-License-Identifier: Apache-2.0
import Balloon
import CLinux
import Machine

/// What a client asks of a guest's balloon.
struct BalloonRequest: Codable, Sendable {
    enum Action: String, Codable { case set, stats, hint, status }
    var action: Action
    /// set: the balloon's size, in bytes
    var size: UInt64?
    /// stats: milliseconds between two requests from now on; 0: no more
    var interval: UInt32?
    /// How long to wait for the guest, in milliseconds.
    var wait: Int?
}

/// What comes back. Sizes are in bytes, times in milliseconds.
struct BalloonAnswer: Codable, Sendable {
    var status: BalloonReport?
    var statistics: StatisticsReport?
    var hint: HintAnswer?
}

struct StatisticsReport: Codable, Sendable {
    /// By name, as in the reference.
    var values: [String: UInt64]
    /// When they came, since 1970, by the host's clock.
    var time: UInt64
    /// Counts the answers of this guest.
    var number: UInt64

    init(_ statistics: BalloonStatistics) {
        values = [:]
        for (tag, value) in statistics.values { values[tag.name] = value }
        time = statistics.time
        number = statistics.number
    }
}

struct HintAnswer: Codable, Sendable {
    var method: String
    var freeBytes: UInt64
    var milliseconds: Double
}

struct BalloonReport: Codable, Sendable {
    /// A driver is ready in the guest.
    var hasDriver: Bool
    /// What it negotiated, by the names of `--balloon`.
    var features: [String]
    /// What the host wants the balloon to hold, what the driver says it holds, and what the queues brought.
    var targetBytes: UInt64
    var actualBytes: UInt64
    var inflatedBytes: UInt64
    /// How the guest can tell its free pages; absent if it cannot.
    var hintMethod: String?
    /// The guest may be holding hinted pages.
    var hasHints: Bool
    /// The value of `poison_val`, where the guest gives one.
    var poison: UInt32?
    /// Resident memory of this process.
    var residentBytes: UInt64
    /// 0: nobody asks by itself.
    var statisticsInterval: UInt32
    var statistics: StatisticsReport?
    var counters: BalloonCounters

    init(_ balloon: BalloonDevice) {
        let status = balloon.status
        hasDriver = status.hasDriver
        features = BalloonFeature.names.filter { status.features & $0.mask != 0 }.map(\.name)
        targetBytes = UInt64(status.targetPages) << 12
        actualBytes = UInt64(status.actualPages) << 12
        inflatedBytes = UInt64(status.inflatedPages) << 12
        hintMethod = status.method?.rawValue
        hasHints = status.hasHints
        poison = status.poison
        residentBytes = BalloonReport.resident()
        statisticsInterval = balloon.statisticsInterval
        statistics = status.statistics.map(StatisticsReport.init)
        counters = status.counters
    }

    /// The second number of /proc/self/statm is in pages.
    private static func resident() -> UInt64 {
        let file = lacuna_open("/proc/self/statm", O_RDONLY | O_CLOEXEC, 0)
        guard file >= 0 else { return 0 }
        defer { close(file) }
        var buffer = [UInt8](repeating: 0, count: 256)
        let count = read(file, &buffer, buffer.count)
        let words = String(decoding: buffer[..<max(0, count)], as: UTF8.self).split(separator: " ")
        return words.count > 1 ? (UInt64(words[1]) ?? 0) << 12 : 0
    }
}

extension RunningGuest {
    func answerBalloon(_ request: BalloonRequest?, _ machine: Machine) throws(Complaint) -> BalloonAnswer {
        guard let request else { throw Complaint("the request does not say what to do with the balloon") }
        guard machine.plugin == nil else {
            throw Complaint("the balloon is a plugin's, which these commands cannot reach; start the guest without --balloon plugin:")
        }
        let balloon = machine.balloon
        switch request.action {
        case .status: break
        case .set:
            let size = request.size ?? 0
            guard size % 4096 == 0, size < machine.configuration.memorySize else {
                throw Complaint("the balloon's size must be a multiple of 4 KiB below the guest's \(machine.configuration.memorySize >> 20) MiB; choose another --size")
            }
            // Cannot be cut: the size was compared with the memory's, which has at most 2^40 bytes.
            let pages = UInt32(size >> 12)
            balloon.setTarget(pages: pages)
            if let wait = request.wait, wait > 0, !balloon.waitForActual(pages: pages, milliseconds: wait) {
                throw Complaint("the balloon holds \(UInt64(balloon.actualPages) >> 8) MiB after \(wait) ms and goes on towards \(size >> 20) MiB; the guest may have no memory to give, or no balloon driver")
            }
        case .stats:
            guard balloon.status.hasDriver else { throw Complaint("no balloon driver is ready in the guest") }
            guard balloon.status.features & BalloonFeature.statistics != 0 else {
                throw Complaint("the guest's balloon driver did not negotiate statistics")
            }
            if let interval = request.interval { machine.pollStatistics(every: interval) }
            let wait = request.wait ?? 5000
            guard machine.activity == .running else { throw Complaint("the guest is not running; resume it first") }
            guard let before = balloon.requestStatistics(),
                let answer = balloon.waitForStatistics(after: before, milliseconds: wait)
            else { throw Complaint("the guest sent no statistics within \(wait) ms; its last ones are in `lacuna balloon status`") }
            return BalloonAnswer(statistics: StatisticsReport(answer))
        case .hint:
            try refuseDuringMigration("asking for free pages")
            if let refusal = balloon.refusal { throw Complaint("no hints: \(refusal)") }
            guard machine.activity == .running else { throw Complaint("the guest is not running; resume it first") }
            return BalloonAnswer(hint: try hint(balloon, wait: request.wait ?? 5000))
        }
        return BalloonAnswer(status: BalloonReport(balloon))
    }

    private func hint(_ balloon: BalloonDevice, wait: Int) throws(Complaint) -> HintAnswer {
        let method = balloon.hintMethod?.rawValue ?? ""
        var start = timespec(), end = timespec()
        clock_gettime(CLOCK_MONOTONIC, &start)
        let request = balloon.openWindow()
        defer { balloon.releaseHints() }
        guard let report = balloon.waitForReport(request, milliseconds: wait) else {
            throw Complaint("the guest did not tell its free pages within \(wait) ms")
        }
        clock_gettime(CLOCK_MONOTONIC, &end)
        let milliseconds = Double(end.tv_sec - start.tv_sec) * 1e3 + Double(end.tv_nsec - start.tv_nsec) / 1e6
        return HintAnswer(method: method, freeBytes: UInt64(report.pages.population) << 12, milliseconds: milliseconds)
    }
}

/// `lacuna balloon …`
enum BalloonClient {
    static func perform(_ words: ArraySlice<String>) throws(Complaint) {
        guard let word = words.first, let action = BalloonRequest.Action(rawValue: word) else {
            throw .usage("balloon takes set, stats, hint or status")
        }
        var options: Set<String> = ["control"]
        if action != .status { options.insert("wait") }
        if action == .set { options.insert("size") }
        if action == .stats { options.insert("interval") }
        let arguments = try Arguments(words.dropFirst(), options: options, flags: ["json"])
        var request = BalloonRequest(action: action)
        if action == .set {
            _ = try arguments.required("size")
            request.size = try arguments.size("size")
        }
        request.wait = try arguments.integer("wait", in: 0...3_600_000)
        request.interval = try arguments.integer("interval", in: 0...86_400_000).map { UInt32($0) }
        if let interval = request.interval, (1..<100).contains(interval) {
            throw .usage("--interval takes 0, or 100 and more")
        }
        let control = try arguments.required("control")
        let reply = try Client.ask(control, ControlRequest(command: .balloon, balloon: request))
        if let error = reply.error { throw Complaint(error) }
        guard let answer = reply.balloon else { return }
        let isJSON = arguments[flag: "json"]
        if let status = answer.status { write(isJSON ? JSON.pretty(status) : Array(text(status).utf8), to: 1) }
        if let statistics = answer.statistics {
            write(isJSON ? JSON.pretty(statistics) : Array(text(statistics).utf8), to: 1)
        }
        if let hint = answer.hint {
            let line = "\(mib(hint.freeBytes)) free, by \(hint.method), in \(Int(hint.milliseconds.rounded())) ms\n"
            write(isJSON ? JSON.pretty(hint) : Array(line.utf8), to: 1)
        }
    }

    private static func mib(_ bytes: UInt64) -> String { "\(bytes >> 20) MiB" }

    private static func text(_ status: BalloonReport) -> String {
        guard status.hasDriver else { return "no balloon driver is ready in the guest; target \(mib(status.targetBytes))\n" }
        var text = "target \(mib(status.targetBytes)), actual \(mib(status.actualBytes)), "
        text += "resident \(mib(status.residentBytes)), released \(mib(status.counters.releasedPages << 12)) so far\n"
        text += "features: \(status.features.joined(separator: " "))\n"
        text += "free pages: \(status.hintMethod ?? "the guest cannot tell them")\n"
        if let statistics = status.statistics { text += self.text(statistics) }
        return text
    }

    private static func text(_ statistics: StatisticsReport) -> String {
        var time = time_t(statistics.time / 1000), parts = tm()
        gmtime_r(&time, &parts)
        var buffer = [CChar](repeating: 0, count: 32)
        strftime(&buffer, buffer.count, "%Y-%m-%dT%H:%M:%SZ", &parts)
        let stamp = String(decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        var text = "statistics \(statistics.number) of \(stamp)\n"
        for tag in StatisticTag.allCases {
            if let value = statistics.values[tag.name] { text += "  \(tag.name) \(value)\n" }
        }
        return text
    }
}

/// The features that `--balloon` names.
func balloonFeatures(_ list: String) throws(Complaint) -> UInt64 {
    var features: UInt64 = 0
    for word in list.split(separator: ",") {
        guard let feature = BalloonFeature.names.first(where: { $0.name == word }) else {
            let names = BalloonFeature.names.map(\.name).joined(separator: ", ")
            throw .usage("--balloon knows \(names), not '\(word)'")
        }
        features |= feature.mask
    }
    return features
}

/// What `--memory-backing` names.
func memoryBacking(_ arguments: Arguments) throws(Complaint) -> MemoryBacking {
    guard let text = arguments["memory-backing"] else { return .anonymous }
    guard let backing = MemoryBacking(rawValue: text) else {
        throw .usage("--memory-backing takes anonymous, memfd or hugepages, not '\(text)'")
    }
    return backing
}
