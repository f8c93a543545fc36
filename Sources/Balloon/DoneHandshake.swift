// SPDX-License-Identifier: Apache-2.0
internal import GuestMemory
internal import Virtio

/// Whether the driver has read DONE, and the request that waits for that.
///
/// A driver that never sees DONE, because the next id overwrote it, keeps all it hinted and has nothing left to hint. So
/// the next id takes its place only once the driver has read it *and* will act on that:
/// - A read of the command id alone counts at once.
/// - A read of more, or of a part of it, may have been meant for another field: QEMU fetches the whole configuration for
///   every access. Linux reads all fields it cares for in one go after a change, so that such a read counts after
///   `readDelay`.
/// - Linux reads the command id in its sending loop, too, where DONE only ends the loop; what it holds it gives back when
///   it reads DONE afterwards. A read before its STOP has come does not count, and it is told to look again then.
struct DoneHandshake {
    /// Nanoseconds.
    static let readDelay: UInt64 = 100_000_000

    var isUnread = false
    /// When DONE was first among what was read, by the monotonic clock; nil: it was not, or in vain.
    var seen: UInt64?
    /// The driver read it while it was sending hints.
    var wasReadWhileSending = false
    /// The command id that takes DONE's place.
    var queued: UInt32?
}

extension BalloonDevice.State {
    /// The driver is in its sending loop, or what it has sent was not all looked at.
    private var isSendingHints: Bool {
        if hintStream != nil { return true }
        guard let number = map.number(of: .hints), let queue = queues[number] else { return false }
        return !queue.isEmpty
    }

    /// The driver read `count` bytes of the configuration at `offset`. True if somebody who waits has to look.
    mutating func noteRead(offset: Int, count: Int) -> Bool {
        let field = ConfigurationField.hintCommand
        // Compared without a sum that a transport's offset could overflow.
        guard done.isUnread, count > 0, offset < field + 4, offset > field - count else { return false }
        if isSendingHints {
            done.wasReadWhileSending = true
            return false
        }
        if count <= 8, offset <= field, offset >= field + 4 - count {
            done.isUnread = false
        } else if done.seen == nil {
            done.seen = monotonicNanoseconds()
        }
        return done.queued != nil
    }

    /// The driver has sent something. True if it has to be told to look again at what it read too early.
    mutating func hasToReadAgain() -> Bool {
        guard done.wasReadWhileSending, done.queued != nil, !isSendingHints else { return false }
        done.wasReadWhileSending = false
        return true
    }

    /// After how many milliseconds another id may take DONE's place without any read more; 0: now, nil: never.
    mutating func doneDelay() -> Int? {
        guard done.isUnread else { return 0 }
        guard let seen = done.seen else { return nil }
        let passed = monotonicNanoseconds() - seen
        if passed < DoneHandshake.readDelay { return Int((DoneHandshake.readDelay - passed) / 1_000_000) + 1 }
        if isSendingHints {
            // It began with what it had read before that.
            done.seen = nil
            done.wasReadWhileSending = true
            return nil
        }
        done.isUnread = false
        return 0
    }
}

extension BalloonDevice {
    /// Asks the driver what it could not be asked before it had read DONE, if it has. `waitForReport` does so by
    /// itself; who waits in another way calls this after each access of the driver's. Returns the milliseconds after
    /// which another call may find it so without an access; nil: none will. Any thread.
    @discardableResult
    public func askWhatWaits() -> Int? {
        let (delay, signals): (Int?, DeviceSignals?) = monitor.withLock { state in
            guard let queued = state.done.queued else { return (nil, nil) }
            guard let delay = state.doneDelay() else { return (nil, nil) }
            guard delay == 0 else { return (delay, nil) }
            state.done = DoneHandshake()
            state.hintCommand = queued
            return (nil, state.signals)
        }
        signals?.configurationChanged()
        return delay
    }

    /// Waits until the request is answered or over, for at most `milliseconds`. False: it is not. What there is of a
    /// report stays for `waitForReport`. Any number of threads.
    public func waitForEnd(of request: UInt32, milliseconds: Int) -> Bool {
        // Cut to a day, as the monitor does.
        let end = monotonicNanoseconds() + UInt64(max(0, min(milliseconds, 86_400_000))) * 1_000_000
        while true {
            let delay = askWhatWaits()
            let now = monotonicNanoseconds()
            let left = end > now ? Int((end - now + 999_999) / 1_000_000) : 0
            let isOver: Bool? = monitor.wait(milliseconds: min(left, delay ?? left)) { state in
                guard let window = state.window, window.request == request, window.isPending else { return true }
                // The driver has read: there may be something to ask, now or a little later.
                let isChanged = !state.done.isUnread || (state.done.seen == nil) != (delay == nil)
                return state.done.queued != nil && isChanged ? false : nil
            }
            if isOver == true { return true }
            if left == 0 { return false }
        }
    }
}
