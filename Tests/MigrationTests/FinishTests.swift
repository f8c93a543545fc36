// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Testing

@testable import Migration

/// Whatever a guest holds for the hints' sake it gets back at the end of every migration, and not while it still runs at
/// the source of one that succeeds.
@Suite struct FinishTests {
    /// A source on a thread of its own, and its peer's end of the channel.
    private struct Attempt {
        let guest: MiniGuest
        let worker: Worker<Result<MigrationReport, MigrationError>>
        let reader: FrameReader
        let writer: FrameWriter

        init(answers: Bool = true) throws {
            let guest = try MiniGuest()
            let hinter = FinishingHinter(guest.journal) { answers ? report($0, guest.memory, 0..<8) : nil }
            let (near, far) = try ByteChannel.pair()
            let source = MigrationSource(
                guest: guest, trackers: [guest.tracker], hinter: hinter, options: quickOptions(skip: true))
            self.guest = guest
            worker = Worker { do throws(MigrationError) { return .success(try source.run(over: near)) } catch { return .failure(error) } }
            reader = FrameReader(far)
            writer = FrameWriter(far, idleMilliseconds: 10_000)
        }

        /// Plays the destination until a frame of this type has come.
        func receive(until last: FrameType) throws {
            var type = FrameType.hello
            repeat {
                let header = try reader.header(idleMilliseconds: 10_000)
                if header.type == .pages {
                    // Its checksum is the verification's business.
                    let bytes = Int(header.payloadBytes), place = UnsafeMutableRawPointer.allocate(byteCount: bytes, alignment: 16)
                    defer { place.deallocate() }
                    try reader.payload(to: place, bytes: bytes, idleMilliseconds: 10_000)
                } else {
                    _ = try reader.payload(of: header, idleMilliseconds: 10_000)
                }
                type = header.type
                if type == .hello { try writer.send(.ready) }
                if type == .stateEnd { try writer.send(.loaded) }
            } while type != last
        }
    }

    @Test func afterThePauseOfASuccess() throws {
        let attempt = try Attempt()
        try attempt.receive(until: .commit)
        try attempt.writer.send(.committed)
        _ = try attempt.worker.join().get()
        let journal = attempt.guest.journal.all
        let pause = try #require(journal.firstIndex(of: "pause")), finish = try #require(journal.firstIndex(of: "finish"))
        #expect(pause < finish && journal.filter { $0 == "finish" }.count == 1)
    }

    /// In the rounds, with and without an answer, and after the guest was stopped.
    @Test(arguments: [FrameType.roundEnd, .stateEnd], [true, false]) func onEveryFailure(at place: FrameType, answers: Bool) throws {
        let attempt = try Attempt(answers: answers)
        try attempt.receive(until: place)
        try attempt.writer.send(.failure, payload: Array("enough".utf8))
        #expect(throws: MigrationError.self) { try attempt.worker.join().get() }
        #expect(attempt.guest.isRunning)
        #expect(attempt.guest.journal.all.contains("finish"))
        try attempt.guest.pause()
    }
}

private final class FinishingHinter: FreePageHinter {
    private let script: ScriptedHinter
    private let journal: Journal
    init(_ journal: Journal, answer: @escaping ScriptedHinter.Answer) {
        self.journal = journal
        script = ScriptedHinter(journal, answer: answer)
    }
    var refusal: String? { nil }
    var method: String { script.method }
    func request() throws(PartFailure) -> UInt32 { try script.request() }
    func wait(for request: UInt32, milliseconds: Int) -> HintReport? { script.wait(for: request, milliseconds: milliseconds) }
    func stop() { script.stop() }
    func finish() { journal.note("finish") }
}
