// SPDX-License-Identifier: Apache-2.0
internal import CLinux
internal import Synchronization

/// A connected stream of bytes in both directions, over a file descriptor: a socket, or anything `read` and `writev`
/// work on.
///
/// Every operation that may block has an *idle* limit: it fails with `timedOut` when not a single byte moved for that
/// many milliseconds, however long the whole takes.
///
/// Thread rules: one thread may read while another writes. `shutdown()` and `interrupt()` may be called from any thread
/// at any time. The descriptor is closed when the last reference goes, so it cannot be mistaken for a newer one.
public final class ByteChannel: Sendable {
    /// What the channel is connected to, for messages.
    public let name: String
    private let descriptor: Int32
    /// An eventfd that is readable while an interruption is pending, so that every `poll` here wakes up.
    private let wakeup: Int32
    private let isSocket: Bool
    private let sent = Atomic<UInt64>(0)
    private let received = Atomic<UInt64>(0)
    private let interrupted = Atomic<Bool>(false)
    private let closed = Atomic<Bool>(false)
    /// When waiting has to end, whatever moves meanwhile; 0: never. Monotonic nanoseconds.
    private let deadline = Atomic<UInt64>(0)

    /// Takes over `descriptor`: makes it non-blocking, and closes it in the end (at once if this throws).
    public init(adopting descriptor: Int32, name: String) throws(MigrationError) {
        let flags = lacuna_fcntl_getfl(descriptor)
        guard flags >= 0, lacuna_fcntl_setfl(descriptor, flags | O_NONBLOCK) == 0 else {
            let code = lacuna_errno()
            close(descriptor)
            throw .channelFailed("descriptor \(descriptor) cannot carry a migration", errno: code)
        }
        let wakeup = eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK))
        guard wakeup >= 0 else {
            let code = lacuna_errno()
            close(descriptor)
            throw .channelFailed("cannot make an eventfd", errno: code)
        }
        var kind: Int32 = 0
        var length = socklen_t(MemoryLayout<Int32>.size)
        isSocket = getsockopt(descriptor, SOL_SOCKET, SO_TYPE, &kind, &length) == 0
        self.descriptor = descriptor
        self.wakeup = wakeup
        self.name = name
    }

    deinit {
        close(descriptor)
        close(wakeup)
    }

    /// Two channels connected to each other.
    public static func pair() throws(MigrationError) -> (ByteChannel, ByteChannel) {
        var ends: [Int32] = [0, 0]
        guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends) == 0 else {
            throw .channelFailed("cannot make a socket pair", errno: lacuna_errno())
        }
        let first: ByteChannel
        do {
            first = try ByteChannel(adopting: ends[0], name: "pair")
        } catch {
            close(ends[1])
            throw error
        }
        return (first, try ByteChannel(adopting: ends[1], name: "pair"))
    }

    /// Bytes handed to the kernel so far. What was not handed over cannot reach the peer.
    public var bytesSent: UInt64 { sent.load(ordering: .relaxed) }
    /// Bytes read so far.
    public var bytesReceived: UInt64 { received.load(ordering: .relaxed) }

    // MARK: Ending

    /// Ends the channel in both directions; operations under way on other threads fail with `cancelled`, later ones
    /// too. What was sent before is still delivered.
    public func shutdown() {
        closed.store(true, ordering: .sequentiallyConsistent)
        if isSocket { _ = CLinux.shutdown(descriptor, Int32(SHUT_RDWR)) }
        signalWakeup()
    }

    /// Tells the peer that nothing more will be sent. Reading goes on.
    public func finishWriting() {
        if isSocket { _ = CLinux.shutdown(descriptor, Int32(SHUT_WR)) }
    }

    /// Makes operations under way and later ones fail with `cancelled`, until `clearInterrupt()`. The connection stays.
    public func interrupt() {
        interrupted.store(true, ordering: .sequentiallyConsistent)
        signalWakeup()
    }

    /// An interruption is pending.
    var isInterrupted: Bool { interrupted.load(ordering: .relaxed) }

    /// Ends an interruption, so that a last message can be sent.
    public func clearInterrupt() {
        var count: UInt64 = 0
        _ = CLinux.read(wakeup, &count, 8)
        interrupted.store(false, ordering: .sequentiallyConsistent)
        // A shutdown must go on waking whoever waits.
        if closed.load(ordering: .sequentiallyConsistent) { signalWakeup() }
    }

    private func signalWakeup() {
        var one: UInt64 = 1
        _ = CLinux.write(wakeup, &one, 8)
    }

    /// From here on no wait lasts beyond `milliseconds` from now, however many bytes move: a peer that takes a byte now
    /// and then must not hold the guest up for ever. Nil: only the idle limit counts.
    func setDeadline(milliseconds: Double?) {
        let nanoseconds = milliseconds.map { monotonicNanoseconds() &+ UInt64(max($0, 1) * 1e6) }
        deadline.store(nanoseconds ?? 0, ordering: .relaxed)
    }

    private func checkStopped() throws(MigrationError) {
        if interrupted.load(ordering: .relaxed) || closed.load(ordering: .relaxed) { throw .cancelled }
    }

    // MARK: Writing

    /// Writes all bytes of all buffers, in order. Throws `timedOut`, `peerClosed`, `channelFailed` or `cancelled`; then
    /// `bytesSent` tells how much the kernel took.
    public func writeAll(_ buffers: [UnsafeRawBufferPointer], idleMilliseconds: Int) throws(MigrationError) {
        let vectors = UnsafeMutableBufferPointer<iovec>.allocate(capacity: max(buffers.count, 1))
        defer { vectors.deallocate() }
        for (index, buffer) in buffers.enumerated() {
            let base = UnsafeMutableRawPointer(mutating: buffer.baseAddress)
            vectors.initializeElement(at: index, to: iovec(iov_base: base, iov_len: buffer.count))
        }
        try writeAll(vectors: UnsafeMutableBufferPointer(rebasing: vectors[..<buffers.count]), idleMilliseconds)
    }

    /// Writes all bytes of the vectors, which it uses up. At most 1024 of them.
    func writeAll(vectors: UnsafeMutableBufferPointer<iovec>, _ idleMilliseconds: Int) throws(MigrationError) {
        var first = 0
        while true {
            while first < vectors.count, vectors[first].iov_len == 0 { first += 1 }
            if first == vectors.count { return }
            try checkStopped()
            let count = writeSome(vectors.baseAddress! + first, vectors.count - first)
            if count > 0 {
                _ = sent.add(UInt64(count), ordering: .relaxed)
                var left = count
                while left > 0 {
                    let part = min(left, vectors[first].iov_len)
                    vectors[first].iov_base += part
                    vectors[first].iov_len -= part
                    left -= part
                    if vectors[first].iov_len == 0 { first += 1 }
                }
                continue
            }
            switch lacuna_errno() {
            case EINTR: continue
            case EAGAIN: try wait(for: Int16(POLLOUT), idleMilliseconds, "sending to \(name)")
            case EPIPE, ECONNRESET:
                try checkStopped()
                throw .peerClosed(name)
            case let code: throw .channelFailed("sending to \(name)", errno: code)
            }
        }
    }

    private func writeSome(_ vectors: UnsafeMutablePointer<iovec>, _ count: Int) -> Int {
        guard isSocket else { return writev(descriptor, vectors, Int32(count)) }
        var message = msghdr()
        message.msg_iov = vectors
        message.msg_iovlen = count
        // Without the flag a lost peer would end the whole process with SIGPIPE.
        return sendmsg(descriptor, &message, Int32(MSG_NOSIGNAL))
    }

    // MARK: Reading

    /// Fills the buffer. Throws `timedOut`, `peerClosed` (also if the stream ends within the buffer), `channelFailed`
    /// or `cancelled`.
    public func readExactly(into buffer: UnsafeMutableRawBufferPointer, idleMilliseconds: Int) throws(MigrationError) {
        var filled = 0
        while filled < buffer.count {
            var vector = iovec(iov_base: buffer.baseAddress! + filled, iov_len: buffer.count - filled)
            filled += try readSome(vectors: &vector, 1, idleMilliseconds)
        }
    }

    /// Reads at least one byte; returns how many. Throws as `readExactly` does; `peerClosed` at the stream's end.
    public func readSome(into buffer: UnsafeMutableRawBufferPointer, idleMilliseconds: Int) throws(MigrationError) -> Int {
        var vector = iovec(iov_base: buffer.baseAddress, iov_len: buffer.count)
        return try readSome(vectors: &vector, 1, idleMilliseconds)
    }

    /// Reads at least one byte into the vectors; returns how many.
    func readSome(
        vectors: UnsafeMutablePointer<iovec>, _ count: Int, _ idleMilliseconds: Int
    ) throws(MigrationError) -> Int {
        while true {
            try checkStopped()
            let got = readv(descriptor, vectors, Int32(count))
            if got > 0 {
                _ = received.add(UInt64(got), ordering: .relaxed)
                return got
            }
            if got == 0 {
                try checkStopped()
                throw .peerClosed(name)
            }
            switch lacuna_errno() {
            case EINTR: continue
            case EAGAIN: try wait(for: Int16(POLLIN), idleMilliseconds, "waiting for \(name)")
            case ECONNRESET:
                try checkStopped()
                throw .peerClosed(name)
            case let code: throw .channelFailed("reading from \(name)", errno: code)
            }
        }
    }

    /// True if a read would return at once, with bytes or with the end of the stream.
    var isReadable: Bool {
        var entry = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
        return poll(&entry, 1, 0) > 0
    }

    /// Reads and drops what still comes, until the peer closes or the time is over: closing a TCP socket with unread
    /// bytes would reset the connection and take our last message from the peer.
    func drain(milliseconds limit: Int) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 16, alignment: 16)
        defer { buffer.deallocate() }
        let start = monotonicNanoseconds()
        while true {
            let left = limit - Int(milliseconds(since: start))
            var vector = iovec(iov_base: buffer.baseAddress, iov_len: buffer.count)
            guard left > 0, (try? readSome(vectors: &vector, 1, left)) != nil else { return }
        }
    }

    // MARK: Waiting

    /// Sleeps, but throws `cancelled` at once when interrupted or shut down.
    func sleep(nanoseconds: UInt64) throws(MigrationError) {
        let limit = Int(min((nanoseconds &+ 999_999) / 1_000_000, UInt64(Int32.max)))
        _ = try pollUntilReady(events: 0, limit)
    }

    private func wait(for events: Int16, _ idleMilliseconds: Int, _ what: String) throws(MigrationError) {
        let end = deadline.load(ordering: .relaxed)
        var limit = idleMilliseconds
        if end > 0 {
            let now = monotonicNanoseconds()
            limit = min(limit, end > now ? Int((end - now) / 1_000_000) + 1 : 0)
        }
        guard limit > 0, try pollUntilReady(events: events, limit) else {
            throw limit < idleMilliseconds ? .tooSlow(what) : .timedOut(what, milliseconds: idleMilliseconds)
        }
    }

    /// False: the time is over. Without `events` only an interruption ends the wait early.
    private func pollUntilReady(events: Int16, _ limit: Int) throws(MigrationError) -> Bool {
        let start = monotonicNanoseconds()
        while true {
            // A negative descriptor is one that poll() leaves alone.
            var entries = (
                pollfd(fd: wakeup, events: Int16(POLLIN), revents: 0),
                pollfd(fd: events == 0 ? -1 : descriptor, events: events, revents: 0)
            )
            let left = max(0, min(limit, Int(Int32.max)) - Int(milliseconds(since: start)))
            let ready = withUnsafeMutablePointer(to: &entries) {
                $0.withMemoryRebound(to: pollfd.self, capacity: 2) { poll($0, 2, Int32(left)) }
            }
            try checkStopped()
            if ready < 0 {
                let code = lacuna_errno()
                if code == EINTR { continue }
                throw .channelFailed("poll", errno: code)
            }
            if entries.1.revents != 0 { return true }
            if ready == 0, left == 0 || Int(milliseconds(since: start)) >= limit { return false }
        }
    }
}
