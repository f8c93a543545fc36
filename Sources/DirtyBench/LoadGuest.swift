// SPDX-License-Identifier: Apache-2.0
import CLinux
import GuestMemory
import Machine
import Migration
import Synchronization

/// A guest that writes to pages at random, so many bytes of pages a second: on real vCPUs, or a thread on plain memory.
final class LoadGuest: OutgoingGuest {
    private enum Wanted { case running, stopped }
    private struct State {
        var wanted = Wanted.stopped
        var isRunning = false
        var writes = 0
        var failure: BenchError?
    }
    let memory: GuestMemory
    let pages: Int
    private let bare: BareGuest?
    private let rate: UInt64
    private let seed: UInt64
    private let state = Monitor(State())

    /// `tracking` nil: on plain memory. `rate` is in bytes of touched pages a second.
    init(size: UInt64, tracking: DirtyTracking?, rate: UInt64, seed: UInt64) throws(BenchError) {
        bare = if let tracking { try BareGuest(size: size, vcpus: 1, tracking: tracking) } else { nil }
        memory = if let bare { bare.memory } else { try plainMemory(size) }
        pages = Int(size / 4096)
        self.rate = rate
        self.seed = seed
    }

    var machineDescription: [UInt8] { [] }
    var trackers: [any DirtyTracker] {
        guard let bare else { return [] }
        return [bare.makeTracker()]
    }
    var fullRings: Int { bare?.ringFigures.fullRings ?? 0 }
    /// Pages written so far, counted each time.
    var writes: Int { state.read { $0.writes } }

    private func write(_ value: UInt32, _ list: [UInt32]) throws(BenchError) {
        if let bare { return try bare.write(value, to: list) }
        for page in list { try? memory.store(value, at: GuestAddress(UInt64(page) << 12)) }
    }

    /// Gives every page contents, none of them zero.
    func fill() throws(BenchError) {
        for region in memory.regions where region.range.start.rawValue == 0 {
            let words = region.host.assumingMemoryBound(to: UInt64.self)
            for index in 0..<pages * 512 { words[index] = UInt64(index) &* 0x9e37_79b9_7f4a_7c15 | 1 }
        }
    }

    func resume() {
        let starts = state.update { state in
            defer { (state.wanted, state.isRunning) = (.running, true) }
            return !state.isRunning
        }
        // A measurement without its load would be none.
        if starts, !startThread(named: "load", { self.load() }) { exit(1) }
    }

    func pause() throws(PartFailure) {
        state.update { $0.wanted = .stopped }
        let failure = state.wait { $0.isRunning ? nil : .some($0.failure) }
        if let failure { throw PartFailure(failure.description) }
    }

    private func load() {
        var random = Sequence64(seed: seed), debt = 0.0, last = nanoseconds(), value: UInt32 = 1
        while state.read({ $0.wanted == .running }) {
            let now = nanoseconds()
            // At most a tenth of a second's worth: what cannot be kept up with is not made up for.
            debt = min(debt + Double(now - last) / 1e9 * Double(rate) / 4096, Double(rate) / 40960 + 1)
            last = now
            let count = Int(debt)
            debt -= Double(count)
            value &+= 1
            do throws(BenchError) {
                try write(value, (0..<count).map { _ in UInt32(random.next(below: pages)) })
            } catch {
                state.update { $0.failure = error }
                break
            }
            state.update { $0.writes += count }
            usleep(5000)
        }
        state.update { $0.isRunning = false }
    }

    func saveState() throws(PartFailure) -> [StateSection] { [StateSection(name: "load", bytes: [1])] }

    /// How many pages of the memory under test differ from `other`'s.
    func differences(_ other: LoadGuest) -> Int {
        let mine = memory.regions[0].host, theirs = other.memory.regions[0].host
        return (0..<pages).count { memcmp(mine + $0 * 4096, theirs + $0 * 4096, 4096) != 0 }
    }
}

/// Where a `LoadGuest` goes. It does not run there before it was compared.
final class LoadPlace: IncomingGuest {
    let guest: LoadGuest
    private let started = Atomic<Bool>(false)

    init(_ guest: LoadGuest) { self.guest = guest }
    var hasStarted: Bool { started.load(ordering: .acquiring) }

    func prepare(machineDescription: [UInt8]) throws(PartFailure) -> GuestMemory { guest.memory }
    func load(state: [StateSection]) throws(PartFailure) {}
    func start() throws(PartFailure) { started.store(true, ordering: .releasing) }
    func discard() {}
}

/// Migrates within this process, over a pair of sockets.
func migrate(
    _ guest: any OutgoingGuest, _ trackers: [any DirtyTracker], to place: any IncomingGuest, _ options: MigrationOptions
) throws(BenchError) -> MigrationReport {
    do {
        let (here, there) = try ByteChannel.pair()
        let receiver = MigrationReceiver(guest: place)
        let receiving = Background("receiver") { () -> String? in
            do { _ = try receiver.run(over: there); return nil } catch { return "\(error)" }
        }
        let source = MigrationSource(guest: guest, trackers: trackers, options: options)
        let result = Result { try source.run(over: here) }
        let trouble = receiving.join()
        let report = try result.get()
        if let trouble { throw BenchError("the destination: \(trouble)") }
        return report
    } catch { throw BenchError("a migration failed: \(error)") }
}
