// SPDX-License-Identifier: Apache-2.0

/// Judges, from round to round, whether a migration gets anywhere, and how much the vCPUs are to be slowed down.
///
/// A round that dirties more than half of what it sent will not end soon. One such round is a burst; two in a row, and
/// the vCPUs get less time, in steps. Pure arithmetic, so that it can be tried with made-up rounds.
struct Convergence: Equatable {
    /// Percent of the time that the vCPUs are kept from running: 0, then 20, then 10 more for each step, 99 at most.
    private(set) var throttlePercent = 0
    private var poorRounds = 0

    private static let firstStep = 20
    private static let step = 10
    private static let limit = 99

    /// Takes in a round: the bytes it sent, and the bytes of the pages that were dirtied meanwhile. True if the vCPUs
    /// are to be slowed down more now.
    mutating func judge(sentBytes: UInt64, dirtiedBytes: UInt64) -> Bool {
        guard dirtiedBytes > sentBytes / 2 else {
            poorRounds = 0
            return false
        }
        poorRounds += 1
        guard poorRounds >= 2, throttlePercent < Convergence.limit else { return false }
        poorRounds = 0
        let next = throttlePercent == 0 ? Convergence.firstStep : throttlePercent + Convergence.step
        throttlePercent = min(next, Convergence.limit)
        return true
    }
}
