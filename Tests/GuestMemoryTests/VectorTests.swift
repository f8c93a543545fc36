// SPDX-License-Identifier: Apache-2.0
import CLinux
import GuestMemory
import Testing

/// The loops that are written for wide vectors, against ones that look at one bit or byte at a time.
@Suite struct VectorTests {
    @Test func onePageIsZeroOnlyIfEveryByteIs() {
        let page = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 64)
        defer { page.deallocate() }
        page.initializeMemory(as: UInt8.self, repeating: 0, count: 4096)
        #expect(lacuna_is_zero(page, 4096) && lacuna_or_words(page, 4096) == 0)
        for byte in 0..<4096 {
            page.storeBytes(of: 0x10, toByteOffset: byte, as: UInt8.self)
            #expect(!lacuna_is_zero(page, 4096))
            #expect(lacuna_or_words(page, 4096) == 0x10 << UInt64(byte % 8 * 8))
            page.storeBytes(of: 0, toByteOffset: byte, as: UInt8.self)
        }
        for bytes in stride(from: 0, through: 4096, by: 64) {
            // What comes after the end does not count.
            page.initializeMemory(as: UInt8.self, repeating: 1, count: 4096)
            page.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
            #expect(lacuna_is_zero(page, bytes) && lacuna_or_words(page, bytes) == 0)
        }
    }

    /// Sizes around the widths of vectors, and one far beyond.
    @Test(arguments: Array(0...20) + [31, 32, 33, 63, 64, 65, 1000]) func setOperationsAgreeWithAnOracle(words: Int) {
        var random = SystemRandomNumberGenerator()
        for _ in 0..<20 {
            let bitmaps = (0..<3).map { _ in PageBitmap(bitCount: words * 64) }
            for bitmap in bitmaps {
                for index in 0..<words { bitmap.store(random.next() & random.next(), inWord: index) }
            }
            let (a, b, c) = (bitmaps[0], bitmaps[1], bitmaps[2])
            let before = (0..<words).map { a.word($0) }
            let joined = PageBitmap(bitCount: words * 64)
            for index in 0..<words { joined.store(before[index], inWord: index) }

            joined.formUnion(ofIntersection: b, c)
            let taken = a.take(inIntersection: b, c)
            var any = false
            for index in 0..<words {
                let both = b.word(index) & c.word(index)
                #expect(joined.word(index) == before[index] | both)
                #expect(a.word(index) == before[index] & ~both)
                #expect(taken?.word(index) ?? 0 == before[index] & both)
                any = any || before[index] & both != 0
            }
            #expect((taken != nil) == any)

            let (left, count) = ((0..<words).map { a.word($0) }, a.subtract(b))
            for index in 0..<words { #expect(a.word(index) == left[index] & ~b.word(index)) }
            #expect(count == (0..<words).reduce(0) { $0 + (left[$1] & b.word($1)).nonzeroBitCount })
        }
    }

    /// A caller's bitmap begins anywhere within a cache line, and what lies beside it is the caller's.
    @Test func clearingBeginsAnywhere() {
        var random = SystemRandomNumberGenerator()
        let room = 96
        let target = UnsafeMutableRawPointer.allocate(byteCount: room * 8, alignment: 64).bindMemory(to: UInt64.self, capacity: room)
        let mask = UnsafeMutableRawPointer.allocate(byteCount: room * 8, alignment: 64).bindMemory(to: UInt64.self, capacity: room)
        defer {
            target.deallocate()
            mask.deallocate()
        }
        for start in 0..<9 {
            for other in 0..<9 {
                for words in [0, 1, 3, 7, 8, 9, 15, 64, 70] {
                    for index in 0..<room {
                        target[index] = random.next()
                        mask[index] = random.next()
                    }
                    let before = (0..<room).map { target[$0] }
                    let count = lacuna_and_not(target + start, mask + other, words)
                    var expected = before, cleared = 0
                    for index in 0..<words {
                        expected[start + index] &= ~mask[other + index]
                        cleared += (before[start + index] & mask[other + index]).nonzeroBitCount
                    }
                    #expect(count == cleared && (0..<room).map { target[$0] } == expected, "\(words) words from \(start) and \(other)")
                }
            }
        }
    }
}
