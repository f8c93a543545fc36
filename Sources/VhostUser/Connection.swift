// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// A front end's socket: whole messages in, replies out, never waiting.
///
/// Thread rules: the service's thread only.
final class Connection {
    enum Arrival {
        case message(Message)
        /// Not a whole one yet.
        case nothing
        /// The other side closed.
        case end
        /// What came cannot be a message; where the next one would begin is anybody's guess.
        case broken(String)
    }

    /// No message has more descriptors of use; more are closed as they come.
    private static let maximumDescriptors = 64

    let socket: OwnedDescriptor
    private var buffer: [UInt8] = []
    private var header: MessageHeader?
    private var descriptors: [OwnedDescriptor] = []
    private var surplus = 0

    init(_ socket: OwnedDescriptor) { self.socket = socket }

    func receive() -> Arrival {
        while true {
            let wanted = (header.map { MessageHeader.bytes + Int($0.size) } ?? MessageHeader.bytes) - buffer.count
            if wanted > 0 {
                if let arrival = read(wanted) { return arrival }
                continue
            }
            guard let header else {
                if let why = takeHeader() { return .broken(why) }
                continue
            }
            let message = Message(
                request: header.request, wantsReply: header.flags & MessageHeader.needReply != 0,
                payload: Array(buffer.dropFirst(MessageHeader.bytes)), descriptors: descriptors)
            let dropped = surplus
            buffer = []
            descriptors = []
            surplus = 0
            self.header = nil
            guard dropped == 0 else { return .broken("a message with \(dropped + Self.maximumDescriptors) descriptors") }
            return .message(message)
        }
    }

    /// Takes up to `wanted` bytes and the descriptors with them. Nil: some came.
    private func read(_ wanted: Int) -> Arrival? {
        var piece = [UInt8](repeating: 0, count: wanted)
        var numbers = [Int32](repeating: -1, count: Int(LACUNA_MAX_DESCRIPTORS))
        var count: Int32 = 0
        let got = unsafe lacuna_receive(
            socket.number, &piece, wanted, Int32(lacuna_MSG_DONTWAIT), &numbers, &count)
        let code = lacuna_errno()
        for number in numbers[..<Int(count)] {
            let descriptor = OwnedDescriptor(adopting: number)
            if descriptors.count < Self.maximumDescriptors { descriptors.append(descriptor) } else { surplus += 1 }
        }
        if got < 0 {
            if code == EINTR { return nil }
            return code == EAGAIN ? .nothing : .end
        }
        if got == 0 { return buffer.isEmpty ? .end : .broken("the connection ended within a message") }
        buffer += piece[..<got]
        return nil
    }

    /// Reads the header at the front of the buffer; returns what is wrong with it.
    private func takeHeader() -> String? {
        var words: [UInt32] = []
        for word in 0..<3 {
            words.append((0..<4).reversed().reduce(0) { $0 << 8 | UInt32(buffer[4 * word + $1]) })
        }
        let found = MessageHeader(request: words[0], flags: words[1], size: words[2])
        guard found.flags & 3 == MessageHeader.version else { return "version \(found.flags & 3) of the protocol" }
        guard found.flags & MessageHeader.reply == 0 else { return "a reply to nothing that was asked" }
        guard found.size <= MessageHeader.maximumPayload else {
            return "a payload of \(found.size) bytes (at most \(MessageHeader.maximumPayload))"
        }
        header = found
        return nil
    }

    /// False if it cannot be sent at once: the front end is gone, or does not read its replies.
    func reply(_ request: UInt32, _ payload: [UInt8]) -> Bool {
        sendMessage(to: socket, request, flags: MessageHeader.version | MessageHeader.reply, payload) == .sent
    }
}

enum SendOutcome { case sent, full, gone }

/// Sends one whole message without waiting.
func sendMessage(to socket: OwnedDescriptor, _ request: UInt32, flags: UInt32, _ payload: [UInt8] = []) -> SendOutcome {
    var bytes: [UInt8] = []
    bytes.put(request)
    bytes.put(flags)
    bytes.put(UInt32(payload.count))
    bytes += payload
    while true {
        let sent = unsafe lacuna_send(socket.number, bytes, bytes.count, Int32(lacuna_MSG_DONTWAIT), nil, 0)
        if sent == bytes.count { return .sent }
        if sent >= 0 { return .gone }
        switch lacuna_errno() {
        case EINTR: continue
        case EAGAIN: return .full
        default: return .gone
        }
    }
}

/// For deadlines; never goes back.
func monotonicMilliseconds() -> Int64 {
    var now = timespec()
    unsafe clock_gettime(CLOCK_MONOTONIC, &now)
    return Int64(now.tv_sec) * 1000 + Int64(now.tv_nsec) / 1_000_000
}
