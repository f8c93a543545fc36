// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Synchronization
import Testing

@testable import Migration

/// Hands out whatever it was given, RAM or not.
private final class LooseTracker: DirtyTracker {
    let next = Mutex<[Int]>([])
    func arm() {}
    func disarm() {}
    func collect(into bitmap: PageBitmap) {
        let pages = next.withLock { pages in
            defer { pages = [] }
            return pages
        }
        for page in pages { bitmap.set(page..<page + 1) }
    }
}

@Suite struct BitmapTests {
    @Test(arguments: 0..<20) func agreesWithASlowOracle(seed: Int) throws {
        var random = SplitMix(UInt64(seed))
        let memory = try GuestMemory(ranges: smallLayout)
        let tracker = LooseTracker()
        let bitmap = MigrationBitmap(memory)
        let tracking = try ArmedTracking(arming: [tracker], of: memory)
        let hinter = ScriptedHinter(Journal()) { _ in nil }
        var dirty = Set<Int>()
        var held = Set<Int>()
        let ram = Set(memory.regions.flatMap { Array($0.range.pages) })

        for _ in 0..<400 {
            switch Int.random(in: 0..<10, using: &random) {
            case 0:
                bitmap.markAll()
                dirty = ram
            case 1, 2:
                let pages = (0..<Int.random(in: 0..<40, using: &random)).map { _ in
                    Int.random(in: 0..<memory.frameCount, using: &random)
                }
                tracker.next.withLock { $0 = pages }
                #expect(try bitmap.merge(tracking) == ram.intersection(pages).count)
                dirty.formUnion(ram.intersection(pages))
            case 3:
                let window = try bitmap.ask(hinter, tracking: tracking)
                let isLate = Bool.random(using: &random), isOther = Int.random(in: 0..<4, using: &random) == 0
                if isLate { _ = try bitmap.merge(tracking) }
                let start = Int.random(in: 0..<memory.frameCount, using: &random)
                let free = Set((start..<min(start + 50, memory.frameCount)).filter(ram.contains))
                let masked = bitmap.mask(report(window.request &+ (isOther ? 1 : 0), memory, free), window)
                #expect(masked.isAccepted == !(isLate || isOther))
                guard masked.isAccepted else { continue }
                #expect(masked.skipped == dirty.intersection(free).count)
                let stale = Set((0..<memory.frameCount).filter { masked.stale?[$0] ?? false })
                #expect(stale == dirty.intersection(free).intersection(held))
                dirty.subtract(free)
                held.subtract(stale)
            default:
                let limit = Int.random(in: 1...100, using: &random)
                guard let run = bitmap.takeRun(limit: limit) else {
                    #expect(dirty.isEmpty)
                    continue
                }
                #expect(!run.isEmpty && run.count <= limit && memory.isRAM(pages: run))
                #expect(dirty.isSuperset(of: run))
                dirty.subtract(run)
                if Bool.random(using: &random) {
                    bitmap.told.sentData(run)
                    held.formUnion(run)
                } else {
                    bitmap.told.sentZero(run)
                    held.subtract(run)
                }
            }
            #expect(bitmap.dirtyCount == dirty.count)
        }
        while let run = bitmap.takeRun(limit: .max) { dirty.subtract(run) }
        #expect(dirty.isEmpty && bitmap.dirtyCount == 0)
    }

    @Test func aRunEndsWhereARegionEnds() throws {
        let memory = try GuestMemory(ranges: smallLayout)
        let bitmap = MigrationBitmap(memory)
        bitmap.markAll()
        #expect(bitmap.takeRun(limit: .max) == 0..<64)
        #expect(bitmap.takeRun(limit: .max) == 64..<128)
        #expect(bitmap.takeRun(limit: .max) == 256..<320)
        #expect(bitmap.takeRun(limit: .max) == nil)
    }

    @Test func aReportOfAnotherSizeIsDropped() throws {
        let memory = try GuestMemory(ranges: smallLayout)
        let bitmap = MigrationBitmap(memory)
        let tracking = try ArmedTracking(arming: [], of: memory)
        bitmap.markAll()
        let window = try bitmap.ask(ScriptedHinter(Journal()) { _ in nil }, tracking: tracking)
        let short = PageBitmap(bitCount: 64)
        short.set(0..<64)
        let masked = bitmap.mask(HintReport(request: window.request, pages: short, figures: nil), window)
        #expect(!masked.isAccepted && bitmap.dirtyCount == memory.ramPages)
    }

    @Test func whatTheVMMWroteBeforeArmingIsNotCountedAgain() throws {
        let memory = try GuestMemory(ranges: smallLayout)
        try memory.store(UInt64(1), at: GuestAddress(0))
        let tracking = try ArmedTracking(arming: [], of: memory)
        let bitmap = MigrationBitmap(memory)
        #expect(try bitmap.merge(tracking) == 0)
        try memory.store(UInt64(1), at: GuestAddress(4096))
        #expect(try bitmap.merge(tracking) == 1)
        #expect(bitmap[1] && !bitmap[0])
    }
}
