// SPDX-License-Identifier: Apache-2.0
import CLinux
import GuestMemory
import TestSupport

/// A client of the hint socket.
package final class HintClient {
    package struct Answer {
        package let command: UInt16
        package let status: UInt32
        package let request: UInt64
        package let body: [UInt8]
        package let file: Int32
        package func word(_ index: Int) -> UInt64 { body[8 * index..<8 * index + 8].reversed().reduce(0) { $0 << 8 | UInt64($1) } }
    }
    package let socket: Int32

    package init?(_ path: String) {
        guard let made = connectTo(path, packets: true) else { return nil }
        socket = made
        var limit = timeval(tv_sec: 20, tv_usec: 0)
        setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    }
    deinit { close(socket) }

    package func send(_ command: UInt16, argument: UInt32 = 0, request: UInt64 = 0, version: UInt16 = 1) {
        var packet = ByteBuilder()
        packet.put(version)
        packet.put(command)
        packet.put(argument)
        packet.put(request)
        sendRaw(packet.bytes)
    }
    package func sendRaw(_ bytes: [UInt8], _ files: [Int32] = []) {
        _ = lacuna_send(socket, bytes, bytes.count, 0, files, Int32(files.count))
    }
    package func receive() -> Answer? {
        var reply = [UInt8](repeating: 0, count: 4096)
        var files = [Int32](repeating: -1, count: Int(LACUNA_MAX_DESCRIPTORS)), count: Int32 = 0
        let got = lacuna_receive(socket, &reply, reply.count, 0, &files, &count)
        guard got >= 16 else { return nil }
        let words = (0..<4).map { word in (0..<4).reversed().reduce(UInt32(0)) { $0 << 8 | UInt32(reply[4 * word + $1]) } }
        return Answer(
            command: UInt16(words[0] >> 16), status: words[1], request: UInt64(words[3]) << 32 | UInt64(words[2]),
            body: Array(reply[16..<got]), file: count > 0 ? files[0] : -1)
    }
    package func ask(_ command: UInt16, argument: UInt32 = 0, request: UInt64 = 0) -> Answer? {
        send(command, argument: argument, request: request)
        return receive()
    }
}
