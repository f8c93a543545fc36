// SPDX-License-Identifier: Apache-2.0
internal import CLinux
import GuestMemory

/// What a guest's memory is made of.
public enum MemoryBacking: String, Sendable {
    case anonymous
    /// A file in memory that other processes could map, too.
    case memfd
    /// The same out of the host's pool of 2 MiB pages. All of it is taken when the guest is made. What the balloon gives
    /// back may be taken by others: a guest that wants it again from an empty pool fails.
    case hugepages

    /// Pages of 4 KiB that go back to the host only together.
    var releaseUnit: Int { self == .hugepages ? 512 : 1 }

    /// Makes zeroed memory.
    func makeMemory(_ layout: [GuestRange]) throws(MachineError) -> GuestMemory {
        let size = layout.reduce(0) { $0 + $1.size }
        do throws(GuestMemoryError) {
            if self == .anonymous { return try GuestMemory(ranges: layout) }
            let file = self == .hugepages ? lacuna_memfd_huge("lacuna-guest") : lacuna_memfd("lacuna-guest")
            guard file >= 0, ftruncate(file, off_t(size)) == 0 else {
                throw .cannotAllocate(bytes: size, errno: lacuna_errno())
            }
            // The mappings have descriptors of their own.
            defer { close(file) }
            if self == .hugepages, lacuna_allocate(file, size) != 0 { throw .cannotAllocate(bytes: size, errno: lacuna_errno()) }
            var mappings: [SharedMapping] = [], offset: UInt64 = 0
            for range in layout {
                mappings.append(SharedMapping(range: range, descriptor: file, offset: offset))
                offset += range.size
            }
            return try GuestMemory(sharing: mappings, limit: 1 << 52)
        } catch {
            guard self == .hugepages else { throw MachineError("\(error)") }
            throw MachineError("no \(size >> 20) MiB of huge pages: \(error); reserve \(size >> 21) or more (sysctl vm.nr_hugepages), or choose another --memory-backing")
        }
    }
}
