// SPDX-License-Identifier: Apache-2.0
import Glibc
import GuestMemory
import Synchronization
import Testing

@testable import Migration

/// A small seeded generator, so that a failing case can be run again.
struct SplitMix: RandomNumberGenerator {
    var state: UInt64
    init(_ seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var z = state
        z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
        z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
        return z ^ (z >> 31)
    }
}

/// A thread whose result can be waited for. The tests' own threads belong to a pool that must not be used up.
final class Worker<Value: Sendable>: Sendable {
    private final class Box: Sendable {
        let body: @Sendable () -> Value
        let result = Mutex<Value?>(nil)
        init(_ body: @escaping @Sendable () -> Value) { self.body = body }
    }
    private let box: Box
    private let thread: pthread_t

    init(_ body: @escaping @Sendable () -> Value) {
        let box = Box(body)
        self.box = box
        var thread = pthread_t()
        let runner = Unmanaged<AnyObject>.passRetained(
            Runner {
                let value = box.body()
                box.result.withLock { $0 = value }
            })
        pthread_create(&thread, nil, { argument in
            (Unmanaged<AnyObject>.fromOpaque(argument!).takeRetainedValue() as! Runner).body()
            return nil
        }, runner.toOpaque())
        self.thread = thread
    }

    /// To be called once.
    func join() -> Value {
        pthread_join(thread, nil)
        return box.result.withLock { $0! }
    }
}

final class Runner {
    let body: () -> Void
    init(_ body: @escaping () -> Void) { self.body = body }
}

/// What happened, in order, across threads.
final class Journal: Sendable {
    private let entries = Mutex<[String]>([])
    func note(_ what: String) { entries.withLock { $0.append(what) } }
    var all: [String] { entries.withLock { $0 } }
    func count(_ what: String) -> Int { all.count { $0 == what } }
}

/// A tracker of writes that are announced to it. Like write protection, it sees nothing while it is not armed.
final class SoftwareTracker: DirtyTracker {
    private let log: PageBitmap
    private let isArmed = Atomic<Bool>(false)
    private let journal: Journal?
    private let armFailure: PartFailure?

    init(_ memory: GuestMemory, journal: Journal? = nil, armFailure: PartFailure? = nil) {
        log = PageBitmap(bitCount: memory.frameCount)
        self.journal = journal
        self.armFailure = armFailure
    }

    /// After the write.
    func wrote(_ page: Int) {
        if isArmed.load(ordering: .sequentiallyConsistent) { log.atomicSet(page) }
    }

    var armed: Bool { isArmed.load(ordering: .sequentiallyConsistent) }

    func arm() throws(PartFailure) {
        if let armFailure { throw armFailure }
        for index in 0..<log.wordCount { _ = log.atomicTake(word: index) }
        isArmed.store(true, ordering: .sequentiallyConsistent)
        journal?.note("arm")
    }
    func collect(into bitmap: PageBitmap) throws(PartFailure) {
        guard armed else { return }
        for index in 0..<log.wordCount { bitmap.merge(log.atomicTake(word: index), intoWord: index) }
        journal?.note("collect")
    }
    func disarm() {
        isArmed.store(false, ordering: .sequentiallyConsistent)
        journal?.note("disarm")
    }
}

func mebibytes(_ start: UInt64, _ size: UInt64) -> GuestRange {
    GuestRange(start: GuestAddress(start << 20), size: size << 20)
}

/// 256 KiB units: the smallest regions there are, two that touch and one behind a hole.
let smallLayout = [
    GuestRange(start: GuestAddress(0), size: 1 << 18), GuestRange(start: GuestAddress(1 << 18), size: 1 << 18),
    GuestRange(start: GuestAddress(1 << 20), size: 1 << 18),
]

/// A guest made of plain memory, and of threads that write to it while it runs.
final class MiniGuest: OutgoingGuest {
    let memory: GuestMemory
    let tracker: SoftwareTracker
    let journal = Journal()
    let description: [UInt8]
    let sections = Mutex<[StateSection]>([StateSection(name: "cpu0", bytes: [1, 2, 3]), StateSection(name: "empty", bytes: [])])
    private let running: Mutex<(isRunning: Bool, threads: [Worker<Void>])>
    private let stopFlag = Atomic<Bool>(true)
    /// One step of each writer thread; called again and again while the guest runs.
    let writers = Mutex<[@Sendable (MiniGuest) -> Void]>([])
    let onPause = Mutex<(@Sendable (MiniGuest) -> PartFailure?)?>(nil)
    let onSave = Mutex<(@Sendable (MiniGuest) -> PartFailure?)?>(nil)
    let resumeFailure = Mutex<PartFailure?>(nil)

    init(memory: GuestMemory, description: [UInt8], isRunning: Bool) {
        self.memory = memory
        self.description = description
        tracker = SoftwareTracker(memory, journal: journal)
        running = Mutex((isRunning, []))
    }

    convenience init(_ layout: [GuestRange] = smallLayout) throws {
        self.init(memory: try GuestMemory(ranges: layout), description: describe(layout), isRunning: true)
    }

    var machineDescription: [UInt8] { description }
    var isRunning: Bool { running.withLock { $0.isRunning } }

    /// Pages of RAM, in order.
    var pages: [Int] { memory.regions.flatMap { Array($0.range.pages) } }

    /// A vCPU's write.
    func write(_ value: UInt64, page: Int, offset: Int = 0, by other: SoftwareTracker? = nil) {
        let address = GuestAddress(UInt64(page) << pageShift + UInt64(offset))
        memory.hostPointer(address, bytes: 8)!.storeBytes(of: value, as: UInt64.self)
        memory.fence()
        (other ?? tracker).wrote(page)
    }
    func read(page: Int, offset: Int = 0) -> UInt64 {
        memory.hostPointer(GuestAddress(UInt64(page) << pageShift + UInt64(offset)), bytes: 8)!.load(as: UInt64.self)
    }
    /// Fills a page with values that depend on `seed`, all of them not zero.
    func fill(page: Int, seed: UInt64) {
        for word in 0..<512 { write(seed << 20 | UInt64(word) | 1 << 63, page: page, offset: word * 8) }
    }
    /// As a guest with `init_on_free` does.
    func clear(page: Int) {
        memset(memory.hostPointer(GuestAddress(UInt64(page) << pageShift), bytes: pageSize)!, 0, pageSize)
        memory.fence()
        tracker.wrote(page)
    }

    /// Starts the writer threads.
    func startWriters() {
        stopFlag.store(false, ordering: .sequentiallyConsistent)
        let steps = writers.withLock { $0 }
        let threads = steps.map { step in
            Worker<Void> { [self] in while !stopFlag.load(ordering: .sequentiallyConsistent) { step(self) } }
        }
        running.withLock { $0 = (true, threads) }
    }

    func pause() throws(PartFailure) {
        journal.note("pause")
        stopFlag.store(true, ordering: .sequentiallyConsistent)
        let threads = running.withLock { state in
            defer { state = (false, []) }
            return state.threads
        }
        for thread in threads { thread.join() }
        if let failure = onPause.withLock({ $0 })?(self) { throw failure }
    }
    func resume() throws(PartFailure) {
        journal.note("resume")
        if let failure = resumeFailure.withLock({ $0 }) { throw failure }
        startWriters()
    }
    func saveState() throws(PartFailure) -> [StateSection] {
        if let failure = onSave.withLock({ $0 })?(self) { throw failure }
        return sections.withLock { $0 }
    }

    /// Pages whose bytes differ from `other`'s.
    func differences(_ other: MiniGuest) -> [Int] {
        pages.filter { page in
            let address = GuestAddress(UInt64(page) << pageShift)
            return memcmp(
                memory.hostPointer(address, bytes: pageSize)!, other.memory.hostPointer(address, bytes: pageSize)!,
                pageSize) != 0
        }
    }
}

/// A machine description: the layout and nothing else.
func describe(_ layout: [GuestRange]) -> [UInt8] {
    var encoder = StateEncoder()
    for range in layout {
        encoder.put(range.start.rawValue)
        encoder.put(range.size)
    }
    return encoder.bytes
}

/// A place for one `MiniGuest` to arrive.
final class MiniPlace: IncomingGuest {
    private let layout: [GuestRange]
    private let arrived = Mutex<MiniGuest?>(nil)
    let journal = Journal()
    let state = Mutex<[StateSection]>([])
    let loadFailure = Mutex<PartFailure?>(nil)
    let startFailure = Mutex<PartFailure?>(nil)

    init(_ layout: [GuestRange] = smallLayout) { self.layout = layout }

    var guest: MiniGuest? { arrived.withLock { $0 } }
    var runs: Bool { journal.count("start") > 0 }

    func prepare(machineDescription: [UInt8]) throws(PartFailure) -> GuestMemory {
        guard machineDescription == describe(layout) else { throw PartFailure("this machine has another memory layout") }
        do {
            let memory = try GuestMemory(ranges: layout)
            arrived.withLock { $0 = MiniGuest(memory: memory, description: machineDescription, isRunning: false) }
            return memory
        } catch { throw PartFailure("no memory: \(error)") }
    }
    func load(state sections: [StateSection]) throws(PartFailure) {
        if let failure = loadFailure.withLock({ $0 }) { throw failure }
        state.withLock { $0 = sections }
        journal.note("load")
    }
    func start() throws(PartFailure) {
        if let failure = startFailure.withLock({ $0 }) { throw failure }
        journal.note("start")
        guest?.startWriters()
    }
    func discard() { journal.note("discard") }
}

/// A hinter that says what a test tells it to.
final class ScriptedHinter: FreePageHinter {
    typealias Answer = @Sendable (_ request: UInt32) -> HintReport?
    private let journal: Journal
    private let answer: Answer
    private let onRequest: @Sendable (UInt32) -> Void
    private let last = Mutex<UInt32>(1)
    let refusal: String?
    let method = "script"

    init(
        _ journal: Journal, refusal: String? = nil, onRequest: @escaping @Sendable (UInt32) -> Void = { _ in },
        answer: @escaping Answer
    ) {
        self.journal = journal
        self.refusal = refusal
        self.answer = answer
        self.onRequest = onRequest
    }

    func request() throws(PartFailure) -> UInt32 {
        journal.note("request")
        let request = last.withLock {
            $0 += 1
            return $0
        }
        onRequest(request)
        return request
    }
    func wait(for request: UInt32, milliseconds: Int) -> HintReport? {
        journal.note("wait")
        return answer(request)
    }
    func stop() { journal.note("stop") }
}

func report(_ request: UInt32, _ memory: GuestMemory, _ pages: some Sequence<Int>) -> HintReport {
    let bitmap = PageBitmap(bitCount: memory.frameCount)
    for page in pages { bitmap.set(page..<page + 1) }
    return HintReport(request: request, pages: bitmap, figures: nil)
}

/// Options under which small guests go through the same motions as large ones.
func quickOptions(skip: Bool = false) -> MigrationOptions {
    var options = MigrationOptions()
    options.skipFreePages = skip
    options.hintMinimumPages = 1
    options.idleTimeoutMilliseconds = 10_000
    options.commitTimeoutMilliseconds = 10_000
    return options
}

struct Ends: Sendable {
    var source: Result<MigrationReport, MigrationError>
    var destination: Result<ReceiveReport, MigrationError>
}

/// Runs both sides, the receiver on a thread of its own. Data connections, where the source's options want some, go
/// through `switchboard`.
func migrate(
    _ source: MigrationSource, to receiver: MigrationReceiver, over channels: (ByteChannel, ByteChannel)? = nil,
    through switchboard: Switchboard = Switchboard()
) throws -> Ends {
    let (near, far) = try channels ?? ByteChannel.pair()
    let worker = Worker<Result<ReceiveReport, MigrationError>> {
        do throws(MigrationError) { return .success(try receiver.run(over: far, joining: switchboard)) } catch {
            return .failure(error)
        }
    }
    let result: Result<MigrationReport, MigrationError>
    do throws(MigrationError) {
        result = .success(try source.run(over: near) { () throws(MigrationError) in try switchboard.connect() })
    } catch { result = .failure(error) }
    return Ends(source: result, destination: worker.join())
}

/// A listener within the process: what one side connects, the other accepts.
final class Switchboard: ChannelAcceptor {
    private let state = Monitor<(waiting: [ByteChannel], isClosed: Bool, made: Int)>(([], false, 0))
    private let make: @Sendable (_ number: Int) throws(MigrationError) -> (ByteChannel, ByteChannel)

    /// `make` makes connection `number`, from 1, and may lead other connections in before it.
    init(
        make: @escaping @Sendable (_ number: Int) throws(MigrationError) -> (ByteChannel, ByteChannel) = {
            number throws(MigrationError) in try ByteChannel.pair()
        }
    ) { self.make = make }

    var isClosed: Bool { state.read(\.isClosed) }

    func connect() throws(MigrationError) -> ByteChannel {
        let number = state.update {
            $0.made += 1
            return $0.made
        }
        let (near, far) = try make(number)
        guard admit(far) else { throw .cannotConnect("switchboard", errno: ECONNREFUSED) }
        return near
    }

    /// Lets somebody in; false if nobody is let in any more.
    @discardableResult func admit(_ far: ByteChannel) -> Bool {
        state.update {
            if !$0.isClosed { $0.waiting.append(far) }
            return !$0.isClosed
        }
    }

    func accept(timeoutMilliseconds: Int?) throws(MigrationError) -> ByteChannel {
        let limit = timeoutMilliseconds ?? 60_000
        let next: ByteChannel?? = state.wait(milliseconds: limit) { state -> ByteChannel?? in
            if state.isClosed { return .some(nil) }
            if state.waiting.isEmpty { return nil }
            return state.waiting.removeFirst()
        }
        guard let next else { throw .timedOut("accepting", milliseconds: limit) }
        guard let next else { throw .cancelled }
        return next
    }

    func close() {
        let unheard = state.update {
            let waiting = $0.waiting
            ($0.isClosed, $0.waiting) = (true, [])
            return waiting
        }
        for channel in unheard { channel.shutdown() }
    }
}
