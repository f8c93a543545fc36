// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials

/// The balloon against QEMU's: the same guest, kernel, driver and bed.
let balloonFigures: [Scenario] = [
    Scenario(
        name: "balloon-against-qemu", memory: 4096, limit: 900, isQuick: false, programs: ["qemu-system-x86_64"],
        isAlone: true, files: ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/linuxboot_dma.bin", "/usr/share/qemu/kvmvapic.bin"],
        body: againstQEMU)
]

/// A connection to QEMU's machine protocol.
private final class MachineProtocol {
    private let descriptor: Int32
    private var pending: [UInt8] = []

    init?(_ path: String) {
        descriptor = socket(AF_UNIX, lacuna_SOCK_STREAM_CLOEXEC, 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: Array(path.utf8)) }
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
        }
        guard result == 0 else { return nil }
        var limit = timeval(tv_sec: 60, tv_usec: 0)
        setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
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

    let emulator = try stage.start(
        "qemu",
        [
            "qemu-system-x86_64", "-L", ".", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm", "-cpu", "host",
            "-M", "pc", "-m", "1024", "-smp", "1", "-kernel", "vmlinuz", "-initrd", "initramfs.gz", "-append", run,
            "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console", "-device", "virtio-balloon-pci",
            "-qmp", "unix:qemu.qmp,server=on,wait=off",
        ])
    try stage.wait(emulator, for: "GUEST-READY", seconds: patience)
    guard let control = MachineProtocol("qemu.qmp") else { throw Failure("cannot reach QEMU") }
    _ = try control.ask("{\"execute\":\"qmp_capabilities\"}")
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
