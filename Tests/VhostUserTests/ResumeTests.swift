// SPDX-License-Identifier: Apache-2.0
import Balloon
import CLinux
import TestSupport
import Testing
import VhostUserSupport
import Virtio

/// A driver that goes on while its device changes: what it has to hear, it hears.
@Suite(.serialized) struct ResumeTests {
    private let hintFeatures = version1 | BalloonFeature.freePageHint
    /// Where the configuration has `free_page_hint_cmd_id`.
    private let command: UInt32 = 8

    private func sayCommand(_ frontEnd: FrontEnd, _ id: UInt32) -> Bool { frontEnd.transfer(2, [pageList([id])]) == 0 }

    /// The memory changes in the middle of a session of hints: the device is another one afterwards.
    @Test func doneReachesTheDriverAfterTheDeviceWasMadeAnew() throws {
        let running = try RunningService()
        defer { running.stop() }
        let hints = try #require(HintClient(running.hintSocket)), frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: hintFeatures, rings: [0, 1, 2]))
        let opened = try #require(hints.ask(2))
        #expect(opened.status == 0 && frontEnd.configuration(command) == UInt32(opened.request))
        #expect(sayCommand(frontEnd, UInt32(opened.request)) && frontEnd.transfer(2, [], writable: [4096]) == 0)
        #expect(sayCommand(frontEnd, 0))
        frontEnd.takeConfigurationChanges()
        let more = MemoryFile(1 << 20)
        #expect(frontEnd.acknowledged(37, FrontEnd.words(0, 1 << 30, 1 << 20, 1 << 20, 0), [more.descriptor]) == 0)
        #expect(frontEnd.awaitConfigurationChange() && frontEnd.configuration(command) == 1)
    }

    @Test func aTargetSetWhileNothingRunsReachesTheDriver() throws {
        let running = try RunningService()
        defer { running.stop() }
        let hints = try #require(HintClient(running.hintSocket)), frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: version1, rings: [0, 1]) && frontEnd.transfer(0, [pageList([300])]) == 0)
        for ring in [0, 1] as [UInt32] {
            frontEnd.send(11, FrontEnd.halves(ring, 0))
            _ = try #require(frontEnd.receive())
        }
        #expect(hints.ask(6, argument: 4321)?.status == 0)
        frontEnd.takeConfigurationChanges()
        #expect(frontEnd.setUp(0, fresh: false) && frontEnd.setUp(1, fresh: false))
        #expect(frontEnd.awaitConfigurationChange() && frontEnd.configuration(0) == 4321)
    }

    /// QEMU ends at a configuration change that reaches it after it has stopped the device, which it does ring by ring.
    @Test func nothingIsToldWhileRingsStop() throws {
        let running = try RunningService()
        defer { running.stop() }
        let frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: hintFeatures, rings: [0, 1, 2]) && frontEnd.transfer(0, [pageList([300])]) == 0)
        frontEnd.takeConfigurationChanges()
        for ring in [2, 1] as [UInt32] {
            // Disabled first, and served on between the two.
            #expect(frontEnd.acknowledged(18, FrontEnd.halves(ring, 0)) == 0 && frontEnd.transfer(0, [pageList([300])]) == 0)
            frontEnd.send(11, FrontEnd.halves(ring, 0))
            #expect(frontEnd.receive() != nil && frontEnd.transfer(0, [pageList([300])]) == 0)
        }
        #expect(!frontEnd.hasConfigurationChange)
        // Begins again: told.
        #expect(frontEnd.setUp(1, fresh: false) && frontEnd.transfer(0, [pageList([300])]) == 0)
        #expect(frontEnd.hasConfigurationChange)
    }

    /// A new process before a driver that another one served: on a migration's destination, or after a restart.
    @Test func aServiceThatTakesOverKnowsThatItKnowsNothing() throws {
        let file = MemoryFile(16 << 20)
        var queues: [MockQueue] = [], requests: [UInt64] = []
        for turn in 0..<2 {
            let running = try RunningService()
            defer { running.stop() }
            let hints = try #require(HintClient(running.hintSocket))
            let frontEnd = try #require(FrontEnd(running.socket, file: file))
            for (index, queue) in queues.enumerated() { frontEnd.adopt(queue, index) }
            #expect(frontEnd.start(features: hintFeatures, rings: [0, 1, 2], fresh: turn == 0))
            // The driver may be holding hints of before, and is told to let go of them.
            #expect(frontEnd.awaitConfigurationChange() && frontEnd.configuration(command) == (turn == 0 ? 0 : 1))
            requests.append(try #require(hints.ask(2)).request)
            #expect(hints.ask(7)?.status == 0 && frontEnd.transfer(0, [pageList([300])]) == 0)
            queues = (0..<3).map { frontEnd.queues[$0]! }
        }
        // It would take an id that it knows for no new request.
        #expect(requests[0] != requests[1] && requests.allSatisfy { $0 >= 2 && $0 <= UInt64(UInt32.max) })
    }

    @Test func oneClientsEndIsNotAnothers() throws {
        let running = try RunningService()
        defer { running.stop() }
        let first = try #require(HintClient(running.hintSocket)), second = try #require(HintClient(running.hintSocket))
        var third = HintClient(running.hintSocket)
        let frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: hintFeatures, rings: [0, 1, 2]))
        for client in [first, third!] { #expect(client.ask(2)?.status == 0 && client.ask(4)?.status == 0) }
        let opened = try #require(second.ask(2))
        second.send(3, argument: 20000, request: opened.request)
        // Neither a FINISH nor the end of a connection.
        #expect(first.ask(7)?.status == 0)
        third = nil
        #expect(first.ask(2)?.status == 5 && frontEnd.configuration(command) == UInt32(opened.request))
        #expect(sayCommand(frontEnd, UInt32(opened.request)) && frontEnd.transfer(2, [], writable: [4096]) == 0)
        #expect(sayCommand(frontEnd, 0))
        let report = try #require(second.receive())
        #expect(report.status == 0)
        close(report.file)
        // The last one's end is the end.
        #expect(frontEnd.configuration(command) == 0 && second.ask(7)?.status == 0)
        #expect(frontEnd.configuration(command) == 1)
    }

    /// A front end that fetches all of the configuration for each read, as QEMU does.
    @Test func theNextRequestComesToADriverBehindQEMU() throws {
        let running = try RunningService()
        defer { running.stop() }
        let hints = try #require(HintClient(running.hintSocket)), frontEnd = try #require(FrontEnd(running.socket))
        #expect(frontEnd.start(features: hintFeatures, rings: [0, 1, 2]))
        func shown() throws -> UInt32 { FrontEnd.number(Array(try #require(frontEnd.configuration(0, 20))[8..<12])) }
        let opened = try #require(hints.ask(2))
        #expect(try shown() == UInt32(opened.request) && hints.ask(7)?.status == 0)
        let next = try #require(hints.ask(2))
        hints.send(3, argument: 20000, request: next.request)
        frontEnd.takeConfigurationChanges()
        // The driver has seen DONE; in a moment it is told to look again. Nothing else happens meanwhile.
        #expect(try shown() == 1)
        #expect(frontEnd.awaitConfigurationChange())
        #expect(try shown() == UInt32(next.request))
        #expect(sayCommand(frontEnd, UInt32(next.request)) && frontEnd.transfer(2, [], writable: [4096]) == 0)
        #expect(sayCommand(frontEnd, 0))
        let report = try #require(hints.receive())
        #expect(report.status == 0)
        close(report.file)
        #expect(hints.ask(7)?.status == 0)
    }
}
