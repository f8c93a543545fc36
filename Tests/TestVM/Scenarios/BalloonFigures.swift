// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials

/// Against QEMU: the same guest, kernel and bed.
let figuresAgainstQEMU: [Scenario] = [("balloon-against-qemu", againstQEMU), ("migrate-against-qemu", migrateAgainstQEMU)].map {
    Scenario(
        name: $0.0, memory: 4096, limit: 900, isQuick: false, programs: ["qemu-system-x86_64"],
        isAlone: true, files: ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/linuxboot_dma.bin", "/usr/share/qemu/kvmvapic.bin"],
        body: $0.1)
}

extension Stage {
    /// Starts QEMU with a guest of 1 GiB and one CPU.
    func startQEMU(_ name: String, _ more: [String]) throws(Failure) -> Child {
        try start(
            name,
            [
                "qemu-system-x86_64", "-L", ".", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm", "-cpu",
                "host", "-M", "pc", "-m", "1024", "-smp", "1", "-kernel", "vmlinuz", "-initrd", "initramfs.gz", "-chardev",
                "stdio,id=console,signal=off", "-serial", "chardev:console", "-qmp", "unix:\(name).qmp,server=on,wait=off",
            ] + more)
    }
}

/// A connection to QEMU's machine protocol.
final class MachineProtocol {
    private let descriptor: Int32
    private var pending: [UInt8] = []

    private let isConnected: Bool

    private init(_ path: String) {
        let descriptor = socket(AF_UNIX, lacuna_SOCK_STREAM_CLOEXEC, 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: Array(path.utf8)) }
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
        }
        (self.descriptor, isConnected) = (descriptor, result == 0)
        var limit = timeval(tv_sec: 60, tv_usec: 0)
        setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    }

    /// Of a QEMU that `startQEMU` started, once it answers.
    convenience init(of emulator: Child) throws(Failure) {
        let limit = now() + 30
        // It makes its socket at some time after it was started.
        while access("\(emulator.name).qmp", F_OK) != 0, now() < limit { usleep(20_000) }
        self.init("\(emulator.name).qmp")
        guard isConnected else { throw Failure("cannot reach QEMU") }
        _ = try ask("{\"execute\":\"qmp_capabilities\"}")
    }

    deinit { close(descriptor) }

    private func line() throws(Failure) -> String {
        while true {
            if let end = pending.firstIndex(of: 0x0a) {
                defer { pending.removeFirst(end + 1) }
                return String(decoding: pending[..<end], as: UTF8.self)
            }
            var buffer = [UInt8](repeating: 0, count: 4096)
            let count = recv(descriptor, &buffer, buffer.count, 0)
            guard count > 0 else { throw Failure("QEMU does not answer") }
            pending += buffer[..<count]
        }
    }

    /// Waits for an event with `text`.
    func wait(for text: String, not failure: String) throws(Failure) {
        while true {
            let line = try line()
            if line.contains(text) { return }
            if line.contains(failure) { throw Failure("QEMU: \(line)") }
        }
    }

    /// Sends a command; its answer, without the events before it.
    func ask(_ command: String) throws(Failure) -> String {
        let bytes = Array((command + "\n").utf8)
        guard send(descriptor, bytes, bytes.count, lacuna_MSG_NOSIGNAL) == bytes.count else { throw Failure("QEMU is gone") }
        while true {
            let answer = try line()
            if answer.contains("\"error\"") { throw Failure("QEMU: \(command): \(answer)") }
            if answer.contains("\"return\"") { return answer }
        }
    }

    /// Sets the guest's memory, and waits until it has that.
    func balloon(memory bytes: Int) throws(Failure) {
        _ = try ask("{\"execute\":\"balloon\",\"arguments\":{\"value\":\(bytes)}}")
        let limit = now() + patience
        while !(try ask("{\"execute\":\"query-balloon\"}").contains("\"actual\": \(bytes)}")) {
            try expect(now() < limit, "QEMU's balloon does not get there")
            // Its event comes once a second at most, which is too coarse; asking costs the guest time.
            usleep(20_000)
        }
    }
}

private struct BalloonFigures: Codable {
    struct Side: Codable { var inflate_ms: Double, deflate_ms: Double }
    var megabytes: Int
    var lacuna: Side, qemu: Side
    var ratio: Double
}

private func againstQEMU(_ stage: Stage) throws(Failure) {
    let total = 1024 << 20, size = 768 << 20
    let run = "console=ttyS0 quiet lacuna.run=dirty-then-free:100 lacuna.module=stock"

    /// The better of two turns: whatever else the machine did, it did it to the worse one.
    func measure(_ set: (Int) throws(Failure) -> Void) throws(Failure) -> BalloonFigures.Side {
        var best = BalloonFigures.Side(inflate_ms: .infinity, deflate_ms: .infinity)
        for _ in 0..<2 {
            let start = now()
            try set(size)
            let middle = now()
            try set(0)
            best.inflate_ms = min(best.inflate_ms, (middle - start) * 1000)
            best.deflate_ms = min(best.deflate_ms, (now() - middle) * 1000)
        }
        return best
    }

    let guest = try stage.boot("lacuna", memory: "1G", run: "dirty-then-free:100", more: "lacuna.module=stock")
    let ours = try measure { bytes throws(Failure) in
        let client = try stage.run(
            ["./lacuna", "balloon", "set", "--control", guest.control, "--size", "\(bytes)", "--wait", "200000"], seconds: patience)
        try expect(client.status == 0, client.text)
    }
    try stage.stop(guest)

    let emulator = try stage.startQEMU("qemu", ["-append", run, "-device", "virtio-balloon-pci"])
    try stage.wait(emulator, for: "GUEST-READY", seconds: patience)
    let control = try MachineProtocol(of: emulator)
    let theirs = try measure { bytes throws(Failure) in try control.balloon(memory: total - bytes) }
    stage.kill(emulator)

    let ratio = (ours.inflate_ms + ours.deflate_ms) / (theirs.inflate_ms + theirs.deflate_ms)
    say("768 MiB of 1 GiB in and out: \(Int(ours.inflate_ms)) + \(Int(ours.deflate_ms)) ms, QEMU \(Int(theirs.inflate_ms)) + \(Int(theirs.deflate_ms)) ms, ratio \(Double(Int(ratio * 100)) / 100)")
    let figures = BalloonFigures(megabytes: size >> 20, lacuna: ours, qemu: theirs, ratio: ratio)
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
    mkdir("out", 0o755)
    do { try encoder.encode(figures).write(to: URL(filePath: "out/balloon.json")) } catch { throw Failure("out/balloon.json: \(error)") }
    try expect(ratio <= 1.0, "slower than QEMU")
}
