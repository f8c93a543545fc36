// SPDX-License-Identifier: Apache-2.0
import CLinux
import Machine
import Migration

/// The commands that talk to a running guest.
enum Client {
    /// Sends a request and returns its last reply; progress goes to `progress` as it comes.
    /// A `descriptor` goes along with it, and is closed here.
    static func ask(
        _ path: String, _ request: ControlRequest, passing descriptor: Int32? = nil, progress: (String) -> Void = { _ in }
    ) throws(Complaint) -> ControlReply {
        let socket = try LocalSocket.connect(path)
        socket.send(JSON.line(request))
        if let descriptor {
            guard socket.send(descriptor: descriptor) else { throw Complaint("cannot pass descriptor \(descriptor) to the guest's process") }
            // Closed here, the channel ends when the guest's process ends it.
            close(descriptor)
        }
        while let line = socket.receiveLine(limit: LocalSocket.answerLimit) {
            guard let reply = try? JSON.decode(ControlReply.self, line) else {
                throw Complaint("the guest at \(path) answered in a way this release does not know; use the same release on both sides")
            }
            if let text = reply.progress { progress(text) } else { return reply }
        }
        throw Complaint("the guest at \(path) went away before it answered; its own output says why")
    }

    private static func done(_ reply: ControlReply) throws(Complaint) -> ControlReply {
        if let error = reply.error { throw Complaint(error) }
        return reply
    }

    static func simple(_ words: ArraySlice<String>, _ command: ControlRequest.Command) throws(Complaint) {
        let arguments = try Arguments(words, options: ["control"], flags: [])
        _ = try done(try ask(try arguments.required("control"), ControlRequest(command: command)))
    }

    static func status(_ words: ArraySlice<String>) throws(Complaint) {
        let arguments = try Arguments(words, options: ["control"], flags: [])
        let reply = try done(try ask(try arguments.required("control"), ControlRequest(command: .status)))
        if let status = reply.status { write(JSON.pretty(status), to: 1) }
    }

    static func type(_ words: ArraySlice<String>) throws(Complaint) {
        let arguments = try Arguments(words, options: ["control", "text"], flags: [])
        let text = unescape(try arguments.required("text"))
        _ = try done(try ask(try arguments.required("control"), ControlRequest(command: .type, text: text)))
    }

    /// `\n` and `\\`, so that a shell's plain quotes do.
    private static func unescape(_ text: String) -> String {
        var result = "", escaped = false
        for character in text {
            if escaped { result.append(character == "n" ? "\n" : character) } else if character != "\\" { result.append(character) }
            escaped = !escaped && character == "\\"
        }
        return result
    }

    static func stop(_ words: ArraySlice<String>) throws(Complaint) {
        let arguments = try Arguments(words, options: ["control"], flags: ["power-button"])
        let request = ControlRequest(command: .stop, powerButton: arguments[flag: "power-button"])
        _ = try done(try ask(try arguments.required("control"), request))
    }

    static func migrate(_ words: ArraySlice<String>) throws(Complaint) {
        if words.contains("--status") { return try migrationStatus(words) }
        let arguments = try Arguments(words, options: migrationOptions.union(["control", "to"]), flags: migrationFlags)
        let to = try arguments.required("to")
        let options = try migrationRequest(arguments)

        // Before the guest moves: a report that cannot be written should not be found out afterwards.
        let json = arguments["json"]
        let file = try openReport(json)

        var request = ControlRequest(command: .migrate, to: to, options: options)
        var descriptor: Int32?
        let special = try SpecialChannel(parsing: to)
        if special != nil { try options.refuseConnections(to) }
        switch special {
        case .file(let path)?: request = ControlRequest(command: .snapshot, to: path, options: options, endsAfterwards: true)
        case let special?:
            descriptor = try special.open()
            request.passesDescriptor = true
        case nil: break
        }
        try follow(request, try arguments.required("control"), passing: descriptor, reportTo: file, named: json) { summary($0, "migrated") }
    }

    /// Saves the guest to a file, and lets it run on.
    static func snapshot(_ words: ArraySlice<String>) throws(Complaint) {
        let arguments = try Arguments(
            words, options: migrationOptions.union(["control"]), flags: migrationFlags, operand: "the file")
        let json = arguments["json"]
        let file = try openReport(json)
        let options = try migrationRequest(arguments)
        try options.refuseConnections(arguments.operand)
        let request = ControlRequest(command: .snapshot, to: try absolutePath(arguments.operand), options: options)
        try follow(request, try arguments.required("control"), passing: nil, reportTo: file, named: json) {
            summary($0, "snapshot written")
        }
    }

    /// Sends a request of a migration's kind, shows its progress, and writes its report.
    private static func follow(
        _ request: ControlRequest, _ control: String, passing descriptor: Int32?, reportTo file: Int32, named json: String?,
        _ summary: (MigrationReport) -> String
    ) throws(Complaint) {
        let terminal = isatty(2) == 1
        var shown = false
        let reply = try ask(control, request, passing: descriptor) { line in
            if terminal { write(Array("\r\u{1b}[K\(line)".utf8), to: 2) }
            shown = true
        }
        if terminal && shown { write([0x0d, 0x1b, 0x5b, 0x4b], to: 2) }
        if let report = reply.report {
            if let refusal = report.hintRefusal { write(Array("lacuna: free pages were not skipped: \(refusal)\n".utf8), to: 2) }
            if file >= 0 {
                guard ftruncate(file, 0) == 0 || errno == EINVAL, write(JSON.pretty(report), to: file), close(file) == 0 else {
                    throw Complaint("the migration is \(report.outcome.rawValue), but its report could not be written to \(json ?? ""): \(String(cString: strerror(errno)))")
                }
            }
        }
        let final = try done(reply)
        if let report = final.report { write(Array((summary(report) + "\n").utf8), to: 1) }
    }

    static let migrationOptions: Set<String> = [
        "json", "downtime", "hint-timeout", "bandwidth", "timeout", "timeout-action", "max-rounds", "connections",
    ]
    static let migrationFlags: Set<String> = ["skip-free-pages", "auto-converge", "pause-before-switch-over", "verify"]

    static func migrationRequest(_ arguments: Arguments) throws(Complaint) -> MigrationRequest {
        var options = MigrationRequest()
        options.skipFreePages = arguments[flag: "skip-free-pages"]
        options.autoConverge = arguments[flag: "auto-converge"]
        options.pauseBeforeSwitchOver = arguments[flag: "pause-before-switch-over"]
        options.verify = arguments[flag: "verify"]
        options.downtimeMilliseconds = try arguments.integer("downtime", in: 1...3_600_000)
        options.hintTimeoutMilliseconds = try arguments.integer("hint-timeout", in: 1...30_000)
        options.timeoutMilliseconds = try arguments.integer("timeout", in: 1...86_400_000)
        options.maxRounds = try arguments.integer("max-rounds", in: 1...99_999)
        options.connections = try arguments.integer("connections", in: 1...16)
        options.bandwidth = try arguments.size("bandwidth")
        if let text = arguments["timeout-action"] {
            guard let action = TimeoutAction(rawValue: text) else {
                throw .usage("--timeout-action takes cancel or force, not '\(text)'")
            }
            guard options.timeoutMilliseconds != nil else { throw .usage("--timeout-action needs --timeout") }
            options.timeoutAction = action
        }
        return options
    }

    private static func openReport(_ path: String?) throws(Complaint) -> Int32 {
        guard let path else { return -1 }
        let file = lacuna_open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0o644)
        guard file >= 0 else {
            throw Complaint("cannot write the report to \(path): \(String(cString: strerror(errno))); choose another --json")
        }
        return file
    }

    private static func migrationStatus(_ words: ArraySlice<String>) throws(Complaint) {
        let arguments = try Arguments(words, options: ["control"], flags: ["status"])
        let request = ControlRequest(command: .migrationStatus)
        let reply = try done(try ask(try arguments.required("control"), request))
        if let migration = reply.migration { write(JSON.pretty(migration), to: 1) }
    }

    private static func summary(_ report: MigrationReport, _ done: String) -> String {
        let ram = Double(report.ramPages) / 256, sent = Double(report.bytes) / 1_048_576
        return "\(done): \(rounded(sent)) MiB sent for \(rounded(ram)) MiB of RAM, \(rounded(Double(report.skippedPages) / 256)) MiB skipped, "
            + "\(report.rounds.count) rounds, \(rounded(report.totalMilliseconds)) ms, downtime \(rounded(report.downtimeMilliseconds)) ms"
            + (report.verifiedPages > 0 ? ", \(report.verifiedPages) pages verified" : "")
            + (report.throttlePercent > 0 ? ", vCPUs slowed down by up to \(report.throttlePercent) %" : "")
    }
    private static func rounded(_ value: Double) -> String { String(Int(value.rounded())) }
}

extension MigrationRequest {
    /// A place that is no address can be reached once only.
    fileprivate func refuseConnections(_ place: String) throws(Complaint) {
        guard connections ?? 1 > 1 else { return }
        throw .usage("--connections needs an address (unix: or tcp:), not '\(place)'")
    }
}

/// Writes all bytes; false if that was not possible.
@discardableResult
func write(_ bytes: [UInt8], to descriptor: Int32) -> Bool {
    var rest = bytes[...]
    while !rest.isEmpty {
        let count = rest.withUnsafeBytes { CLinux.write(descriptor, $0.baseAddress, $0.count) }
        if count < 0 {
            if errno == EINTR { continue }
            return false
        }
        rest = rest.dropFirst(count)
    }
    return true
}
