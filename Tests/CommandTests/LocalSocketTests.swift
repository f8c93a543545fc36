// SPDX-License-Identifier: Apache-2.0
import CLinux
import Machine
import Migration
import Testing

@testable import lacuna

/// A thread that may block, as the tests' own may not.
private final class Background<Value: Sendable>: Sendable {
    private let result = Monitor<Value?>(nil)
    init(_ body: @escaping @Sendable () -> Value) {
        startThread(named: "test") { [result] in
            let value = body()
            result.update { $0 = value }
        }
    }
    func join() -> Value { result.wait { $0 } }
}

/// The control socket between a guest's process and clients that misbehave.
@Suite struct LocalSocketTests {
    private func pair() throws -> (LocalSocket, LocalSocket) {
        var ends: [Int32] = [0, 0]
        try #require(socketpair(AF_UNIX, lacuna_SOCK_STREAM_CLOEXEC, 0, &ends) == 0)
        return (LocalSocket(adopting: ends[0]), LocalSocket(adopting: ends[1]))
    }
    private func line(_ number: Int) -> [UInt8] { Array("line \(number) \(String(repeating: "x", count: 200))\n".utf8) }
    private func number(_ line: [UInt8]?) -> Int? {
        line.flatMap { Int(String(decoding: $0, as: UTF8.self).split(separator: " ")[1]) }
    }

    /// Progress for a client that stopped reading: nothing waits for it, and what it reads later is whole lines, in order.
    @Test func whatIsOfferedNeverWaits() throws {
        let (guest, client) = try pair()
        // Many times what a socket holds.
        let count = 20_000
        for index in 0..<count { guest.offer(line(index)) }
        // It reads on, and the answer comes behind what fitted.
        let reader = Background {
            var seen: [Int] = []
            while let got = number(client.receiveLine(limit: LocalSocket.answerLimit)) {
                seen.append(got)
                if got == count { break }
            }
            return seen
        }
        #expect(guest.send(line(count)))
        let seen = reader.join()
        #expect(seen == seen.sorted() && seen.first == 0 && seen.last == count)
        #expect(seen.count > 10 && seen.count < count)
    }

    /// An answer that nobody takes is given up, and every later one at once.
    @Test func anAnswerThatNobodyTakesIsGivenUp() throws {
        let (guest, client) = try pair()
        let large = [UInt8](repeating: 0x78, count: 4 << 20)
        #expect(!guest.send(large))
        #expect(!guest.send(line(1)))
        guest.offer(line(2))
        _ = client
    }

    @Test func aRequestThatNeverEndsIsCutOff() throws {
        let (guest, client) = try pair()
        let writer = Background { client.send([UInt8](repeating: 0x78, count: 4096)) }
        #expect(guest.receiveLine(limit: 4096) == nil)
        #expect(writer.join())
    }

    /// The figures of a hundred thousand rounds are one line.
    @Test func aLongAnswerArrives() throws {
        let (guest, client) = try pair()
        let answer = [UInt8](repeating: 0x78, count: 30 << 20) + [0x0a]
        let writer = Background { guest.send(answer) }
        #expect(client.receiveLine(limit: LocalSocket.answerLimit)?.count == 30 << 20)
        #expect(writer.join())
    }
}
