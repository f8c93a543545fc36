// SPDX-License-Identifier: Apache-2.0
internal import CLinux
public import GuestMemory

/// An opened snapshot file of the right size whose header, machine and state are whole. The memory's bytes are checked when
/// they are read in full; a guest that starts at once reads them as it touches them.
public final class SnapshotReader: Sendable {
    public let path: String
    public let machineDescription: [UInt8]
    public let sections: [StateSection]
    /// The RAM, in ascending order.
    public let layout: [GuestRange]
    private let header: SnapshotHeader
    private let file: Int32

    /// Opens and checks `path`. Throws with the reason, for the operator.
    public init(path: String) throws(PartFailure) {
        func failed(_ why: String) -> PartFailure { PartFailure("cannot restore \(path): \(why)") }
        let file = lacuna_open(path, O_RDONLY | O_CLOEXEC, 0)
        guard file >= 0 else { throw failed(errnoText(lacuna_errno())) }
        do throws(StateError) {
            var status = stat()
            guard fstat(file, &status) == 0, status.st_mode & mode_t(S_IFMT) == mode_t(S_IFREG) else {
                throw StateError("it is no plain file")
            }
            let header = try SnapshotHeader(decoding: try read(file, SnapshotHeader.size, at: 0))
            guard UInt64(status.st_size) == header.fileSize else {
                throw StateError(
                    "the file has \(status.st_size) bytes instead of \(header.fileSize): it was cut or not copied whole")
            }
            let metadata = try read(file, Int(header.metadataBytes), at: header.metadataOffset)
            guard checksum(metadata) == header.metadataChecksum else { throw StateError("the machine's state is damaged") }
            let decoded = try SnapshotMetadata(decoding: metadata)
            (machineDescription, sections) = (decoded.description, decoded.sections)
            self.header = header
        } catch {
            close(file)
            throw failed(error.what)
        }
        self.path = path
        self.file = file
        layout = header.regions.map(\.range)
    }

    deinit { close(file) }

    /// Memory that reads the file page by page as it is touched, and never writes to it. The file must stay as it is for
    /// as long as the memory lives. Takes the same time for any size.
    public func mapMemory() throws(PartFailure) -> GuestMemory {
        do throws(GuestMemoryError) {
            return try GuestMemory(
                restoring: header.regions.map { SharedMapping(range: $0.range, descriptor: file, offset: $0.offset) })
        } catch { throw PartFailure("\(error)") }
    }

    /// Memory with all of the file's pages in it, each compared with its checksum. The file is not needed afterwards.
    public func readMemory() throws(PartFailure) -> GuestMemory {
        let memory: GuestMemory
        do throws(GuestMemoryError) { memory = try GuestMemory(ranges: layout) } catch { throw PartFailure("\(error)") }
        let table = try readTable()
        var index = 0
        for region in header.regions {
            try fill(region, of: memory, table[index..<index + region.range.pages.count])
            index += region.range.pages.count
        }
        return memory
    }

    private func readTable() throws(PartFailure) -> [UInt32] {
        do throws(StateError) {
            let bytes = try read(file, Int(header.tableBytes), at: header.tableOffset)
            guard checksum(bytes) == header.tableChecksum else { throw StateError("the table of checksums is damaged") }
            return bytes.withUnsafeBytes { bytes in
                (0..<bytes.count / 4).map { UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: $0 * 4, as: UInt32.self)) }
            }
        } catch { throw PartFailure("cannot restore \(path): \(error.what)") }
    }

    /// `table` has the checksums of the region's pages.
    private func fill(_ region: SnapshotRegion, of memory: GuestMemory, _ table: ArraySlice<UInt32>) throws(PartFailure) {
        let tableIndex = table.startIndex
        guard let host = memory.hostPointer(region.range.start, bytes: Int(region.range.size)) else {
            throw PartFailure("the file's memory is not the machine's")
        }
        func damaged(_ page: Int) -> PartFailure {
            let address = GuestAddress(region.range.start.rawValue + UInt64(page * pageSize))
            return PartFailure("cannot restore \(path): the guest's memory at \(address) is damaged")
        }
        let (start, end) = (off_t(region.offset), off_t(region.offset + region.range.size))
        var position = start, page = 0
        while position < end {
            // What lies between two stretches of data reads as zero and is not touched.
            var data = lseek(file, position, lacuna_SEEK_DATA)
            if data < 0 || data > end { data = end }
            let first = Int(data - start) / pageSize
            for hole in page..<first where table[tableIndex + hole] != zeroPageChecksum { throw damaged(hole) }
            if data == end { return }
            var stop = lseek(file, data, lacuna_SEEK_HOLE)
            if stop < 0 || stop > end { stop = end }
            let last = (Int(stop - start) + pageSize - 1) / pageSize
            for page in first..<last {
                let place = host + page * pageSize
                guard readAll(file, place, pageSize, at: start + off_t(page * pageSize)) else {
                    throw PartFailure("cannot read \(path): \(errnoText(lacuna_errno()))")
                }
                guard lacuna_crc32c(0, place, pageSize) == table[tableIndex + page] else { throw damaged(page) }
            }
            page = last
            position = start + off_t(last * pageSize)
        }
    }
}

/// pread() until all is there; false leaves errno, or 0 at the file's end.
private func readAll(_ file: Int32, _ place: UnsafeMutableRawPointer, _ count: Int, at offset: off_t) -> Bool {
    var done = 0
    while done < count {
        let part = pread(file, place + done, count - done, offset + off_t(done))
        if part > 0 { done += part } else if part == 0 || lacuna_errno() != EINTR { return false }
    }
    return true
}

/// `count` bytes of the file. The caller has bounded `count`.
private func read(_ file: Int32, _ count: Int, at offset: UInt64) throws(StateError) -> [UInt8] {
    var status = stat()
    // Before the memory is taken: a header may promise more than there is.
    guard fstat(file, &status) == 0, Int64(status.st_size) >= Int64(offset) + Int64(count) else {
        throw StateError("the file ends too early")
    }
    var isRead = true
    let bytes = [UInt8](unsafeUninitializedCapacity: max(count, 1)) { buffer, used in
        isRead = readAll(file, buffer.baseAddress!, count, at: off_t(offset))
        used = isRead ? count : 0
    }
    guard isRead else { throw StateError("the file cannot be read") }
    return bytes
}
