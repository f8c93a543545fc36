// SPDX-License-Identifier: Apache-2.0

/// What the operator chose for one migration.
public struct MigrationOptions: Sendable, Codable, Equatable {
    /// Ask the guest for its free pages and leave them out.
    public var skipFreePages = false
    /// The guest may be stopped when the rest is expected to be sent within this time.
    public var downtimeLimitMilliseconds = 300
    /// How long each round waits for the guest's report.
    public var hintTimeoutMilliseconds = 200
    /// Below this many dirty pages a later round does not ask: sending them is quicker.
    public var hintMinimumPages = 256
    /// After so many rounds the guest is stopped, however much is left; 0: rounds go on until the rest is small.
    public var maxRounds = 0
    /// Bytes per second on the wire before the guest is stopped; 0: no limit. Values from 1 to 65535 count as 65536.
    public var bandwidthLimit = 0
    /// The whole migration may take so long before the guest is stopped; 0: no limit. What then happens is
    /// `timeoutAction`.
    public var timeoutMilliseconds = 0
    public var timeoutAction = TimeoutAction.cancel
    /// Slow the vCPUs down, in steps, while the guest dirties memory faster than it can be sent.
    public var autoConverge = false
    /// Wait, with the guest running and the rest kept small, until `MigrationSource.allowSwitchOver()`.
    public var pauseBeforeSwitchOver = false
    /// Compare a checksum of each page that was not skipped before the guest is given away.
    public var verify = false
    /// Connections that memory is sent over: 1, or 2 to 16 beside the one that carries everything else. Other values
    /// count as the nearest of these.
    public var connections = 1
    /// How long the destination may keep silent or take nothing.
    public var idleTimeoutMilliseconds = 60_000
    /// How long to wait for the acknowledgement of the commit.
    public var commitTimeoutMilliseconds = 10_000
    public init() {}
}

/// What to do with a migration that takes too long.
public enum TimeoutAction: String, Codable, Sendable {
    /// Give it up; the guest runs on at the source.
    case cancel
    /// Stop the guest and send the rest, however long that takes.
    case force
}

/// How a migration's source ended, where it did not throw.
public enum MigrationOutcome: String, Codable, Sendable {
    /// The destination has the guest.
    case completed
    /// The destination was told to take the guest and nobody knows whether it did. The guest is paused here.
    case unknown
}

/// One round of a migration.
public struct MigrationRound: Codable, Sendable, Equatable {
    /// From 1.
    public var number: Int
    /// Pages the trackers saw written since the round before. In the first round 0: all of RAM is to be sent.
    public var dirtied = 0
    /// The guest was asked for its free pages.
    public var asked = false
    /// It answered in time.
    public var answered = false
    /// Free pages in its report.
    public var found = 0
    /// Pages that were to be sent and were left out.
    public var skipped = 0
    /// Of these, pages sent in an earlier round, which the destination was told to drop.
    public var discarded = 0
    /// Pages sent with their bytes.
    public var sent = 0
    /// Pages sent as a zero mark.
    public var zero = 0
    /// Bytes on the wire.
    public var bytes: UInt64 = 0
    public var milliseconds = 0.0
    /// From the request to the whole report, or to giving up.
    public var hintLatencyMilliseconds = 0.0
    /// The driver's own figures.
    public var figures: HintFigures?
    /// Percent of the time that the vCPUs were kept from running.
    public var throttlePercent = 0
    /// The guest was stopped.
    public var stopped = false
    init(number: Int) { self.number = number }
}

/// The time the guest stood still, in milliseconds, and what it was spent on.
public struct DowntimeParts: Codable, Sendable, Equatable {
    public var pause = 0.0
    /// Collecting the dirty pages, twice, and saving the state between.
    public var collectAndSave = 0.0
    /// Sending the rest of memory.
    public var memory = 0.0
    /// Sending the state, and the destination's loading of it.
    public var state = 0.0
    /// From the commit to its acknowledgement.
    public var commit = 0.0
}

/// What a migration did, as its source saw it. Times are in milliseconds.
public struct MigrationReport: Codable, Sendable, Equatable {
    public var outcome = MigrationOutcome.completed
    /// Why the outcome is unknown.
    public var outcomeReason: String?
    public var ramPages = 0
    /// Pages in the first report.
    public var freePages = 0
    /// Bytes sent by the source, over all connections.
    public var bytes: UInt64 = 0
    public var pagesSent = 0
    public var zeroPages = 0
    public var skippedPages = 0
    public var discardedPages = 0
    /// What answered the requests; nil without hints.
    public var hintMethod: String?
    /// Why there were no hints, or no more, although they were wanted.
    public var hintRefusal: String?
    /// Reports that came too late to be used.
    public var lateReports = 0
    /// Free pages in those reports.
    public var droppedPages = 0
    public var rounds: [MigrationRound] = []
    /// Connections that memory was sent over.
    public var connections = 1
    public var stateBytes = 0
    /// Pages whose checksums were compared and agreed; 0 if that was not asked for.
    public var verifiedPages = 0
    /// The most that auto-converge slowed the vCPUs down, in percent of their time.
    public var throttlePercent = 0
    public var totalMilliseconds = 0.0
    public var downtimeMilliseconds = 0.0
    public var downtime = DowntimeParts()
    public init() {}
}

/// Where a migration stands.
public struct MigrationProgress: Codable, Sendable, Equatable {
    public enum Phase: String, Codable, Sendable { case connecting, rounds, waiting, stopped, state, commit, done }
    public var phase: Phase
    /// From 1; 0 before the first.
    public var round: Int
    public var ramPages: Int
    /// Pages still to be sent in this round.
    public var remainingPages: Int
    public var bytes: UInt64
    public var pagesSent: Int
    public var zeroPages: Int
    public var skippedPages: Int
    /// Bytes per second while sending; 0 as long as it is not known.
    public var bytesPerSecond: Double
    /// Pages a second that the guest dirtied during the last round.
    public var dirtyPagesPerSecond: Double
    /// Percent of the time that the vCPUs are kept from running.
    public var throttlePercent: Int
    public var milliseconds: Double
}

/// What the destination received.
public struct ReceiveReport: Codable, Sendable, Equatable {
    public var rounds = 0
    public var pages = 0
    public var zeroPages = 0
    public var discardMarks = 0
    /// Connections that memory came over.
    public var connections = 1
    /// Connections that wanted to join and had no right to.
    public var strangers = 0
    public var bytes: UInt64 = 0
    public var totalMilliseconds = 0.0
    /// False: the guest runs here, but the source may not know it and keeps its copy paused.
    public var acknowledged = false
    public init() {}
}
