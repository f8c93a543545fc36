// SPDX-License-Identifier: Apache-2.0

/// Saved state that does not say what its reader expects: cut short, too long, or with a value out of range.
public struct StateError: Error, Equatable, CustomStringConvertible {
    public let what: String
    public init(_ what: String) { self.what = what }
    public var description: String { "saved state: \(what)" }
}

/// Writes plain values as little-endian bytes, for device state and stream sections.
public struct StateEncoder: Sendable {
    public private(set) var bytes: [UInt8] = []
    public init() {}

    public mutating func put<Value: FixedWidthInteger>(_ value: Value) {
        var little = value.littleEndian
        for _ in 0..<Value.bitWidth / 8 {
            bytes.append(UInt8(truncatingIfNeeded: little))
            little >>= 8
        }
    }
    public mutating func put(_ value: Bool) { put(UInt8(value ? 1 : 0)) }
    /// A length (32 bits) and the bytes.
    public mutating func put(_ blob: [UInt8]) {
        put(UInt32(blob.count))
        bytes += blob
    }
    public mutating func put(_ text: String) { put(Array(text.utf8)) }
}

/// Reads what `StateEncoder` wrote. The bytes are untrusted: every read is checked against what is left.
public struct StateDecoder: Sendable {
    private let bytes: [UInt8]
    private var position = 0
    public init(_ bytes: [UInt8]) { self.bytes = bytes }

    public mutating func take<Value: FixedWidthInteger>(_ type: Value.Type = Value.self) throws(StateError) -> Value {
        let size = Value.bitWidth / 8
        guard bytes.count - position >= size else { throw StateError("it ends too early") }
        var value: UInt64 = 0
        for offset in (0..<size).reversed() { value = value << 8 | UInt64(bytes[position + offset]) }
        position += size
        return Value(truncatingIfNeeded: value)
    }
    public mutating func takeBool() throws(StateError) -> Bool {
        switch try take(UInt8.self) {
        case 0: return false
        case 1: return true
        case let other: throw StateError("\(other) is no truth value")
        }
    }
    /// A blob of at most `limit` bytes.
    public mutating func takeBlob(limit: Int) throws(StateError) -> [UInt8] {
        let count = Int(try take(UInt32.self))
        guard count <= limit else { throw StateError("a part of \(count) bytes, more than the \(limit) allowed") }
        guard bytes.count - position >= count else { throw StateError("it ends too early") }
        defer { position += count }
        return Array(bytes[position..<position + count])
    }
    public mutating func takeString(limit: Int) throws(StateError) -> String {
        String(decoding: try takeBlob(limit: limit), as: UTF8.self)
    }
    /// To be called last: says whether anything is left over.
    public func finish() throws(StateError) {
        guard position == bytes.count else { throw StateError("\(bytes.count - position) bytes left over") }
    }
}
