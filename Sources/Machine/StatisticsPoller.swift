// SPDX-License-Identifier: Apache-2.0
public import Balloon
internal import CLinux
import Synchronization

/// Asks a machine's guest for statistics at an interval.
final class StatisticsPoller: Sendable {
    /// Each change of the interval ends the thread of the one before.
    private let generation = Mutex<UInt64>(0)

    func start(_ machine: Machine, every milliseconds: UInt32) {
        let mine = generation.withLock {
            $0 &+= 1
            return $0
        }
        guard milliseconds > 0 else { return }
        // Weak: the machine may end, and its memory go, while this thread waits.
        startThread(named: "statistics") { [weak machine, self] in
            var left = 0
            while self.generation.withLock({ $0 }) == mine {
                guard let balloon = machine?.balloon, machine?.activity != .ended else { return }
                if left <= 0 {
                    _ = balloon.requestStatistics()
                    left = Int(milliseconds)
                }
                // In short turns, to notice the end. Nobody has statistics of that number: only the time counts.
                let turn = min(left, 500)
                _ = balloon.waitForStatistics(after: .max, milliseconds: turn)
                left -= turn
            }
        }
    }
}

extension Machine {
    /// Asks the guest for statistics every so many milliseconds from now on; 0: no more. The interval goes along when
    /// the machine is migrated, and holds after a reboot.
    public func pollStatistics(every milliseconds: UInt32) {
        balloon.statisticsInterval = milliseconds
        poller.start(self, every: milliseconds)
    }

    /// Takes over what the operator wanted of the balloon before the guest reset itself.
    public func inheritBalloon(of other: BalloonDevice) {
        balloon.inheritWishes(of: other)
        pollStatistics(every: balloon.statisticsInterval)
    }
}

/// One line on the process's standard error.
func logLine(_ text: String) {
    let bytes = Array("lacuna: \(text)\n".utf8)
    // It may be a vCPU's thread: a message that nobody can read now is not worth a guest that stands still.
    var polled = pollfd(fd: 2, events: Int16(POLLOUT), revents: 0)
    if poll(&polled, 1, 0) > 0 { _ = write(2, bytes, bytes.count) }
}
