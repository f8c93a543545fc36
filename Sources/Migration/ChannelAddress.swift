// SPDX-License-Identifier: Apache-2.0
internal import CLinux
internal import Synchronization

/// Where a migration's channel begins or ends: `unix:PATH`, `tcp:HOST:PORT` or `tcp:[IPV6]:PORT`.
///
/// HOST is a numeric address or `localhost`: a statically linked program has no name service to ask.
public enum ChannelAddress: Sendable, Hashable, CustomStringConvertible {
    case unix(path: String)
    /// `host` without brackets. Port 0 is for listening only: the system chooses.
    case tcp(host: String, port: UInt16)

    /// Reads an address as an operator writes it.
    public init(parsing text: String) throws(MigrationError) {
        if text.hasPrefix("unix:") {
            let path = String(text.dropFirst(5))
            guard !path.isEmpty else { throw .badAddress(text, why: "the path is missing") }
            let limit = MemoryLayout.size(ofValue: sockaddr_un().sun_path) - 1
            guard path.utf8.count <= limit else {
                throw .badAddress(text, why: "a socket's path has at most \(limit) bytes, this has \(path.utf8.count)")
            }
            guard !path.utf8.contains(0) else { throw .badAddress(text, why: "the path has a zero byte") }
            self = .unix(path: path)
        } else if text.hasPrefix("tcp:") {
            let rest = text.dropFirst(4)
            guard let colon = rest.lastIndex(of: ":") else { throw .badAddress(text, why: "the port is missing") }
            var host = rest[..<colon]
            let digits = rest[rest.index(after: colon)...]
            guard let port = UInt16(digits), digits.utf8.allSatisfy({ $0 >= 48 && $0 <= 57 }) else {
                throw .badAddress(text, why: "'\(digits)' is no port (0 to 65535)")
            }
            if host.hasPrefix("["), host.hasSuffix("]") {
                host = host.dropFirst().dropLast()
                guard host.contains(":") else { throw .badAddress(text, why: "brackets are for IPv6 addresses") }
            } else if host.contains(":") {
                throw .badAddress(text, why: "an IPv6 address needs brackets")
            }
            let address = ChannelAddress.tcp(host: String(host), port: port)
            guard address.socketAddress() != nil else {
                throw .badAddress(text, why: "'\(host)' is no numeric address, and names are not looked up")
            }
            self = address
        } else {
            throw .badAddress(text, why: "it names no kind of channel; give unix:PATH or tcp:HOST:PORT (or fd:N, exec:COMMAND, file:PATH)")
        }
    }

    public var description: String {
        switch self {
        case .unix(let path): "unix:\(path)"
        case .tcp(let host, let port): host.contains(":") ? "tcp:[\(host)]:\(port)" : "tcp:\(host):\(port)"
        }
    }

    /// True if nobody on another machine can listen in: a unix socket, or the loopback interface.
    public var isLocal: Bool {
        switch self {
        case .unix: true
        case .tcp(let host, _): host == "localhost" || host == "::1" || host.hasPrefix("127.")
        }
    }

    var family: Int32 {
        switch self {
        case .unix: AF_UNIX
        case .tcp(let host, _): host.contains(":") ? AF_INET6 : AF_INET
        }
    }

    /// The address as the kernel wants it; nil if the host is not numeric or the path too long.
    func socketAddress() -> (storage: sockaddr_storage, length: socklen_t)? {
        var storage = sockaddr_storage()
        switch self {
        case .unix(let path):
            var address = sockaddr_un()
            let bytes = Array(path.utf8)
            guard bytes.count < MemoryLayout.size(ofValue: address.sun_path) else { return nil }
            address.sun_family = sa_family_t(AF_UNIX)
            withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: bytes) }
            withUnsafeMutableBytes(of: &storage) { $0.storeBytes(of: address, as: sockaddr_un.self) }
            return (storage, socklen_t(MemoryLayout<sockaddr_un>.size))
        case .tcp(let host, let port) where host.contains(":"):
            var address = sockaddr_in6()
            address.sin6_family = sa_family_t(AF_INET6)
            address.sin6_port = port.bigEndian
            guard inet_pton(AF_INET6, host, &address.sin6_addr) == 1 else { return nil }
            withUnsafeMutableBytes(of: &storage) { $0.storeBytes(of: address, as: sockaddr_in6.self) }
            return (storage, socklen_t(MemoryLayout<sockaddr_in6>.size))
        case .tcp(let host, let port):
            var address = sockaddr_in()
            address.sin_family = sa_family_t(AF_INET)
            address.sin_port = port.bigEndian
            let numeric = host == "localhost" ? "127.0.0.1" : host
            guard inet_pton(AF_INET, numeric, &address.sin_addr) == 1 else { return nil }
            withUnsafeMutableBytes(of: &storage) { $0.storeBytes(of: address, as: sockaddr_in.self) }
            return (storage, socklen_t(MemoryLayout<sockaddr_in>.size))
        }
    }
}

/// Calls `body` with the address as a plain `sockaddr`.
private func withSockaddr(
    _ address: (storage: sockaddr_storage, length: socklen_t),
    _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32
) -> Int32 {
    var storage = address.storage
    return withUnsafePointer(to: &storage) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, address.length) }
    }
}

/// A new non-blocking stream socket, or a negative number.
private func makeSocket(_ family: Int32) -> Int32 {
    let kind = SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue
    let descriptor = socket(family, Int32(kind), 0)
    if descriptor >= 0, family == AF_UNIX { enlargeBuffers(descriptor) }
    return descriptor
}

/// Bigger buffers, so that a sender seldom waits for the receiver's thread to be scheduled. Not for TCP: a fixed size
/// switches the kernel's own tuning off, which goes further than an ordinary user may.
private func enlargeBuffers(_ descriptor: Int32) {
    var bytes: Int32 = 4 << 20
    setsockopt(descriptor, SOL_SOCKET, SO_SNDBUF, &bytes, socklen_t(MemoryLayout<Int32>.size))
    setsockopt(descriptor, SOL_SOCKET, SO_RCVBUF, &bytes, socklen_t(MemoryLayout<Int32>.size))
}

/// Frames are put together before they are sent, so waiting for more to send only delays the handshakes.
private func sendAtOnce(_ descriptor: Int32) {
    var one: Int32 = 1
    setsockopt(descriptor, Int32(IPPROTO_TCP), TCP_NODELAY, &one, socklen_t(MemoryLayout<Int32>.size))
}

extension ByteChannel {
    /// Connects to a listener. Throws `cannotConnect`, with ETIMEDOUT if nobody answers in time.
    public static func connect(
        to address: ChannelAddress, timeoutMilliseconds: Int = 10_000
    ) throws(MigrationError) -> ByteChannel {
        guard let target = address.socketAddress() else {
            throw .badAddress(address.description, why: "the host is not numeric or the path is too long")
        }
        let descriptor = makeSocket(address.family)
        guard descriptor >= 0 else { throw .cannotConnect(address.description, errno: lacuna_errno()) }
        var code = withSockaddr(target) { CLinux.connect(descriptor, $0, $1) } == 0 ? 0 : lacuna_errno()
        let start = monotonicNanoseconds()
        // A unix socket whose listener has no room says EAGAIN; there is nothing to poll for then.
        while code == EAGAIN, Int(milliseconds(since: start)) < timeoutMilliseconds {
            poll(nil, 0, 10)
            code = withSockaddr(target) { CLinux.connect(descriptor, $0, $1) } == 0 ? 0 : lacuna_errno()
        }
        while code == EINPROGRESS || code == EINTR {
            let left = timeoutMilliseconds - Int(milliseconds(since: start))
            var entry = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
            let ready = poll(&entry, 1, Int32(clamping: max(left, 0)))
            if ready == 0 {
                code = ETIMEDOUT
            } else if ready > 0 {
                var length = socklen_t(MemoryLayout<Int32>.size)
                getsockopt(descriptor, SOL_SOCKET, SO_ERROR, &code, &length)
            }
        }
        guard code == 0 else {
            close(descriptor)
            throw .cannotConnect(address.description, errno: code)
        }
        if address.family != AF_UNIX { sendAtOnce(descriptor) }
        return try ByteChannel(adopting: descriptor, name: address.description)
    }
}

/// Waits for connections at an address.
///
/// Thread rules: `accept` on one thread at a time; `close()` from any thread, which ends an `accept` under way.
public final class ChannelListener: Sendable {
    /// The address listened on; a port of 0 has become the port that the system chose.
    public let address: ChannelAddress
    private let descriptor: Int32
    private let wakeup: Int32
    /// The socket file as it was made, so that only this one is removed in the end and not a successor's.
    private let file: (device: UInt64, inode: UInt64)?
    private let closed = Atomic<Bool>(false)

    /// Starts listening. A unix socket's file that nobody listens on any more is replaced. Throws `cannotListen`.
    public init(_ address: ChannelAddress) throws(MigrationError) {
        guard let local = address.socketAddress() else {
            throw .badAddress(address.description, why: "the host is not numeric or the path is too long")
        }
        if case .unix(let path) = address { ChannelListener.removeStale(path, local) }
        let descriptor = makeSocket(address.family)
        guard descriptor >= 0 else { throw .cannotListen(address.description, errno: lacuna_errno()) }
        var one: Int32 = 1
        if address.family != AF_UNIX {
            setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &one, socklen_t(MemoryLayout<Int32>.size))
        }
        var isOpen = withSockaddr(local, { bind(descriptor, $0, $1) }) == 0
        // Guest memory goes through it: for this user only. Nobody can connect before listen().
        if isOpen, case .unix(let path) = address { isOpen = chmod(path, 0o600) == 0 }
        guard isOpen, listen(descriptor, 64) == 0 else {
            let code = lacuna_errno()
            CLinux.close(descriptor)
            throw .cannotListen(address.description, errno: code)
        }
        let wakeup = eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK))
        guard wakeup >= 0 else {
            let code = lacuna_errno()
            CLinux.close(descriptor)
            throw .cannotListen(address.description, errno: code)
        }
        self.descriptor = descriptor
        self.wakeup = wakeup
        switch address {
        case .unix(let path):
            self.address = address
            file = ChannelListener.identity(path)
        case .tcp(let host, _):
            self.address = .tcp(host: host, port: ChannelListener.boundPort(descriptor))
            file = nil
        }
    }

    deinit {
        close()
        CLinux.close(descriptor)
        CLinux.close(wakeup)
    }

    /// Waits for a connection, for at most `timeoutMilliseconds` (nil: for ever). Throws `timedOut`, `cancelled` after
    /// `close()`, or `channelFailed`.
    public func accept(timeoutMilliseconds: Int? = nil) throws(MigrationError) -> ByteChannel {
        let start = monotonicNanoseconds()
        while true {
            if closed.load(ordering: .sequentiallyConsistent) { throw .cancelled }
            let connection = CLinux.accept(descriptor, nil, nil)
            if connection >= 0 {
                // FIOCLEX: fcntl() has too many shapes for Swift, and accept4() is no POSIX call.
                _ = lacuna_ioctl_none(connection, 0x5451, 0)
                if address.family == AF_UNIX { enlargeBuffers(connection) } else { sendAtOnce(connection) }
                return try ByteChannel(adopting: connection, name: address.description)
            }
            switch lacuna_errno() {
            case EAGAIN: break
            case EINTR, ECONNABORTED: continue
            case let code: throw .channelFailed("accepting on \(address)", errno: code)
            }
            var wait: Int32 = -1
            if let limit = timeoutMilliseconds {
                let left = limit - Int(milliseconds(since: start))
                guard left > 0 else { throw .timedOut("waiting for a connection on \(address)", milliseconds: limit) }
                wait = Int32(clamping: left)
            }
            var entries = [
                pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0),
                pollfd(fd: wakeup, events: Int16(POLLIN), revents: 0),
            ]
            poll(&entries, 2, wait)
        }
    }

    /// Stops listening and removes the unix socket's file. No effect the second time.
    public func close() {
        guard !closed.exchange(true, ordering: .sequentiallyConsistent) else { return }
        var one: UInt64 = 1
        _ = CLinux.write(wakeup, &one, 8)
        if case .unix(let path) = address, let file, let now = ChannelListener.identity(path), now == file {
            unlink(path)
        }
        // Connections that nobody accepted are refused from here on.
        _ = CLinux.shutdown(descriptor, Int32(SHUT_RDWR))
    }

    private static func identity(_ path: String) -> (device: UInt64, inode: UInt64)? {
        var status = stat()
        guard lstat(path, &status) == 0 else { return nil }
        return (UInt64(status.st_dev), UInt64(status.st_ino))
    }

    private static func removeStale(_ path: String, _ local: (storage: sockaddr_storage, length: socklen_t)) {
        var status = stat()
        guard lstat(path, &status) == 0, status.st_mode & UInt32(S_IFMT) == UInt32(S_IFSOCK) else { return }
        let probe = makeSocket(AF_UNIX)
        guard probe >= 0 else { return }
        // Refused means that the file outlived its listener.
        if withSockaddr(local, { CLinux.connect(probe, $0, $1) }) != 0, lacuna_errno() == ECONNREFUSED { unlink(path) }
        CLinux.close(probe)
    }

    private static func boundPort(_ descriptor: Int32) -> UInt16 {
        var storage = sockaddr_storage()
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        _ = withUnsafeMutablePointer(to: &storage) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { getsockname(descriptor, $0, &length) }
        }
        // The port lies at the same place for both families.
        return withUnsafeBytes(of: &storage) { UInt16(bigEndian: $0.loadUnaligned(fromByteOffset: 2, as: UInt16.self)) }
    }
}
