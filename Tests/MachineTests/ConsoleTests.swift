// SPDX-License-Identifier: Apache-2.0
import CLinux
import Synchronization
import TestSupport
import Testing

@testable import Machine
@testable import Migration

/// A console whose reader does not read.
@Suite struct ConsoleTests {
    /// A pipe that takes no byte more, and what is in it.
    private static func fullPipe() throws -> (reader: Int32, writer: Int32, bytes: Int) {
        var ends: [Int32] = [0, 0]
        try #require(pipe(&ends) == 0)
        let piece = [UInt8](repeating: 0x2e, count: 4096)
        var polled = pollfd(fd: ends[1], events: Int16(POLLOUT), revents: 0)
        var bytes = 0
        while poll(&polled, 1, 0) > 0 { bytes += write(ends[1], piece, piece.count) }
        return (ends[0], ends[1], bytes)
    }

    private static func read(_ reader: Int32, _ count: Int) -> [UInt8] {
        var bytes: [UInt8] = [], piece = [UInt8](repeating: 0, count: 4096)
        while bytes.count < count {
            var polled = pollfd(fd: reader, events: Int16(POLLIN), revents: 0)
            guard poll(&polled, 1, 20_000) > 0 else { return bytes }
            let got = CLinux.read(reader, &piece, min(piece.count, count - bytes.count))
            if got <= 0 { return bytes }
            bytes += piece[..<got]
        }
        return bytes
    }

    /// The vCPU that prints comes back at once; a reader that goes on later finds everything, in order.
    @Test func guestDoesNotWaitForItsReader() throws {
        let (reader, writer, full) = try Self.fullPipe()
        let port = SerialPort(output: writer) { _ in }
        let isBack = Monitor(false)
        let text = (0..<1000).map { UInt8(truncatingIfNeeded: $0) }
        let vcpu = HostThread {
            for byte in text { port.write(0, byte) }
            isBack.update { $0 = true }
        }
        let cameBack: Bool? = isBack.wait(nanoseconds: 10_000_000_000) { $0 ? true : nil }
        #expect(cameBack == true)
        #expect(Self.read(reader, full).count == full)
        #expect(Self.read(reader, text.count) == text)
        vcpu.join()
        // And the bytes after that go straight on.
        port.write(0, 0x21)
        #expect(Self.read(reader, 1) == [0x21] && port.output.dropped == 0)
        port.output.close(milliseconds: 1000)
        close(reader)
        close(writer)
    }

    /// The thread ends when it had nothing to do, a new one begins, and no byte is lost between them.
    @Test func bytesArriveWhateverTheWriterDoes() throws {
        var ends: [Int32] = [0, 0]
        try #require(pipe(&ends) == 0)
        let output = ConsoleOutput(ends[1], idleNanoseconds: 100_000)
        for round in 0..<200 {
            output.send(UInt8(round))
            #expect(Self.read(ends[0], 1) == [UInt8(round)])
            let begin = monotonicNanoseconds()
            while monotonicNanoseconds() - begin < UInt64(round) * 1500 {}
        }
        output.close(milliseconds: 20_000)
        #expect(output.dropped == 0)
        close(ends[0])
        close(ends[1])
    }

    @Test func whatIsTooMuchIsDroppedAndCounted() throws {
        let (reader, writer, full) = try Self.fullPipe()
        let output = ConsoleOutput(writer, limit: 100)
        for number in 0..<150 { output.send(UInt8(number)) }
        #expect(output.dropped == 50)
        #expect(Self.read(reader, full).count == full)
        #expect(Self.read(reader, 100) == (0..<100).map { UInt8($0) })
        output.close(milliseconds: 1000)
        close(reader)
        close(writer)
    }

    /// The end of a machine does not wait for a reader either, and nothing comes after it.
    @Test func endGivesUpWhatNobodyReads() throws {
        let (reader, writer, full) = try Self.fullPipe()
        let output = ConsoleOutput(writer)
        for number in 0..<10 { output.send(UInt8(number)) }
        output.close(milliseconds: 1)
        #expect(output.dropped == 10)
        output.send(7)
        #expect(output.dropped == 11)
        #expect(Self.read(reader, full).count == full)
        var polled = pollfd(fd: reader, events: Int16(POLLIN), revents: 0)
        #expect(poll(&polled, 1, 0) == 0)
        close(reader)
        close(writer)
    }

    /// A reader that is gone costs the guest nothing, either.
    @Test func deadReaderTakesEverything() throws {
        _ = lacuna_ignore_signal(SIGPIPE)
        var ends: [Int32] = [0, 0]
        try #require(pipe(&ends) == 0)
        close(ends[0])
        let output = ConsoleOutput(ends[1])
        for number in 0..<10 { output.send(UInt8(number)) }
        output.close(milliseconds: 20_000)
        #expect(output.dropped == 0)
        close(ends[1])
    }
}
