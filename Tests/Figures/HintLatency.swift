// SPDX-License-Identifier: Apache-2.0
import Balloon
import CLinux
import GuestMemory
import TestSupport
import VhostUserSupport
import Virtio

/// From the request to the report, through the hint socket and vhost-user against the device in the same process, with
/// a guest of 4 GiB whose driver answers as soon as it hears of the request: what it finds lies ready. Both report the
/// same pages to a caller on another thread than the driver's.
struct HintLatency {
    static let limit = 2.0
    private static let guestBytes: UInt64 = 4 << 30
    private static let rounds = 50

    /// The driver's buffers, in memory that nobody else uses.
    private struct Buffers {
        let memory: GuestMemory
        let header: UInt64 = 512 << 20
        var bitmap: UInt64 { header + 4096 }
        var figures: UInt64 { header + (1 << 20) }
        private let bits = UInt32(HintLatency.guestBytes >> 12)

        init(_ memory: GuestMemory) {
            self.memory = memory
            for word in 0..<UInt64(bits / 64) { memory.poke(UInt64(0x00ff_ffff_ffff_ff00), at: bitmap + 8 * word) }
        }

        /// Makes the report available: the bitmap's chain and the figures'.
        func publish(_ request: UInt32, in queue: MockQueue) {
            _ = queue.takeUsed()
            var pages = ByteBuilder(), end = ByteBuilder()
            for (builder, kind, count) in [(0, UInt16(1), bits), (1, UInt16(2), UInt32(0))] {
                var header = ByteBuilder()
                header.put(request)
                // The first chain is the first of its report, the second the last.
                header.put(kind)
                header.put(kind)
                header.put(UInt64(0))
                header.put(count)
                header.put(UInt32(0))
                if builder == 0 { pages = header } else { end = header }
            }
            for figure in [1, 2, 3, 4, 5] as [UInt64] { end.put(figure) }
            memory.poke(pages.bytes, at: header)
            memory.poke(end.bytes, at: figures)
            queue.publish(queue.chain([MockDescriptor(header, 24), MockDescriptor(bitmap, bits / 8)]))
            queue.publish(queue.chain([MockDescriptor(figures, 64)]))
        }
    }

    private static func measure(_ ask: () -> Int?, close: () -> Void) -> [Double] {
        (0..<rounds).map { _ in
            let start = nanoseconds(), pages = ask(), end = nanoseconds()
            guard pages == Int(guestBytes >> 12) / 64 * 48 else { fail("no report, or a wrong one") }
            close()
            return end - start
        }
    }

    private final class InProcess: @unchecked Sendable {
        // Sendable: the queue is the driver thread's.
        let device: BalloonDevice
        private let queue: MockQueue
        private let buffers: Buffers
        private let changed = eventfd(0, lacuna_EFD_FLAGS)
        private let file = MemoryFile(HintLatency.guestBytes)

        init() throws {
            let memory = try GuestMemory(
                sharing: [
                    SharedMapping(
                        range: GuestRange(start: GuestAddress(0), size: file.size), descriptor: file.descriptor, offset: 0)
                ], limit: 1 << 32)
            device = BalloonDevice(memory: memory)
            queue = MockQueue(memory: memory, base: 1 << 20, size: 32)
            buffers = Buffers(memory)
            let changed = changed
            device.activate(
                features: VirtioFeature.version1 | BalloonFeature.freePageBitmap,
                queues: [nil, nil, queue.deviceSide(), nil, nil, nil],
                signals: DeviceSignals(
                    usedBuffer: { _ in },
                    configurationChanged: {
                        var one: UInt64 = 1
                        write(changed, &one, 8)
                    }, needsReset: {}))
        }

        /// The driver, until the device is asked for a target.
        func drive() {
            var seen: UInt32 = 0
            while device.targetPages == 0 {
                var polled = pollfd(fd: changed, events: Int16(POLLIN), revents: 0), value: UInt64 = 0
                poll(&polled, 1, -1)
                _ = read(changed, &value, 8)
                let wanted = UInt32(truncatingIfNeeded: device.readConfiguration(offset: 16, count: 4))
                guard wanted >= 2, wanted != seen else { continue }
                seen = wanted
                buffers.publish(wanted, in: queue)
                device.notify(queue: 2)
            }
        }
    }

    private final class Guest: @unchecked Sendable {
        // Sendable: the front end is the driver thread's once that began.
        private let frontEnd: FrontEnd
        private let buffers: Buffers
        init(_ socket: String) {
            guard let made = FrontEnd(socket, file: MemoryFile(HintLatency.guestBytes)),
                made.start(features: VirtioFeature.version1 | BalloonFeature.freePageBitmap, rings: [0, 1, 2])
            else { fail("no device over vhost-user") }
            frontEnd = made
            buffers = Buffers(made.memory)
        }
        func drive() {
            var seen: UInt32 = 0
            while frontEnd.awaitConfigurationChange(), let wanted = frontEnd.configuration(16) {
                if frontEnd.configuration(0) != 0 { return }
                guard wanted >= 2, wanted != seen else { continue }
                seen = wanted
                buffers.publish(wanted, in: frontEnd.queues[2]!)
                frontEnd.kick(2)
            }
            fail("the service is gone")
        }
    }

    /// Prints the figures as JSON. True if they are within the limit.
    static func run() throws -> Bool {
        let near = try InProcess(), driver = HostThread { near.drive() }
        let running = try RunningService(), guest = Guest(running.socket), other = HostThread { guest.drive() }
        guard let hints = HintClient(running.hintSocket) else { fail("no hint socket") }
        var direct: [Double] = [], sockets: [Double] = []
        // In turns, so that both meet the same machine.
        for _ in 0..<5 {
            direct += measure {
                near.device.waitForReport(near.device.openWindow(), milliseconds: 10_000)?.pages.population
            } close: { near.device.closeWindow() }
            sockets += measure {
                guard let opened = hints.ask(2), opened.status == 0,
                    let report = hints.ask(3, argument: 10_000, request: opened.request), report.status == 0
                else { return nil }
                close(report.file)
                return Int(report.word(1))
            } close: { _ = hints.ask(4) }
        }
        near.device.setTarget(pages: 1)
        driver.join()
        _ = hints.ask(6, argument: 1)
        other.join()
        running.stop()
        func median(_ list: [Double]) -> Double { list.sorted()[list.count / 2] }
        let ratio = median(sockets) / median(direct)
        print("{\"hintRequests\": \(direct.count), \"inProcessMicroseconds\": \(Int(median(direct) / 1000)), \"vhostUserMicroseconds\": \(Int(median(sockets) / 1000)), \"ratio\": \(ratio), \"limit\": \(limit)}")
        return ratio <= limit
    }
}
