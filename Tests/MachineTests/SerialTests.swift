// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Synchronization
import Testing

@testable import Machine

@Suite struct SerialTests {
    final class Line: Sendable {
        let levels = Mutex<[Bool]>([])
        var level: Bool { levels.withLock { $0.last ?? false } }
    }
    private func port(_ line: Line) -> SerialPort {
        SerialPort(output: -1) { level in line.levels.withLock { $0.append(level) } }
    }

    @Test func interruptFollowsTheTransmitter() {
        let line = Line(), port = port(line)
        port.write(1, 2) // the transmitter is empty, so its interrupt comes at once
        #expect(line.level)
        #expect(port.read(2) & 0x0f == 0x02)
        #expect(!line.level) // reading the cause acknowledged it
        #expect(port.read(2) & 0x0f == 0x01)
        port.write(0, 0x41)
        #expect(line.level)
        port.write(1, 0)
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

    @Test func powerButtonRaisesTheLineOnceItIsEnabled() {
        let line = SerialTests.Line()
        let power = PowerManagement { level in line.levels.withLock { $0.append(level) } }
        power.pressPowerButton()
        #expect(!line.level)
        _ = power.write(port: Layout.powerEvents + 2, size: 2, value: 1 << 8)
        #expect(line.level)
        _ = power.write(port: Layout.powerEvents, size: 2, value: 1 << 8)
        #expect(!line.level)
    }
}
