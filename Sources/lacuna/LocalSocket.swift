// SPDX-License-Identifier: Apache-2.0
import CLinux
import Synchronization

/// A unix stream socket that carries lines. Closes with its owner.
final class LocalSocket: Sendable {
    /// A request is never longer; a client that sends more is cut off.
    static let requestLimit = 1 << 20
    /// Answers can hold the figures of a hundred thousand rounds.
    static let answerLimit = 1 << 28
    /// How long the other side may take none of an answer before it counts as gone.
    private static let patienceMilliseconds: Int32 = 5000

    let descriptor: Int32
    /// The rest of a line that did not fit into the socket yet.
    private let rest = Mutex<ArraySlice<UInt8>>([])

    init(adopting descriptor: Int32) { self.descriptor = descriptor }
    deinit { close(descriptor) }

    private static func withAddress<Result>(
        _ path: String, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Result
    ) throws(Complaint) -> Result {
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let bytes = Array(path.utf8)
        let room = MemoryLayout.size(ofValue: address.sun_path)
        guard !bytes.isEmpty, bytes.count < room else {
            throw Complaint("the socket's path '\(path)' must have 1 to \(room - 1) bytes; choose a shorter one")
        }
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: bytes) }
        return withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
        }
    }

    private static func make() throws(Complaint) -> Int32 {
        let made = socket(AF_UNIX, lacuna_SOCK_STREAM_CLOEXEC, 0)
        guard made >= 0 else { throw Complaint("cannot make a socket: \(String(cString: strerror(errno)))") }
        return made
    }

    static func connect(_ path: String) throws(Complaint) -> LocalSocket {
        let socket = LocalSocket(adopting: try make())
        if try withAddress(path, { CLinux.connect(socket.descriptor, $0, $1) }) != 0 {
            throw Complaint(
                "cannot reach a guest at \(path): \(String(cString: strerror(errno))); is it running, with --control \(path)?")
        }
        return socket
    }

    /// Listens at `path`. A stale socket, which nobody answers on, is replaced; a live one is an error.
    static func listen(_ path: String) throws(Complaint) -> LocalSocket {
        let socket = LocalSocket(adopting: try make())
        var result = try withAddress(path) { bind(socket.descriptor, $0, $1) }
        if result != 0, errno == EADDRINUSE {
            var information = stat()
            let isSocket = lstat(path, &information) == 0 && Int32(information.st_mode) & S_IFMT == S_IFSOCK
            if isSocket, (try? connect(path)) == nil {
                unlink(path)
                result = try withAddress(path) { bind(socket.descriptor, $0, $1) }
            } else {
                let what = isSocket ? "another guest answers there" : "a file that is no socket is there"
                throw Complaint("cannot use the control socket \(path): \(what); choose another --control")
            }
        }
        guard result == 0, CLinux.listen(socket.descriptor, 16) == 0 else {
            throw Complaint("cannot listen on the control socket \(path): \(String(cString: strerror(errno))); choose another --control")
        }
        // The socket lets its users migrate and stop the guest: the owner only.
        chmod(path, 0o600)
        return socket
    }

    func accept() -> LocalSocket? {
        while true {
            let peer = lacuna_accept(descriptor)
            if peer >= 0 { return LocalSocket(adopting: peer) }
            switch errno {
            case EINTR, ECONNABORTED: continue
            // Whoever asks has to wait until something was closed or freed, of which nothing tells.
            case EMFILE, ENFILE, ENOBUFS, ENOMEM: poll(nil, 0, 100)
            default: return nil
            }
        }
    }

    /// Sends a line. False if the other side is gone, or takes nothing of it for five seconds.
    @discardableResult
    func send(_ line: [UInt8]) -> Bool {
        rest.withLock { rest in
            rest += line
            while push(&rest), !rest.isEmpty {
                var ready = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
                let result = poll(&ready, 1, Self.patienceMilliseconds)
                if result == 0 || result < 0 && errno != EINTR { shutdown(descriptor, Int32(SHUT_RDWR)) }
            }
            return rest.isEmpty
        }
    }

    /// Sends a line that need not arrive, without waiting: it is dropped if the other side has not taken what came before.
    func offer(_ line: [UInt8]) {
        rest.withLock { rest in
            guard push(&rest), rest.isEmpty else { return }
            rest += line
            _ = push(&rest)
        }
    }

    /// Sends what the socket takes at once. False if the other side is gone.
    private func push(_ rest: inout ArraySlice<UInt8>) -> Bool {
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes {
                CLinux.send(descriptor, $0.baseAddress, $0.count, lacuna_MSG_NOSIGNAL | lacuna_MSG_DONTWAIT)
            }
            if count >= 0 {
                rest = rest.dropFirst(count)
            } else if errno == EAGAIN {
                return true
            } else if errno != EINTR {
                return false
            }
        }
        return true
    }

    /// Passes a descriptor, after a request that announced it.
    func send(descriptor passed: Int32) -> Bool {
        var (byte, descriptors) = (UInt8(0), [passed])
        return lacuna_send(descriptor, &byte, 1, 0, &descriptors, 1) == 1
    }

    /// The one descriptor that the other side passes now; the caller's to close.
    func receiveDescriptor() throws(Complaint) -> Int32 {
        var (byte, count) = (UInt8(0), Int32(0))
        var descriptors = [Int32](repeating: -1, count: Int(LACUNA_MAX_DESCRIPTORS))
        let got = lacuna_receive(descriptor, &byte, 1, 0, &descriptors, &count)
        guard got == 1, count == 1 else {
            for extra in descriptors[..<Int(count)] { close(extra) }
            throw Complaint("the client announced a descriptor and passed \(count)")
        }
        return descriptors[0]
    }

    /// The next line, without its end; nil at the end of the stream, or if the line is longer than `limit`.
    func receiveLine(limit: Int) -> [UInt8]? {
        var line: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 4096)
        while line.count < limit {
            // Peeked at first, so that nothing past this line is taken.
            let seen = buffer.withUnsafeMutableBytes { recv(descriptor, $0.baseAddress, $0.count, lacuna_MSG_PEEK) }
            if seen < 0 && errno == EINTR { continue }
            if seen <= 0 { return nil }
            let end = buffer[..<seen].firstIndex(of: 0x0a)
            let wanted = end.map { $0 + 1 } ?? seen
            let got = buffer.withUnsafeMutableBytes { recv(descriptor, $0.baseAddress, wanted, 0) }
            if got <= 0 { return nil }
            line += buffer[..<got]
            if line.last == 0x0a {
                line.removeLast()
                return line
            }
        }
        return nil
    }
}

/// glibc's errno is a macro that Swift does not import.
var errno: Int32 { lacuna_errno() }
