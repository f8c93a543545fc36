// SPDX-License-Identifier: Apache-2.0

/// Requests of the front end, by the numbers of the vhost-user specification (QEMU, docs/interop/vhost-user.rst).
enum Request: UInt32, CaseIterable {
    case getFeatures = 1
    case setFeatures = 2
    case setOwner = 3
    case resetOwner = 4
    case setMemoryTable = 5
    case setLogBase = 6
    case setLogDescriptor = 7
    case setRingSize = 8
    case setRingAddress = 9
    case setRingBase = 10
    case getRingBase = 11
    case setRingKick = 12
    case setRingCall = 13
    case setRingError = 14
    case getProtocolFeatures = 15
    case setProtocolFeatures = 16
    case getQueueCount = 17
    case setRingEnable = 18
    case setBackendChannel = 21
    case getConfiguration = 24
    case setConfiguration = 25
    case resetDevice = 34
    case getMaximumMemorySlots = 36
    case addMemoryRegion = 37
    case removeMemoryRegion = 38
    case setStatus = 39
    case getStatus = 40

    /// Whether a reply with a payload of its own follows, besides the acknowledgement of any request.
    var hasReply: Bool {
        switch self {
        case .getFeatures, .getRingBase, .getProtocolFeatures, .getQueueCount, .getConfiguration,
            .getMaximumMemorySlots, .getStatus:
            true
        default: false
        }
    }
}

/// Bits of the virtio feature word that are vhost's own.
enum VhostFeature {
    /// `VHOST_F_LOG_ALL`: writes to guest memory are entered into the log.
    static let logAll: UInt64 = 1 << 26
    /// `VHOST_USER_F_PROTOCOL_FEATURES`.
    static let protocolFeatures: UInt64 = 1 << 30
}

/// `VHOST_USER_PROTOCOL_F_…`, as masks.
enum ProtocolFeature {
    static let multiqueue: UInt64 = 1 << 0
    static let sharedLog: UInt64 = 1 << 1
    static let replyAck: UInt64 = 1 << 3
    static let backendChannel: UInt64 = 1 << 5
    static let configuration: UInt64 = 1 << 9
    static let resetDevice: UInt64 = 1 << 13
    static let memorySlots: UInt64 = 1 << 15
    static let status: UInt64 = 1 << 16

    static let offered =
        multiqueue | sharedLog | replyAck | backendChannel | configuration | resetDevice | memorySlots
        | status
}

/// The header of every message, in either direction: three little-endian words.
struct MessageHeader {
    static let bytes = 12
    static let version: UInt32 = 1
    static let reply: UInt32 = 1 << 2
    static let needReply: UInt32 = 1 << 3
    /// The largest payload: a configuration space of 256 bytes, or the memory tables of today's front ends, with room.
    static let maximumPayload: UInt32 = 4096

    let request: UInt32
    let flags: UInt32
    let size: UInt32
}

/// One whole message of the front end. Its descriptors close with it, unless somebody keeps them.
struct Message {
    let request: UInt32
    let wantsReply: Bool
    let payload: [UInt8]
    let descriptors: [OwnedDescriptor]
}

/// Why a message was not obeyed. The connection goes on.
struct Refusal: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

/// Reads a payload from the front, little-endian; what is not there is a refusal.
struct PayloadReader {
    private let bytes: [UInt8]
    private var place = 0

    init(_ message: Message) { bytes = message.payload }

    var remaining: Int { bytes.count - place }

    mutating func take<Value: FixedWidthInteger & UnsignedInteger>(
        _ type: Value.Type = Value.self
    ) throws(Refusal) -> Value {
        let count = MemoryLayout<Value>.size
        guard remaining >= count else { throw Refusal("the payload of \(bytes.count) bytes is too short") }
        var value: Value = 0
        for index in (0..<count).reversed() { value = value << 8 | Value(truncatingIfNeeded: bytes[place + index]) }
        place += count
        return value
    }

    mutating func take(bytes count: Int) throws(Refusal) -> ArraySlice<UInt8> {
        guard count >= 0, count <= remaining else { throw Refusal("the payload of \(bytes.count) bytes is too short") }
        place += count
        return bytes[place - count..<place]
    }

    /// To be called when everything was taken.
    func finish() throws(Refusal) {
        guard remaining == 0 else { throw Refusal("the payload has \(remaining) bytes too many") }
    }
}

extension Array<UInt8> {
    mutating func put<Value: FixedWidthInteger & UnsignedInteger>(_ value: Value) {
        for shift in 0..<MemoryLayout<Value>.size { append(UInt8(truncatingIfNeeded: value >> Value(8 * shift))) }
    }
}

/// Lines for the operator, so many a second that a hostile peer cannot fill a disk.
struct RateLimitedLog {
    private static let linesPerSecond = 20
    private let sink: @Sendable (String) -> Void
    private var second: Int64 = -1
    private var lines = 0
    private var suppressed = 0

    init(_ sink: @escaping @Sendable (String) -> Void) { self.sink = sink }

    mutating func callAsFunction(_ line: String) {
        let now = monotonicMilliseconds() / 1000
        if now != second {
            if suppressed > 0 { sink("\(suppressed) more messages like these") }
            (second, lines, suppressed) = (now, 0, 0)
        }
        lines += 1
        if lines <= Self.linesPerSecond { sink(line) } else { suppressed += 1 }
    }
}
