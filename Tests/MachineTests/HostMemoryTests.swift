// SPDX-License-Identifier: Apache-2.0
import Migration
import Testing

@testable import Machine

@Suite struct HostMemoryTests {
    @Test func memoryAndSwapAreAdded() {
        let text = "MemTotal:        1024 kB\nMemFree:  7 kB\nSwapTotal:       512 kB\nSwapFree: 1 kB\n"
        #expect(HostMemory.capacity(of: text) == 1536 << 10)
        #expect(HostMemory.capacity(of: "MemTotal: 4 kB\n") == 4096)
    }

    @Test(arguments: ["", "MemTotal:\n", "MemTotal: many kB\n", "MemTotal: 18446744073709551615 kB\nSwapTotal: 1 kB", "SwapTotal: 5 kB"])
    func nonsenseIsNoCapacity(text: String) { #expect(HostMemory.capacity(of: text) == nil) }

    /// 1024 TiB are more than any machine that runs tests has.
    @Test func aGuestThatCanNeverFitIsRefused() throws {
        #expect(throws: PartFailure.self) { try HostMemory.check(canHold: 1 << 50) }
        try HostMemory.check(canHold: 1 << 20)
    }
}
