// SPDX-License-Identifier: Apache-2.0
import CLinux

// lacuna-scenarios list [--quick]
// lacuna-scenarios run NAME
// lacuna-scenarios demo [--memory SIZE]
// lacuna-scenarios relay LISTEN TARGET PLACE ACTION, for the scenarios' own use

_ = lacuna_ignore_signal(SIGPIPE)
let words = Array(CommandLine.arguments.dropFirst())

/// Runs `body`, ends whatever it left running, and ends this process with the verdict.
func perform(echo: Bool, _ body: (Stage) throws(Failure) -> Bool) -> Never {
    let stage = Stage(echo: echo)
    do throws(Failure) {
        let good = try body(stage)
        stage.close()
        exit(good ? 0 : 1)
    } catch {
        stage.close()
        // Clients that were answered, named by their command, have nothing to add. The reason comes last, where who reads
        // a log looks first.
        for child in stage.children where !child.lines.isEmpty && (child.status != 0 || !child.name.hasPrefix("./")) {
            say("--- \(child.name), its last lines (status \(child.status ?? -1)):")
            for line in child.lines.suffix(15) { say("    \(line)") }
        }
        say("failed: \(error)")
        exit(1)
    }
}

switch words.first {
case "list":
    for scenario in scenarios where scenario.isQuick || !words.contains("--quick") {
        let more = scenario.programs.map { " --program \($0)" } + scenario.modules.map { " --module \($0)" }
            + scenario.files.map { " --file \($0)" }
        say("\(scenario.name) \(scenario.memory) \(scenario.limit) \(scenario.isAlone ? "alone" : "beside")" + more.joined())
    }
case "run" where words.count == 2 || words.count == 3 && words[2] == "--echo":
    guard let scenario = scenarios.first(where: { $0.name == words[1] }) else {
        say("there is no scenario \(words[1]); see lacuna-scenarios list")
        exit(2)
    }
    perform(echo: words.count == 3) { stage throws(Failure) in
        try scenario.body(stage)
        return true
    }
case "demo" where words.count == 1 || words.count == 3 && words[1] == "--memory":
    perform(echo: false) { stage throws(Failure) in try demo(memory: words.count == 3 ? words[2] : "1G", stage: stage) }
case "relay" where words.count == 5:
    guard let place = StreamPlace(parsing: words[3]), let action = Relay.Action(rawValue: words[4]) else {
        say("'\(words[3])' is no place in a stream, or '\(words[4])' no action")
        exit(2)
    }
    Relay.run(listen: words[1], target: words[2], place: place, action: action)
case "vsock" where words.count == 4:
    // A program of the scenarios' own: vsock CID PORT BLOCKS.
    exit(talk(cid: UInt32(words[1]) ?? 0, port: UInt32(words[2]) ?? 0, limit: Int(words[3]) ?? 0))
case "narrow" where words.count > 3:
    // The same: narrow USER PROCESSES COMMAND...
    exit(becomeNarrow(user: UInt32(words[1]) ?? 65534, processes: UInt(words[2]) ?? 1, Array(words[3...])))
default:
    say("usage: lacuna-scenarios list [--quick] | run NAME [--echo] | demo [--memory SIZE]")
    exit(2)
}
