// SPDX-License-Identifier: Apache-2.0
import CLinux

// A peer that goes away is an error of the call that notices, not the end of the process.
_ = lacuna_ignore_signal(SIGPIPE)

func perform(_ words: ArraySlice<String>) throws(Complaint) {
    switch words.first {
    case nil, "help", "--help", "-h": write(Array((help + "\n").utf8), to: words.isEmpty ? 2 : 1)
    case "run": try Host.run(words.dropFirst())
    case "receive": try Host.receive(words.dropFirst())
    case "migrate": try Client.migrate(words.dropFirst())
    case "relay": try Relay.run(words.dropFirst())
    case "restore": try Host.restore(words.dropFirst())
    case "snapshot": try Client.snapshot(words.dropFirst())
    case "cancel": try Client.simple(words.dropFirst(), .cancel)
    case "switch-over": try Client.simple(words.dropFirst(), .switchOver)
    case "status": try Client.status(words.dropFirst())
    case "pause": try Client.simple(words.dropFirst(), .pause)
    case "resume": try Client.simple(words.dropFirst(), .resume)
    case "balloon": try BalloonClient.perform(words.dropFirst())
    case "type": try Client.type(words.dropFirst())
    case "bench" where SpeedBench.names.contains(words.dropFirst().first ?? ""): try SpeedBench.run(words.dropFirst())
    case "bench": try Bench.run(words.dropFirst())
    case "stop": try Client.stop(words.dropFirst())
    case "vhost-user": try VhostUserCommand.run(words.dropFirst())
    case "hints": try HintsCommand.run(words.dropFirst())
    case let other?: throw .usage("there is no command '\(other)'")
    }
    if words.isEmpty { throw .usage("give a command") }
}

do throws(Complaint) {
    let words = CommandLine.arguments.dropFirst()
    if words.contains("--help") || words.contains("-h") { write(Array((help + "\n").utf8), to: 1) } else { try perform(words) }
} catch {
    write(Array("lacuna: \(error)\n".utf8), to: 2)
    exit(error.status)
}
