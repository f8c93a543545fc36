// SPDX-License-Identifier: Apache-2.0
internal import CLinux
import Migration

/// Where a console's output goes. The guest never waits for whoever reads it: a terminal may be held with ^S, and the
/// reader of a pipe may have stopped, while the vCPU that prints has to stop at once when the machine is paused. Nor does
/// it pay for a system call a byte: what it prints is kept, up to a limit, and a thread of its own writes it a
/// millisecond later, or as soon as that can be done. Beyond the limit it is dropped, as on a real line without flow
/// control.
///
/// Thread rules: all methods may be called from any thread; none but `close` waits.
final class ConsoleOutput: Sendable {
    private struct State {
        /// What was not written yet, oldest first.
        var pending: [UInt8] = []
        /// A thread sees to `pending`, which is empty without one.
        var hasWriter = false
        var dropped: UInt64 = 0
        var isClosed = false
    }
    private let descriptor: Int32
    private let limit: Int
    private let idleNanoseconds: UInt64
    private let state = Monitor(State())

    /// Writes to `descriptor` (negative: nowhere), which stays the caller's, and keeps up to `limit` bytes. The thread
    /// ends when it had nothing to do for `idleNanoseconds`.
    init(_ descriptor: Int32, limit: Int = 256 << 10, idleNanoseconds: UInt64 = 1_000_000_000) {
        self.descriptor = descriptor
        self.limit = limit
        self.idleNanoseconds = idleNanoseconds
    }

    /// Bytes that nobody took.
    var dropped: UInt64 { state.read(\.dropped) }

    func send(_ byte: UInt8) {
        guard descriptor >= 0 else { return }
        let needsWriter = state.update { state in
            guard !state.isClosed, state.pending.count < limit else {
                state.dropped += 1
                return false
            }
            state.pending.append(byte)
            defer { state.hasWriter = true }
            return !state.hasWriter
        }
        guard needsWriter else { return }
        do throws(MigrationError) { try startThreadIfPossible(named: "console output") { self.writePending() } } catch {
            // The system has no room for a thread: what cannot be written at once never is.
            state.update { state in
                let count = write(state.pending)
                state.dropped += UInt64(max(0, state.pending.count - count))
                (state.pending, state.hasWriter) = ([], false)
            }
        }
    }

    /// Waits up to `milliseconds` until everything is written; nothing is from then on.
    func close(milliseconds: UInt64) {
        _ = state.wait(nanoseconds: milliseconds * 1_000_000) { $0.pending.isEmpty ? () : nil }
        let dropped = state.update { state in
            state.dropped += UInt64(state.pending.count)
            state.pending = []
            defer { state.isClosed = true }
            return state.isClosed ? 0 : state.dropped
        }
        if dropped > 0 { logLine("\(dropped) bytes of the console's output were dropped: nobody read them") }
    }

    /// Writes as much as can be written without waiting: 0 if that is nothing, all of it if it can never be written.
    private func write(_ bytes: [UInt8]) -> Int {
        var polled = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
        guard poll(&polled, 1, 0) > 0 else { return 0 }
        // A pipe that polls writable has room for these; a terminal held at this very moment, or a pipe that somebody
        // else fills, may make the call wait. That stops the thread, and not the guest; and a vCPU that writes itself,
        // for want of a thread, only until a signal: `Machine.pause` sends those until it stops.
        let count = bytes.withUnsafeBytes { CLinux.write(descriptor, $0.baseAddress, $0.count) }
        if count >= 0 { return count }
        return lacuna_errno() == EINTR || lacuna_errno() == EAGAIN ? 0 : bytes.count
    }

    /// The thread: ends once there was nothing to write for a while.
    private func writePending() {
        while true {
            let hasBytes: Void? = state.wait(nanoseconds: idleNanoseconds) { $0.pending.isEmpty ? nil : () }
            if hasBytes != nil {
                // The rest of the line goes along.
                usleep(1000)
                writeAll()
                continue
            }
            let isOver = state.update { state in
                if state.pending.isEmpty { state.hasWriter = false }
                return !state.hasWriter
            }
            if isOver { return }
        }
    }

    /// Returns once it has written all there was.
    private func writeAll() {
        let mostAtOnce = 512, lookMilliseconds: Int32 = 200
        while true {
            // Not for ever: `close` takes away what there is to write.
            var polled = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
            let isReady = poll(&polled, 1, lookMilliseconds) > 0
            // Taken only now, so that nothing is written that was given up meanwhile.
            let next = state.read { Array($0.pending.prefix(mostAtOnce)) }
            guard !next.isEmpty else { return }
            guard isReady else { continue }
            let count = write(next)
            // Only this thread takes bytes away, but for `close`.
            state.update { $0.pending.removeFirst(min(count, $0.pending.count)) }
            // What has come since waits for more of its kind.
            guard next.count == mostAtOnce || count < next.count else { return }
        }
    }
}
