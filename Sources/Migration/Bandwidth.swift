// SPDX-License-Identifier: Apache-2.0
internal import Synchronization

/// How many bytes a second may leave, over all connections of one migration together: a token bucket that holds at most
/// a tenth of a second's worth.
///
/// Thread rules: any thread.
final class Bandwidth: Sendable {
    private struct State {
        /// Bytes that may be sent at once; negative: a debt to be slept off.
        var allowance = 0.0
        var lastRefill: UInt64
        var isLimited: Bool
    }
    /// Bytes to put together before they are sent: small enough that the pauses between stay short.
    let batchBytes: Int
    private let bytesPerSecond: Double
    private let state: Mutex<State>

    /// `bytesPerSecond` 0: no limit. The floor of 64 KiB keeps the pauses well under the destination's patience.
    init(bytesPerSecond: Int) {
        self.bytesPerSecond = Double(max(bytesPerSecond, 1 << 16))
        batchBytes = bytesPerSecond > 0 ? max(1 << 16, min(1 << 20, bytesPerSecond / 20)) : 1 << 20
        state = Mutex(State(lastRefill: monotonicNanoseconds(), isLimited: bytesPerSecond > 0))
    }

    /// From here on there is no limit.
    func lift() { state.withLock { $0.isLimited = false } }

    /// Accounts for bytes that were sent; returns the nanoseconds that the sender has to sleep for them.
    func pay(for bytes: Int) -> UInt64 {
        state.withLock { state in
            guard state.isLimited else { return 0 }
            let now = monotonicNanoseconds()
            let refill = Double(now &- state.lastRefill) / 1e9 * bytesPerSecond
            state.allowance = min(state.allowance + refill, bytesPerSecond / 10) - Double(bytes)
            state.lastRefill = now
            return state.allowance < 0 ? UInt64(-state.allowance / bytesPerSecond * 1e9) : 0
        }
    }
}
