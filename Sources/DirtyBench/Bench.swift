// SPDX-License-Identifier: Apache-2.0
import Machine

/// What a benchmark is run with.
public struct BenchOptions: Sendable {
    /// Guest memory in bytes; nil: each benchmark's own. `harvest` only sizes its bitmaps by it.
    public var memorySize: UInt64?
    /// Threads on plain memory instead of a guest on KVM.
    public var plain = false
    /// Entries of each dirty ring.
    public var ringEntries = DirtyTracking.defaultRingEntries
    /// Bytes of pages that the guest touches in a second.
    public var rate: UInt64 = 32 << 20
    /// Migrations for each tracker.
    public var migrations = 6
    /// Bytes a second on the wire, 0: no limit.
    public var bandwidth: UInt64 = 0
    /// Milliseconds.
    public var downtime = 50
    /// A Linux guest for `first-dirty`, and its command lines.
    public var kernel: String?
    public var initramfs: String?
    public var idleCommandLine = "console=ttyS0 quiet lacuna.run=idle"
    public var loadedCommandLine = "console=ttyS0 quiet lacuna.run=memcheck:30"
    public var readyText = "GUEST-READY"
    public init() {}

    var memory: UInt64 = 0
}

/// The benchmarks of dirty tracking.
public enum DirtyBench: String, CaseIterable, Sendable {
    case dirtyLog = "dirty-log"
    case firstDirty = "first-dirty"
    case harvest
    case pingPong = "ping-pong"

    /// Runs the benchmark on the calling thread; takes seconds to minutes.
    public func run(_ choices: BenchOptions) throws(BenchError) -> BenchTable {
        var options = choices
        let usual: UInt64 =
            switch self {
            case .dirtyLog: 2 << 30
            case .firstDirty, .pingPong: 256 << 20
            case .harvest: 1 << 40
            }
        options.memory = options.memorySize ?? usual
        let limit: UInt64 = self == .harvest ? 1 << 44 : 2 << 30
        guard options.memory % (2 << 20) == 0, options.memory > 0, options.memory <= limit else {
            throw BenchError("--memory takes a multiple of 2M up to \(limit >> 30)G for this benchmark")
        }
        switch self {
        case .dirtyLog: return try dirtyLogBench(options)
        case .firstDirty: return try firstDirtyBench(options)
        case .harvest: return try harvestBench(options)
        case .pingPong: return try pingPongBench(options)
        }
    }
}
