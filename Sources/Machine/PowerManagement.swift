// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Synchronization

/// ACPI's fixed power-management registers (specification 6.5, section 4.8.3): the power button, and the way to off.
final class PowerManagement: Sendable {
    private struct State {
        var status: UInt16 = 0
        var enable: UInt16 = 0
        var control: UInt16 = 1 // SCI_EN: always in ACPI mode
    }
    private let state = Mutex(State())
    private let setLine: @Sendable (Bool) -> Void
    private static let powerButton: UInt16 = 1 << 8

    init(setLine: @escaping @Sendable (Bool) -> Void) { self.setLine = setLine }

    /// What the guest asked for by a write.
    enum Request { case powerOff }

    func read(port: UInt16, size: Int) -> UInt32 {
        state.withLock { state in
            switch port {
            case Layout.powerEvents where size == 4: UInt32(state.status) | UInt32(state.enable) << 16
            case Layout.powerEvents: UInt32(state.status)
            case Layout.powerEvents + 2: UInt32(state.enable)
            case Layout.powerControl: UInt32(state.control)
            default: 0
            }
        }
    }

    func write(port: UInt16, size: Int, value: UInt32) -> Request? {
        state.withLock { state in
            let low = UInt16(truncatingIfNeeded: value), high = UInt16(truncatingIfNeeded: value >> 16)
            switch port {
            case Layout.powerEvents:
                state.status &= ~low // write one to clear
                if size == 4 { state.enable = high }
            case Layout.powerEvents + 2: state.enable = low
            case Layout.powerControl:
                let sleepEnable: UInt16 = 1 << 13
                state.control = low & ~sleepEnable | 1
                if low & sleepEnable != 0, low >> 10 & 7 == Layout.sleepTypeOff { return .powerOff }
            default: break
            }
            setLine(state.status & state.enable != 0)
            return nil
        }
    }

    /// Presses the power button.
    func pressPowerButton() {
        state.withLock { state in
            state.status |= Self.powerButton
            setLine(state.status & state.enable != 0)
        }
    }

    func save(into encoder: inout StateEncoder) {
        state.withLock { state in
            encoder.put(state.status)
            encoder.put(state.enable)
            encoder.put(state.control)
        }
    }

    func restore(from decoder: inout StateDecoder) throws(StateError) {
        let new = State(status: try decoder.take(), enable: try decoder.take(), control: try decoder.take())
        state.withLock { $0 = new }
    }

    /// Raises the line anew if anything is pending, as a restored `SerialPort` does.
    func repeatInterrupt() { state.withLock { setLine($0.status & $0.enable != 0) } }
}
