// SPDX-License-Identifier: Apache-2.0
import CLinux
import Machine
import Migration

/// The channels that are not addresses of sockets: a descriptor, a command, a file.
enum SpecialChannel {
    /// `fd:N`: an open descriptor of this process.
    case descriptor(Int32)
    /// `exec:COMMAND`: what a shell runs, with the channel as its standard input and output.
    case command(String)
    /// `file:PATH`: a snapshot.
    case file(path: String)

    /// Nil: the text is none of them.
    init?(parsing text: String) throws(Complaint) {
        if text.hasPrefix("fd:") {
            guard let number = Int32(text.dropFirst(3)), number >= 0 else {
                throw Complaint("'\(text)': \(text.dropFirst(3)) is no descriptor; give the number of an open one")
            }
            guard lacuna_fcntl_getfl(number) >= 0 else {
                throw Complaint("'\(text)': descriptor \(number) is not open in this process")
            }
            self = .descriptor(number)
        } else if text.hasPrefix("exec:") {
            let command = String(text.dropFirst(5))
            guard !command.isEmpty else { throw Complaint("'\(text)': the command is missing") }
            self = .command(command)
        } else if text.hasPrefix("file:") {
            self = .file(path: try absolutePath(String(text.dropFirst(5))))
        } else {
            return nil
        }
    }

    /// The descriptor to migrate over; the caller's. Not for files.
    func open() throws(Complaint) -> Int32? {
        switch self {
        case .descriptor(let number): return number
        case .command(let command): return try SpecialChannel.start(command)
        case .file: return nil
        }
    }

    /// Starts a command whose standard input and output are one end of a socket pair; returns the other end.
    private static func start(_ command: String) throws(Complaint) -> Int32 {
        var ends: [Int32] = [0, 0]
        guard socketpair(AF_UNIX, lacuna_SOCK_STREAM_CLOEXEC, 0, &ends) == 0 else {
            throw Complaint("cannot make a socket pair: \(String(cString: strerror(errno)))")
        }
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        // Standard error stays: what the command has to say, the operator should read.
        posix_spawn_file_actions_adddup2(&actions, ends[1], 0)
        posix_spawn_file_actions_adddup2(&actions, ends[1], 1)
        defer { posix_spawn_file_actions_destroy(&actions) }
        var arguments: [UnsafeMutablePointer<CChar>?] = [strdup("sh"), strdup("-c"), strdup(command), nil]
        defer { for argument in arguments { free(argument) } }
        var pid = pid_t()
        let result = posix_spawn(&pid, "/bin/sh", &actions, nil, &arguments, lacuna_environ())
        close(ends[1])
        guard result == 0 else {
            close(ends[0])
            throw Complaint("cannot start a shell for 'exec:\(command)': \(String(cString: strerror(result)))")
        }
        return ends[0]
    }
}

/// `path` as seen from this process's folder: another process is to open it.
func absolutePath(_ path: String) throws(Complaint) -> String {
    guard !path.isEmpty else { throw Complaint("the file's path is missing") }
    if path.hasPrefix("/") { return path }
    guard let folder = getcwd(nil, 0) else { throw Complaint("the folder of this process is gone; give an absolute path") }
    defer { free(folder) }
    return String(cString: folder) + "/" + path
}

/// Joins standard input and output with a channel: the far end of `exec:`.
enum Relay {
    static func run(_ words: ArraySlice<String>) throws(Complaint) {
        guard words.count == 1, let text = words.first else { throw .usage("relay takes one ADDRESS") }
        let channel: ByteChannel
        do throws(MigrationError) { channel = try ByteChannel.connect(to: try ChannelAddress(parsing: text)) } catch {
            throw Complaint(error.description)
        }
        let thread = RelayThread(channel)
        thread.start()
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 18, alignment: 4096)
        defer { buffer.deallocate() }
        while let count = try? channel.readSome(into: buffer, idleMilliseconds: .max / 2) {
            guard write(Array(buffer[..<count]), to: 1) else { return }
        }
    }

    /// Standard input to the channel, until either ends.
    private final class RelayThread: Sendable {
        private let channel: ByteChannel
        init(_ channel: ByteChannel) { self.channel = channel }

        func start() {
            let isStarted = startThread(named: "relay") { [channel] in
                let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 18, alignment: 4096)
                defer { buffer.deallocate() }
                while true {
                    let count = read(0, buffer.baseAddress, buffer.count)
                    if count < 0 && errno == EINTR { continue }
                    let part = UnsafeRawBufferPointer(rebasing: buffer[..<max(count, 0)])
                    if count <= 0 || (try? channel.writeAll([part], idleMilliseconds: .max / 2)) == nil { break }
                }
                channel.finishWriting()
            }
            if !isStarted { exit(1) }
        }
    }
}
