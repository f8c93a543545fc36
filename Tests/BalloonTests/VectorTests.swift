// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import TestSupport
import Testing
import Virtio

@testable import Balloon

/// The protocol's test vectors: `protocol/vectors/README.md` describes them.
@Suite struct VectorTests {
    struct Vector: Sendable, CustomTestStringConvertible {
        let name: String
        let fields: [String: String]
        let bytes: [UInt8]
        var testDescription: String { name }

        func number(_ field: String) -> UInt64? { fields[field].flatMap { UInt64($0) } }
        /// `set`, as ranges.
        var runs: [ClosedRange<UInt64>] {
            (fields["set"] ?? "").split(separator: ",").map { part in
                let ends = part.split(separator: "-").compactMap { UInt64($0) }
                return ends[0]...ends[ends.count - 1]
            }
        }
    }

    static let vectors: [Vector] = {
        let folder = #filePath.split(separator: "/").dropLast(3).map { "/" + $0 }.joined() + "/protocol/vectors/"
        let text = String(decoding: contents(of: folder + "vectors.txt") ?? [], as: UTF8.self)
        return text.split(separator: "\n").filter { !$0.hasPrefix("#") }.map { line in
            let parts = line.split(separator: " ")
            var fields: [String: String] = [:]
            for part in parts.dropFirst() {
                let sides = part.split(separator: "=", omittingEmptySubsequences: false)
                fields[String(sides[0])] = String(sides[1])
            }
            return Vector(
                name: String(parts[0]), fields: fields, bytes: contents(of: folder + parts[0] + ".bin") ?? [])
        }
    }()

    /// A chain of the bytes, cut in two at `cut`.
    private func chain(_ bytes: [UInt8], cut: Int, in memory: GuestMemory) throws -> DescriptorChain {
        let queue = MockQueue(memory: memory, base: 0x1000, size: 4)
        memory.poke(Array(bytes[..<cut]), at: 0x4_0000)
        memory.poke(Array(bytes[cut...]), at: 0x8_0000)
        var list: [MockDescriptor] = []
        if cut > 0 { list.append(MockDescriptor(0x4_0000, UInt32(cut))) }
        if cut < bytes.count { list.append(MockDescriptor(0x8_0000, UInt32(bytes.count - cut))) }
        // A chain has at least one descriptor: one that cannot be read, for nothing that can.
        if list.isEmpty { list.append(MockDescriptor(0x4_0000, 8, flags: DescriptorFlag.write)) }
        queue.publish(queue.chain(list))
        return try #require(try queue.deviceSide().popChain())
    }

    @Test func vectorsAreThere() {
        #expect(Self.vectors.count >= 32)
        for vector in Self.vectors { #expect(UInt64(vector.bytes.count) == vector.number("length"), "\(vector.name)") }
    }

    @Test(arguments: vectors) func decodes(vector: Vector) throws {
        let memory = GuestMemory.withHole()
        let ram = PageBitmap(bitCount: memory.frameCount)
        for region in memory.regions { ram.set(region.range.pages) }
        let count = vector.bytes.count
        // Every cut, but for the long one: around the header and the device's own pieces.
        let cuts = count < 1000 ? Array(0...count) : [0, 1, 23, 24, 25, 31, 32, 24 + 4095, 24 + 4096, count - 1, count]
        for cut in cuts {
            let chain = try chain(vector.bytes, cut: cut, in: memory)
            var fault: ReportFault?
            do throws(ReportFault) {
                try check(vector, chain)
            } catch { fault = error }
            #expect(fault?.rawValue == vector.fields["error"], "cut at \(cut)")
            try checkWindow(vector, chain, ram: ram)
        }
    }

    private func check(_ vector: Vector, _ chain: DescriptorChain) throws(ReportFault) {
        var reader = chain.reader()
        let header = try ReportHeader(from: &reader)
        switch try header.check(following: reader.remaining) {
        case .pages:
            #expect(vector.fields["kind"] == "pages")
            #expect(header.start == vector.number("start_pfn") && UInt64(header.bits) == vector.number("num_bits"))
            var set: [UInt64] = []
            for word in 0..<UInt64(header.bits / 64) {
                let bits = (try? reader.take(UInt64.self)) ?? 0
                for bit in 0..<64 as Range<UInt64> where bits >> bit & 1 == 1 {
                    set.append(header.start + 64 * word + bit)
                }
            }
            #expect(UInt64(set.count) == vector.number("count") && set == vector.runs.flatMap { Array($0) })
        case .figures:
            let figures = try FreePageFigures(from: &reader)
            #expect(vector.fields["kind"] == "figures")
            #expect(figures.blocks == vector.number("blocks") && figures.pages == vector.number("pages"))
            #expect(figures.walkNanoseconds == vector.number("walk_ns"))
            #expect(figures.longestLockNanoseconds == vector.number("lock_ns"))
            #expect(UInt64(figures.batches) == vector.number("batches"))
        }
        #expect(UInt64(header.request) == vector.number("cmd_id"))
        #expect(UInt64(header.flags.rawValue) == vector.number("flags"))
    }

    /// The same bytes through the window that is open for their request.
    private func checkWindow(_ vector: Vector, _ chain: DescriptorChain, ram: PageBitmap) throws {
        let request = UInt32(vector.number("cmd_id") ?? 7)
        var window = HintWindow(request: request, frames: ram.bitCount), notRAM: UInt64 = 0
        let outcome = window.accept(chain, ram: ram, notRAM: &notRAM)
        if let error = vector.fields["error"] {
            #expect(outcome == .malformed(try #require(ReportFault(rawValue: error))))
            return
        }
        let flags = try #require(vector.number("flags"))
        guard flags & 1 == 1 else {
            #expect(outcome == .misplaced)
            return
        }
        if vector.fields["kind"] == "figures" {
            #expect(outcome == (flags & 4 == 0 ? .last : .failed))
            return
        }
        #expect(outcome == .taken)
        window.complete(adding: nil)
        let taken = window.take()
        let report = try #require(taken)
        let all = vector.runs.flatMap { Array($0) }
        let real = all.filter { $0 < UInt64(ram.bitCount) && ram[Int($0)] }
        #expect(pages(report.pages) == Set(real.map(Int.init)))
        #expect(notRAM == UInt64(all.count - real.count))
    }
}
