// SPDX-License-Identifier: Apache-2.0
import CLinux
import GuestMemory
import TestSupport
import VhostUser

/// A file in memory, open in this process.
package final class MemoryFile: Sendable {
    package let descriptor: Int32
    package let size: UInt64
    package init(_ size: UInt64, name: String = "lacuna-guest") {
        descriptor = lacuna_memfd(name)
        self.size = size
        precondition(descriptor >= 0 && ftruncate(descriptor, off_t(size)) == 0)
    }
    deinit { close(descriptor) }
    package var populatedBytes: Int {
        var information = stat()
        precondition(fstat(descriptor, &information) == 0)
        return Int(information.st_blocks) * 512
    }
}

/// A VMM as the service sees it: sends messages, right or wrong, with descriptors. Its guest memory is a file, seen
/// through `memory` here.
package final class FrontEnd {
    package static let userBase: UInt64 = 0x7f00_0000_0000

    package let socket: Int32
    package let file: MemoryFile
    package let memory: GuestMemory
    package private(set) var calls: [Int: Int32] = [:]
    package private(set) var kicks: [Int: Int32] = [:]
    package private(set) var queues: [Int: MockQueue] = [:]
    package private(set) var backendChannel: Int32 = -1
    private var arena: UInt64 = 1 << 20

    /// Waits until the service listens.
    package init?(_ path: String, file: MemoryFile? = nil) {
        guard let made = connectTo(path, packets: false) else { return nil }
        socket = made
        self.file = file ?? MemoryFile(16 << 20)
        memory = try! GuestMemory(
            sharing: [
                SharedMapping(
                    range: GuestRange(start: GuestAddress(0), size: self.file.size), descriptor: self.file.descriptor, offset: 0)
            ], limit: 1 << 32)
        // A test that waits for ever tells nothing.
        var limit = timeval(tv_sec: 20, tv_usec: 0)
        setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    }

    deinit {
        close(socket)
        for descriptor in calls.values { close(descriptor) }
        for descriptor in kicks.values { close(descriptor) }
        if backendChannel >= 0 { close(backendChannel) }
    }

    /// Any bytes with any descriptors. False if the service is gone.
    @discardableResult
    package func sendRaw(_ bytes: [UInt8], _ descriptors: [Int32] = []) -> Bool {
        lacuna_send(socket, bytes, bytes.count, 0, descriptors, Int32(descriptors.count)) == bytes.count
    }

    @discardableResult
    package func send(_ request: UInt32, _ payload: [UInt8] = [], _ descriptors: [Int32] = [], flags: UInt32 = 1) -> Bool {
        var message = ByteBuilder()
        message.put(request)
        message.put(flags)
        message.put(UInt32(payload.count))
        return sendRaw(message.bytes + payload, descriptors)
    }

    /// The next reply's request and payload; nil if the service closed or does not answer.
    package func receive() -> (request: UInt32, payload: [UInt8])? {
        func exactly(_ count: Int) -> [UInt8]? {
            var bytes = [UInt8](repeating: 0, count: count), done = 0
            while done < count {
                let got = bytes.withUnsafeMutableBytes { recv(socket, $0.baseAddress! + done, count - done, 0) }
                if got <= 0 { return nil }
                done += got
            }
            return bytes
        }
        guard let header = exactly(12) else { return nil }
        let words = (0..<3).map { word in (0..<4).reversed().reduce(UInt32(0)) { $0 << 8 | UInt32(header[4 * word + $1]) } }
        guard words[1] & 7 == 5, let payload = exactly(Int(words[2])) else { return nil }
        return (words[0], payload)
    }

    /// A request with a reply of one word.
    package func ask(_ request: UInt32, _ payload: [UInt8] = []) -> UInt64? {
        send(request, payload)
        guard let reply = receive(), reply.request == request, reply.payload.count == 8 else { return nil }
        return reply.payload.reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }

    /// A request with need_reply; its code.
    package func acknowledged(_ request: UInt32, _ payload: [UInt8] = [], _ descriptors: [Int32] = []) -> UInt64? {
        send(request, payload, descriptors, flags: 1 | 8)
        guard let reply = receive(), reply.request == request, reply.payload.count == 8 else { return nil }
        return reply.payload.reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }

    package static func words(_ list: UInt64...) -> [UInt8] {
        var bytes = ByteBuilder()
        for word in list { bytes.put(word) }
        return bytes.bytes
    }
    package static func halves(_ list: UInt32...) -> [UInt8] {
        var bytes = ByteBuilder()
        for word in list { bytes.put(word) }
        return bytes.bytes
    }

    package func memoryTable(size: UInt64? = nil) -> [UInt8] {
        Self.halves(1, 0) + Self.words(0, size ?? file.size, Self.userBase, 0)
    }

    package func allocate(_ bytes: UInt64, alignment: UInt64 = 16) -> UInt64 {
        arena = (arena + alignment - 1) & ~(alignment - 1)
        defer { arena += bytes }
        return arena
    }

    /// Everything up to a running device with these rings, as a real front end does it. True if all was accepted.
    package func start(features: UInt64, rings: [Int], fresh: Bool = true) -> Bool {
        send(3)
        guard let offered = ask(1), features & ~offered == 0, let protocolFeatures = ask(15) else { return false }
        guard acknowledgedLate(16, Self.words(protocolFeatures)) else { return false }
        var pair: [Int32] = [0, 0]
        guard socketpair(AF_UNIX, lacuna_SOCK_STREAM_CLOEXEC, 0, &pair) == 0 else { return false }
        guard acknowledged(21, [], [pair[1]]) == 0 else { return false }
        close(pair[1])
        if backendChannel >= 0 { close(backendChannel) }
        backendChannel = pair[0]
        guard acknowledged(2, Self.words(features | 1 << 30)) == 0,
            acknowledged(5, memoryTable(), [file.descriptor]) == 0
        else { return false }
        for ring in rings { guard setUp(ring, fresh: fresh) else { return false } }
        return acknowledged(39, Self.words(15)) == 0
    }

    private func acknowledgedLate(_ request: UInt32, _ payload: [UInt8]) -> Bool {
        // Before REPLY_ACK is negotiated there is no acknowledgement.
        send(request, payload)
    }

    /// Sets a ring up, in new places of guest memory or, for a front end that takes over, in the old ones.
    package func setUp(_ index: Int, size: UInt16 = 32, fresh: Bool = true) -> Bool {
        if fresh || queues[index] == nil {
            queues[index] = MockQueue(
                memory: memory, base: allocate(MockQueue.bytes(size: size), alignment: 4096), size: size)
        }
        let queue = queues[index]!, number = UInt32(index)
        for old in [calls[index], kicks[index]].compactMap({ $0 }) { close(old) }
        calls[index] = eventfd(0, lacuna_EFD_FLAGS)
        kicks[index] = eventfd(0, lacuna_EFD_FLAGS)
        return acknowledged(8, Self.halves(number, UInt32(size))) == 0
            && acknowledged(10, Self.halves(number, UInt32(queue.usedIndex))) == 0
            && acknowledged(9, addresses(index)) == 0
            && acknowledged(13, Self.words(UInt64(index)), [calls[index]!]) == 0
            // What an earlier descriptor may have missed.
            && waitFor(calls[index]!, milliseconds: 0)
            && acknowledged(12, Self.words(UInt64(index)), [kicks[index]!]) == 0
            && acknowledged(18, Self.halves(number, 1)) == 0
    }

    package func addresses(_ index: Int) -> [UInt8] {
        let queue = queues[index]!
        return Self.halves(UInt32(index), 0)
            + Self.words(
                Self.userBase + queue.descriptors, Self.userBase + queue.used, Self.userBase + queue.available, queue.used)
    }

    package func adopt(_ queue: MockQueue, _ index: Int) { queues[index] = queue }

    /// Makes a buffer available, kicks, and waits until it comes back; the written length, or nil if it did not.
    package func transfer(_ index: Int, _ readable: [[UInt8]], writable: [Int] = []) -> UInt32? {
        let queue = queues[index]!
        var list = readable.map { bytes in
            let place = allocate(UInt64(bytes.count))
            memory.poke(bytes, at: place)
            return MockDescriptor(place, UInt32(bytes.count))
        }
        list += writable.map { MockDescriptor(allocate(UInt64($0)), UInt32($0), flags: DescriptorFlag.write) }
        queue.publish(queue.chain(list))
        kick(index)
        guard waitFor(calls[index]!) else { return nil }
        return queue.takeUsed().first?.written
    }

    package func kick(_ index: Int) {
        var one: UInt64 = 1
        write(kicks[index]!, &one, 8)
    }

    /// Waits for an event, and takes it.
    package func waitFor(_ descriptor: Int32, milliseconds: Int32 = 20000) -> Bool {
        var polled = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
        guard poll(&polled, 1, milliseconds) == 1 else { return false }
        var buffer: UInt64 = 0
        return read(descriptor, &buffer, 8) == 8
    }

    /// Waits for a configuration change.
    package func awaitConfigurationChange() -> Bool {
        var polled = pollfd(fd: backendChannel, events: Int16(POLLIN), revents: 0)
        guard poll(&polled, 1, 20000) == 1 else { return false }
        var header = [UInt8](repeating: 0, count: 12)
        return recv(backendChannel, &header, 12, 0) == 12 && header[0] == 2
    }

    /// Whether a configuration change is there.
    package var hasConfigurationChange: Bool {
        var polled = pollfd(fd: backendChannel, events: Int16(POLLIN), revents: 0)
        return poll(&polled, 1, 0) == 1
    }

    /// Takes the configuration changes that are there.
    package func takeConfigurationChanges() {
        var bin = [UInt8](repeating: 0, count: 4096)
        while recv(backendChannel, &bin, bin.count, lacuna_MSG_DONTWAIT) > 0 {}
    }

    package func configuration(_ offset: UInt32) -> UInt32? { configuration(offset, 4).map { Self.number($0) } }

    package func configuration(_ offset: UInt32, _ count: Int) -> [UInt8]? {
        send(24, Self.halves(offset, UInt32(count), 0) + [UInt8](repeating: 0, count: count))
        guard let reply = receive(), reply.payload.count == 12 + count else { return nil }
        return Array(reply.payload[12...])
    }

    package static func number(_ bytes: [UInt8]) -> UInt32 { bytes.reversed().reduce(0) { $0 << 8 | UInt32($1) } }
}

/// Connects to a socket as soon as somebody listens there.
package func connectTo(_ path: String, packets: Bool) -> Int32? {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: Array(path.utf8)) }
    for _ in 0..<2000 {
        let made = socket(AF_UNIX, packets ? lacuna_SOCK_SEQPACKET_CLOEXEC : lacuna_SOCK_STREAM_CLOEXEC, 0)
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                connect(made, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
        if result == 0 { return made }
        close(made)
        // The service is another thread or process: there is nothing to wait for but its socket.
        sleep(milliseconds: 5)
    }
    return nil
}

/// A service on a thread of its own.
package final class RunningService {
    package let service: VhostUserService
    package let folder: String
    package let log = Tally()
    private let thread: HostThread

    package var socket: String { folder + "/s" }
    package var hintSocket: String { folder + "/h" }

    package init(target: UInt32 = 0, limit: UInt64 = 1 << 32) throws {
        var template = Array("/tmp/lacuna-vu.XXXXXX".utf8CString)
        precondition(mkdtemp(&template) != nil)
        folder = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        var options = VhostUserService.Options(socket: folder + "/s", hintSocket: folder + "/h")
        options.target = target
        options.addressLimit = limit
        let log = log
        let service = try VhostUserService(options) { _ in log.add() }
        self.service = service
        thread = HostThread { try! service.run() }
    }

    package func stop() {
        service.stop()
        thread.join()
    }
    deinit {
        unlink(socket)
        unlink(hintSocket)
        rmdir(folder)
    }
}
