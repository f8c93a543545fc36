// SPDX-License-Identifier: Apache-2.0
import CLinux

/// What a scenario expected and did not get.
struct Failure: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

/// A started program whose standard output and error come through one pipe.
final class Child {
    let name: String
    let pid: pid_t
    fileprivate var pipe: Int32
    /// Readable once the process has ended.
    private let process: Int32
    /// Whole lines so far, and what has come of the next.
    private(set) var lines: [String] = []
    private var partial: [UInt8] = []
    fileprivate(set) var status: Int32?

    fileprivate init(name: String, pid: pid_t, process: Int32, pipe: Int32) {
        self.name = name
        self.pid = pid
        self.process = process
        self.pipe = pipe
    }

    /// What to wait for: the next output, or the end of a process that has closed its output.
    fileprivate var awaited: Int32 { pipe >= 0 ? pipe : process }

    fileprivate func take(_ bytes: ArraySlice<UInt8>) {
        for byte in bytes {
            if byte == 0x0a {
                lines.append(String(decoding: partial, as: UTF8.self))
                partial = []
            } else if byte != 0x0d {
                partial.append(byte)
            }
        }
    }

    /// No more output. The process may take its time all the same, and nothing waits for it without a limit.
    fileprivate func endOutput() {
        if !partial.isEmpty { take([0x0a]) }
        close(pipe)
        pipe = -1
    }

    fileprivate func end() {
        close(process)
        var code: Int32 = 0
        while waitpid(pid, &code, 0) < 0 && errno == EINTR {}
        let signal = code & 0x7f
        status = signal == 0 ? code >> 8 & 0xff : 128 + signal
    }

    var text: String { lines.joined(separator: "\n") }
    /// Lines from `index` on that contain `text`.
    func count(_ text: String, from index: Int = 0) -> Int { lines[min(index, lines.count)...].filter { $0.contains(text) }.count }
}

/// The programs of one scenario. Everything waits here: on the pipes, with a limit, never by sleeping.
final class Stage {
    private(set) var children: [Child] = []
    private let echo: Bool

    init(echo: Bool) { self.echo = echo }

    func start(_ name: String, _ command: [String]) throws(Failure) -> Child {
        var ends: [Int32] = [0, 0]
        guard pipe(&ends) == 0 else { throw Failure("pipe: errno \(errno)") }
        for end in ends { _ = lacuna_set_cloexec(end) }
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        posix_spawn_file_actions_adddup2(&actions, ends[1], 1)
        posix_spawn_file_actions_adddup2(&actions, ends[1], 2)
        defer { posix_spawn_file_actions_destroy(&actions) }
        var arguments = command.map { strdup($0) } + [nil]
        defer { for argument in arguments { free(argument) } }
        var pid = pid_t()
        let result = posix_spawnp(&pid, command[0], &actions, nil, &arguments, lacuna_environ())
        _ = CLinux.close(ends[1])
        guard result == 0 else {
            _ = CLinux.close(ends[0])
            throw Failure("cannot start \(command[0]): \(String(cString: strerror(result)))")
        }
        let process = lacuna_pidfd_open(pid)
        guard process >= 0 else {
            let error = errno
            _ = CLinux.close(ends[0])
            throw Failure("pidfd_open: errno \(error)")
        }
        let child = Child(name: name, pid: pid, process: process, pipe: ends[0])
        children.append(child)
        return child
    }

    /// Takes in what the programs print until `done` says so or `seconds` are over.
    private func pump(seconds: Double, until done: () throws(Failure) -> Bool) throws(Failure) -> Bool {
        let limit = now() + seconds
        while true {
            if try done() { return true }
            let left = limit - now()
            if left <= 0 { return false }
            let open = children.filter { $0.status == nil }
            var polled = open.map { pollfd(fd: $0.awaited, events: Int16(POLLIN), revents: 0) }
            guard !open.isEmpty else { return try done() }
            if poll(&polled, nfds_t(polled.count), Int32(min(left, 3600) * 1000) + 1) < 0 { continue }
            var buffer = [UInt8](repeating: 0, count: 65536)
            for (child, entry) in zip(open, polled) where entry.revents != 0 {
                guard child.pipe >= 0 else {
                    child.end()
                    continue
                }
                let count = read(child.pipe, &buffer, buffer.count)
                if count > 0 {
                    let before = child.lines.count
                    child.take(buffer[..<count])
                    if echo { for line in child.lines[before...] { say("    [\(child.name)] \(line)") } }
                } else if count == 0 || errno != EINTR {
                    child.endOutput()
                }
            }
        }
    }

    /// Waits for a line with `text`, at or after line `index`; returns the line and the index after it.
    @discardableResult
    func wait(_ child: Child, for text: String, from index: Int = 0, count: Int = 1, seconds: Double) throws(Failure) -> (line: String, next: Int) {
        var position = index, left = count
        var found = ""
        let came = try pump(seconds: seconds) { () throws(Failure) in
            while position < child.lines.count {
                defer { position += 1 }
                let line = child.lines[position]
                if line.contains("MEMCHECK WRONG") { throw Failure("\(child.name): \(line)") }
                if line.contains(text) {
                    found = line
                    left -= 1
                    if left == 0 { return true }
                }
            }
            if child.status != nil { throw Failure("\(child.name) ended with status \(child.status!) before it said '\(text)'") }
            return false
        }
        guard came else { throw Failure("\(child.name) did not say '\(text)' (\(left) of \(count) missing) within \(Int(seconds)) s") }
        return (found, position)
    }

    func waitForEnd(_ child: Child, seconds: Double) throws(Failure) -> Int32 {
        guard try pump(seconds: seconds, until: { child.status != nil }) else {
            throw Failure("\(child.name) did not end within \(Int(seconds)) s")
        }
        return child.status!
    }

    /// Waits for a line with `text` or for the end, whichever comes first; true if the line came.
    func waitForEnd(_ child: Child, or text: String, seconds: Double) throws(Failure) -> Bool {
        guard try pump(seconds: seconds, until: { child.status != nil || child.count(text) > 0 }) else {
            throw Failure("\(child.name) neither ended nor said '\(text)' within \(Int(seconds)) s")
        }
        return child.count(text) > 0
    }

    /// Runs a program to its end.
    func run(_ command: [String], seconds: Double = 60) throws(Failure) -> Child {
        let child = try start(command.prefix(2).joined(separator: " "), command)
        _ = try waitForEnd(child, seconds: seconds)
        return child
    }

    func kill(_ child: Child) { if child.status == nil { _ = CLinux.kill(child.pid, SIGKILL) } }

    /// Ends what still runs.
    func close() {
        for child in children { kill(child) }
        _ = try? pump(seconds: 30) { children.allSatisfy { $0.status != nil } }
    }
}

/// Monotonic seconds.
func now() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
}

func say(_ text: String) {
    let bytes = Array((text + "\n").utf8)
    _ = write(1, bytes, bytes.count)
}

/// glibc's errno is a macro that Swift does not import.
var errno: Int32 { lacuna_errno() }
