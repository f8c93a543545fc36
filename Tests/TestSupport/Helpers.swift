// SPDX-License-Identifier: Apache-2.0
import Glibc
public import GuestMemory
import Synchronization

/// A seeded generator (SplitMix64): a failing case runs again from its seed.
public struct SeededGenerator: RandomNumberGenerator, Sendable {
    private var state: UInt64
    public init(seed: UInt64) { state = seed }

    public mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var z = state
        z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
        z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
        return z ^ (z >> 31)
    }

    /// A number of a random magnitude, so that small and huge ones both turn up.
    public mutating func anyMagnitude() -> UInt64 { next() >> UInt64.random(in: 0..<64, using: &self) }

    public mutating func bytes(_ count: Int) -> [UInt8] { (0..<count).map { _ in UInt8(truncatingIfNeeded: next()) } }
}

/// A thread of its own, for code that blocks: the threads of Swift's tasks must not.
public final class HostThread {
    private final class Body {
        let run: @Sendable () -> Void
        init(_ run: @escaping @Sendable () -> Void) { self.run = run }
    }
    private var thread = pthread_t()

    public init(_ run: @escaping @Sendable () -> Void) {
        let body = Unmanaged.passRetained(Body(run))
        let code = pthread_create(
            &thread, nil,
            { argument in
                Unmanaged<Body>.fromOpaque(argument!).takeRetainedValue().run()
                return nil
            }, body.toOpaque())
        precondition(code == 0, "pthread_create")
    }

    /// To be called once.
    public func join() { pthread_join(thread, nil) }
}

/// Counts across threads.
public final class Tally: Sendable {
    private let count = Atomic<Int>(0)
    public init() {}
    public func add() { count.add(1, ordering: .sequentiallyConsistent) }
    public var value: Int { count.load(ordering: .sequentiallyConsistent) }
}

public func sleep(milliseconds: UInt32) { usleep(milliseconds * 1000) }

/// How many descriptors of a process are open on a file whose name begins so.
public func openDescriptors(to name: String, process: String = "self") -> Int {
    guard let folder = opendir("/proc/\(process)/fd") else { return -1 }
    defer { closedir(folder) }
    var count = 0
    while let entry = readdir(folder) {
        let number = withUnsafeBytes(of: &entry.pointee.d_name) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
        var target = [UInt8](repeating: 0, count: 4096)
        let bytes = target.withUnsafeMutableBytes {
            readlink("/proc/\(process)/fd/\(number)", $0.baseAddress!.assumingMemoryBound(to: CChar.self), $0.count)
        }
        if bytes > 0, String(decoding: target[..<bytes], as: UTF8.self).hasPrefix(name) { count += 1 }
    }
    return count
}

/// The whole contents of a file.
public func contents(of path: String) -> [UInt8]? {
    guard let file = fopen(path, "rb") else { return nil }
    defer { fclose(file) }
    var bytes: [UInt8] = [], piece = [UInt8](repeating: 0, count: 65536)
    while true {
        let count = fread(&piece, 1, piece.count, file)
        if count == 0 { return bytes }
        bytes += piece[..<count]
    }
}

extension GuestMemory {
    /// 4 MiB from 0, a hole of 4 MiB, and 2 MiB more: 2560 page frames, 1536 of them RAM.
    public static func withHole() -> GuestMemory {
        try! GuestMemory(ranges: [
            GuestRange(start: GuestAddress(0), size: 4 << 20),
            GuestRange(start: GuestAddress(8 << 20), size: 2 << 20),
        ])
    }

    /// Writes as the guest would: into RAM, without the VMM's log.
    public func poke(_ bytes: [UInt8], at address: UInt64) {
        guard !bytes.isEmpty else { return }
        let host = hostPointer(GuestAddress(address), bytes: bytes.count)!
        bytes.withUnsafeBytes { host.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
    }
    public func poke<Value: FixedWidthInteger & BitwiseCopyable>(_ value: Value, at address: UInt64) {
        hostPointer(GuestAddress(address), bytes: MemoryLayout<Value>.size)!.storeBytes(of: value, as: Value.self)
    }
    public func peek(_ address: UInt64, count: Int) -> [UInt8] {
        let host = hostPointer(GuestAddress(address), bytes: count)!
        return Array(UnsafeRawBufferPointer(start: host, count: count))
    }
    public func peek<Value: FixedWidthInteger & BitwiseCopyable>(
        _ address: UInt64, as type: Value.Type = Value.self
    ) -> Value {
        hostPointer(GuestAddress(address), bytes: MemoryLayout<Value>.size)!.loadUnaligned(as: Value.self)
    }
}

/// Little-endian bytes, joined.
public struct ByteBuilder {
    public private(set) var bytes: [UInt8] = []
    public init() {}
    public mutating func put<Value: FixedWidthInteger>(_ value: Value) {
        withUnsafeBytes(of: value.littleEndian) { bytes += $0 }
    }
}
