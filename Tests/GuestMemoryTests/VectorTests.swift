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
}
