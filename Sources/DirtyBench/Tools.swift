// SPDX-License-Identifier: Apache-2.0
import CLinux
import Machine
import Migration

/// Nanoseconds of the monotonic clock.
func nanoseconds() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
}

/// How long `body` takes.
func timed(_ body: () -> Void) -> UInt64 {
    let start = nanoseconds()
    body()
    return nanoseconds() - start
}

func median(_ values: [UInt64]) -> UInt64 { values.isEmpty ? 0 : values.sorted()[values.count / 2] }

/// A seeded generator (xorshift64*), so that every run asks for the same pages.
struct Sequence64 {
    private var state: UInt64
    init(seed: UInt64) { state = seed &* 0x9e37_79b9_7f4a_7c15 | 1 }
    mutating func next() -> UInt64 {
        state ^= state >> 12
        state ^= state << 25
        state ^= state >> 27
        return state &* 0x2545_f491_4f6c_dd1d
    }
    /// 0 up to `bound`, which is at most 2^32.
    mutating func next(below bound: Int) -> Int { Int(((next() >> 32) &* UInt64(bound)) >> 32) }
}

/// `count` different pages out of `total`, spread all over, in no order.
func scattered(_ count: Int, of total: Int, seed: UInt64) -> [UInt32] {
    var random = Sequence64(seed: seed)
    func commonDivisor(_ a: Int, _ b: Int) -> Int { b == 0 ? a : commonDivisor(b, a % b) }
    // A step without a common divisor visits every page once.
    var step = max(1, total / 2 + random.next(below: max(1, total / 2))) | 1
    while commonDivisor(step, total) != 1 { step += 2 }
    let start = random.next(below: total)
    return (0..<count).map { UInt32((start + $0 * step) % total) }
}

/// Runs `body` on a thread of its own; `join` waits for its result.
final class Background<Value: Sendable>: Sendable {
    private let result = Monitor<Value?>(nil)
    init(_ name: String, _ body: @escaping @Sendable () -> Value) {
        let isStarted = startThread(named: name) { [result] in
            let value = body()
            result.update { $0 = value }
        }
        // A measurement without its load would be none.
        if !isStarted { exit(1) }
    }
    func join() -> Value { result.wait { $0 } }
}
