// SPDX-License-Identifier: Apache-2.0
import CLinux
import DirtyBench

/// `lacuna bench dirty …`
enum Bench {
    static func run(_ words: ArraySlice<String>) throws(Complaint) {
        guard words.first == "dirty", let name = words.dropFirst().first, let bench = DirtyBench(rawValue: name) else {
            let names = DirtyBench.allCases.map(\.rawValue).joined(separator: ", ")
            throw .usage("give one of the benchmarks, as `lacuna bench dirty NAME`: \(names)")
        }
        let arguments = try Arguments(
            words.dropFirst(2),
            options: [
                "memory", "json", "dirty-ring-size", "rate", "migrations", "bandwidth", "downtime", "kernel", "initramfs",
                "cmdline", "cmdline-loaded", "ready",
            ], flags: ["plain", "check"])
        var options = BenchOptions()
        options.memorySize = try arguments.size("memory")
        options.plain = arguments[flag: "plain"]
        if arguments["dirty-ring-size"] != nil { options.ringEntries = try arguments.ringEntries() }
        if let rate = try arguments.size("rate") { options.rate = rate }
        if let count = try arguments.integer("migrations", in: 1...1000) { options.migrations = count }
        if let limit = try arguments.size("bandwidth") { options.bandwidth = limit }
        if let limit = try arguments.integer("downtime", in: 1...60_000) { options.downtime = limit }
        options.kernel = arguments["kernel"]
        options.initramfs = arguments["initramfs"]
        if let text = arguments["cmdline"] { options.idleCommandLine = text }
        if let text = arguments["cmdline-loaded"] { options.loadedCommandLine = text }
        if let text = arguments["ready"] { options.readyText = text }

        let table: BenchTable
        do throws(BenchError) { table = try bench.run(options) } catch { throw Complaint("\(error)") }
        write(Array(table.text.utf8), to: 1)
        if let path = arguments["json"] {
            let file = lacuna_open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o644)
            guard file >= 0, write(Array(table.json.utf8), to: file), close(file) == 0 else {
                throw Complaint("cannot write the figures to \(path): \(String(cString: strerror(errno))); choose another --json")
            }
        }
        for miss in table.misses { write(Array("lacuna: \(miss)\n".utf8), to: 2) }
        if arguments[flag: "check"], !table.misses.isEmpty {
            throw Complaint("\(table.misses.count) limits were missed")
        }
    }
}
