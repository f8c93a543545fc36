// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// A call to KVM that failed: which one, and the errno.
public struct KVMError: Error, Equatable, CustomStringConvertible {
    public let call: String
    public let errno: Int32
    public init(call: String, errno: Int32) {
        self.call = call
        self.errno = errno
    }
    public var description: String { "\(call): \(String(cString: strerror(errno))) (errno \(errno))" }
}

/// A descriptor of KVM's that closes with its owner. The one place where errno is read and EINTR handled.
final class Descriptor: Sendable {
    let number: Int32
    init(_ number: Int32) { self.number = number }
    deinit { close(number) }

    /// An ioctl without an argument or with a plain number. Restarted on EINTR.
    @discardableResult
    func call(_ name: String, _ request: UInt, _ argument: UInt = 0) throws(KVMError) -> Int32 {
        while true {
            let result = lacuna_ioctl_none(number, request, argument)
            if result >= 0 { return result }
            let code = lacuna_errno()
            if code != EINTR { throw KVMError(call: name, errno: code) }
        }
    }

    /// An ioctl with a structure. Restarted on EINTR.
    @discardableResult
    func call(_ name: String, _ request: UInt, pointer: UnsafeMutableRawPointer?) throws(KVMError) -> Int32 {
        while true {
            let result = lacuna_ioctl_pointer(number, request, pointer)
            if result >= 0 { return result }
            let code = lacuna_errno()
            if code != EINTR { throw KVMError(call: name, errno: code) }
        }
    }

    /// An ioctl that reads and fills one fixed structure.
    @discardableResult
    func call<Value>(_ name: String, _ request: UInt, _ value: inout Value) throws(KVMError) -> Int32 {
        // withUnsafeMutablePointer does not rethrow typed errors out of a generic closure with `try` inside; the errno
        // is carried out as a value instead.
        let result: Result<Int32, KVMError> = withUnsafeMutablePointer(to: &value) { pointer in
            do throws(KVMError) {
                return .success(try call(name, request, pointer: UnsafeMutableRawPointer(pointer)))
            } catch {
                return .failure(error)
            }
        }
        return try result.get()
    }

    /// An ioctl on a structure of `count` bytes that is treated as opaque.
    @discardableResult
    func call(_ name: String, _ request: UInt, bytes: inout [UInt8]) throws(KVMError) -> Int32 {
        let result: Result<Int32, KVMError> = bytes.withUnsafeMutableBytes { buffer in
            do throws(KVMError) {
                return .success(try call(name, request, pointer: buffer.baseAddress))
            } catch {
                return .failure(error)
            }
        }
        return try result.get()
    }

    /// Fills a structure of `size` bytes.
    func get(_ name: String, _ request: UInt, size: Int) throws(KVMError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: size)
        try call(name, request, bytes: &bytes)
        return bytes
    }

    /// Hands a structure over. Its size is checked, because the kernel reads `size` bytes whatever the array holds.
    func set(_ name: String, _ request: UInt, _ bytes: [UInt8], size: Int) throws(KVMError) {
        guard bytes.count == size else { throw KVMError(call: "\(name): \(bytes.count) bytes of state", errno: EINVAL) }
        var copy = bytes
        try call(name, request, bytes: &copy)
    }
}
