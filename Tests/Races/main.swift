// SPDX-License-Identifier: Apache-2.0
import Glibc
import GuestMemory
import Migration
import Synchronization
import TestSupport

// What runs on several threads at once, in a program small enough to be built with ThreadSanitizer in a minute. It checks
// results as well, so it means something without the sanitizer too. Prints `ok NAME`, ends with 1 at the first failure.

func expect(_ condition: Bool, _ what: @autoclosure () -> String) {
    if condition { return }
    print("not ok: \(what())")
    exit(1)
}

/// Two setters, which look at what they set, against a thread that takes whole words and drains by the summary.
func bitmapUnderFire() {
    let map = PageBitmap(bitCount: 3 * 4096), rounds = 5000, done = Tally()
    let setters = (0..<2).map { number in
        HostThread {
            var random = SeededGenerator(seed: UInt64(number))
            for _ in 0..<rounds {
                let bit = number + 2 * Int.random(in: 0..<map.bitCount / 2, using: &random)
                // Waits until it was taken, so that every set counts.
                while map[bit] {}
                map.atomicSet(bit)
            }
            done.add()
        }
    }
    var taken = 0, turn = 0
    func take() {
        turn += 1
        if turn % 2 == 0 {
            map.atomicDrain { _, bits in taken += bits.nonzeroBitCount }
        } else {
            for index in 0..<map.wordCount { taken += map.atomicTake(word: index).nonzeroBitCount }
        }
    }
    while done.value < 2 { take() }
    take()
    take()
    for setter in setters { setter.join() }
    expect(taken == 2 * rounds, "\(taken) bits of \(2 * rounds) came out")
}

/// The same for the log with two buffers.
func doubleBufferUnderFire() {
    let log = DoubleBufferedLog(bitCount: 4096), found = PageBitmap(bitCount: 4096), rounds = 2000
    let seen = Tally(), wanted = Tally()
    let setter = HostThread {
        for round in 0..<rounds {
            log.atomicSet(round * 7 % 4096)
            wanted.add()
            while seen.value < wanted.value {}
        }
    }
    while seen.value < rounds {
        let now = wanted.value
        for _ in 0..<2 { log.harvest(into: found) }
        guard now > seen.value else { continue }
        let page = (now - 1) * 7 % 4096
        expect(found[page], "bit \(page) of round \(now) was lost")
        found.clear(page..<page + 1)
        seen.add()
    }
    setter.join()
}

/// A guest of plain memory and two threads that write to it, logged as the VMM's own writes are.
final class WritingGuest: OutgoingGuest {
    let memory: GuestMemory
    let machineDescription: [UInt8] = []
    private let stopping = Atomic<Bool>(false)
    private let threads = Mutex<[HostThread]>([])

    init() { memory = GuestMemory.withHole() }

    func start() {
        stopping.store(false, ordering: .sequentiallyConsistent)
        threads.withLock { threads in
            threads = (0..<2).map { number in
                HostThread { [self] in
                    var random = SeededGenerator(seed: UInt64(number)), value: UInt64 = 0
                    while !stopping.load(ordering: .relaxed) {
                        value &+= 1
                        // Each thread has bytes of its own, and both have every page.
                        let page = UInt64(Int.random(in: 0..<512, using: &random)) * 4096
                        guestWrites(value, memory, page + UInt64(number) * 8)
                        memory.logWrite(GuestAddress(page), bytes: 16)
                    }
                }
            }
        }
    }
    func pause() throws(PartFailure) {
        stopping.store(true, ordering: .sequentiallyConsistent)
        let ending = threads.withLock { threads in
            defer { threads = [] }
            return threads
        }
        for thread in ending { thread.join() }
    }
    func resume() { start() }
    func saveState() throws(PartFailure) -> [StateSection] { [StateSection(name: "cpu", bytes: [1])] }
}

/// What a vCPU does: it writes to memory that is being sent. That race is meant, and its write is sent again; so this
/// function, and no other, is named in the sanitizer's list of exceptions.
@inline(never) func guestWrites(_ value: UInt64, _ memory: GuestMemory, _ address: UInt64) {
    memory.hostPointer(GuestAddress(address), bytes: 8)!.storeBytes(of: value, as: UInt64.self)
}

final class Place: IncomingGuest {
    let memory = GuestMemory.withHole()
    func prepare(machineDescription: [UInt8]) throws(PartFailure) -> GuestMemory { memory }
    func load(state: [StateSection]) throws(PartFailure) {}
    func start() throws(PartFailure) {}
    func discard() {}
}

/// Whole migrations over one to four connections, with writers, progress and a cancel from another thread in every third.
func migrations() throws {
    for round in 0..<9 {
        let guest = WritingGuest(), place = Place()
        guest.start()
        let (here, there) = try ByteChannel.pair()
        let listener = try ChannelListener(.tcp(host: "127.0.0.1", port: 0))
        let received = Mutex<Bool?>(nil)
        let receiver = HostThread {
            let arrived = (try? MigrationReceiver(guest: place).run(over: there, joining: listener)) != nil
            received.withLock { $0 = arrived }
        }
        var options = MigrationOptions()
        options.downtimeLimitMilliseconds = 5
        options.maxRounds = 6
        options.connections = 1 + round % 4
        let source = MigrationSource(guest: guest, trackers: [], options: options)
        let canceller = HostThread { if round % 3 == 2 { source.cancel() } }
        let sent: Bool
        do throws(MigrationError) {
            _ = try source.run(over: here) { () throws(MigrationError) in try ByteChannel.connect(to: listener.address) }
            sent = true
        } catch { sent = false }
        canceller.join()
        receiver.join()
        if sent { expect(received.withLock { $0 } == true, "migration \(round) was sent and did not arrive") }
        if sent {
            for region in guest.memory.regions {
                let other = place.memory.hostPointer(region.range.start, bytes: Int(region.range.size))!
                expect(memcmp(region.host, other, Int(region.range.size)) == 0, "memory differs after migration \(round)")
            }
        } else {
            expect(round % 3 == 2, "migration \(round) failed")
            try guest.pause()
        }
    }
}

func run(_ name: String, _ body: () throws -> Void) {
    do { try body() } catch { expect(false, "\(name): \(error)") }
    print("ok \(name)")
}
/// A race on purpose: whoever wants to know whether the sanitizer works here runs this first.
func canary() {
    let value = UnsafeMutablePointer<Int>.allocate(capacity: 1)
    value.initialize(to: 0)
    let address = UInt(bitPattern: value)
    let other = HostThread { UnsafeMutablePointer<Int>(bitPattern: address)!.pointee += 1 }
    value.pointee += 1
    other.join()
}
if CommandLine.arguments.dropFirst().first == "canary" {
    canary()
    exit(0)
}
run("bitmap", bitmapUnderFire)
run("double buffer", doubleBufferUnderFire)
run("migrations", migrations)
