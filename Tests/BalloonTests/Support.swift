// SPDX-License-Identifier: Apache-2.0
import Balloon
import GuestMemory
import TestSupport
import Testing
import Virtio

let version1 = VirtioFeature.version1
let bitmap = BalloonFeature.freePageBitmap

/// Flags of a report's chain.
let first: UInt16 = 1
let last: UInt16 = 2
let failed: UInt16 = 4

func header(
    _ request: UInt32, kind: UInt16 = 1, flags: UInt16 = 0, start: UInt64 = 0, bits: UInt32 = 0, reserved: UInt32 = 0
) -> [UInt8] {
    var bytes = ByteBuilder()
    bytes.put(request)
    bytes.put(kind)
    bytes.put(flags)
    bytes.put(start)
    bytes.put(bits)
    bytes.put(reserved)
    return bytes.bytes
}

func words(_ list: [UInt64]) -> [UInt8] {
    var bytes = ByteBuilder()
    for word in list { bytes.put(word) }
    return bytes.bytes
}

func pageList(_ pages: [UInt32]) -> [UInt8] {
    var bytes = ByteBuilder()
    for page in pages { bytes.put(page) }
    return bytes.bytes
}

/// A balloon behind its transport, and a driver in a guest of 4 MiB + 2 MiB with a hole of 4 MiB between.
struct Bench {
    let memory: GuestMemory
    let device: BalloonDevice
    let transport: MMIOTransport
    let driver: MockDriver
    let interrupts = Tally()
    var bitmapQueue = 2

    init(memory: GuestMemory = .withHole()) {
        self.memory = memory
        device = BalloonDevice(memory: memory)
        let interrupts = interrupts
        transport = MMIOTransport(device: device, memory: memory) { interrupts.add() }
        driver = MockDriver(memory: memory, transport: transport)
    }

    /// With a driver like lacuna_balloon in Linux: queues without gaps.
    static func started(_ extra: UInt64 = 0) -> Bench {
        let bench = Bench()
        #expect(bench.driver.start(features: version1 | bitmap | extra, queues: [0, 1, 2]))
        return bench
    }

    /// A bitmap's chain, header and words apart as the kernel module sends them.
    func sendPages(_ request: UInt32, _ flags: UInt16 = 0, start: UInt64, _ list: [UInt64]) {
        send([header(request, flags: flags, start: start, bits: UInt32(list.count * 64)), words(list)])
    }

    func sendFigures(_ request: UInt32, _ flags: UInt16 = last, _ figures: [UInt64] = [1, 2, 3, 4, 5]) {
        send([header(request, kind: 2, flags: flags) + words(figures)])
    }

    /// Whatever the device makes of a chain, it is used, with nothing written.
    func send(_ readable: [[UInt8]], writable: [Int] = [], _ location: SourceLocation = #_sourceLocation) {
        let used = driver.send(queue: bitmapQueue, readable: readable, writable: writable)
        #expect(used.map(\.written) == [0], sourceLocation: location)
    }

    func inflate(_ pages: [UInt32]) { driver.send(queue: 0, readable: [pageList(pages)]) }
    func deflate(_ pages: [UInt32]) { driver.send(queue: 1, readable: [pageList(pages)]) }

    /// One whole report of one word at page 64.
    func report(_ word: UInt64 = 0xff) -> FreePageReport? {
        let request = device.openWindow()
        sendPages(request, first, start: 64, [word])
        sendFigures(request)
        return device.waitForReport(request, milliseconds: 0)
    }
}

/// The pages of a bitmap.
func pages(_ bitmap: PageBitmap) -> Set<Int> { Set((0..<bitmap.bitCount).filter { bitmap[$0] }) }
