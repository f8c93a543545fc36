// SPDX-License-Identifier: Apache-2.0
import CLinux

/// Talks to the agent of a guest: sends blocks of random bytes and checks what comes back. Ends after `limit` blocks, or
/// with 0 when the connection does; a migration ends every connection. The last line says how many blocks came back
/// whole. Returns the exit status.
func talk(cid: UInt32, port: UInt32, limit: Int) -> Int32 {
    var connection: Int32 = -1
    // A guest that has just moved may answer before it has read its new address, and the host drops such an answer. The
    // kernel's own limit for an answer is 2 s, which is little in a machine that is emulated.
    for attempt in 1...3 {
        connection = socket(AF_VSOCK, lacuna_SOCK_STREAM_CLOEXEC, 0)
        var limit = timeval(tv_sec: 10, tv_usec: 0)
        setsockopt(
            connection, AF_VSOCK, lacuna_SO_VM_SOCKETS_CONNECT_TIMEOUT, &limit, socklen_t(MemoryLayout<timeval>.size))
        var address = sockaddr_vm()
        address.svm_family = sa_family_t(AF_VSOCK)
        address.svm_cid = cid
        address.svm_port = port
        let connected = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                connect(connection, $0, socklen_t(MemoryLayout<sockaddr_vm>.size))
            }
        }
        if connection >= 0, connected == 0 { break }
        let code = errno
        say("VSOCK cannot connect to \(cid):\(port): \(String(cString: strerror(code)))")
        guard code == ETIMEDOUT, attempt < 3 else { return 1 }
        close(connection)
    }
    var random = SystemRandomNumberGenerator(), blocks = 0
    while limit == 0 || blocks < limit {
        let block = (0..<4096).flatMap { _ in withUnsafeBytes(of: random.next() as UInt64) { Array($0) } }
        var (sent, received) = (0, [UInt8]())
        var piece = [UInt8](repeating: 0, count: 65536)
        var isWhole = true
        while isWhole, sent < block.count {
            let count = block[sent...].withUnsafeBytes { send(connection, $0.baseAddress, $0.count, lacuna_MSG_NOSIGNAL) }
            if count > 0 { sent += count } else { isWhole = false }
        }
        while isWhole, received.count < block.count {
            let count = recv(connection, &piece, piece.count, 0)
            if count > 0 { received += piece[..<count] } else { isWhole = false }
        }
        // Also of a block that the end of the connection cut off: what came must be right.
        guard zip(received, block).allSatisfy({ $0 == $1 ^ 0x5a }), received.count <= block.count else {
            say("VSOCK WRONG bytes in block \(blocks + 1)")
            return 1
        }
        if !isWhole {
            say("VSOCK ended (\(String(cString: strerror(errno))))")
            break
        }
        blocks += 1
        if blocks % 16 == 1 { say("VSOCK blocks=\(blocks)") }
    }
    close(connection)
    say("VSOCK blocks=\(blocks)")
    return limit == 0 || blocks == limit ? 0 : 1
}
