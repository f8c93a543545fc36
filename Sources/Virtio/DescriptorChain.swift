// SPDX-License-Identifier: Apache-2.0
public import GuestMemory

/// One piece of a buffer: bytes of guest RAM, within one region.
public struct GuestSegment: Hashable, Sendable {
    public let address: GuestAddress
    /// In bytes, never 0.
    public let length: UInt32
    public init(address: GuestAddress, length: UInt32) {
        self.address = address
        self.length = length
    }
}

/// What a queue needs to know of a chain to take it back. Plain data: a device that keeps a buffer for longer saves it
/// with its own state. A wrong one, from a hostile state, confuses nobody but the driver.
public struct BufferToken: Sendable, Hashable {
    /// The index of the first descriptor (split), or the buffer's id (packed).
    public let head: UInt16
    /// The descriptors of the ring that the chain takes, in a packed queue; 1 in a split one.
    public let slots: UInt16
    public init(head: UInt16, slots: UInt16) {
        self.head = head
        self.slots = slots
    }

    public init(from decoder: inout StateDecoder) throws(StateError) {
        head = try decoder.take()
        slots = try decoder.take()
    }

    public func encode(into encoder: inout StateEncoder) {
        encoder.put(head)
        encoder.put(slots)
    }
}

/// A buffer as the driver made it available: a validated private copy of its descriptors (virtio 1.3, section 2.7.5).
/// The descriptors cannot change any more; the bytes they point at can, at any time.
public struct DescriptorChain: Sendable {
    /// Index of the first descriptor (split) or the buffer's id (packed).
    public let head: UInt16
    /// The chain's name when it is given back.
    public var token: BufferToken { BufferToken(head: head, slots: slots) }
    private let slots: UInt16
    /// What the device may read, in order.
    public let readable: [GuestSegment]
    /// What the device may write, in order.
    public let writable: [GuestSegment]
    /// Bytes in `readable`, at most 2^32.
    public let readableBytes: Int
    /// Bytes in `writable`, at most 2^32.
    public let writableBytes: Int
    let memory: GuestMemory

    init(
        head: UInt16, slots: UInt16 = 1, readable: [GuestSegment], writable: [GuestSegment], memory: GuestMemory
    ) {
        self.head = head
        self.slots = slots
        self.readable = readable
        self.writable = writable
        self.memory = memory
        // Cannot overflow: the queue bounds the sum of all lengths by 2^32.
        readableBytes = readable.reduce(0) { $0 + Int($1.length) }
        writableBytes = writable.reduce(0) { $0 + Int($1.length) }
    }

    /// Reads the readable segments as one run of bytes, from the first byte on. One reader for a chain: a second one
    /// would read bytes again that the guest may have changed.
    public func reader() -> ChainReader { ChainReader(chain: self) }

    /// Copies `bytes` into the writable segments, from the first byte on, as far as there is room. Returns how many
    /// bytes were written: what `VirtQueue.push` wants to know.
    public func write(_ bytes: [UInt8]) -> UInt32 {
        var done = 0
        for segment in writable where done < bytes.count {
            let count = min(Int(segment.length), bytes.count - done)
            guard memory.copyIn(bytes[done..<done + count], at: segment.address) else { break }
            done += count
        }
        return UInt32(clamping: done)
    }
}

/// Why a chain's bytes could not be read.
public enum ChainReadError: Error, Equatable, CustomStringConvertible {
    /// The readable part of the chain is shorter than that.
    case tooShort(wanted: Int, left: Int)
    /// The segment is not RAM: only possible for a chain of another memory.
    case notRAM(GuestAddress)

    public var description: String {
        switch self {
        case .tooShort(let wanted, let left): "\(wanted) bytes wanted from a buffer with \(left) left"
        case .notRAM(let address): "the buffer at \(address) is not guest RAM"
        }
    }
}

/// Goes once over the readable bytes of a chain. It only moves forward and cannot be copied, so that every byte of
/// guest memory is read at most once: what was checked is what is used.
public struct ChainReader: ~Copyable {
    private let memory: GuestMemory
    private let segments: [GuestSegment]
    private var segment = 0
    private var offset = 0
    /// Bytes not read yet.
    public private(set) var remaining: Int

    init(chain: borrowing DescriptorChain) {
        memory = chain.memory
        segments = chain.readable
        remaining = chain.readableBytes
    }

    /// Fills the whole buffer. After an error nothing was consumed.
    public mutating func read(into buffer: UnsafeMutableRawBufferPointer) throws(ChainReadError) {
        guard buffer.count <= remaining else { throw .tooShort(wanted: buffer.count, left: remaining) }
        var done = 0
        while done < buffer.count {
            let current = segments[segment], count = min(Int(current.length) - offset, buffer.count - done)
            // Cannot wrap: the queue checked that the whole segment is RAM.
            let address = GuestAddress(current.address.rawValue &+ UInt64(offset))
            do throws(GuestMemoryError) {
                let piece = unsafe UnsafeMutableRawBufferPointer(rebasing: buffer[done..<done + count])
                try unsafe memory.read(address, into: piece)
            } catch { throw .notRAM(address) }
            done += count
            advance(count)
        }
    }

    /// Takes a little-endian integer.
    public mutating func take<Value: FixedWidthInteger & BitwiseCopyable>(
        _ type: Value.Type = Value.self
    ) throws(ChainReadError) -> Value {
        var value: Value = 0
        try unsafe withUnsafeMutableBytes(of: &value) { (bytes) throws(ChainReadError) in try unsafe read(into: bytes) }
        return Value(littleEndian: value)
    }

    /// Takes `count` bytes. The caller bounds `count`; it is compared with what is left before anything is allocated.
    public mutating func take(bytes count: Int) throws(ChainReadError) -> [UInt8] {
        guard count >= 0, count <= remaining else { throw .tooShort(wanted: count, left: remaining) }
        var bytes = [UInt8](repeating: 0, count: count)
        try fill(&bytes, count: count)
        return bytes
    }

    /// Takes little-endian words into the first `count` elements of `buffer`, which must have as many.
    public mutating func take<Word: FixedWidthInteger & BitwiseCopyable>(
        _ count: Int, into buffer: inout [Word]
    ) throws(ChainReadError) {
        precondition(count >= 0 && count <= buffer.count)
        try fill(&buffer, count: count)
        // Compiled away where the host is little-endian.
        for index in 0..<count where Word(littleEndian: 1) != 1 { buffer[index] = Word(littleEndian: buffer[index]) }
    }

    /// Passes over `count` bytes without reading them.
    public mutating func skip(_ count: Int) throws(ChainReadError) {
        guard count >= 0, count <= remaining else { throw .tooShort(wanted: count, left: remaining) }
        var left = count
        while left > 0 {
            let step = min(Int(segments[segment].length) - offset, left)
            left -= step
            advance(step)
        }
    }

    private mutating func fill<Word: BitwiseCopyable>(_ buffer: inout [Word], count: Int) throws(ChainReadError) {
        let bytes = count * MemoryLayout<Word>.stride
        // The rethrows of the standard library is untyped: the result carries the error out.
        let result: Result<Void, ChainReadError> = unsafe buffer.withUnsafeMutableBytes { whole in
            do throws(ChainReadError) {
                unsafe try read(into: UnsafeMutableRawBufferPointer(rebasing: whole[..<bytes]))
                return .success(())
            } catch { return .failure(error) }
        }
        try result.get()
    }

    /// `count` is at most what is left of the current segment.
    private mutating func advance(_ count: Int) {
        offset += count
        remaining -= count
        if offset == Int(segments[segment].length) {
            segment += 1
            offset = 0
        }
    }
}

extension GuestMemory {
    /// Copies a value out of guest memory with one pass over its bytes, so that no check can see another value than
    /// the use after it.
    func copyOut<Value: BitwiseCopyable>(
        _ address: GuestAddress, into value: inout Value
    ) throws(GuestMemoryError) {
        // The bytes go through an opaque C copy: the compiler cannot read them from the guest a second time.
        try unsafe withUnsafeMutableBytes(of: &value) { (bytes) throws(GuestMemoryError) in
            try unsafe read(address, into: bytes)
        }
    }

    /// False, and nothing written, if it is not all RAM.
    func copyIn(_ bytes: ArraySlice<UInt8>, at address: GuestAddress) -> Bool {
        unsafe bytes.withUnsafeBytes { unsafe (try? write($0, at: address)) != nil }
    }

    /// True if all `bytes` bytes at `address` are RAM of one region.
    func isRAM(_ address: GuestAddress, bytes: Int) -> Bool { unsafe hostPointer(address, bytes: bytes) != nil }
}
