// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Migration
import Synchronization

/// When a transmitter says that it is empty, nanoseconds of the monotonic clock.
///
/// It could always say so at once, as it hands each byte on. But the handler of that interrupt sends what it is given
/// until there is none, and as long as one vCPU prints faster than another's handler sends, that other would do nothing
/// else: its own programs and its watchdog would stand still. So the guest gets as much time after each load of the FIFO
/// as its handler took for it. Polled output is not held up: the line status register always says "empty".
struct TransmitterPace {
    /// A handler that took longer was not busy with the port.
    static let longest: UInt64 = 10_000_000
    /// When the guest last asked why it was interrupted.
    private var heard: UInt64 = 0
    /// When to say it next; nil if nothing was sent since.
    private(set) var due: UInt64?

    mutating func guestHeard(at now: UInt64) { heard = now }

    mutating func sent(at now: UInt64) { due = now + min(now - min(heard, now), Self.longest) }

    mutating func saidEmpty() { due = nil }
}

/// A 16550A serial port: the guest's console.
///
/// Thread rules: all methods may be called from any thread.
final class SerialPort: Sendable {
    private struct State {
        var interruptEnable: UInt8 = 0
        var lineControl: UInt8 = 0
        var modemControl: UInt8 = 0
        var scratch: UInt8 = 0
        var fifoControl: UInt8 = 0
        var divisor: UInt16 = 1
        var transmitterEmptyPending = false
        var pace = TransmitterPace()
        /// A thread sees to `pace.due`.
        var hasClock = false
        var input: [UInt8] = []
        var line = false
    }
    private let state = Mutex(State())
    /// Set when there is something for a clock that waits.
    private let clockHasWork = Monitor(false)
    private let setLine: @Sendable (Bool) -> Void
    let output: ConsoleOutput
    /// Input the guest has not fetched is kept up to here; more is dropped, as on a real line.
    private let inputLimit = 4096
    private let idleNanoseconds: UInt64

    /// Writes what the guest sends to the descriptor `output` (negative: nowhere). The threads of a port end when they
    /// had nothing to do for `idleNanoseconds`.
    init(output: Int32, idleNanoseconds: UInt64 = 1_000_000_000, setLine: @escaping @Sendable (Bool) -> Void) {
        self.output = ConsoleOutput(output, idleNanoseconds: idleNanoseconds)
        self.idleNanoseconds = idleNanoseconds
        self.setLine = setLine
    }

    /// The interrupt line follows what is pending; only called with the state locked, so that its edges keep their order.
    private func settle(_ state: inout State) {
        let high = identification(state) & 1 == 0
        if high != state.line {
            state.line = high
            setLine(high)
        }
    }

    /// The interrupt identification register: the highest-priority cause, bit 0 clear while there is one.
    private func identification(_ state: State) -> UInt8 {
        let fifo: UInt8 = state.fifoControl & 1 == 1 ? 0xc0 : 0
        if state.interruptEnable & 1 != 0, !state.input.isEmpty { return fifo | 0x04 }
        if state.interruptEnable & 2 != 0, state.transmitterEmptyPending { return fifo | 0x02 }
        return fifo | 0x01
    }

    private func sayEmpty(_ state: inout State) {
        state.transmitterEmptyPending = true
        state.pace.saidEmpty()
    }

    /// A byte was sent: the interrupt for it comes, but not at once.
    private func sent(_ state: inout State) {
        guard state.interruptEnable & 2 != 0 else {
            // Polled. What is due for bytes before it stays due: a kernel message does not end the handler's rest.
            if state.pace.due == nil { sayEmpty(&state) }
            return
        }
        // The system may have no room for a thread: then it does come at once.
        guard state.hasClock || (try? startClock()) != nil else {
            sayEmpty(&state)
            return
        }
        if state.hasClock, state.pace.due == nil { clockHasWork.update { $0 = true } }
        state.hasClock = true
        state.transmitterEmptyPending = false
        state.pace.sent(at: monotonicNanoseconds())
    }

    private func startClock() throws(MigrationError) {
        // Weak: the machine may end while this thread waits.
        try startThreadIfPossible(named: "serial port") { [weak self, clockHasWork] in
            var hasNothing = false
            while let turn = self?.nextTurn(hasNothing: hasNothing) {
                let hasWork: Void? = clockHasWork.wait(nanoseconds: turn.nanoseconds) { flag in
                    defer { flag = false }
                    return flag ? () : nil
                }
                hasNothing = turn.isIdle && hasWork == nil
            }
        }
    }

    /// Says what is due, and how long the clock's thread waits then; nil: it ends.
    private func nextTurn(hasNothing: Bool) -> (nanoseconds: UInt64, isIdle: Bool)? {
        state.withLock { state in
            if let due = state.pace.due {
                let now = monotonicNanoseconds()
                if now < due { return (due - now, false) }
                sayEmpty(&state)
                settle(&state)
            } else if hasNothing {
                state.hasClock = false
                return nil
            }
            return (idleNanoseconds, true)
        }
    }

    func read(_ register: UInt16) -> UInt8 {
        state.withLock { state in
            defer { settle(&state) }
            let divisorAccess = state.lineControl & 0x80 != 0
            switch register {
            case 0 where divisorAccess: return UInt8(truncatingIfNeeded: state.divisor)
            case 0: return state.input.isEmpty ? 0 : state.input.removeFirst()
            case 1 where divisorAccess: return UInt8(truncatingIfNeeded: state.divisor >> 8)
            case 1: return state.interruptEnable
            case 2:
                let value = identification(state)
                // Reading it acknowledges "transmitter empty", and no other cause.
                if value & 0x0f == 0x02 { state.transmitterEmptyPending = false }
                // Whatever the cause: a handler that came for input sends as well.
                if value & 1 == 0 { state.pace.guestHeard(at: monotonicNanoseconds()) }
                return value
            case 3: return state.lineControl
            case 4: return state.modemControl
            case 5: return 0x60 | (state.input.isEmpty ? 0 : 1) // transmitter always empty: output is taken at once
            case 6:
                // In loop-back mode the modem inputs mirror the outputs; drivers probe for a 16550 that way.
                let out = state.modemControl
                if out & 0x10 == 0 { return 0xb0 }
                return (out & 0x0c) << 4 | (out & 0x02) << 3 | (out & 0x01) << 5
            default: return state.scratch
            }
        }
    }

    func write(_ register: UInt16, _ value: UInt8) {
        state.withLock { state in
            defer { settle(&state) }
            let divisorAccess = state.lineControl & 0x80 != 0
            switch register {
            case 0 where divisorAccess: state.divisor = state.divisor & 0xff00 | UInt16(value)
            case 0:
                if state.modemControl & 0x10 != 0 {
                    if state.input.count < inputLimit { state.input.append(value) }
                    sayEmpty(&state)
                } else {
                    output.send(value)
                    sent(&state)
                }
            case 1 where divisorAccess: state.divisor = state.divisor & 0x00ff | UInt16(value) << 8
            case 1:
                if value & 2 != 0, state.interruptEnable & 2 == 0, state.pace.due == nil { sayEmpty(&state) }
                state.interruptEnable = value & 0x0f
            case 2:
                if value & 2 != 0 { state.input.removeAll() }
                if value & 4 != 0, state.pace.due != nil { sayEmpty(&state) }
                state.fifoControl = value & 0xc9
            case 3: state.lineControl = value
            case 4: state.modemControl = value & 0x1f
            case 7: state.scratch = value
            default: break
            }
        }
    }

    /// Bytes typed at the console.
    func receive(_ bytes: some Sequence<UInt8>) {
        state.withLock { state in
            for byte in bytes where state.input.count < inputLimit { state.input.append(byte) }
            settle(&state)
        }
    }

    func save(into encoder: inout StateEncoder) {
        state.withLock { state in
            encoder.put(state.interruptEnable)
            encoder.put(state.lineControl)
            encoder.put(state.modemControl)
            encoder.put(state.scratch)
            encoder.put(state.fifoControl)
            encoder.put(state.divisor)
            // What is still to come is due at once on the other side: `repeatInterrupt` says so there.
            encoder.put(state.transmitterEmptyPending || state.pace.due != nil)
            encoder.put(state.line)
            encoder.put(state.input)
        }
    }

    func restore(from decoder: inout StateDecoder) throws(StateError) {
        var new = State()
        new.interruptEnable = try decoder.take()
        new.lineControl = try decoder.take()
        new.modemControl = try decoder.take()
        new.scratch = try decoder.take()
        new.fifoControl = try decoder.take()
        new.divisor = try decoder.take()
        new.transmitterEmptyPending = try decoder.takeBool()
        // The level itself is in the interrupt controllers' state.
        new.line = try decoder.takeBool()
        new.input = try decoder.takeBlob(limit: inputLimit)
        guard new.interruptEnable & 0xf0 == 0, new.modemControl & 0xe0 == 0 else {
            throw StateError("the serial port has reserved bits set")
        }
        let checked = new
        state.withLock { $0 = checked }
    }

    /// Raises the line anew if anything is pending: the interrupt controllers' state may be from before that was so, or
    /// from after the guest was told, and one interrupt too many does no harm. For a restored port whose controllers
    /// have their state.
    func repeatInterrupt() {
        state.withLock { state in
            setLine(false)
            state.line = false
            settle(&state)
        }
    }
}
