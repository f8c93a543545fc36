// SPDX-License-Identifier: Apache-2.0

/// Bytes in a page of the balloon protocol and of the dirty log, and the shift that goes with it.
public let pageSize = 4096
public let pageShift: UInt64 = 12

/// A guest-physical address (GPA), in bytes.
public struct GuestAddress: RawRepresentable, Hashable, Comparable, Sendable, CustomStringConvertible {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }
    public init(_ value: UInt64) { rawValue = value }

    public static func < (a: GuestAddress, b: GuestAddress) -> Bool { a.rawValue < b.rawValue }
    public var pageFrame: PageFrameNumber { PageFrameNumber(rawValue >> pageShift) }
    public var description: String { "0x" + String(rawValue, radix: 16) }

    /// The address `bytes` further on, or nil where that leaves the 64-bit address space.
    public func advanced(by bytes: UInt64) -> GuestAddress? {
        let (sum, overflow) = rawValue.addingReportingOverflow(bytes)
        return overflow ? nil : GuestAddress(sum)
    }
}

/// The number of a 4 KiB page of guest-physical memory: GPA >> 12.
public struct PageFrameNumber: RawRepresentable, Hashable, Comparable, Sendable {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }
    public init(_ value: UInt64) { rawValue = value }

    public static func < (a: PageFrameNumber, b: PageFrameNumber) -> Bool { a.rawValue < b.rawValue }
    /// The page's first byte. Page numbers above 2^52 do not exist; their upper bits are dropped.
    public var address: GuestAddress { GuestAddress(rawValue << pageShift) }
}

/// A run of guest-physical memory: `start` and `size` in bytes, both multiples of the page size.
public struct GuestRange: Hashable, Sendable {
    public let start: GuestAddress
    public let size: UInt64
    public init(start: GuestAddress, size: UInt64) {
        self.start = start
        self.size = size
    }
    public var pages: Range<Int> { Int(start.rawValue >> pageShift)..<Int((start.rawValue + size) >> pageShift) }
}
