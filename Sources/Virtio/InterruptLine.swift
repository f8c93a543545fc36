// SPDX-License-Identifier: Apache-2.0
internal import Synchronization

/// The part of the transport that devices reach from any thread: pending interrupt causes, the configuration's
/// generation and `DEVICE_NEEDS_RESET`.
///
/// Its lock is a leaf: nothing else is locked or called while it is held. So a device may signal with its own locks
/// held, while another thread is inside the transport waiting for that device.
final class InterruptLine: Sendable {
    /// Bits of the interrupt status register (virtio 1.3, section 4.2.2).
    static let usedBuffer: UInt32 = 1
    static let configurationChange: UInt32 = 2

    struct State {
        var pending: UInt32 = 0
        var generation: UInt32 = 0
        var needsReset = false
        /// Between `DRIVER_OK` and reset: only then may a device notify (section 3.1.1).
        var isLive = false
        /// Which activation is the current one: the signals of an earlier one are dead.
        var epoch: UInt64 = 0
    }

    private let state = Mutex(State())
    private let interrupt: @Sendable () -> Void

    init(interrupt: @escaping @Sendable () -> Void) { self.interrupt = interrupt }

    var current: State { state.withLock { $0 } }

    /// The driver's acknowledgement: clears these causes.
    func acknowledge(_ causes: UInt32) { state.withLock { $0.pending &= ~causes } }

    /// Kills the signals handed out so far. The generation goes on: a driver must not take a value of one life for one
    /// of another.
    func reset() {
        state.withLock {
            $0 = State(generation: $0.generation &+ 1, epoch: $0.epoch &+ 1)
        }
    }

    /// Takes over what was saved.
    func restore(pending: UInt32, generation: UInt32, needsReset: Bool) {
        state.withLock {
            $0.pending = pending
            $0.generation = generation
            $0.needsReset = needsReset
        }
    }

    /// Makes signals for the activation that begins now.
    func begin() -> DeviceSignals {
        let epoch = state.withLock {
            $0.isLive = true
            return $0.epoch
        }
        return DeviceSignals(
            usedBuffer: { [self] _ in
                raise(epoch) { $0.pending |= Self.usedBuffer }
            },
            configurationChanged: { [self] in
                raise(epoch) {
                    $0.pending |= Self.configurationChange
                    $0.generation &+= 1
                }
            },
            needsReset: { [self] in
                raise(epoch) {
                    $0.pending |= Self.configurationChange
                    $0.needsReset = true
                }
            })
    }

    /// `DRIVER_OK` on a device that cannot work (section 2.1.2: a configuration change tells the driver).
    func refuse() {
        state.withLock {
            $0.pending |= Self.configurationChange
            $0.needsReset = true
        }
        interrupt()
    }

    /// Interrupts again if a cause is still pending.
    func repeatPending() {
        if state.withLock({ $0.pending != 0 }) { interrupt() }
    }

    private func raise(_ epoch: UInt64, _ change: (inout State) -> Void) {
        let isCurrent = state.withLock { state in
            guard state.isLive, state.epoch == epoch else { return false }
            change(&state)
            return true
        }
        if isCurrent { interrupt() }
    }
}
