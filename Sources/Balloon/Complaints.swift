// SPDX-License-Identifier: Apache-2.0

/// Lets through a bounded number of messages about what a guest does wrong: it can do so as fast as it likes.
struct Complaints {
    /// So many messages at most in each period.
    static let burst = 8
    static let periodNanoseconds: UInt64 = 10_000_000_000

    private var begin: UInt64 = 0
    private var count = 0
    private var dropped = 0

    /// The message to log now, with a word on those that were dropped before it; nil: drop this one.
    mutating func admit(_ message: String, now: UInt64) -> String? {
        if now &- begin >= Self.periodNanoseconds {
            begin = now
            count = 0
        }
        guard count < Self.burst else {
            dropped += 1
            return nil
        }
        count += 1
        defer { dropped = 0 }
        return dropped > 0 ? "\(message) (and \(dropped) more messages before)" : message
    }
}
