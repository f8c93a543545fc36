// SPDX-License-Identifier: Apache-2.0
internal import Balloon
internal import CLinux
internal import GuestMemory

/// The second socket of the service (protocol/hint-socket.md): hints for the VMM's migration code.
///
/// Thread rules: the service's thread only.
final class HintServer {
    static let version: UInt16 = 1
    static let requestBytes = 16
    /// More clients wait to be accepted.
    static let maximumClients = 8

    enum Command: UInt16 {
        case hello = 1
        case request = 2
        case wait = 3
        case close = 4
        case statistics = 5
        case setTarget = 6
        /// The migration is over, however it ended.
        case finish = 7
        /// Asks the guest for its statistics.
        case poll = 8
    }

    enum Status: UInt32 {
        case ok = 0
        /// No report can be had now; the text says why.
        case refused = 1
        /// It did not come in time. The window is still open.
        case timedOut = 2
        /// The guest gave up, sent nonsense, or its device was reset.
        case failed = 3
        /// The request is not the one of this client's open window.
        case stale = 4
        /// Another client has a window open.
        case busy = 5
        case malformed = 6
        /// The service itself could not (no memory, no descriptors).
        case internalError = 7
    }

    final class Client {
        let socket: OwnedDescriptor
        /// The window it opened, of this device. The device is another one after a reset.
        var window: (request: UInt32, device: BalloonDevice)?
        /// The device that it asked and that was not told yet that this is over.
        var asked: BalloonDevice?
        /// Until when it waits.
        var deadline: Int64?
        init(_ socket: OwnedDescriptor) { self.socket = socket }
    }

    private(set) var clients: [Client] = []

    func add(_ socket: OwnedDescriptor) { clients.append(Client(socket)) }

    /// The earliest time at which something is to be done.
    var nextDeadline: Int64? { clients.compactMap(\.deadline).min() }

    /// Reads one packet of `client`; takes the client out if it is gone.
    func receive(_ client: Client, _ backend: Backend) {
        // One more than a request has, to see what is too long.
        var packet = [UInt8](repeating: 0, count: Self.requestBytes + 1)
        var numbers = [Int32](repeating: -1, count: Int(LACUNA_MAX_DESCRIPTORS))
        var count: Int32 = 0
        let got = unsafe lacuna_receive(
            client.socket.number, &packet, packet.count, Int32(lacuna_MSG_DONTWAIT), &numbers, &count)
        let code = lacuna_errno()
        for number in numbers[..<Int(count)] { close(number) }
        if got < 0, code == EAGAIN || code == EINTR { return }
        guard got > 0 else { return remove(client) }
        guard got == Self.requestBytes, count == 0 else {
            return answer(client, 0, .malformed, 0, text: "a request has \(Self.requestBytes) bytes and no descriptors")
        }
        func number(_ range: Range<Int>) -> UInt64 { packet[range].reversed().reduce(0) { $0 << 8 | UInt64($1) } }
        let command = UInt16(number(2..<4)), argument = UInt32(number(4..<8)), request = number(8..<16)
        guard number(0..<2) == UInt64(Self.version) else {
            return answer(client, command, .malformed, 0, text: "version \(number(0..<2)); this is version \(Self.version)")
        }
        guard let known = Command(rawValue: command) else {
            return answer(client, command, .malformed, 0, text: "there is no command \(command)")
        }
        guard client.deadline == nil || known == .close || known == .finish else {
            return answer(client, command, .malformed, 0, text: "a wait is going on")
        }
        obey(known, argument, request, client, backend)
    }

    private func obey(_ command: Command, _ argument: UInt32, _ request: UInt64, _ client: Client, _ backend: Backend) {
        let code = command.rawValue
        switch command {
        case .hello:
            var body: [UInt8] = []
            body.put(UInt64(backend.memory.frameCount))
            body.put(UInt64(backend.isLive ? backend.memory.ramPages : 0))
            answer(client, code, .ok, 0, body)
        case .request:
            if clients.contains(where: { $0 !== client && isOpen($0, backend) }) {
                return answer(client, code, .busy, 0, text: "another client has a window open")
            }
            if let refusal = backend.refusal { return answer(client, code, .refused, 0, text: refusal) }
            let opened = backend.device.openWindow()
            client.window = (opened, backend.device)
            client.asked = backend.device
            answer(client, code, .ok, UInt64(opened))
        case .wait:
            guard let window = client.window, UInt64(window.request) == request else {
                return answer(client, code, .stale, request, text: "no window of this request is open")
            }
            // A day at most, so that no sum overflows.
            client.deadline = monotonicMilliseconds() + Int64(min(argument, 86_400_000))
            progress(client, backend)
        case .close:
            client.deadline = nil
            closeWindow(client)
            answer(client, code, .ok, 0)
        case .statistics: answer(client, code, .ok, 0, Self.encode(backend))
        case .setTarget:
            backend.device.setTarget(pages: argument)
            answer(client, code, .ok, 0)
        case .finish:
            client.deadline = nil
            finish(client)
            answer(client, code, .ok, 0)
        case .poll:
            answer(client, code, .ok, 0)
            _ = backend.device.requestStatistics()
        }
    }

    /// Looks at what clients wait for. To be called after anything that can have completed a report.
    func progress(_ backend: Backend) {
        for client in clients where client.deadline != nil { progress(client, backend) }
    }

    private func progress(_ client: Client, _ backend: Backend) {
        guard let deadline = client.deadline, let window = client.window else { return }
        let code = Command.wait.rawValue, request = UInt64(window.request)
        // Free page hints have no end that would have to come: at the deadline those that are there are a report.
        let isDue = window.device === backend.device
            && (window.device.isReportComplete(window.request) || monotonicMilliseconds() >= deadline)
        if let report = isDue ? window.device.waitForReport(window.request, milliseconds: 0) : nil {
            client.deadline = nil
            guard let file = Self.sealedFile(report.pages) else {
                return answer(client, code, .internalError, request, text: "no file for the bitmap: \(errorText())")
            }
            var body: [UInt8] = []
            body.put(UInt64(report.pages.bitCount))
            body.put(UInt64(report.pages.population))
            let figures = report.figures
            body.put(UInt64(figures == nil ? 0 : 1))
            for value in [
                figures?.blocks, figures?.pages, figures?.walkNanoseconds, figures?.longestLockNanoseconds,
                figures.map { UInt64($0.batches) },
            ] { body.put(value ?? 0) }
            return answer(client, code, .ok, request, body, file: file)
        }
        guard window.device === backend.device, window.device.isReportPending(window.request) else {
            client.deadline = nil
            closeWindow(client)
            return answer(client, code, .failed, request, text: "the guest gave up, or its device was reset")
        }
        guard monotonicMilliseconds() >= deadline else { return }
        client.deadline = nil
        answer(client, code, .timedOut, request, text: "no report within the time given")
    }

    private func isOpen(_ client: Client, _ backend: Backend) -> Bool {
        client.window.map { $0.device === backend.device } ?? false
    }

    private func closeWindow(_ client: Client) {
        client.window?.device.closeWindow()
        client.window = nil
    }

    /// A driver that hints may have its pages back, unless another client's migration goes on.
    private func finish(_ client: Client) {
        closeWindow(client)
        guard let asked = client.asked else { return }
        client.asked = nil
        if !clients.contains(where: { $0 !== client && $0.asked === asked }) { asked.releaseHints() }
    }

    private func remove(_ client: Client) {
        finish(client)
        clients.removeAll { $0 === client }
    }

    private func answer(
        _ client: Client, _ command: UInt16, _ status: Status, _ request: UInt64, _ body: [UInt8] = [],
        text: String = "", file: OwnedDescriptor? = nil
    ) {
        var packet: [UInt8] = []
        packet.put(Self.version)
        packet.put(command)
        packet.put(status.rawValue)
        packet.put(request)
        packet += body
        packet += Array(text.utf8)
        var descriptors: [Int32] = file.map { [$0.number] } ?? []
        let sent = unsafe lacuna_send(
            client.socket.number, packet, packet.count, Int32(lacuna_MSG_DONTWAIT), &descriptors,
            Int32(descriptors.count))
        // A client that does not read its answers is as good as gone.
        if sent < 0 { remove(client) }
    }

    /// The words of a bitmap as a file in memory that nobody can change. Empty stretches take no memory.
    private static func sealedFile(_ pages: PageBitmap) -> OwnedDescriptor? {
        let made = unsafe lacuna_memfd("lacuna-free-pages")
        guard made >= 0 else { return nil }
        let file = OwnedDescriptor(adopting: made)
        guard ftruncate(made, off_t(pages.wordCount * 8)) == 0 else { return nil }
        let isWritten = unsafe pages.withUnsafeWords { words -> Bool in
            var place = 0
            while place < words.count {
                let end = min(place + 512, words.count)
                if unsafe words[place..<end].contains(where: { $0 != 0 }) {
                    let bytes = (end - place) * 8
                    guard unsafe pwrite(made, words.baseAddress! + place, bytes, off_t(place * 8)) == bytes else {
                        return false
                    }
                }
                place = end
            }
            return true
        }
        return isWritten && lacuna_seal(made) == 0 ? file : nil
    }

    /// The counters, in the order of protocol/hint-socket.md, which only ever grows at its end.
    private static func encode(_ backend: Backend) -> [UInt8] {
        let counters = backend.device.counters
        let values: [UInt64] = [
            UInt64(backend.device.actualPages), backend.messages, backend.refusedMessages, backend.frontEnds,
            counters.inflateChains, counters.deflateChains, counters.inflatedPages, counters.deflatedPages,
            counters.listedPagesNotRAM, counters.malformedLists, counters.requests, counters.reportChains,
            counters.reportsCompleted, counters.reportsFailed, counters.reportsVoid, counters.staleChains,
            counters.lateChains, counters.malformedReportChains, counters.reportedPagesNotRAM, counters.brokenQueues,
            counters.releasedPages, counters.reportedFreePages, counters.hintedPages, counters.statisticsBuffers,
        ]
        var body: [UInt8] = []
        for value in values { body.put(value) }
        // The guest's own statistics: how many, when, and then by their tags.
        let statistics = backend.device.status.statistics
        body.put(statistics?.number ?? 0)
        body.put(statistics?.time ?? 0)
        for tag in StatisticTag.allCases { body.put(statistics?.values[tag] ?? .max) }
        return body
    }
}
