// SPDX-License-Identifier: Apache-2.0
import CLinux

/// A unix stream socket that carries lines. Closes with its owner.
final class LocalSocket: Sendable {
    let descriptor: Int32
    /// A control line is never longer; a client that sends more is cut off.
    private let lineLimit = 1 << 20

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
            if errno != EINTR && errno != ECONNABORTED { return nil }
        }
    }

    /// False if the other side is gone.
    @discardableResult
    func send(_ bytes: [UInt8]) -> Bool {
        var rest = bytes[...]
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes { CLinux.send(descriptor, $0.baseAddress, $0.count, lacuna_MSG_NOSIGNAL) }
            if count < 0 {
                if errno == EINTR { continue }
                return false
            }
            rest = rest.dropFirst(count)
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

    /// The next line, without its end; nil at the end of the stream.
    func receiveLine() -> [UInt8]? {
        var line: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 4096)
        while line.count < lineLimit {
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
