// SPDX-License-Identifier: Apache-2.0
import CLinux
import GuestMemory
import TestSupport
import Testing
import VhostUserSupport
import Virtio

/// `lacuna vhost-user` as a process of its own: whatever happens to it is seen from outside.
private final class ServiceProcess {
    let pid: pid_t
    let folder: String
    var socket: String { folder + "/s" }
    var hintSocket: String { folder + "/h" }

    init?() {
        var template = Array("/tmp/lacuna-vu.XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { return nil }
        folder = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        // Built by the same `swift test`, beside the tests.
        var place = [UInt8](repeating: 0, count: 4096)
        let count = place.withUnsafeMutableBytes {
            readlink("/proc/self/exe", $0.baseAddress!.assumingMemoryBound(to: CChar.self), $0.count)
        }
        let own = String(decoding: place[..<max(count, 0)], as: UTF8.self)
        let program = "/" + own.split(separator: "/").dropLast().joined(separator: "/") + "/lacuna"
        let line = [
            program, "vhost-user", "--socket", folder + "/s", "--hint-socket", folder + "/h", "--address-limit", "4G",
        ]
        var words: [UnsafeMutablePointer<CChar>?] = line.map { strdup($0) }
        words.append(nil)
        defer { for word in words { free(word) } }
        var actions = posix_spawn_file_actions_t(), child: pid_t = 0
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, 2, folder + "/log", O_WRONLY | O_CREAT, 0o600)
        guard posix_spawn(&child, program, &actions, nil, &words, lacuna_environ()) == 0 else { return nil }
        pid = child
    }

    deinit {
        kill(pid, SIGKILL)
        var status: Int32 = 0
        waitpid(pid, &status, 0)
        for name in ["s", "h", "log"] { unlink(folder + "/" + name) }
        rmdir(folder)
    }

    /// Nil while it runs.
    func end(wait: Bool = false) -> Int32? {
        var status: Int32 = 0
        return waitpid(pid, &status, wait ? 0 : WNOHANG) == pid ? status : nil
    }

    var openDescriptors: Int {
        TestSupport.openDescriptors(to: "", process: "\(pid)")
    }

    var mappings: Int { (contents(of: "/proc/\(pid)/maps") ?? []).filter { $0 == 0x0a }.count }

    /// The descriptors after everybody left.
    func settledDescriptors(_ wanted: Int) -> Int {
        for _ in 0..<2000 where openDescriptors != wanted { sleep(milliseconds: 1) }
        return openDescriptors
    }
}

/// Numbers that have a chance to matter, and others.
private struct Nonsense {
    var random: SeededGenerator

    mutating func word() -> UInt64 {
        switch UInt8.random(in: 0..<6, using: &random) {
        case 0: UInt64.random(in: 0..<8, using: &random)
        case 1: UInt64.random(in: 0..<4096, using: &random) << 12
        case 2: FrontEnd.userBase + UInt64.random(in: 0..<(16 << 20), using: &random)
        case 3: 1 << UInt64.random(in: 0..<64, using: &random)
        case 4: 0 &- UInt64.random(in: 0..<5000, using: &random)
        default: random.next()
        }
    }
    mutating func half() -> UInt32 {
        Bool.random(using: &random) ? UInt32.random(in: 0..<8, using: &random) : UInt32(truncatingIfNeeded: word())
    }

    /// A payload of about the right shape for this request.
    mutating func payload(_ request: UInt32, _ frontEnd: FrontEnd) -> [UInt8] {
        var bytes = ByteBuilder()
        switch request {
        case 5:
            let count = UInt32.random(in: 0..<4, using: &random)
            if count == 1, Bool.random(using: &random) { return frontEnd.memoryTable() }
            bytes.put(count)
            bytes.put(UInt32(0))
            for _ in 0..<4 * count { bytes.put(word()) }
        case 37, 38: for _ in 0..<5 { bytes.put(word()) }
        case 6: for _ in 0..<2 { bytes.put(word() >> 40) }
        case 8, 10, 11, 18: for _ in 0..<2 { bytes.put(half()) }
        case 9:
            if let queue = frontEnd.queues.keys.randomElement(using: &random), Bool.random(using: &random) {
                return frontEnd.addresses(queue)
            }
            for _ in 0..<2 { bytes.put(half()) }
            for _ in 0..<4 { bytes.put(word()) }
        case 24, 25:
            let size = UInt32.random(in: 0..<40, using: &random)
            for value in [half(), size, half()] { bytes.put(value) }
            for _ in 0..<size { bytes.put(UInt8(truncatingIfNeeded: random.next())) }
        case 1, 3, 4, 15, 17, 34, 36, 40: break
        default: bytes.put(word())
        }
        return bytes.bytes
    }
}

@Suite(.serialized) struct HostileTests {
    /// At least 100 000 messages: of the right shape with random contents, with wrong sizes, cut short, out of order,
    /// with missing and surplus descriptors of all kinds, and kicks in between.
    @Test func aHundredThousandRandomMessages() throws {
        let service = try #require(ServiceProcess())
        var random = SeededGenerator(seed: 7)
        let file = MemoryFile(16 << 20)
        var socketPair: [Int32] = [0, 0], pipeEnds: [Int32] = [0, 0]
        #expect(socketpair(AF_UNIX, lacuna_SOCK_STREAM_CLOEXEC, 0, &socketPair) == 0 && pipe(&pipeEnds) == 0)
        let short = MemoryFile(4096), event = eventfd(0, lacuna_EFD_FLAGS), folder = lacuna_open("/tmp", O_RDONLY, 0)
        let null = lacuna_open("/dev/null", O_RDWR, 0)
        let files = [file.descriptor, file.descriptor, short.descriptor, event, event, socketPair[1], pipeEnds[1], folder, null]
        defer { for number in socketPair + pipeEnds + [event, folder, null] { close(number) } }

        // What an idle service has open.
        do { _ = try #require(FrontEnd(service.socket)).ask(1) }
        do { _ = try #require(HintClient(service.hintSocket)).ask(1) }
        // Of those a moment ago nothing is left once a later client was served.
        let hints = try #require(HintClient(service.hintSocket))
        _ = try #require(hints.ask(5))
        let before = service.openDescriptors, mappings = service.mappings

        // Counted by the service: what is cut short, or follows a broken header, never was a message.
        var sent = 0, connections = 0
        while try #require(hints.ask(5)).word(1) < 100_000 {
            guard let frontEnd = FrontEnd(service.socket, file: file) else {
                Issue.record("the service is gone after \(sent) messages: \(String(describing: service.end()))")
                return
            }
            connections += 1
            var nonsense = Nonsense(random: SeededGenerator(seed: random.next()))
            // Some begin with a working device.
            if connections % 3 == 0 {
                guard frontEnd.start(features: version1 | bitmapFeature, rings: [0, 1, 2]) else {
                    Issue.record("no working device after \(sent) messages")
                    return
                }
            }
            var isOpen = true
            for _ in 0..<400 where isOpen {
                let request = UInt8.random(in: 0..<30, using: &random) == 0 ? nonsense.half() : UInt32.random(in: 1..<42, using: &random)
                var payload = nonsense.payload(request, frontEnd)
                switch UInt8.random(in: 0..<40, using: &random) {
                case 0: payload = Array(payload.prefix(Int.random(in: 0...payload.count, using: &random)))
                case 1: payload += random.bytes(Int.random(in: 0..<300, using: &random))
                case 2: payload = random.bytes(Int.random(in: 0..<64, using: &random))
                default: break
                }
                let usual = [5: Int(payload.first ?? 0) & 3, 6: 1, 12: 1, 13: 1, 14: 1, 21: 1, 37: 1][Int(request)] ?? 0
                let count = UInt8.random(in: 0..<12, using: &random) == 0 ? Int.random(in: 0..<12, using: &random) : usual
                let carried = (0..<count).map { _ in files.randomElement(using: &random)! }
                var message = ByteBuilder()
                message.put(request)
                message.put(Int.random(in: 0..<600, using: &random) == 0 ? nonsense.half() : 1 | UInt32.random(in: 0..<2, using: &random) << 3)
                message.put(Int.random(in: 0..<600, using: &random) == 0 ? nonsense.half() : UInt32(payload.count))
                var bytes = message.bytes + payload
                if Int.random(in: 0..<1000, using: &random) == 0 {
                    bytes = Array(bytes.prefix(Int.random(in: 1..<bytes.count, using: &random)))
                }
                isOpen = frontEnd.sendRaw(bytes, carried)
                sent += 1
                if let ring = frontEnd.kicks.keys.randomElement(using: &random), UInt8.random(in: 0..<8, using: &random) == 0 {
                    frontEnd.memory.poke(UInt16(truncatingIfNeeded: random.next()), at: frontEnd.queues[ring]!.available + 2)
                    frontEnd.kick(ring)
                }
                // Reads its replies most of the time.
                var bin = [UInt8](repeating: 0, count: 4096)
                if connections % 10 != 0 { while recv(frontEnd.socket, &bin, bin.count, lacuna_MSG_DONTWAIT) > 0 {} }
                while recv(socketPair[0], &bin, bin.count, lacuna_MSG_DONTWAIT) > 0 {}
            }
        }
        #expect(service.end() == nil)
        #expect(service.settledDescriptors(before) == before)
        // A mapping of the memory that was sent, here and there, would be one too many.
        #expect(service.mappings <= mappings + 8)

        // And it still works.
        let frontEnd = try #require(FrontEnd(service.socket))
        #expect(frontEnd.start(features: version1, rings: [0, 1]) && frontEnd.transfer(0, [pageList([300])]) == 0)
        let statistics = try #require(hints.ask(5))
        print("hostile front end: \(sent) messages over \(connections) connections, \(statistics.word(1)) understood as messages, \(statistics.word(2)) refused")
        #expect(statistics.word(1) >= 100_000 && statistics.word(2) >= 20_000)
        kill(service.pid, SIGTERM)
        #expect(service.end(wait: true) == 0)
        #expect(access(service.socket, F_OK) != 0)
    }

    @Test func randomPacketsOnTheHintSocket() throws {
        let service = try #require(ServiceProcess())
        var random = SeededGenerator(seed: 8)
        let file = MemoryFile(4096)
        let frontEnd = try #require(FrontEnd(service.socket))
        #expect(frontEnd.start(features: version1 | bitmapFeature, rings: [0, 1, 2]))
        let before = service.openDescriptors
        for round in 0..<100 {
            let client = try #require(HintClient(service.hintSocket))
            for _ in 0..<50 {
                if Bool.random(using: &random) {
                    let files = UInt8.random(in: 0..<8, using: &random) == 0 ? [file.descriptor, file.descriptor] : []
                    client.sendRaw(random.bytes(Int.random(in: 1..<40, using: &random)), files)
                } else {
                    client.send(
                        UInt16.random(in: 0..<9, using: &random), argument: UInt32.random(in: 0..<20, using: &random),
                        request: UInt64.random(in: 0..<60, using: &random))
                }
                if round % 5 != 0 { _ = client.receive() }
            }
        }
        #expect(service.end() == nil)
        #expect(service.settledDescriptors(before) == before)
        #expect(frontEnd.transfer(0, [pageList([300])]) == 0)
    }
}
