// SPDX-License-Identifier: Apache-2.0
internal import GuestMemory

/// The front end's memory: files, where they are in the guest, and where the front end has them mapped.
struct MemoryTable {
    /// Slots: what `GET_MAX_MEM_SLOTS` says.
    static let maximumRegions = 256
    /// Bytes of one region in a message.
    static let entryBytes = 32

    struct Region {
        let range: GuestRange
        /// In the front end's address space.
        let userAddress: UInt64
        let offset: UInt64
        let file: OwnedDescriptor
    }

    private(set) var regions: [Region] = []

    var mappings: [SharedMapping] {
        regions.map { SharedMapping(range: $0.range, descriptor: $0.file.number, offset: $0.offset) }
    }

    /// The guest's address for one of the front end's, or nil.
    func guestAddress(ofUser address: UInt64) -> GuestAddress? {
        for region in regions where address >= region.userAddress && address - region.userAddress < region.range.size {
            // Cannot overflow: `add` saw to the end of each range.
            return GuestAddress(region.range.start.rawValue + (address - region.userAddress))
        }
        return nil
    }

    /// Reads one `struct` of a region: guest address, size, user address, offset in the file.
    static func read(_ reader: inout PayloadReader, file: OwnedDescriptor) throws(Refusal) -> Region {
        let guest = try reader.take(UInt64.self), size = try reader.take(UInt64.self)
        let user = try reader.take(UInt64.self), offset = try reader.take(UInt64.self)
        guard guest.addingReportingOverflow(size).overflow == false, user.addingReportingOverflow(size).overflow == false
        else { throw Refusal("a region that goes beyond the address space") }
        return Region(
            range: GuestRange(start: GuestAddress(guest), size: size), userAddress: user, offset: offset, file: file)
    }

    /// A table with `region` besides. `GuestMemory` checks the ranges.
    mutating func add(_ region: Region) throws(Refusal) {
        guard regions.count < Self.maximumRegions else { throw Refusal("more than \(Self.maximumRegions) regions") }
        for other in regions where region.userAddress < other.userAddress + other.range.size
            && other.userAddress < region.userAddress + region.range.size
        { throw Refusal("two regions at the same place in the front end's memory") }
        regions.append(region)
    }

    /// Takes out the region at this place. The specification has guest address, user address and size name it.
    mutating func remove(guest: UInt64, size: UInt64, user: UInt64) throws(Refusal) {
        guard let index = regions.firstIndex(where: {
            $0.range.start.rawValue == guest && $0.range.size == size && $0.userAddress == user
        }) else { throw Refusal("there is no such region") }
        regions.remove(at: index)
    }
}
