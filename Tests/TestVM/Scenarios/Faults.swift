// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import Migration

/// Migrations that lose their connection, their source or their destination at a chosen place in the stream.
let faultScenarios: [Scenario] = [
    // Before the commit: the source runs on, whatever was cut.
    Scenario(name: "faults-cut", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        try suffer(stage, Fault.cuts, randomBytes: 6)
    },
    // Around the commit: the guest may go either way, or stay paused with the reason.
    Scenario(name: "faults-commit", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        try suffer(stage, Fault.commits, randomBytes: 0)
    },
    Scenario(name: "faults-kill-destination", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        try suffer(stage, Fault.destinationKills, randomBytes: 0)
    },
    Scenario(name: "faults-kill-source", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        try suffer(stage, Fault.sourceKills, randomBytes: 0)
    },
    // The same where memory goes over connections of its own.
    Scenario(name: "faults-connections", memory: 2560, limit: 600, isQuick: false) { stage throws(Failure) in
        try suffer(stage, Fault.connections, randomBytes: 0, flags: ["--connections", "3"])
    },
]

/// One thing that goes wrong, and where the guest may be afterwards.
private struct Fault {
    enum Event {
        case cut, late, killSource, killDestination
        /// What the relay does.
        var action: Relay.Action { self == .cut ? .cut : self == .late ? .late : .hold }
    }
    /// Where the guest is in the end.
    enum Whereabouts {
        /// It runs at the source, as if nothing had been.
        case source
        /// It is paused at the source with the reason shown, and the destination is gone.
        case paused
        /// It runs at the destination; the source, if there is one, is paused with the reason shown.
        case destination
        /// It runs at the destination and the source knows it.
        case moved
        /// It died with its source.
        case lost
        /// It runs at the destination because the stream had no such place: nothing was free that had been sent, say.
        case missed
    }
    let event: Event
    let place: String
    let allowed: Set<Whereabouts>

    init(_ event: Event, _ place: String, _ allowed: Whereabouts...) {
        (self.event, self.place, self.allowed) = (event, place, Set(allowed))
    }

    static let cuts =
        [
            "forward:before:hello:1", "forward:mid:hello:1", "forward:after:hello:1", "backward:before:ready:1",
            "backward:mid:ready:1", "backward:after:ready:1", "forward:before:pages:1", "forward:mid:pages:1",
            "forward:after:pages:1", "forward:mid:pages:20", "forward:before:zero:1", "forward:mid:zero:1",
            "forward:before:discard:1", "forward:after:discard:1", "forward:before:roundEnd:1", "forward:after:roundEnd:1",
            "forward:mid:roundEnd:2", "forward:before:verify:1", "forward:mid:verify:1", "forward:before:state:1",
            "forward:mid:state:2", "forward:after:state:2", "forward:before:stateEnd:1", "forward:mid:stateEnd:1",
            "forward:after:stateEnd:1", "backward:before:loaded:1", "backward:mid:loaded:1",
        ].map { Fault(.cut, $0, .source) }

    static let commits = [
        // The commit may or may not have been on its way already.
        Fault(.cut, "backward:after:loaded:1", .source, .paused),
        Fault(.cut, "forward:before:commit:1", .paused),
        Fault(.cut, "forward:mid:commit:1", .paused),
        Fault(.cut, "forward:after:commit:1", .destination),
        Fault(.cut, "backward:before:committed:1", .destination),
        Fault(.cut, "backward:mid:committed:1", .destination),
        Fault(.cut, "backward:after:committed:1", .moved),
        // A commit that arrives when the source has long given up waiting for the answer.
        Fault(.late, "forward:before:commit:1", .destination),
    ]

    static let destinationKills =
        [
            "forward:after:hello:1", "backward:after:ready:1", "forward:before:pages:1", "forward:mid:pages:5",
            "forward:after:zero:1", "forward:after:roundEnd:1", "forward:mid:state:1", "forward:after:stateEnd:1",
            "backward:before:loaded:1",
        ].map { Fault(.killDestination, $0, .source) } + [
            Fault(.killDestination, "backward:after:loaded:1", .paused),
            Fault(.killDestination, "forward:before:commit:1", .paused),
            Fault(.killDestination, "forward:mid:commit:1", .paused),
            // It had the guest, and its source could not know.
            Fault(.killDestination, "backward:before:committed:1", .paused),
            Fault(.killDestination, "backward:mid:committed:1", .paused),
        ]

    // The first connection says everything but memory; three more have that.
    static let connections =
        [
            "backward:mid:ready:1", "2/forward:before:join:1", "3/forward:mid:join:1", "4/forward:after:join:1",
            "2/forward:mid:pages:1", "3/forward:after:pages:9", "4/forward:mid:zero:1", "3/forward:mid:discard:1",
            "2/forward:before:roundEnd:1", "4/forward:after:roundEnd:1", "1/forward:mid:roundEnd:1",
            "2/forward:before:laneEnd:1", "3/forward:mid:laneEnd:1", "forward:mid:state:1", "backward:before:loaded:1",
        ].map { Fault(.cut, $0, .source) } + [
            Fault(.killDestination, "3/forward:mid:pages:5", .source),
            Fault(.killDestination, "2/forward:after:laneEnd:1", .source),
            Fault(.killDestination, "forward:mid:commit:1", .paused),
            Fault(.cut, "forward:mid:commit:1", .paused),
            Fault(.cut, "backward:before:committed:1", .destination),
            Fault(.killSource, "forward:after:commit:1", .destination),
            Fault(.killSource, "3/forward:mid:pages:5", .lost),
        ]

    // After a loss a new guest is booted, so each of these is followed by one that keeps its guest.
    static let sourceKills = [
        Fault(.killSource, "forward:after:commit:1", .destination),
        Fault(.killSource, "backward:before:committed:1", .destination),
        Fault(.killSource, "backward:mid:committed:1", .destination),
        Fault(.killSource, "forward:mid:pages:3", .lost),
        Fault(.killSource, "forward:after:roundEnd:1", .lost),
        Fault(.killSource, "forward:after:stateEnd:1", .lost),
        Fault(.killSource, "backward:after:loaded:1", .lost),
        Fault(.killSource, "forward:mid:commit:1", .lost),
    ]
}

/// Goes through the faults with one guest that keeps checking its memory, as long as it lives.
private func suffer(
    _ stage: Stage, _ faults: [Fault], randomBytes: Int, flags: [String] = []
) throws(Failure) {
    var number = 0
    func boot() throws(Failure) -> Guest {
        number += 1
        let guest = try stage.boot("guest-\(number)", memory: "192M", run: "memcheck:25")
        try stage.verify(guest, passes: 1)
        return guest
    }
    var holder = try boot()
    var all = faults
    if randomBytes > 0 {
        // A migration that nothing happens to: the line itself is no fault, and this many bytes there are.
        let line = try Line(stage, "whole", from: holder, place: "none", action: .cut, flags)
        try expect(try stage.waitForEnd(line.client, seconds: patience) == 0, "nothing was cut and it failed: \(line.client.text)")
        let said = try stage.wait(line.relay, for: "RELAY passed", seconds: 30).line
        say(said)
        try stage.wait(line.destination.child, for: "the guest runs here now", seconds: 30)
        try stage.verify(line.destination, passes: 9)
        holder = line.destination
        let bytes = said.split(separator: " ").compactMap { UInt64($0) }.first ?? 0
        let seed = UInt64(now() * 1e9)
        say("random bytes from the seed \(seed)")
        var random = SeededNumbers(state: seed)
        for _ in 0..<randomBytes {
            // The guest's next migration may take fewer bytes than the last.
            all.append(Fault(.cut, "forward:byte:\(UInt64.random(in: 0...bytes / 2, using: &random))", .source))
        }
    }
    for (index, fault) in all.enumerated() {
        let started = now()
        // Checksums take long in an emulated CPU: only where they are what is cut.
        let more = fault.place.contains("verify") ? ["--verify"] : []
        var (found, guest) = try suffer(stage, fault, "\(index + 1)", holder, flags + more)
        for again in 1...3 where found == .missed {
            holder = guest ?? holder
            (found, guest) = try suffer(stage, fault, "\(index + 1)-\(again)", holder, flags + more)
        }
        say("\(index + 1): \(fault.event) \(fault.place): \(found) (\(Int((now() - started) * 1000)) ms)")
        try expect(fault.allowed.contains(found), "\(fault.event) \(fault.place): the guest is '\(found)'")
        if let guest { holder = guest } else { holder = try boot() }
    }
    say("\(all.count) faults, each with one guest at most and none lost that had a side alive")
    // The next attempt starts clean, and after it every byte is looked at.
    let destination = try stage.receive("last", at: "unix:last.sock")
    _ = try stage.migrate(holder, to: destination, at: "unix:last.sock", flags: migrationFlags(for: "") + flags)
    try stage.verify(destination, passes: 9)
    try stage.stop(destination)
}

/// Narrow, so that there are several rounds; narrower and more of them where a page that was sent has to be free in a
/// later one.
private func migrationFlags(for place: String) -> [String] {
    let rounds = place.contains("discard") ? ["--bandwidth", "60M", "--max-rounds", "20"] : ["--bandwidth", "120M", "--max-rounds", "3"]
    return ["--skip-free-pages", "--hint-timeout", "5000", "--downtime", "20"] + rounds
}

/// A migration under way through a relay.
private struct Line {
    let destination: Guest
    let relay: Child
    let client: Child

    init(
        _ stage: Stage, _ name: String, from source: Guest, place: String, action: Relay.Action, _ flags: [String]
    ) throws(Failure) {
        destination = try stage.receive("destination-\(name)", at: "unix:\(name).sock")
        let door = "\(name).relay"
        relay = try stage.start("relay-\(name)", ["./lacuna-scenarios", "relay", door, "\(name).sock", place, "\(action)"])
        try stage.wait(relay, for: "RELAY listens", seconds: 30)
        client = try stage.start(
            "migrate-\(name)", ["./lacuna", "migrate", "--control", source.control, "--to", "unix:\(door)"] + migrationFlags(for: place)
                + flags)
    }
}

private struct Status: Decodable {
    var activity: String
    var reason: String?
}

private func status(_ stage: Stage, _ guest: Guest) throws(Failure) -> Status {
    let client = try stage.run(["./lacuna", "status", "--control", guest.control])
    guard client.status == 0 else { throw Failure("status failed: \(client.text)") }
    do { return try JSONDecoder().decode(Status.self, from: Data(client.text.utf8)) } catch {
        throw Failure("status said '\(client.text)': \(error)")
    }
}

/// One fault. Finds out where the guest is by asking both sides, checks that it is in one place only and that its memory
/// is right there (in eight passes, of which one looks at every byte), and returns who has it now.
private func suffer(
    _ stage: Stage, _ fault: Fault, _ name: String, _ source: Guest, _ flags: [String]
) throws(Failure) -> (Fault.Whereabouts, Guest?) {
    let line = try Line(stage, name, from: source, place: fault.place, action: fault.event.action, flags)
    guard try stage.waitForEnd(line.relay, or: "RELAY stands", seconds: patience) else {
        try expect(line.relay.count("RELAY passed") > 0, "the relay failed: \(line.relay.text)")
        try expect(try stage.waitForEnd(line.client, seconds: 60) == 0, "nothing was cut and it failed: \(line.client.text)")
        try stage.wait(line.destination.child, for: "the guest runs here now", seconds: 30)
        try stage.verify(line.destination, passes: 9)
        return (.missed, line.destination)
    }
    switch fault.event {
    case .killSource: stage.kill(source.child)
    case .killDestination: stage.kill(line.destination.child)
    case .cut, .late: break
    }
    let clientStatus = try stage.waitForEnd(line.client, seconds: 60)
    let arrived = try stage.waitForEnd(line.destination.child, or: "the guest runs here now", seconds: 60)
    let isDestinationAlive = line.destination.child.status == nil
    // A destination that was not given the guest never ran it: not a line of its console came through there.
    try expect(
        arrived || line.destination.child.count("MEMCHECK") == 0, "the destination ran a guest that it was not given")
    if !arrived, fault.event != .killDestination {
        try expect(
            line.destination.child.text.contains("no guest was received: "),
            "the destination does not say why: \(line.destination.child.text)")
    }

    if fault.event == .killSource || clientStatus == 0 {
        let end = try stage.waitForEnd(source.child, seconds: 30)
        try expect(fault.event == .killSource || end == 0, "the source ended with status \(end)")
        guard isDestinationAlive else {
            try expect(fault.event == .killSource, "the migration succeeded and the destination is gone")
            return (.lost, nil)
        }
        try expect(arrived, "the destination lives without a guest")
        try stage.verify(line.destination, passes: 9)
        return (clientStatus == 0 ? .moved : .destination, line.destination)
    }

    let seen = try status(stage, source)
    switch seen.activity {
    case "running":
        try expect(!isDestinationAlive && !arrived, "the guest runs on both sides")
        try stage.verify(source, passes: 8)
        return (.source, source)
    case "paused":
        let reason = seen.reason ?? ""
        try expect(
            reason.contains("unknown") && reason.contains("resume") && line.client.text.contains(reason),
            "the source is paused and does not say why: status '\(reason)', migrate '\(line.client.text)'")
        if isDestinationAlive {
            let before = source.child.lines.count
            try stage.verify(line.destination, passes: 9)
            try expect(source.child.lines.count == before, "the paused source ran on: \(source.child.lines.last ?? "")")
            try stage.stop(source)
            return (.destination, line.destination)
        }
        let client = try stage.run(["./lacuna", "resume", "--control", source.control])
        try expect(client.status == 0, "resume failed: \(client.text)")
        let after = try status(stage, source)
        try expect(after.activity == "running" && after.reason == nil, "after resume: \(after)")
        try stage.verify(source, passes: 8)
        return (.paused, source)
    default:
        throw Failure("the source is neither running nor paused: \(seen)")
    }
}

/// Numbers that can be had again from the seed.
struct SeededNumbers: RandomNumberGenerator {
    var state: UInt64
    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var z = state
        z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
        z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
        return z ^ (z >> 31)
    }
}
