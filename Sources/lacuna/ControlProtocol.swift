// SPDX-License-Identifier: Apache-2.0
import FoundationEssentials
import Machine
import Migration

/// What a client asks of a running guest: one JSON object on a line.
struct ControlRequest: Codable, Sendable {
    enum Command: String, Codable {
        case migrate, snapshot, migrationStatus, switchOver, cancel, status, pause, resume, type, stop, balloon
    }
    var command: Command
    /// migrate: the channel's address; snapshot: the file's path
    var to: String?
    var options: MigrationRequest?
    /// migrate: the channel is a descriptor, which follows the request's line
    var passesDescriptor: Bool?
    /// snapshot: the guest ends when the file is whole
    var endsAfterwards: Bool?
    /// type: the bytes for the console
    var text: String?
    /// stop: press the power button instead of ending the guest
    var powerButton: Bool?
    var balloon: BalloonRequest?
}

/// The choices a migration leaves to the operator.
struct MigrationRequest: Codable, Sendable {
    var skipFreePages = false
    var downtimeMilliseconds: Int?
    var hintTimeoutMilliseconds: Int?
    var bandwidth: UInt64?
    var timeoutMilliseconds: Int?
    var timeoutAction: TimeoutAction?
    var autoConverge = false
    var pauseBeforeSwitchOver = false
    var verify = false
    var maxRounds: Int?
    var connections: Int?
}

/// What comes back: lines of JSON, any number with `progress`, then one with `error` or `done`.
struct ControlReply: Codable, Sendable {
    var progress: String?
    var error: String?
    var done: Bool?
    var status: MachineStatus?
    var report: MigrationReport?
    var migration: MigrationStatus?
    var balloon: BalloonAnswer?
}

/// The migration under way, or the last one.
struct MigrationStatus: Codable, Sendable {
    var to: String
    var isUnderWay = true
    var progress: MigrationProgress?
    var rounds: [MigrationRound] = []
    /// How it ended, where it did.
    var report: MigrationReport?
    var error: String?
}

struct MachineStatus: Codable, Sendable {
    var activity: String
    /// Why it is in that state, where that needs a word.
    var reason: String?
    var memoryMiB: UInt64
    var vcpus: Int
    /// Why free pages could not be skipped now; absent if they can.
    var hintRefusal: String?
}

enum JSON {
    static func line(_ value: some Encodable) -> [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        // Only numbers that are not finite cannot be encoded, and there are none in these types.
        return Array((try? encoder.encode(value)) ?? Data("{}".utf8)) + [0x0a]
    }
    static func pretty(_ value: some Encodable) -> [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
        return Array((try? encoder.encode(value)) ?? Data("{}".utf8)) + [0x0a]
    }
    static func decode<Value: Decodable>(_ type: Value.Type, _ bytes: [UInt8]) throws -> Value {
        try JSONDecoder().decode(type, from: Data(bytes))
    }
}
