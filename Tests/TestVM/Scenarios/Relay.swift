// SPDX-License-Identifier: Apache-2.0
import CLinux
import Migration

// A line between a migration's source and its destination that fails at a chosen place. It runs as a child of a
// scenario: `lacuna-scenarios relay LISTEN TARGET PLACE ACTION`, both ends unix sockets.

/// A place in the stream: `forward:mid:pages:3`, `backward:after:ready:1`, `forward:byte:12345`, or `none`. Forward is
/// from the source to the destination. The number of a frame counts those of its type in its direction from 1; the
/// middle of a frame is the half of all its bytes.
struct StreamPlace: Sendable {
    enum Edge: String { case before, mid, after }
    private enum Kind {
        case none
        case byte(UInt64)
        case frame(Edge, FrameType, Int)
    }
    let isForward: Bool
    /// From 1, in the order in which they come.
    let connection: Int
    private let kind: Kind

    /// Nil if the text is no place.
    init?(parsing text: String) {
        guard text != "none" else {
            (isForward, connection, kind) = (true, 1, .none)
            return
        }
        let parts = text.split(separator: "/", maxSplits: 1)
        guard let last = parts.last, let number = parts.count == 2 ? Int(parts[0]) : 1 else { return nil }
        connection = number
        let words = last.split(separator: ":").map(String.init)
        guard words.count >= 3, words[0] == "forward" || words[0] == "backward" else { return nil }
        isForward = words[0] == "forward"
        if words.count == 3, words[1] == "byte", let byte = UInt64(words[2]) {
            kind = .byte(byte)
        } else if words.count == 4, let edge = Edge(rawValue: words[1]), let number = Int(words[3]), number > 0,
            let type = FrameType.allCases.first(where: { "\($0)" == words[2] })
        {
            kind = .frame(edge, type, number)
        } else {
            return nil
        }
    }

    /// The offset to stop at that is known before any byte came.
    var byte: UInt64? { if case .byte(let byte) = kind { byte } else { nil } }

    /// The offset to stop at, once the header of the `number`-th frame of its type has come, which begins at `start`.
    func offset(_ header: FrameHeader, number: Int, start: UInt64) -> UInt64? {
        guard case .frame(let edge, let type, let wanted) = kind, header.type == type, number == wanted else { return nil }
        let size = UInt64(FrameHeader.size) + UInt64(header.payloadBytes)
        return switch edge {
        case .before: start
        case .mid: start + size / 2
        case .after: start + size
        }
    }
}

/// One direction of the line: passes frames on, a header only when it is there as a whole.
private final class Lane {
    let from: Int32, to: Int32
    private let place: StreamPlace?
    private var header: [UInt8] = []
    private var payloadLeft = 0
    private var stopAt: UInt64?
    private(set) var counts: [FrameType: Int] = [:]
    private(set) var passed: UInt64 = 0
    private(set) var isOpen = true
    /// What was read and may not pass.
    private var held: [UInt8] = []
    private(set) var stands = false

    init(from: Int32, to: Int32, place: StreamPlace?) {
        (self.from, self.to, self.place) = (from, to, place)
        stopAt = place?.byte
    }

    /// Reads once and passes on what may pass.
    func carry() {
        var buffer = [UInt8](repeating: 0, count: 1 << 18)
        let got = read(from, &buffer, buffer.count)
        if got < 0 && errno == EINTR { return }
        guard got > 0 else {
            emit(header)
            header = []
            if !stands { shut() }
            return
        }
        take(buffer[..<got])
    }

    private func take(_ bytes: ArraySlice<UInt8>) {
        var rest = bytes
        while !rest.isEmpty {
            if payloadLeft > 0 {
                let part = rest.prefix(payloadLeft)
                payloadLeft -= part.count
                rest = rest.dropFirst(part.count)
                emit(part)
                continue
            }
            let part = rest.prefix(FrameHeader.size - header.count)
            header += part
            rest = rest.dropFirst(part.count)
            guard header.count == FrameHeader.size else { return }
            guard let frame = header.withUnsafeBytes({ try? FrameHeader(decoding: $0.baseAddress!) }) else {
                say("RELAY met no frame header after \(passed) bytes")
                exit(1)
            }
            counts[frame.type, default: 0] += 1
            stopAt = place?.offset(frame, number: counts[frame.type]!, start: passed) ?? stopAt
            payloadLeft = Int(frame.payloadBytes)
            emit(header[...])
            header = []
        }
    }

    private func emit(_ bytes: some RandomAccessCollection<UInt8>) {
        let all = Array(bytes)
        guard !stands else {
            held += all
            return
        }
        var count = all.count
        if let stopAt, passed + UInt64(count) >= stopAt {
            count = Int(stopAt - passed)
            stands = true
        }
        send(all[..<count])
        held += all[count...]
    }

    private func send(_ bytes: ArraySlice<UInt8>) {
        var rest = bytes
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes { CLinux.send(to, $0.baseAddress, $0.count, lacuna_MSG_NOSIGNAL) }
            if count < 0 && errno == EINTR { continue }
            // A peer that is gone takes nothing more; its side's end is seen where it is read from.
            guard count > 0 else { return }
            passed += UInt64(count)
            rest = rest.dropFirst(count)
        }
    }

    /// Passes on what was held, and stops nowhere any more.
    func goOn() {
        (stands, stopAt) = (false, nil)
        send(held[...])
        held = []
    }

    private func shut() {
        isOpen = false
        _ = CLinux.shutdown(to, Int32(SHUT_WR))
    }

    var summary: String {
        counts.sorted { $0.key.rawValue < $1.key.rawValue }.map { "\($0.key)=\($0.value)" }.joined(separator: " ")
    }
}

/// The line as a whole.
enum Relay {
    /// What happens at the place.
    enum Action: String {
        /// Both connections end.
        case cut
        /// Nothing passes in either direction until one side is gone; then both connections end.
        case hold
        /// As `hold`, but once the source is gone, everything that it had sent passes.
        case late
    }

    static func run(listen: String, target: String, place: StreamPlace, action: Action) -> Never {
        // The target first: who can connect here has somebody to talk to.
        let far = unixSocket(target) { connect($0, $1, $2) }
        let listener = unixSocket(listen) { bind($0, $1, $2) }
        guard CLinux.listen(listener, 16) == 0 else { end("cannot listen on \(listen)") }
        say("RELAY listens")
        // One target is there for the first; the others are reached for as they come.
        var free: Int32? = far
        var lines: [(forward: Lane, backward: Lane)] = []
        func isStanding() -> Bool { lines.contains { $0.forward.stands || $0.backward.stands } }
        while lines.isEmpty || lines.contains(where: { $0.forward.isOpen || $0.backward.isOpen }) {
            let lanes = lines.flatMap { [$0.forward, $0.backward] }
            var polled = lanes.map { pollfd(fd: $0.isOpen ? $0.from : -1, events: Int16(POLLIN), revents: 0) }
            polled.append(pollfd(fd: listener, events: Int16(POLLIN), revents: 0))
            if poll(&polled, nfds_t(polled.count), -1) < 0 { continue }
            if polled.last!.revents != 0 {
                let near = lacuna_accept(listener)
                guard near >= 0 else { end("accept: errno \(errno)") }
                let far = free ?? unixSocket(target) { connect($0, $1, $2) }
                free = nil
                let here = lines.count + 1 == place.connection ? place : nil
                lines.append((
                    Lane(from: near, to: far, place: here.flatMap { $0.isForward ? $0 : nil }),
                    Lane(from: far, to: near, place: here.flatMap { $0.isForward ? nil : $0 })
                ))
            }
            for (lane, entry) in zip(lanes, polled) where entry.revents != 0 && !isStanding() { lane.carry() }
            guard isStanding() else { continue }
            let (forward, backward) = lines[place.connection - 1]
            say("RELAY stands after \(forward.passed) bytes forward and \(backward.passed) backward")
            switch action {
            case .cut: exit(0)
            case .hold:
                waitForEnd(of: lines.flatMap { [$0.forward.from, $0.backward.from] })
                exit(0)
            case .late:
                waitForEnd(of: [forward.from])
                for lane in lines.flatMap({ [$0.forward, $0.backward] }) { lane.goOn() }
            }
        }
        for (forward, backward) in lines {
            say("RELAY passed forward \(forward.passed) bytes: \(forward.summary); backward \(backward.passed): \(backward.summary)")
        }
        exit(0)
    }

    /// POLLRDHUP, which glibc shows only to programs that ask for all it has.
    private static let endOfPeer: Int16 = 0x2000

    private static func waitForEnd(of sockets: [Int32]) {
        while true {
            var polled = sockets.map { pollfd(fd: $0, events: endOfPeer, revents: 0) }
            if poll(&polled, nfds_t(polled.count), -1) > 0 { return }
        }
    }

    private static func end(_ text: String) -> Never {
        say("RELAY failed: \(text)")
        exit(1)
    }

    private static func unixSocket(_ path: String, _ use: (Int32, UnsafePointer<sockaddr>, socklen_t) -> Int32) -> Int32 {
        let made = socket(AF_UNIX, lacuna_SOCK_STREAM_CLOEXEC, 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        guard made >= 0, path.utf8.count < MemoryLayout.size(ofValue: address.sun_path) else { end("no socket for \(path)") }
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { use(made, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
        }
        guard result == 0 else { end("\(path): errno \(errno)") }
        return made
    }
}
