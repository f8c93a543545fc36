// SPDX-License-Identifier: Apache-2.0
internal import CLinux
public import GuestMemory
internal import Synchronization

/// The destination of a migration that is a file. What arrives goes to its place in the file; pages that are zero or were
/// skipped stay holes. The file appears under its name only when it is whole and on the disk; before that it has none
/// where the file system can do that (`O_TMPFILE`), so that nothing is left even of a process that was killed.
///
/// Thread rules: as `IncomingGuest`; one migration's thread.
public final class SnapshotWriter: IncomingGuest {
    private struct State {
        var header: SnapshotHeader
        /// The descriptor of the file that is being written; -1 when it is done with.
        var file: Int32 = -1
        /// Its name meanwhile, if it has one.
        var temporary: String?
        var metadata = SnapshotMetadata(description: [], sections: [])
        /// CRC-32C of each page of RAM, in order.
        var table: [UInt32] = []
        var memory: GuestMemory?
    }
    public let path: String
    private let layout: [GuestRange]
    private let state: Mutex<State>

    /// A snapshot at `path` of a guest with this RAM. Nothing is written before the migration begins.
    public init(path: String, of memory: GuestMemory) {
        self.path = path
        layout = memory.regions.map(\.range)
        state = Mutex(State(header: SnapshotHeader(layout: layout)))
    }

    deinit { discard() }

    public func prepare(machineDescription: [UInt8]) throws(PartFailure) -> GuestMemory {
        guard layout.count <= SnapshotHeader.regionLimit else { throw PartFailure("the guest has \(layout.count) memory regions") }
        let memory: GuestMemory
        // Only a place for what arrives, a moment before it is written: it never holds more than one frame's pages.
        do { memory = try GuestMemory(ranges: layout) } catch { throw PartFailure("\(error)") }
        let (file, temporary) = create()
        guard file >= 0 else { throw failure("create") }
        state.withLock {
            $0.file = file
            $0.temporary = temporary
            $0.metadata.description = machineDescription
            $0.memory = memory
            $0.table = Array(repeating: zeroPageChecksum, count: memory.ramPages)
        }
        // The whole size at once: a file system that cannot hold one so large says so before the guest is stopped.
        let size = state.withLock { $0.header.metadataOffset }
        guard ftruncate(file, off_t(size)) == 0 else { throw failure("make room in") }
        return memory
    }

    public func received(pages: Range<Int>) throws(PartFailure) {
        let (memory, file, place) = try place(of: pages)
        guard let host = memory.hostPointer(PageFrameNumber(UInt64(pages.lowerBound)).address, bytes: pages.count * pageSize)
        else { throw PartFailure("pages outside RAM") }
        guard writeAll(file, host, pages.count * pageSize, at: place.offset) else { throw failure("write") }
        state.withLock { state in
            for page in 0..<pages.count {
                state.table[place.index + page] = lacuna_crc32c(0, host + page * pageSize, pageSize)
            }
        }
        do { try memory.discard(pages: pages) } catch { throw PartFailure("\(error)") }
    }

    public func dropped(pages: Range<Int>) throws(PartFailure) {
        let (_, file, place) = try place(of: pages)
        let bytes = UInt64(pages.count * pageSize)
        if lacuna_punch_hole(file, place.offset, bytes) != 0 {
            // A file system without holes: zeroes that take room are right too.
            let zeroes = [UInt8](repeating: 0, count: pageSize)
            for page in 0..<pages.count {
                let isWritten = zeroes.withUnsafeBytes {
                    writeAll(file, $0.baseAddress!, pageSize, at: place.offset + UInt64(page * pageSize))
                }
                guard isWritten else { throw failure("write") }
            }
        }
        state.withLock { state in for page in 0..<pages.count { state.table[place.index + page] = zeroPageChecksum } }
    }

    public func checksums(of pages: Range<Int>) -> [UInt32]? {
        guard let place = try? place(of: pages).place else { return [] }
        return state.withLock { Array($0.table[place.index..<place.index + pages.count]) }
    }

    public func load(state sections: [StateSection]) throws(PartFailure) {
        var (header, file, bytes, table): (SnapshotHeader, Int32, [UInt8], [UInt32]) = state.withLock {
            $0.metadata.sections = sections
            return ($0.header, $0.file, $0.metadata.encode(), $0.table)
        }
        header.metadataBytes = UInt32(bytes.count)
        header.metadataChecksum = checksum(bytes)
        header.tableOffset = (header.metadataOffset + UInt64(bytes.count) + 4095) & ~4095
        header.tableBytes = UInt64(table.count * 4)
        header.fileSize = header.tableOffset + header.tableBytes
        let isWritten =
            bytes.withUnsafeBytes { writeAll(file, $0.baseAddress!, $0.count, at: header.metadataOffset) }
            && table.withUnsafeBytes {
                // x86-64 is little-endian, as the file is.
                header.tableChecksum = lacuna_crc32c(0, $0.baseAddress, $0.count)
                return writeAll(file, $0.baseAddress!, $0.count, at: header.tableOffset)
            }
        guard isWritten else { throw failure("write") }
        state.withLock { $0.header = header }
    }

    /// Everything arrived: brings it to the disk, and the file to its name.
    public func start() throws(PartFailure) {
        let (header, file) = state.withLock { ($0.header.encode(), $0.file) }
        // The header comes last: until then the file says nothing of itself.
        guard fsync(file) == 0, header.withUnsafeBytes({ writeAll(file, $0.baseAddress!, $0.count, at: 0) }),
            fsync(file) == 0, let temporary = nameTemporarily(), lacuna_rename(temporary, path) == 0
        else {
            defer { discard() }
            throw failure("finish")
        }
        state.withLock {
            close($0.file)
            $0.file = -1
        }
        syncFolder()
    }

    /// Removes what there is of the file, if it is not whole.
    public func discard() {
        state.withLock {
            guard $0.file >= 0 else { return }
            close($0.file)
            if let temporary = $0.temporary { unlink(temporary) }
            $0.file = -1
        }
    }

    private var folder: String { path.lastIndex(of: "/").map { $0 == path.startIndex ? "/" : String(path[..<$0]) } ?? "." }

    /// A name that nobody else uses; a lost process may have left others.
    private func temporaryName() -> String {
        "\(folder)/.\(String(UInt64.random(in: 0...UInt64.max), radix: 16)).partial"
    }

    /// An empty file, with a name only if it has to have one; -1 leaves errno.
    private func create() -> (file: Int32, name: String?) {
        // A name that cannot be is found out now and not when all is written.
        if access(path, F_OK) != 0, lacuna_errno() == ENAMETOOLONG { return (-1, nil) }
        // A name can be given later through /proc only.
        if access("/proc/self/fd", X_OK) == 0 {
            let file = lacuna_open_unnamed(folder)
            if file >= 0 { return (file, nil) }
        }
        let name = temporaryName()
        return (lacuna_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0o600), name)
    }

    /// The name from which the whole file is renamed, as only that replaces an older one; nil leaves errno.
    private func nameTemporarily() -> String? {
        state.withLock { state in
            if state.temporary == nil {
                let name = temporaryName()
                guard lacuna_give_name(state.file, name) == 0 else { return nil }
                state.temporary = name
            }
            return state.temporary
        }
    }

    /// The name itself lasts from here on.
    private func syncFolder() {
        let descriptor = lacuna_open(folder, O_RDONLY | O_CLOEXEC, 0)
        guard descriptor >= 0 else { return }
        fsync(descriptor)
        close(descriptor)
    }

    private func failure(_ doing: String) -> PartFailure {
        PartFailure("cannot \(doing) the snapshot \(path): \(errnoText(lacuna_errno()))")
    }

    private func place(
        of pages: Range<Int>
    ) throws(PartFailure) -> (memory: GuestMemory, file: Int32, place: (offset: UInt64, index: Int)) {
        let (memory, file, regions) = state.withLock { ($0.memory, $0.file, $0.header.regions) }
        var before = 0
        for region in regions {
            let ram = region.range.pages
            if let memory, file >= 0, pages.lowerBound >= ram.lowerBound, pages.upperBound <= ram.upperBound {
                let index = pages.lowerBound - ram.lowerBound
                return (memory, file, (region.offset + UInt64(index * pageSize), before + index))
            }
            before += ram.count
        }
        throw PartFailure("pages outside the snapshot's memory")
    }
}

/// The CRC-32C of a page of zeroes.
let zeroPageChecksum = checksum([UInt8](repeating: 0, count: pageSize))

/// pwrite() until all is written; false leaves errno.
private func writeAll(_ file: Int32, _ bytes: UnsafeRawPointer, _ count: Int, at offset: UInt64) -> Bool {
    var done = 0
    while done < count {
        let part = pwrite(file, bytes + done, count - done, off_t(offset) + off_t(done))
        if part > 0 { done += part } else if part == 0 || lacuna_errno() != EINTR { return false }
    }
    return true
}
