// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import GuestMemory

/// `lacuna hints`: a client of the hint socket (protocol/hint-socket.md) for scripts and for trying things out.
enum HintsCommand {
    private struct Answer {
        let status: UInt32
        let request: UInt64
        let body: [UInt8]
        /// The sealed bitmap, for the caller to close; -1: none.
        let file: Int32
        func word(_ index: Int) -> UInt64 {
            guard body.count >= 8 * index + 8 else { return 0 }
            return body[8 * index..<8 * index + 8].reversed().reduce(0) { $0 << 8 | UInt64($1) }
        }
        var text: String { String(decoding: body, as: UTF8.self) }
    }

    struct Report: Codable {
        var freePages: UInt64
        var bitmapBytes: UInt64
        var sealed: Bool
        var microseconds: Double
        var walkNanoseconds: UInt64?
        var blocks: UInt64?
    }

    struct Statistics: Codable {
        var frames: UInt64 = 0
        var ramPages: UInt64 = 0
        var counters: [String: UInt64] = [:]
        var guest: [String: UInt64] = [:]
    }

    /// In the order of the protocol.
    private static let names = [
        "actualPages", "messages", "refusedMessages", "frontEnds", "inflateChains", "deflateChains", "inflatedPages",
        "deflatedPages", "listedPagesNotRAM", "malformedLists", "requests", "reportChains", "reportsCompleted",
        "reportsFailed", "reportsVoid", "staleChains", "lateChains", "malformedReportChains", "reportedPagesNotRAM",
        "brokenQueues", "releasedPages", "reportedFreePages", "hintedPages", "statisticsBuffers", "guestStatistics",
        "guestStatisticsTime",
    ]
    /// Statistics of the guest's, after those; 2^64 - 1: it did not tell.
    private static let tags = [
        "swapIn", "swapOut", "majorFaults", "minorFaults", "free", "total", "available", "caches",
        "hugePageAllocations", "hugePageFailures", "oomKills", "allocationStalls", "asyncScans", "directScans",
        "asyncReclaims", "directReclaims",
    ]

    static func run(_ words: ArraySlice<String>) throws(Complaint) {
        guard let action = words.first, !action.hasPrefix("--") else {
            throw .usage("hints needs an action: status, poll, request or target")
        }
        let arguments = try Arguments(words.dropFirst(), options: ["hint-socket", "timeout", "size"], flags: [])
        let socket = try connect(try arguments.required("hint-socket"))
        defer { close(socket) }
        switch action {
        case "status":
            let hello = try done(try ask(socket, 1)), counters = try done(try ask(socket, 5))
            var statistics = Statistics(frames: hello.word(0), ramPages: hello.word(1))
            for (index, name) in names.enumerated() { statistics.counters[name] = counters.word(index) }
            for (index, name) in tags.enumerated() {
                let value = counters.word(names.count + index)
                if value != .max { statistics.guest[name] = value }
            }
            write(JSON.pretty(statistics), to: 1)
        case "poll": _ = try done(try ask(socket, 8))
        case "target":
            guard let size = try arguments.size("size"), let pages = UInt32(exactly: size / 4096) else {
                throw .usage("hints target needs --size, at most 16T")
            }
            _ = try done(try ask(socket, 6, argument: pages))
        case "request":
            let timeout = try arguments.integer("timeout", in: 1...600_000) ?? 1000
            let start = monotonicNanoseconds()
            let opened = try done(try ask(socket, 2))
            let report = try done(try ask(socket, 3, argument: UInt32(timeout), request: opened.request))
            let end = monotonicNanoseconds()
            defer { if report.file >= 0 { close(report.file) } }
            guard report.file >= 0 else { throw Complaint("the service sent no bitmap") }
            _ = try done(try ask(socket, 4))
            let seals = lacuna_seals(report.file)
            let counted = try population(report.file, bytes: Int(report.word(0) / 8))
            guard counted == report.word(1) else {
                throw Complaint("the bitmap has \(counted) pages and not \(report.word(1)) as the service says")
            }
            let hasFigures = report.word(2) != 0
            write(
                JSON.pretty(
                    Report(
                        freePages: counted, bitmapBytes: report.word(0) / 8, sealed: seals & 0xf == 0xf,
                        microseconds: Double(end - start) / 1000, walkNanoseconds: hasFigures ? report.word(5) : nil,
                        blocks: hasFigures ? report.word(3) : nil)), to: 1)
        default: throw .usage("hints has no action '\(action)'; there are status, poll, request and target")
        }
    }

    private static func population(_ file: Int32, bytes: Int) throws(Complaint) -> UInt64 {
        guard bytes > 0, let map = lacuna_mmap(bytes, PROT_READ, MAP_SHARED, file, 0) else {
            throw Complaint("the bitmap cannot be read: \(String(cString: strerror(errno)))")
        }
        defer { munmap(map, bytes) }
        return UInt64(lacuna_popcount(map.assumingMemoryBound(to: UInt64.self), bytes / 8))
    }

    private static func monotonicNanoseconds() -> Int64 {
        var now = timespec()
        clock_gettime(CLOCK_MONOTONIC, &now)
        return Int64(now.tv_sec) * 1_000_000_000 + Int64(now.tv_nsec)
    }

    private static func connect(_ path: String) throws(Complaint) -> Int32 {
        let made = socket(AF_UNIX, lacuna_SOCK_SEQPACKET_CLOEXEC, 0)
        guard made >= 0 else { throw Complaint("cannot make a socket: \(String(cString: strerror(errno)))") }
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let name = Array(path.utf8), room = MemoryLayout.size(ofValue: address.sun_path)
        guard !name.isEmpty, name.count < room else {
            close(made)
            throw Complaint("the socket's path '\(path)' must have 1 to \(room - 1) bytes")
        }
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: name) }
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                CLinux.connect(made, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
        guard result == 0 else {
            let why = String(cString: strerror(errno))
            close(made)
            throw Complaint("cannot reach a service at \(path): \(why); is it running, with --hint-socket \(path)?")
        }
        return made
    }

    private static func ask(
        _ socket: Int32, _ command: UInt16, argument: UInt32 = 0, request: UInt64 = 0
    ) throws(Complaint) -> Answer {
        var packet: [UInt8] = [1, 0, UInt8(command), 0]
        for shift in 0..<4 { packet.append(UInt8(truncatingIfNeeded: argument >> UInt32(8 * shift))) }
        for shift in 0..<8 { packet.append(UInt8(truncatingIfNeeded: request >> UInt64(8 * shift))) }
        guard send(socket, packet, packet.count, lacuna_MSG_NOSIGNAL) == packet.count else {
            throw Complaint("the service is gone: \(String(cString: strerror(errno)))")
        }
        var reply = [UInt8](repeating: 0, count: 4096)
        var files = [Int32](repeating: -1, count: Int(LACUNA_MAX_DESCRIPTORS)), count: Int32 = 0
        let got = lacuna_receive(socket, &reply, reply.count, 0, &files, &count)
        for file in files[..<Int(count)].dropFirst() { close(file) }
        guard got >= 16 else { throw Complaint("the service went away before it answered") }
        let words = stride(from: 0, to: 16, by: 4).map { place in
            reply[place..<place + 4].reversed().reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
        }
        return Answer(
            status: words[1], request: UInt64(words[3]) << 32 | UInt64(words[2]), body: Array(reply[16..<got]),
            file: count > 0 ? files[0] : -1)
    }

    private static func done(_ answer: Answer) throws(Complaint) -> Answer {
        guard answer.status == 0 else { throw Complaint("\(answer.text) (status \(answer.status))") }
        return answer
    }
}
