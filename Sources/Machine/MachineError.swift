// SPDX-License-Identifier: Apache-2.0
internal import CLinux
import KVM

/// Why a machine could not be made, booted or restored: one line that names the cause and what to do about it.
public struct MachineError: Error, Equatable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
    init(_ error: KVMError, while doing: String) { self.init("\(doing): \(error)") }
}

func errnoText(_ code: Int32) -> String { String(cString: strerror(code)) }

/// A whole file, read into memory; `what` names it in the error.
func readFile(_ path: String, what: String, remedy: String) throws(MachineError) -> [UInt8] {
    let file = lacuna_open(path, O_RDONLY | O_CLOEXEC, 0)
    guard file >= 0 else { throw MachineError("cannot open \(what) \(path): \(errnoText(lacuna_errno())); \(remedy)") }
    defer { close(file) }
    var contents: [UInt8] = []
    var information = stat()
    if fstat(file, &information) == 0, information.st_size > 0 { contents.reserveCapacity(Int(information.st_size)) }
    var buffer = [UInt8](repeating: 0, count: 1 << 20)
    while true {
        let count = buffer.withUnsafeMutableBytes { CLinux.read(file, $0.baseAddress, $0.count) }
        if count == 0 { return contents }
        if count < 0 {
            if lacuna_errno() == EINTR { continue }
            throw MachineError("cannot read \(what) \(path): \(errnoText(lacuna_errno())); \(remedy)")
        }
        contents += buffer[..<count]
    }
}
