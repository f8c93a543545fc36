// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// An open file descriptor. Closes with its last owner.
final class OwnedDescriptor: Sendable {
    let number: Int32

    /// Takes `number` over.
    init(adopting number: Int32) { self.number = number }
    deinit { close(number) }

    /// What kind of file it is: the bits of `S_IFMT`; 0 for an eventfd and its like.
    var kind: mode_t? {
        var information = stat()
        guard unsafe fstat(number, &information) == 0 else { return nil }
        return information.st_mode & mode_t(S_IFMT)
    }

    /// No read or write of this process waits on it from here on. For a descriptor that another process shares this
    /// changes how that process sees it, too; eventfds and the ends of pipes in this protocol are made for that.
    func setNonBlocking() {
        let flags = lacuna_fcntl_getfl(number)
        if flags >= 0 { _ = lacuna_fcntl_setfl(number, flags | O_NONBLOCK) }
    }

    /// Whether this can carry events: an eventfd, a pipe or a socket. A plain file would be readable for ever.
    var carriesEvents: Bool {
        switch kind {
        case 0, mode_t(S_IFIFO), mode_t(S_IFSOCK): true
        default: false
        }
    }

    /// Adds one event, without waiting; one that does not fit means that there are plenty already.
    func signal() {
        var one: UInt64 = 1
        _ = unsafe write(number, &one, MemoryLayout<UInt64>.size)
    }

    /// Takes the events that are there. False if nobody is left who could send any.
    func drain() -> Bool {
        var buffer: UInt64 = 0
        while true {
            let count = unsafe read(number, &buffer, MemoryLayout<UInt64>.size)
            if count < 0 && lacuna_errno() == EINTR { continue }
            return count > 0 || count < 0 && lacuna_errno() == EAGAIN
        }
    }

    static func eventfd() -> OwnedDescriptor? {
        let made = CLinux.eventfd(0, lacuna_EFD_FLAGS)
        return made >= 0 ? OwnedDescriptor(adopting: made) : nil
    }
}

/// Why the service could not start or go on, for an operator.
public struct VhostUserFailure: Error, Sendable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}

func errorText(_ code: Int32 = lacuna_errno()) -> String { unsafe String(cString: strerror(code)) }
