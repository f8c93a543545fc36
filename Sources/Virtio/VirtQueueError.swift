// SPDX-License-Identifier: Apache-2.0
public import GuestMemory

/// What a driver did wrong with a split virtqueue. After any of these the queue is broken until the driver resets the
/// device.
public enum VirtQueueError: Error, Equatable, Sendable, CustomStringConvertible {
    /// The parts of a split queue (virtio 1.3, section 2.7).
    public enum Part: String, Sendable {
        case descriptors = "descriptor table"
        case available = "available ring"
        case used = "used ring"
    }

    // Set-up.
    /// Not a power of two, 0, or more than the device's maximum.
    case badSize(UInt32, maximum: UInt16)
    case misaligned(Part, GuestAddress)
    case notRAM(Part, GuestAddress)
    /// Saved counters with more buffers outstanding than the queue has descriptors.
    case badCounters(nextAvailable: UInt16, nextUsed: UInt16)

    // The available ring.
    /// More entries than the queue has descriptors became available.
    case availableIndexJumped(from: UInt16, to: UInt16)
    case headOutOfRange(UInt16)

    // A chain, named by its head.
    case nextOutOfRange(head: UInt16, next: UInt16)
    /// More descriptors than the table holds: it goes round.
    case loop(head: UInt16)
    case readableAfterWritable(head: UInt16)
    case zeroLength(head: UInt16)
    /// More than 2^32 bytes in all.
    case tooLong(head: UInt16)
    case bufferNotRAM(head: UInt16, GuestAddress, length: UInt32)
    /// An indirect descriptor without `VIRTIO_F_INDIRECT_DESC` negotiated.
    case indirectNotNegotiated(head: UInt16)
    case nestedIndirect(head: UInt16)
    case indirectWithNext(head: UInt16)
    /// Empty, not a multiple of 16 bytes, or more than `VirtQueue.maximumIndirectEntries` descriptors.
    case badIndirectSize(head: UInt16, bytes: UInt32)
    case indirectTableNotRAM(head: UInt16, GuestAddress)

    public var description: String {
        switch self {
        case .badSize(let size, let maximum):
            "a queue of \(size) descriptors (a power of two up to \(maximum) is possible)"
        case .misaligned(let part, let address): "the \(part.rawValue) at \(address) is not aligned"
        case .notRAM(let part, let address): "the \(part.rawValue) at \(address) is not in guest RAM"
        case .badCounters(let available, let used): "counters \(available) and \(used) too far apart"
        case .availableIndexJumped(let from, let to): "the available index jumped from \(from) to \(to)"
        case .headOutOfRange(let head): "there is no descriptor \(head)"
        case .nextOutOfRange(let head, let next): "chain \(head): there is no descriptor \(next)"
        case .loop(let head): "chain \(head): it never ends"
        case .readableAfterWritable(let head): "chain \(head): a readable descriptor after a writable one"
        case .zeroLength(let head): "chain \(head): an empty descriptor"
        case .tooLong(let head): "chain \(head): more than 2^32 bytes"
        case .bufferNotRAM(let head, let address, let length):
            "chain \(head): \(length) bytes at \(address) are not guest RAM"
        case .indirectNotNegotiated(let head): "chain \(head): indirect descriptors were not negotiated"
        case .nestedIndirect(let head): "chain \(head): an indirect descriptor in an indirect table"
        case .indirectWithNext(let head): "chain \(head): an indirect descriptor with a next one"
        case .badIndirectSize(let head, let bytes): "chain \(head): an indirect table of \(bytes) bytes"
        case .indirectTableNotRAM(let head, let address):
            "chain \(head): the indirect table at \(address) is not in guest RAM"
        }
    }
}
