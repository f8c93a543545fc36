// SPDX-License-Identifier: Apache-2.0
import Glibc
import Testing

@testable import Migration

@Suite struct ChannelTests {
    private static func path(_ name: String) -> String { "/tmp/lacuna-\(getpid())-\(name).sock" }

    private static func listen(_ address: ChannelAddress, mayFail: Bool) -> ChannelListener? {
        let listener = try? ChannelListener(address)
        if !mayFail { #expect(listener != nil) }
        return listener
    }

    @Test func addressesAreReadAndPrinted() throws {
        for text in ["unix:/run/a.sock", "unix:a:b", "tcp:127.0.0.1:4444", "tcp:[::1]:1", "tcp:localhost:0"] {
            #expect(try ChannelAddress(parsing: text).description == text)
        }
        let bad = [
            "", "unix:", "tcp:", "tcp:1.2.3.4", "tcp:1.2.3.4:", "tcp:1.2.3.4:65536", "tcp:1.2.3.4:-1", "tcp:1.2.3.4:+1",
            "tcp:::1:80", "tcp:[1.2.3.4]:80", "tcp:example.org:80", "tcp:[::1:80", "tcp:[]:80", "udp:1.2.3.4:5",
            "unix:" + String(repeating: "x", count: 108), "unix:a\0b", "tcp::80",
        ]
        for text in bad { #expect(throws: MigrationError.self, "\(text)") { try ChannelAddress(parsing: text) } }
    }

    @Test(arguments: ["unix", "tcp:127.0.0.1:0", "tcp:[::1]:0"]) func bytesGoBothWays(kind: String) throws {
        let address = try ChannelAddress(parsing: kind == "unix" ? "unix:" + Self.path("both") : kind)
        // Not every host has IPv6.
        guard let listener = Self.listen(address, mayFail: kind.contains("[")) else { return }
        let near = try ByteChannel.connect(to: listener.address)
        let far = try listener.accept(timeoutMilliseconds: 5000)
        let size = 8 << 20
        let worker = Worker<[UInt8]> {
            let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: size, alignment: 16)
            defer { buffer.deallocate() }
            try? far.readExactly(into: buffer, idleMilliseconds: 5000)
            return Array(buffer)
        }
        var random = SplitMix(9)
        let sent = (0..<size / 8).flatMap { _ -> [UInt8] in withUnsafeBytes(of: random.next()) { Array($0) } }
        try sent.withUnsafeBytes { bytes in
            try near.writeAll(
                [.init(rebasing: bytes[..<17]), .init(rebasing: bytes[17..<17]), .init(rebasing: bytes[17...])],
                idleMilliseconds: 5000)
        }
        #expect(worker.join() == sent)
        #expect(near.bytesSent == UInt64(size) && far.bytesReceived == UInt64(size))
    }

    @Test func theSocketFileGoesWithItsListener() throws {
        let path = Self.path("file")
        let address = ChannelAddress.unix(path: path)
        do {
            let listener = try ChannelListener(address)
            #expect(access(path, F_OK) == 0)
            #expect(throws: MigrationError.cannotListen(address.description, errno: EADDRINUSE)) {
                try ChannelListener(address)
            }
            listener.close()
        }
        #expect(access(path, F_OK) != 0)
    }

    @Test func aStaleSocketFileIsReplacedAndAnotherFileIsNot() throws {
        let path = Self.path("stale")
        let address = ChannelAddress.unix(path: path)
        var old: ChannelListener? = try ChannelListener(address)
        rename(path, path + ".old")
        old?.close()
        old = nil
        rename(path + ".old", path)
        #expect(throws: MigrationError.cannotConnect(address.description, errno: ECONNREFUSED)) {
            try ByteChannel.connect(to: address)
        }
        let listener = try ChannelListener(address)
        _ = try ByteChannel.connect(to: address)
        listener.close()

        let file = open(path, O_CREAT | O_WRONLY, 0o600)
        close(file)
        #expect(throws: MigrationError.self) { try ChannelListener(address) }
        #expect(access(path, F_OK) == 0)
        unlink(path)
    }

    @Test func whatToDoIsSaid() throws {
        let nowhere = ChannelAddress.unix(path: Self.path("nowhere"))
        let error = #expect(throws: MigrationError.self) { try ByteChannel.connect(to: nowhere) }
        #expect(error?.description.contains("lacuna receive") == true)
        let foreign = ChannelAddress.tcp(host: "192.0.2.1", port: 1)
        let other = #expect(throws: MigrationError.self) { try ChannelListener(foreign) }
        #expect(other?.description.contains("does not have that address") == true)
        #expect(!errnoText(EPIPE).isEmpty)
    }

    @Test func shutdownWakesAReader() throws {
        let (near, far) = try ByteChannel.pair()
        let worker = Worker<MigrationError?> {
            var byte: UInt8 = 0
            do throws(MigrationError) {
                let result: Result<Void, MigrationError> = withUnsafeMutableBytes(of: &byte) { buffer in
                    do throws(MigrationError) {
                        return .success(try near.readExactly(into: buffer, idleMilliseconds: 60_000))
                    } catch { return .failure(error) }
                }
                try result.get()
            } catch { return error }
            return nil
        }
        near.shutdown()
        #expect(worker.join() == .cancelled)
        withExtendedLifetime(far) {}
    }

    @Test func closeWakesAnAccept() throws {
        let listener = try ChannelListener(.tcp(host: "127.0.0.1", port: 0))
        let worker = Worker<MigrationError?> {
            do throws(MigrationError) { _ = try listener.accept() } catch { return error }
            return nil
        }
        listener.close()
        #expect(worker.join() == .cancelled)
        let quick = try ChannelListener(.tcp(host: "127.0.0.1", port: 0))
        guard case .timedOut = #expect(throws: MigrationError.self, performing: { try quick.accept(timeoutMilliseconds: 10) })
        else {
            Issue.record("no timeout")
            return
        }
    }

    @Test func aWriterDoesNotWaitForEver() throws {
        let (near, far) = try ByteChannel.pair()
        let bytes = [UInt8](repeating: 0, count: 16 << 20)
        guard
            case .timedOut = #expect(
                throws: MigrationError.self,
                performing: { try bytes.withUnsafeBytes { try near.writeAll([$0], idleMilliseconds: 20) } })
        else {
            Issue.record("no timeout")
            return
        }
        near.interrupt()
        #expect(throws: MigrationError.cancelled) {
            try bytes.withUnsafeBytes { try near.writeAll([$0], idleMilliseconds: 20) }
        }
        withExtendedLifetime(far) {}
    }
}
