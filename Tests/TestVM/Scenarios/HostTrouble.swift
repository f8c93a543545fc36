// SPDX-License-Identifier: Apache-2.0
import CLinux
import FoundationEssentials
import Migration

/// What the host can do to a guest: a console nobody reads, memory that is short.
let hostTroubleScenarios: [Scenario] = [
    Scenario(name: "stuck-console", memory: 2560, limit: 600, isQuick: false, body: stuckConsole),
    Scenario(name: "reboot-memory", memory: 2560, limit: 600, isQuick: false, body: rebootMemory),
    Scenario(name: "reboot-in-migration", memory: 2560, limit: 600, isQuick: false, body: rebootDuringMigration),
    Scenario(name: "reboot-hugepages", memory: 2560, limit: 600, isQuick: false, body: rebootHugePages),
    Scenario(name: "no-threads", memory: 2560, limit: 600, isQuick: false, body: noThreads),
    Scenario(name: "frozen-vcpu", memory: 2560, limit: 600, isQuick: false, body: frozenVCPU),
]

extension Stage {
    /// Types a command at the guest's console.
    func enter(_ guest: Guest, _ text: String) throws(Failure) {
        let client = try run(["./lacuna", "type", "--control", guest.control, "--text", text + "\\n"])
        guard client.status == 0 else { throw Failure("type: \(client.text)") }
    }

    /// The VMM's resident memory in bytes.
    func residentMemory(_ guest: Guest) throws(Failure) -> Int {
        guard let bytes = FileManager.default.contents(atPath: "/proc/\(guest.child.pid)/status"),
            let line = String(decoding: bytes, as: UTF8.self).split(separator: "\n").first(where: { $0.hasPrefix("VmRSS:") }),
            let kb = line.split(whereSeparator: { $0 == " " || $0 == "\t" }).dropFirst().first.flatMap({ Int($0) })
        else { throw Failure("\(guest.child.name) has no VmRSS") }
        return kb << 10
    }

    /// Does `body` while the host's freezer holds one thread of a VMM. The thread goes on however that ends: not even
    /// SIGKILL reaches one that is frozen.
    fileprivate func freezing(_ guest: Guest, thread name: String, _ body: () throws(Failure) -> Void) throws(Failure) {
        do throws(Failure) {
            try freeze(guest, thread: name, true)
            try body()
        } catch {
            try? freeze(guest, thread: name, false)
            throw error
        }
        try freeze(guest, thread: name, false)
    }

    private func freeze(_ guest: Guest, thread name: String, _ isFrozen: Bool) throws(Failure) {
        let tasks = "/proc/\(guest.child.pid)/task"
        let threads = ((try? FileManager.default.contentsOfDirectory(atPath: tasks)) ?? []).filter {
            FileManager.default.contents(atPath: "\(tasks)/\($0)/comm").map { String(decoding: $0, as: UTF8.self) } == "\(name)\n"
        }
        guard threads.count == 1, let thread = threads.first else { throw Failure("\(threads.count) threads are called \(name)") }
        // The group outlives the mount. The kernel has version 1 of the interface, the only one that takes single threads.
        let steps =
            isFrozen
            ? """
                mkdir freezer/vcpu && echo \(thread) >freezer/vcpu/tasks && echo FROZEN >freezer/vcpu/freezer.state &&
                until grep -q FROZEN freezer/vcpu/freezer.state; do usleep 10000; done
                """
            // A thread that this one makes begins in the same group.
            : """
                echo THAWED >freezer/vcpu/freezer.state
                until rmdir freezer/vcpu 2>/dev/null; do
                    for task in $(cat freezer/vcpu/tasks); do echo $task >freezer/tasks; done
                    usleep 10000
                done
                """
        let shell = try run(
            ["busybox", "unshare", "-m", "sh", "-c", "mkdir -p freezer && mount -t cgroup -o freezer none freezer && { \(steps); }"],
            seconds: patience)
        try expect(shell.status == 0, "the freezer: \(shell.text)")
    }

    /// Asks again until `done`; the answers take their time.
    func ask(_ what: String, until done: () throws(Failure) -> Bool) throws(Failure) {
        let limit = now() + patience
        while !(try done()) { try expect(now() < limit, "\(what): not within \(Int(patience)) s") }
    }
}

/// The guest prints more than a pipe holds, and whoever has its console does not read. It runs on, and can be moved.
private func stuckConsole(_ stage: Stage) throws(Failure) {
    try expect(try stage.run(["busybox", "mkfifo", "console"]).status == 0, "no FIFO")
    let reader = lacuna_open("console", O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0)
    try expect(reader >= 0, "cannot open the FIFO: errno \(errno)")
    defer { close(reader) }
    let room: Int32 = 16 << 10
    try expect(lacuna_set_pipe_size(reader, room) == room, "cannot make the FIFO small: errno \(errno)")
    let source = try stage.boot(
        "source", memory: "256M", cpus: 2, run: memcheckGuest, until: nil, options: ["--console", "file:console"])
    // Read until the guest is ready, and then no more.
    var text = "", piece = [UInt8](repeating: 0, count: 4096)
    let limit = now() + patience
    while !text.contains("GUEST-READY") {
        var polled = pollfd(fd: reader, events: Int16(POLLIN), revents: 0)
        _ = poll(&polled, 1, 1000)
        try expect(now() < limit, "the guest is not ready: \(text)")
        let count = read(reader, &piece, piece.count)
        if count > 0 { text += String(decoding: piece[..<count], as: UTF8.self) }
    }
    try stage.enter(source, "yes FLOOD-FLOOD-FLOOD-FLOOD | head -n 1000")
    var waiting: Int32 = 0, before: Int32 = -1
    try stage.ask("a full console") { () throws(Failure) in
        try expect(try stage.isRunning(source), "the source does not run")
        before = waiting
        try expect(lacuna_ioctl_pointer(reader, UInt(FIONREAD), &waiting) == 0, "FIONREAD: errno \(errno)")
        // Pages of a FIFO are left when the next piece, of up to 512 bytes, does not fit, and no piece is begun in the
        // last one's rest by a program that looks first.
        return waiting > room - 4096 - 3 * 512 && waiting == before
    }
    let destination = try stage.receive("destination", at: "unix:channel")
    let report = try stage.migrate(
        source, to: destination, at: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
    say("\(waiting) bytes wait in the console; downtime \(Int(report.downtimeMilliseconds)) ms, \(Int(report.downtime.pause)) of it to stop the vCPUs")
    try expect(report.downtime.pause < 5000, "the vCPUs took \(Int(report.downtime.pause)) ms to stop")
    try expect(source.child.text.contains("of the console's output were dropped"), "the console took everything: \(source.child.text)")
    // The guest prints on where somebody listens.
    try stage.verify(destination, passes: 9)
    try stage.stop(destination)
}

/// A destination that has no room for a vCPU's thread says so while the source can still have its guest back.
private func noThreads(_ stage: Stage) throws(Failure) {
    let source = try stage.boot("source", memory: "256M", run: memcheckGuest)
    try stage.verify(source, passes: 1)
    // Limits on threads are not for root, and others may not open /dev/kvm: this one gets a node of its own.
    let narrow = try stage.start(
        "narrow",
        ["busybox", "unshare", "-m", "sh", "-c",
         """
         mkdir -p narrow && mount -t tmpfs none narrow && mknod narrow/kvm c 10 232 && chmod 666 narrow/kvm &&
         mount --bind narrow/kvm /dev/kvm &&
         exec ./lacuna-scenarios narrow 64999 1 ./lacuna receive --listen tcp:127.0.0.1:4444
         """])
    try stage.wait(narrow, for: "waiting for a guest", seconds: 30)
    let client = try stage.run(
        ["./lacuna", "migrate", "--control", source.control, "--to", "tcp:127.0.0.1:4444", "--skip-free-pages", "--hint-timeout", "5000"],
        seconds: patience)
    say(client.text)
    try expect(client.status == 1 && client.text.contains("thread for vCPU 0"), "status \(client.status ?? -1): \(client.text)")
    try expect(try stage.waitForEnd(narrow, seconds: 30) == 1, "the destination's status is \(narrow.status ?? -1): \(narrow.text)")
    try expect(try stage.isRunning(source), "the source does not run")
    try stage.verify(source, passes: 2)
    let destination = try stage.receive("destination", at: "unix:channel")
    _ = try stage.migrate(source, to: destination, at: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
    try stage.verify(destination, passes: 9)
    try stage.stop(destination)
}

/// The host does not let a vCPU's thread run. Whatever needs the guest to stand gives up after its limit, and the guest
/// runs on where it was.
private func frozenVCPU(_ stage: Stage) throws(Failure) {
    // Its own watchdogs would be right to complain.
    let source = try stage.boot(
        "source", memory: "256M", cpus: 2, run: memcheckGuest, more: "nosoftlockup rcupdate.rcu_cpu_stall_suppress=1")
    try stage.verify(source, passes: 1)
    let complaint = "only 1 of 2 vCPUs stopped within 10 s"
    func gaveUp(_ client: Child, since start: Double) throws(Failure) {
        let took = now() - start
        try expect(client.status == 1 && client.text.contains(complaint), "status \(client.status ?? -1): \(client.text)")
        try expect(took > 9 && took < 60, "that took \(took) s")
        try expect(try stage.isRunning(source), "the source does not run")
    }
    try stage.freezing(source, thread: "vcpu1") { () throws(Failure) in
        let start = now()
        try gaveUp(try stage.run(["./lacuna", "pause", "--control", source.control], seconds: patience), since: start)
    }
    try stage.verify(source, passes: 2)
    try expect(try stage.run(["./lacuna", "pause", "--control", source.control], seconds: patience).status == 0, "no pause afterwards")
    try expect(try stage.run(["./lacuna", "resume", "--control", source.control]).status == 0, "no resume")

    // A migration comes to that point with everything sent.
    let first = try stage.receive("first", at: "unix:first")
    let client = try stage.start(
        "migrate",
        ["./lacuna", "migrate", "--control", source.control, "--to", "unix:first", "--skip-free-pages", "--hint-timeout", "5000",
         "--pause-before-switch-over"])
    try stage.ask("a migration that waits") { () throws(Failure) in
        try expect(client.status == nil, "the migration ended by itself: \(client.text)")
        return try stage.run(["./lacuna", "migrate", "--status", "--control", source.control]).text.contains("\"waiting\"")
    }
    try stage.freezing(source, thread: "vcpu1") { () throws(Failure) in
        let start = now()
        try expect(try stage.run(["./lacuna", "switch-over", "--control", source.control]).status == 0, "switch-over failed")
        _ = try stage.waitForEnd(client, seconds: patience)
        try gaveUp(client, since: start)
        try expect(try stage.waitForEnd(first.child, seconds: 60) != 0, "the destination lives on")
        try expect(first.child.text.contains(complaint), "the destination does not say why: \(first.child.text)")
    }
    try stage.verify(source, passes: 2)

    let destination = try stage.receive("destination", at: "unix:channel")
    _ = try stage.migrate(source, to: destination, at: "unix:channel", flags: ["--skip-free-pages", "--hint-timeout", "5000"])
    try stage.verify(destination, passes: 9)
    try stage.stop(destination)
}

/// A guest that uses most of its memory in each of its lives never costs the host more than one life's.
private func rebootMemory(_ stage: Stage) throws(Failure) {
    let guest = try stage.boot("guest", memory: "256M", run: "dirty-then-free:75,reboot", until: nil)
    var position = 0, resident: [Int] = []
    for _ in 0..<4 {
        position = try stage.wait(guest.child, for: "DIRTY-THEN-FREE filled=", from: position, seconds: patience).next
        resident.append(try stage.residentMemory(guest))
    }
    say("resident after each of 4 lives: \(resident.map { $0 >> 20 }) MiB of 256")
    // What is measured must be most of a guest, or two of them would not show.
    try expect(resident[0] > 160 << 20, "the first life took \(resident[0] >> 20) MiB only")
    for bytes in resident.dropFirst() { try expect(bytes < 300 << 20, "\(bytes >> 20) MiB are resident after a reboot") }
    try stage.stop(guest)
}

/// A guest that resets itself in the middle of a migration ends that one at once, and boots again where it is.
private func rebootDuringMigration(_ stage: Stage) throws(Failure) {
    let guest = try stage.boot("guest", memory: "256M", run: "dirty-then-free:75")
    let destination = try stage.receive("destination", at: "unix:channel")
    let client = try stage.start(
        "migrate", ["./lacuna", "migrate", "--control", guest.control, "--to", "unix:channel", "--bandwidth", "1M"])
    try stage.ask("a migration under way") { () throws(Failure) in
        try expect(client.status == nil, "the migration ended by itself: \(client.text)")
        return try stage.run(["./lacuna", "status", "--control", guest.control]).text.contains("\"migrating\"")
    }
    let before = guest.child.lines.count
    try stage.enter(guest, "reboot -f")
    try expect(try stage.waitForEnd(client, seconds: 60) == 1, "the migration's status is \(client.status ?? -1)")
    try expect(client.text.contains("the guest ended while it was being migrated"), "the migration says: \(client.text)")
    try expect(try stage.waitForEnd(destination.child, seconds: 60) != 0, "the destination lives on")
    try stage.wait(guest.child, for: "GUEST-READY", from: before, seconds: patience)
    let resident = try stage.residentMemory(guest)
    say("\(resident >> 20) MiB are resident after the reboot")
    try expect(resident < 300 << 20, "\(resident >> 20) MiB are resident after a reboot")
    try stage.stop(guest)
}

/// The host has huge pages for this guest and not one more: it can reboot all the same.
private func rebootHugePages(_ stage: Stage) throws(Failure) {
    func free() throws(Failure) -> Int {
        guard let bytes = FileManager.default.contents(atPath: "/proc/meminfo"),
            let line = String(decoding: bytes, as: UTF8.self).split(separator: "\n").first(where: { $0.hasPrefix("HugePages_Free:") }),
            let count = line.split(separator: " ").last.flatMap({ Int($0) })
        else { throw Failure("/proc/meminfo has no HugePages_Free") }
        return count
    }
    do { try Data("128".utf8).write(to: URL(filePath: "/proc/sys/vm/nr_hugepages")) } catch { throw Failure("nr_hugepages: \(error)") }
    let pool = try free()
    try expect(pool == 128, "only \(pool) huge pages to be had")
    let guest = try stage.boot(
        "guest", memory: "256M", run: "dirty-then-free:75,reboot", until: nil, options: ["--memory-backing", "hugepages"])
    try stage.wait(guest.child, for: "DIRTY-THEN-FREE filled=", count: 3, seconds: patience)
    try expect(try free() == 0, "the guest's memory is not of huge pages")
    try stage.stop(guest)
    let left = try free()
    try expect(left == 128, "\(left) of 128 huge pages came back")
}

/// Becomes a program of the user `user`, who may have so many processes and threads. Returns only if that fails.
func becomeNarrow(user: uid_t, processes: UInt, _ command: [String]) -> Int32 {
    var limit = rlimit(rlim_cur: processes, rlim_max: processes)
    var arguments = command.map { strdup($0) } + [nil]
    if setrlimit(__rlimit_resource_t(__RLIMIT_NPROC.rawValue), &limit) == 0, setgid(user) == 0, setuid(user) == 0 { execv(command[0], &arguments) }
    say("narrow: errno \(errno)")
    return 1
}
