// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import GuestMemory
import Synchronization
import Testing

@testable import Migration

/// A folder of its own for each test, gone afterwards.
private final class Folder: Sendable {
    let path: String
    init() throws {
        var template = Array("/tmp/lacuna-test.XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw PartFailure("mkdtemp: \(lacuna_errno())") }
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
    deinit { try? FileManager.default.removeItem(atPath: path) }
    func file(_ name: String) -> String { "\(path)/\(name)" }
    var names: [String] { (try? FileManager.default.contentsOfDirectory(atPath: path)) ?? [] }
}

@Suite struct SnapshotTests {
    /// Saves `guest`, which runs on meanwhile, and returns the source's report.
    private func save(
        _ guest: MiniGuest, to path: String, _ hinter: ScriptedHinter? = nil, options: MigrationOptions = quickOptions()
    ) throws -> MigrationReport {
        let writer = SnapshotWriter(path: path, of: guest.memory)
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], hinter: hinter, options: options)
        let ends = try migrate(source, to: MigrationReceiver(guest: writer))
        _ = try ends.destination.get()
        return try ends.source.get()
    }

    private func guest(seed: UInt64 = 7) throws -> MiniGuest {
        let guest = try MiniGuest()
        for page in guest.pages where page % 5 != 0 { guest.fill(page: page, seed: seed &+ UInt64(page)) }
        return guest
    }

    private func expectSame(_ memory: GuestMemory, as guest: MiniGuest, except skipped: Set<Int> = []) {
        let other = MiniGuest(memory: memory, description: [], isRunning: false)
        #expect(memory.regions.map(\.range) == guest.memory.regions.map(\.range))
        #expect(guest.differences(other).filter { !skipped.contains($0) }.isEmpty)
        for page in skipped { #expect(other.read(page: page) == 0 && other.read(page: page, offset: 4088) == 0) }
    }

    @Test func whatIsSavedComesBack() throws {
        let folder = try Folder(), guest = try guest()
        _ = try save(guest, to: folder.file("a"))
        #expect(folder.names == ["a"])
        let reader = try SnapshotReader(path: folder.file("a"))
        #expect(reader.machineDescription == guest.machineDescription)
        #expect(reader.sections == guest.sections.withLock { $0 })
        expectSame(try reader.mapMemory(), as: guest)
        expectSame(try reader.readMemory(), as: guest)
    }

    /// What is not whole has no name, so that nothing is left of a process that is killed.
    @Test func aFileWithoutANameUntilItIsWhole() throws {
        let folder = try Folder(), guest = try guest()
        let unnamed = lacuna_open_unnamed(folder.path)
        if unnamed >= 0 { close(unnamed) }
        let seen = Mutex<[[String]]>([])
        let writer = SnapshotWriter(path: folder.file("a"), of: guest.memory)
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions()) { progress, round in
            if progress.phase == .rounds, round != nil { seen.withLock { $0.append(folder.names) } }
        }
        let ends = try migrate(source, to: MigrationReceiver(guest: writer))
        _ = (try ends.source.get(), try ends.destination.get())
        let names = try #require(seen.withLock { $0.first })
        // A file system that cannot do that has a name that nobody takes for a snapshot.
        #expect(unnamed >= 0 ? names.isEmpty : names.count == 1 && names[0].hasSuffix(".partial"))
        #expect(folder.names == ["a"])
    }

    @Test func aBusyGuestIsSavedAsItWasWhenItStood() throws {
        let folder = try Folder(), guest = try guest()
        let pages = guest.pages
        let turn = Mutex(0)
        guest.writers.withLock {
            $0 = [{ guest in
                let next = turn.withLock {
                    $0 += 1
                    return $0
                }
                guest.write(UInt64(next) | 1 << 63, page: pages[next &* 7 % pages.count], offset: next % 512 * 8)
            }]
        }
        guest.startWriters()
        var options = quickOptions()
        options.maxRounds = 4
        options.downtimeLimitMilliseconds = 0
        _ = try save(guest, to: folder.file("a"), options: options)
        // Nobody resumed it, so its memory is what it was.
        expectSame(try SnapshotReader(path: folder.file("a")).readMemory(), as: guest)
    }

    @Test func skippedPagesAreHolesThatReadAsZero() throws {
        let folder = try Folder(), guest = try MiniGuest([mebibytes(0, 8)])
        for page in guest.pages { guest.fill(page: page, seed: 3) }
        let free = Array(guest.pages[256..<1792])
        let hinter = ScriptedHinter(guest.journal) { request in report(request, guest.memory, free) }
        var options = quickOptions(skip: true)
        options.verify = true
        let result = try save(guest, to: folder.file("a"), hinter, options: options)
        #expect(result.skippedPages == free.count && result.verifiedPages == guest.pages.count - free.count)
        let reader = try SnapshotReader(path: folder.file("a"))
        expectSame(try reader.mapMemory(), as: guest, except: Set(free))
        expectSame(try reader.readMemory(), as: guest, except: Set(free))
        var status = stat()
        #expect(stat(folder.file("a"), &status) == 0)
        // 2 MiB of pages in use, the state, and the table.
        #expect(Int(status.st_blocks) * 512 < 2 << 20 + 64 << 10)
        #expect(status.st_size > 8 << 20)
    }

    /// W6 on a file: sent in the first round, free in the second.
    @Test func aPageThatWasWrittenAndIsFreeLaterIsAHoleAgain() throws {
        let folder = try Folder(), guest = try guest()
        let page = guest.pages[11]
        let hinter = ScriptedHinter(
            guest.journal,
            onRequest: { if $0 == 3 { guest.clear(page: page) } },
            answer: { request in report(request, guest.memory, request == 2 ? [] : [page]) })
        var options = quickOptions(skip: true)
        options.downtimeLimitMilliseconds = 0
        options.maxRounds = 2
        let writer = SnapshotWriter(path: folder.file("a"), of: guest.memory)
        let isSecond = Mutex(false)
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], hinter: hinter, options: options) { _, round in
            // Dirtied after the first round, so that the second one has it in its bitmap.
            if round?.number == 1, !isSecond.withLock({ $0 }) {
                isSecond.withLock { $0 = true }
                guest.write(9, page: page)
            }
        }
        let ends = try migrate(source, to: MigrationReceiver(guest: writer))
        _ = try ends.destination.get()
        #expect(try ends.source.get().discardedPages == 1)
        let memory = try SnapshotReader(path: folder.file("a")).mapMemory()
        #expect(MiniGuest(memory: memory, description: [], isRunning: false).read(page: page, offset: 800) == 0)
    }

    @Test func aRestoredGuestNeverChangesItsFile() throws {
        let folder = try Folder(), guest = try guest()
        _ = try save(guest, to: folder.file("a"))
        let before = try Data(contentsOf: URL(filePath: folder.file("a")))
        let reader = try SnapshotReader(path: folder.file("a"))
        let memory = try reader.mapMemory()
        let other = MiniGuest(memory: memory, description: [], isRunning: false)
        for page in guest.pages { other.fill(page: page, seed: 99) }
        // Given back to the host, a page is zero and not what the file has.
        try memory.discard(pages: guest.pages[1]..<guest.pages[3])
        #expect(other.read(page: guest.pages[1]) == 0)
        #expect(try Data(contentsOf: URL(filePath: folder.file("a"))) == before)
    }

    @Test func aFailedAttemptLeavesNothing() throws {
        let folder = try Folder(), guest = try guest()
        guest.onSave.withLock { $0 = { _ in PartFailure("no state today") } }
        #expect(throws: (any Error).self) { try save(guest, to: folder.file("a")) }
        #expect(folder.names.isEmpty && guest.isRunning)
        try guest.pause()
    }

    @Test func anOlderSnapshotStaysUntilTheNewOneIsWhole() throws {
        let folder = try Folder(), guest = try guest()
        _ = try save(guest, to: folder.file("a"))
        let before = try Data(contentsOf: URL(filePath: folder.file("a")))
        guest.startWriters()
        guest.onSave.withLock { $0 = { _ in PartFailure("no state today") } }
        #expect(throws: (any Error).self) { try save(guest, to: folder.file("a")) }
        #expect(try Data(contentsOf: URL(filePath: folder.file("a"))) == before)
        try guest.pause()
    }

    @Test(arguments: ["/nowhere/at/all/a", "/proc/a"]) func aPlaceThatCannotBeWrittenIsNamed(path: String) throws {
        let guest = try guest()
        let writer = SnapshotWriter(path: path, of: guest.memory)
        let source = MigrationSource(guest: guest, trackers: [guest.tracker], options: quickOptions())
        let ends = try migrate(source, to: MigrationReceiver(guest: writer))
        guard case .failure(.refused(let why)) = ends.source else {
            Issue.record("the source ended with \(ends.source)")
            return
        }
        #expect(why.contains(path) && why.contains("No such file"))
        #expect(guest.isRunning)
        try guest.pause()
    }

    // MARK: Damage

    private func damaged(_ folder: Folder, _ change: (inout [UInt8]) -> Void) throws -> String {
        var bytes = [UInt8](try Data(contentsOf: URL(filePath: folder.file("a"))))
        change(&bytes)
        try Data(bytes).write(to: URL(filePath: folder.file("b")))
        return folder.file("b")
    }

    @Test func everyFlippedBitOfHeaderStateAndTableIsNoticed() throws {
        let folder = try Folder()
        _ = try save(try guest(), to: folder.file("a"))
        let bytes = [UInt8](try Data(contentsOf: URL(filePath: folder.file("a"))))
        let header = try SnapshotHeader(decoding: Array(bytes[..<4096]))
        let metadata = Int(header.metadataOffset)..<Int(header.metadataOffset) + Int(header.metadataBytes)
        let table = Int(header.tableOffset)..<Int(header.fileSize)
        for place in [0, 7, 8, 12, 16, 24, 32, 40, 48, 56, 60, 64, 72, 80, 200, 4091, 4092, 4095] + metadata + stride(
            from: table.lowerBound, to: table.upperBound, by: 37)
        {
            let path = try damaged(folder) { $0[place] ^= 1 << UInt8(place & 7) }
            // The table is needed, and read, only where all memory is.
            #expect(throws: PartFailure.self, "byte \(place)") {
                let reader = try SnapshotReader(path: path)
                if table.contains(place) { _ = try reader.readMemory() }
            }
        }
    }

    @Test func aFlippedBitOfMemoryIsNoticedWhenAllIsRead() throws {
        let folder = try Folder(), guest = try guest()
        _ = try save(guest, to: folder.file("a"))
        let first = Int(SnapshotHeader.alignment)
        // A page with data, and one that was a hole.
        for place in [first + 4096 + 17, first + 4095, first] {
            let path = try damaged(folder) { $0[place] ^= 0x10 }
            let reader = try SnapshotReader(path: path)
            #expect(throws: PartFailure.self) { try reader.readMemory() }
        }
    }

    @Test func aCutOrLengthenedFileIsRefused() throws {
        let folder = try Folder()
        _ = try save(try guest(), to: folder.file("a"))
        let size = try Data(contentsOf: URL(filePath: folder.file("a"))).count
        for keep in [0, 1, 4095, 4096, 4097, size / 2, size - 4096, size - 1] {
            let path = try damaged(folder) { $0.removeLast($0.count - keep) }
            #expect(throws: PartFailure.self, "\(keep) bytes") { try SnapshotReader(path: path) }
        }
        let path = try damaged(folder) { $0.append(0) }
        #expect(throws: PartFailure.self) { try SnapshotReader(path: path) }
        for path in [folder.path, "/dev/zero", folder.file("missing")] {
            #expect(throws: PartFailure.self) { try SnapshotReader(path: path) }
        }
    }

    /// Headers with a right checksum and wrong numbers.
    @Test func aHeaderIsNeverBelieved() throws {
        let good = SnapshotHeader(layout: smallLayout)
        func refused(_ what: String, _ change: (inout SnapshotHeader) -> Void) {
            var header = good
            header.metadataBytes = 100
            header.tableOffset = header.metadataOffset + 4096
            header.tableBytes = UInt64(header.ramPages * 4)
            header.fileSize = header.tableOffset + header.tableBytes
            #expect((try? SnapshotHeader(decoding: header.encode())) == header)
            change(&header)
            #expect(throws: StateError.self, "\(what)") { try SnapshotHeader(decoding: header.encode()) }
        }
        refused("file size") { $0.fileSize += 1 }
        refused("huge file") { $0.fileSize = .max }
        refused("metadata in memory") { $0.metadataOffset = 4096 }
        refused("metadata far away") { $0.metadataOffset = .max - 50 }
        refused("much metadata") { $0.metadataBytes = .max }
        refused("table before the end") { $0.tableOffset = $0.metadataOffset }
        refused("table far away") { $0.tableOffset = .max - 4 }
        refused("table too short") { $0.tableBytes -= 4 }
        refused("table too long") { $0.tableBytes = .max }
        refused("no regions") { $0.regions = [] }
        refused("overlap in the guest") { $0.regions[1].range = $0.regions[0].range }
        refused("overlap in the file") { $0.regions[1].offset = $0.regions[0].offset }
        refused("region at no boundary") { $0.regions[1].offset += 4096 }
        refused("region of no size") { $0.regions[2].range = GuestRange(start: $0.regions[2].range.start, size: 0) }
        refused("endless region") { $0.regions[2].range = GuestRange(start: GuestAddress(1 << 51), size: ~0 << 18) }
        refused("region beyond all addresses") { $0.regions[2].range = GuestRange(start: GuestAddress(~0 << 18), size: 1 << 18) }
        refused("region far out in the file") { $0.regions[2].offset = ~0 << 21 }
    }
}
