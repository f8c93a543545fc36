// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// Why a migration, or a part of one, did not happen. Each description is one line that says what went wrong and what
/// to do about it.
public indirect enum MigrationError: Error, Equatable, Sendable, CustomStringConvertible {
    /// The text is no channel address.
    case badAddress(String, why: String)
    /// Nobody could be reached at the address; the errno of `connect`.
    case cannotConnect(String, errno: Int32)
    /// The address could not be listened on; the errno of `bind` or `listen`.
    case cannotListen(String, errno: Int32)
    /// A system call on an open channel failed with this errno.
    case channelFailed(String, errno: Int32)
    /// The peer closed the connection, or it broke, before the migration was done.
    case peerClosed(String)
    /// The peer neither sent nor took a byte for so long.
    case timedOut(String, milliseconds: Int)
    /// Somebody on this side called `cancel()` or `shutdown()`.
    case cancelled
    /// The peer's operator cancelled.
    case cancelledByPeer
    /// The peer sent what the stream's specification does not allow.
    case badStream(String)
    /// The peer speaks another version of the stream.
    case wrongVersion(Int)
    /// The destination cannot build this machine; its own words.
    case refused(String)
    /// The peer gave up; its own words.
    case peerFailed(String)
    /// A part of this side's machine failed.
    case machineFailed(doing: String, why: String)
    /// Bytes move, but so slowly that waiting on would keep the guest from running for too long.
    case tooSlow(String)
    /// Memory at the destination is not what it is at the source: the first such page frame, and how many in its run.
    case notVerified(page: Int, count: Int)
    /// The time for the migration was over before the rest was small enough.
    /// Speeds are in bytes a second, 0 where not known yet.
    case notConverging(milliseconds: Int, dirtiedPerSecond: Int, sentPerSecond: Int)
    /// Data connection `number`, from 1, failed, and the migration with it.
    case laneFailed(number: Int, cause: MigrationError)
    /// The migration failed for `cause`, and then the guest could not be resumed. It is whole, but paused.
    case notResumed(cause: String, why: String)
    /// The destination owns the guest, but could not start it. The source will not run it any more.
    case notStarted(why: String)

    public var description: String {
        switch self {
        case .badAddress(let text, let why):
            "'\(text)' is no address: \(why); give unix:PATH, tcp:HOST:PORT or tcp:[IPV6]:PORT"
        case .cannotConnect(let address, let errno):
            "cannot connect to \(address): " + MigrationError.remedy(connecting: errno)
        case .cannotListen(let address, let errno):
            "cannot listen on \(address): " + MigrationError.remedy(listening: errno)
        case .channelFailed(let what, let errno): "\(what): \(errnoText(errno)); the migration can be tried again"
        case .peerClosed(let name):
            "the connection (\(name)) was closed by the other side; its own messages say why"
        case .timedOut(let what, let milliseconds):
            "\(what): nothing happened for \(milliseconds) ms; check the network and the other side, then try again"
        case .cancelled: "cancelled; the guest stays where it was"
        case .cancelledByPeer: "the source cancelled the migration; the guest stays there"
        case .badStream(let what): "bad migration stream: \(what); the other side is broken or is not lacuna"
        case .wrongVersion(let version):
            "the other side speaks version \(version) of the migration stream, this one version "
                + "\(FrameHeader.version); use the same release of lacuna on both"
        case .refused(let why): "the destination refused: \(why)"
        case .peerFailed(let why): "the other side gave up: \(why)"
        case .machineFailed(let doing, let why): "\(doing) failed: \(why)"
        case .tooSlow(let what): "\(what) goes on too slowly; the guest is not kept waiting any longer"
        case .notVerified(let page, let count):
            "memory arrived wrong: \(count) pages from page frame 0x\(String(page, radix: 16)) on differ; the guest stays at "
                + "the source; please report this"
        case .notConverging(let milliseconds, let dirtied, let sent):
            "given up after \(milliseconds) ms: the guest dirties \(dirtied >> 20) MiB/s and \(sent >> 20) MiB/s are sent; try "
                + "--auto-converge, a longer --timeout, more --bandwidth or --downtime, or --timeout-action force"
        case .laneFailed(let number, let cause): "data connection \(number): \(cause)"
        case .notResumed(let cause, let why):
            "\(cause); the guest is still here but could not be resumed: \(why); resume it by hand"
        case .notStarted(let why):
            "the guest arrived and belongs to this side, but does not start: \(why); resume it by hand"
        }
    }

    private static func remedy(connecting code: Int32) -> String {
        switch code {
        case ECONNREFUSED: "connection refused: is `lacuna receive` running there?"
        case ENOENT: "there is no such socket: is `lacuna receive` running, with this path?"
        case EACCES, EPERM: "permission denied: check the socket's owner, or the firewall"
        case ETIMEDOUT: "no answer in time: check the host, the port and the firewall"
        case EHOSTUNREACH, ENETUNREACH: "no route to that host: check the address"
        default: errnoText(code)
        }
    }

    private static func remedy(listening code: Int32) -> String {
        switch code {
        case EADDRINUSE: "address in use: another program listens there (or the file is no socket); choose another"
        case EADDRNOTAVAIL: "this host does not have that address: choose one of its own, or 0.0.0.0"
        case EACCES, EPERM: "permission denied: choose a port above 1023 or a directory you may write to"
        case ENOENT: "there is no such directory: create it first"
        default: errnoText(code)
        }
    }

    /// True where the connection is to blame, so that the peer may have left word of the reason.
    var isConnectionLoss: Bool {
        switch self {
        case .peerClosed, .channelFailed: true
        case .laneFailed(_, let cause): cause.isConnectionLoss
        default: false
        }
    }
}

/// The C library's words for an errno.
func errnoText(_ code: Int32) -> String {
    // glibc keeps one buffer for each thread, and copying it out is all that happens here.
    guard let text = strerror(code) else { return "errno \(code)" }
    return String(cString: text)
}

/// Text from the peer, made fit for a terminal and a log: one line, no control characters, at most 1000 characters.
func printable(_ bytes: [UInt8]) -> String {
    let text = String(decoding: bytes, as: UTF8.self)
    var result = String.UnicodeScalarView()
    for scalar in text.unicodeScalars.prefix(1000) {
        switch scalar.properties.generalCategory {
        case .control, .format, .surrogate, .privateUse, .unassigned, .lineSeparator, .paragraphSeparator:
            result.append(" ")
        default: result.append(scalar)
        }
    }
    return String(result)
}

/// Nanoseconds of the monotonic clock.
package func monotonicNanoseconds() -> UInt64 {
    var now = timespec()
    clock_gettime(CLOCK_MONOTONIC, &now)
    return UInt64(now.tv_sec) &* 1_000_000_000 &+ UInt64(now.tv_nsec)
}

/// Milliseconds since an earlier reading of `monotonicNanoseconds`.
func milliseconds(since start: UInt64) -> Double { Double(monotonicNanoseconds() &- start) / 1e6 }
