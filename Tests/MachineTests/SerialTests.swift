// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Synchronization
import TestSupport
import Testing

@testable import Machine
@testable import Migration

@Suite struct SerialTests {
    final class Line: Sendable {
        let levels = Monitor<[Bool]>([])
        var level: Bool { levels.read { $0.last ?? false } }
        func set(_ level: Bool) { levels.update { $0.append(level) } }
        func isRaised() -> Bool { levels.wait(nanoseconds: 20_000_000_000) { $0.last == true ? true : nil } ?? false }
    }
    private func port(_ line: Line) -> SerialPort { SerialPort(output: -1) { line.set($0) } }

    @Test func interruptFollowsTheTransmitter() {
        let line = Line(), port = port(line)
        port.write(1, 2) // the transmitter is empty, so its interrupt comes at once
        #expect(line.level)
        #expect(port.read(2) & 0x0f == 0x02)
        #expect(!line.level) // reading the cause acknowledged it
        #expect(port.read(2) & 0x0f == 0x01)
        port.write(0, 0x41)
        #expect(line.isRaised()) // without any further access
        port.write(1, 0)
        #expect(!line.level)
        // Polled output is not held up, and its end is known once somebody asks.
        port.write(0, 0x42)
        #expect(port.read(5) & 0x60 == 0x60 && !line.level)
        port.write(1, 2)
        #expect(line.level)
    }

    @Test func paceIsTheHandlers() {
        var pace = TransmitterPace()
        #expect(pace.due == nil)
        pace.guestHeard(at: 1000)
        pace.sent(at: 1600)
        #expect(pace.due == 2200)
        // The handler was slow to send the next byte: it still counts from its beginning.
        pace.saidEmpty()
        #expect(pace.due == nil)
        pace.sent(at: 3000)
        #expect(pace.due == 5000)
        pace.sent(at: 1 << 40)
        #expect(pace.due == 1 << 40 + TransmitterPace.longest)
        // A clock that goes back makes nothing trap.
        pace.sent(at: 1)
        #expect(pace.due == 1)
    }

    /// A handler that always has more to send does not keep its vCPU: after each load the vCPU has as long for itself.
    @Test func handlerThatNeverEndsLeavesHalfTheTime() {
        let line = Line(), port = port(line)
        port.write(1, 2)
        for _ in 0..<20 {
            #expect(line.isRaised())
            #expect(port.read(2) & 0x0f == 0x02)
            let begin = monotonicNanoseconds()
            for _ in 0..<15 { port.write(0, 0x41) }
            while monotonicNanoseconds() - begin < 1_000_000 {}
            let last = monotonicNanoseconds()
            port.write(0, 0x42)
            #expect(line.isRaised())
            #expect(monotonicNanoseconds() - last >= min(last - begin, TransmitterPace.longest))
        }
    }

    /// Kernel messages come in between, polled: what is due stays due, and comes.
    @Test func polledOutputEndsNoRest() {
        let line = Line(), port = port(line)
        let begin = monotonicNanoseconds()
        port.write(1, 2)
        port.write(0, 0x41) // the guest did not ask for the cause, so the rest is the longest there is
        port.write(1, 0)
        port.write(0, 0x42)
        port.write(1, 2)
        let isEarly = line.level
        if monotonicNanoseconds() - begin < TransmitterPace.longest { #expect(!isEarly) }
        #expect(line.isRaised())
        // A transmitter that is cleared is empty.
        port.write(0, 0x43)
        port.write(2, 0x05)
        #expect(line.level)
    }

    /// The thread ends when it had nothing to do, a new one begins, and no interrupt is lost between them.
    @Test func interruptsComeWhateverTheClockDoes() {
        let line = Line(), port = SerialPort(output: -1, idleNanoseconds: 100_000) { line.set($0) }
        port.write(1, 2)
        for round in 0..<300 {
            #expect(line.isRaised())
            _ = port.read(2)
            let begin = monotonicNanoseconds()
            while monotonicNanoseconds() - begin < UInt64(round) * 1000 {}
            port.write(0, 0x41)
        }
        #expect(line.isRaised())
    }

    /// The clock does not keep the port of a machine that has ended.
    @Test func portEndsWhileItsClockWaits() {
        let line = Line()
        weak var left: SerialPort?
        do {
            let port = SerialPort(output: -1, idleNanoseconds: 600_000_000_000) { line.set($0) }
            left = port
            port.write(1, 2)
            // More than once: a clock that waits is woken, and does not come by its own.
            for _ in 0..<3 {
                port.write(0, 0x41)
                #expect(line.isRaised())
            }
        }
        let begin = monotonicNanoseconds()
        while left != nil, monotonicNanoseconds() - begin < 20_000_000_000 {
            line.levels.wait(nanoseconds: 1_000_000) { _ -> Void? in nil }
        }
        #expect(left == nil)
    }

    /// What the transmitter was about to say is said on the other side, whose interrupt controllers know nothing of it.
    @Test func interruptToComeComesAfterAMove() throws {
        let port = port(Line())
        port.write(1, 2)
        port.write(0, 0x41) // the guest did not ask for the cause, so the rest is the longest there is
        var encoder = StateEncoder()
        port.save(into: &encoder)
        let line = Line(), other = self.port(line)
        var decoder = StateDecoder(encoder.bytes)
        try other.restore(from: &decoder)
        #expect(!line.level)
        other.repeatInterrupt()
        #expect(line.level && other.read(2) & 0x0f == 0x02)
        // Nothing is pending now, so nothing is repeated.
        other.repeatInterrupt()
        #expect(!line.level)
    }

    @Test func inputRaisesTheLineUntilItIsRead() {
        let line = Line(), port = port(line)
        port.write(1, 1)
        port.receive([0x61, 0x62])
        #expect(line.level && port.read(2) & 0x0f == 0x04 && port.read(5) & 1 == 1)
        #expect(port.read(0) == 0x61 && line.level)
        #expect(port.read(0) == 0x62 && !line.level)
        #expect(port.read(0) == 0)
    }

    @Test func inputBeyondTheLimitIsDropped() {
        let port = port(Line())
        port.receive([UInt8](repeating: 1, count: 10_000))
        var count = 0
        while port.read(5) & 1 == 1 {
            _ = port.read(0)
            count += 1
        }
        #expect(count == 4096)
    }

    @Test func stateSurvivesARoundTrip() throws {
        let port = port(Line())
        port.write(3, 0x80)
        port.write(0, 0x34)
        port.write(1, 0x12)
        port.write(3, 0x03)
        port.write(1, 0x05)
        port.write(7, 0x5a)
        port.receive([9, 8, 7])
        var encoder = StateEncoder()
        port.save(into: &encoder)
        let other = self.port(Line())
        var decoder = StateDecoder(encoder.bytes)
        try other.restore(from: &decoder)
        try decoder.finish()
        var again = StateEncoder()
        other.save(into: &again)
        #expect(again.bytes == encoder.bytes)
        #expect(other.read(0) == 9)
    }

    /// Every way of cutting the state short, and reserved bits, are errors; none traps.
    @Test func badStateIsRefused() {
        var encoder = StateEncoder()
        port(Line()).save(into: &encoder)
        for length in 0..<encoder.bytes.count {
            var decoder = StateDecoder(Array(encoder.bytes[..<length]))
            #expect(throws: StateError.self) { try self.port(Line()).restore(from: &decoder) }
        }
        var bytes = encoder.bytes
        bytes[0] = 0xf0
        var decoder = StateDecoder(bytes)
        #expect(throws: StateError.self) { try self.port(Line()).restore(from: &decoder) }
    }
}

@Suite struct PowerTests {
    @Test func sleepTypeFivePowersOff() {
        let power = PowerManagement { _ in }
        #expect(power.write(port: Layout.powerControl, size: 2, value: 5 << 10) == nil) // without SLP_EN
        #expect(power.write(port: Layout.powerControl, size: 2, value: 1 << 13 | 3 << 10) == nil) // another state
        #expect(power.write(port: Layout.powerControl, size: 2, value: 1 << 13 | 5 << 10) == .powerOff)
        #expect(power.read(port: Layout.powerControl, size: 2) & 1 == 1)
    }

    @Test func powerButtonRaisesTheLineOnceItIsEnabled() throws {
        let line = SerialTests.Line()
        let power = PowerManagement { line.set($0) }
        power.pressPowerButton()
        #expect(!line.level)
        _ = power.write(port: Layout.powerEvents + 2, size: 2, value: 1 << 8)
        #expect(line.level)
        // The same on the other side of a move, whose interrupt controllers may not know of it.
        var encoder = StateEncoder()
        power.save(into: &encoder)
        let otherLine = SerialTests.Line(), other = PowerManagement { otherLine.set($0) }
        var decoder = StateDecoder(encoder.bytes)
        try other.restore(from: &decoder)
        #expect(!otherLine.level)
        other.repeatInterrupt()
        #expect(otherLine.level)
        _ = power.write(port: Layout.powerEvents, size: 2, value: 1 << 8)
        #expect(!line.level)
    }
}
