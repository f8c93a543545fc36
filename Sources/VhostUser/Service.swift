// SPDX-License-Identifier: Apache-2.0
internal import Balloon
internal import CLinux
internal import Synchronization

/// The balloon device out of process: serves one front end at a time on a vhost-user socket, and up to eight clients on
/// a hint socket.
///
/// Everything happens on the thread that calls `run`; nothing there waits for a front end, a client or a guest. A front
/// end that dies or breaks the protocol is let go, and the next one may connect; what the guest and the operator told
/// the balloon is kept.
///
/// Not for: untrusted operators. Whoever may connect to the sockets may serve the device with memory of its own.
public final class VhostUserService: Sendable {
    public struct Options: Sendable {
        /// Where to listen for the front end.
        public var socket: String
        /// Where to listen for clients of hints, or nil.
        public var hintSocket: String?
        /// Bytes of guest-physical address space, a front end may use: bounds the memory for bitmaps (1/32768 each).
        public var addressLimit: UInt64 = 1 << 40
        /// What the balloon offers, of `BalloonFeature`.
        public var features: UInt64 = BalloonFeature.standard
        /// Pages of 4 KiB the balloon is to have from the beginning.
        public var target: UInt32 = 0
        public init(socket: String, hintSocket: String? = nil) {
            self.socket = socket
            self.hintSocket = hintSocket
        }
    }

    private let options: Options
    private let listener: ListeningSocket
    private let hintListener: ListeningSocket?
    private let wake: OwnedDescriptor
    private let isStopped = Atomic<Bool>(false)
    private let log: @Sendable (String) -> Void

    /// Binds the sockets. Lines about what front ends do wrong go to `log`, at a bounded rate.
    public init(_ options: Options, log: @escaping @Sendable (String) -> Void) throws(VhostUserFailure) {
        self.options = options
        self.log = log
        listener = try ListeningSocket(options.socket, packets: false)
        hintListener = try options.hintSocket.map { path throws(VhostUserFailure) in
            try ListeningSocket(path, packets: true)
        }
        guard let wake = OwnedDescriptor.eventfd() else { throw VhostUserFailure("no eventfd: \(errorText())") }
        self.wake = wake
    }

    /// Ends `run`. From any thread, and before `run`, too.
    public func stop() {
        isStopped.store(true, ordering: .sequentiallyConsistent)
        wake.signal()
    }

    /// Serves until `stop`, and takes the sockets' names away then. To be called once.
    public func run() throws(VhostUserFailure) {
        defer {
            listener.remove()
            hintListener?.remove()
        }
        let backend = try Backend(features: options.features, addressLimit: options.addressLimit, log: log)
        backend.device.setTarget(pages: options.target)
        let hints = HintServer()
        var connection: Connection?
        while !isStopped.load(ordering: .sequentiallyConsistent) {
            backend.settle()
            let delay = backend.device.askWhatWaits()
            hints.progress(backend)

            // What can happen next.
            enum Source { case wake, listener, connection, backendChannel, hintListener, kick(Int), client(HintServer.Client) }
            var sources: [Source] = [.wake]
            var polled = [pollfd(fd: wake.number, events: Int16(POLLIN), revents: 0)]
            func watch(_ source: Source, _ descriptor: OwnedDescriptor, _ events: Int32 = POLLIN) {
                sources.append(source)
                polled.append(pollfd(fd: descriptor.number, events: Int16(events), revents: 0))
            }
            if let connection { watch(.connection, connection.socket) } else { watch(.listener, listener.descriptor) }
            if let channel = backend.signals.flush() { watch(.backendChannel, channel, POLLOUT) }
            for (index, ring) in backend.rings.enumerated() where ring.live != nil {
                if let kick = ring.kick { watch(.kick(index), kick) }
            }
            if let hintListener, hints.clients.count < HintServer.maximumClients {
                watch(.hintListener, hintListener.descriptor)
            }
            for client in hints.clients { watch(.client(client), client.socket) }

            let untilDeadline = hints.nextDeadline.map { max(0, min($0 - monotonicMilliseconds(), 1 << 30)) }
            let limit = [untilDeadline, delay.map { Int64($0) }].compactMap(\.self).min() ?? -1
            let ready = unsafe poll(&polled, nfds_t(polled.count), Int32(limit))
            guard ready >= 0 || lacuna_errno() == EINTR else { throw VhostUserFailure("poll: \(errorText())") }
            guard ready > 0 else { continue }

            for (source, state) in zip(sources, polled) where state.revents != 0 {
                switch source {
                case .wake: _ = wake.drain()
                case .listener:
                    if let peer = listener.accept() {
                        connection = Connection(peer)
                        backend.connected()
                    }
                case .hintListener:
                    if let peer = hintListener?.accept() { hints.add(peer) }
                // After a front end that left a moment ago, the ring may be gone.
                case .kick(let index): backend.kicked(index)
                case .backendChannel: break
                case .client(let client): hints.receive(client, backend)
                case .connection:
                    guard let current = connection, !serve(current, backend) else { break }
                    connection = nil
                    backend.disconnect()
                }
            }
        }
    }

    /// Messages taken before kicks and clients get their turn.
    private static let messagesInARow = 64

    /// False if the front end is gone or has to go.
    private func serve(_ connection: Connection, _ backend: Backend) -> Bool {
        for _ in 0..<Self.messagesInARow {
            switch connection.receive() {
            case .nothing: return true
            case .end: return false
            case .broken(let why):
                backend.complain("the front end broke the protocol: \(why)")
                return false
            case .message(let message):
                guard let reply = backend.handle(message) else { continue }
                guard connection.reply(message.request, reply) else {
                    backend.complain("the front end does not read its replies")
                    return false
                }
            }
        }
        return true
    }
}

/// A unix socket that others connect to, for its owner only. Its name goes with it.
final class ListeningSocket: Sendable {
    let descriptor: OwnedDescriptor
    private let path: String

    /// A stale socket, which nobody answers on, is replaced; anything else at that place is an error.
    init(_ path: String, packets: Bool) throws(VhostUserFailure) {
        let type = packets ? lacuna_SOCK_SEQPACKET_CLOEXEC : lacuna_SOCK_STREAM_CLOEXEC
        func fresh() throws(VhostUserFailure) -> OwnedDescriptor {
            let made = socket(AF_UNIX, type, 0)
            guard made >= 0 else { throw VhostUserFailure("cannot make a socket: \(errorText())") }
            return OwnedDescriptor(adopting: made)
        }
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let name = Array(path.utf8), room = MemoryLayout.size(ofValue: address.sun_path)
        guard !name.isEmpty, name.count < room, !name.contains(0) else {
            throw VhostUserFailure("the socket's path '\(path)' must have 1 to \(room - 1) bytes; choose a shorter one")
        }
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: name) }
        let bytes = socklen_t(MemoryLayout<sockaddr_un>.size)
        func call(_ body: (UnsafePointer<sockaddr>) -> Int32) -> Int32 {
            unsafe withUnsafePointer(to: &address) {
                unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { unsafe body($0) }
            }
        }
        let made = try fresh()
        var result = unsafe call { unsafe bind(made.number, $0, bytes) }
        if result != 0, lacuna_errno() == EADDRINUSE {
            var information = stat()
            let isSocket = unsafe lstat(path, &information) == 0
                && information.st_mode & mode_t(S_IFMT) == mode_t(S_IFSOCK)
            let probe = try fresh()
            guard isSocket, unsafe call({ unsafe connect(probe.number, $0, bytes) }) != 0, lacuna_errno() == ECONNREFUSED else {
                let what = isSocket ? "somebody answers there" : "a file that is no socket is there"
                throw VhostUserFailure("cannot use the socket \(path): \(what); choose another path")
            }
            unsafe unlink(path)
            result = unsafe call { unsafe bind(made.number, $0, bytes) }
        }
        // Whoever connects decides what the device does: the owner only, from the first moment on.
        guard result == 0, unsafe chmod(path, 0o600) == 0, listen(made.number, 16) == 0 else {
            throw VhostUserFailure("cannot listen at \(path): \(errorText()); choose another path")
        }
        made.setNonBlocking()
        descriptor = made
        self.path = path
    }

    func remove() { unsafe unlink(path) }

    func accept() -> OwnedDescriptor? {
        let peer = lacuna_accept(descriptor.number)
        return peer >= 0 ? OwnedDescriptor(adopting: peer) : nil
    }
}
