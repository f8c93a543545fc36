// SPDX-License-Identifier: Apache-2.0
import CLinux
import Migration

/// Saves a guest that filled and freed three quarters of its memory, lets it run on, and starts it again from the file.
func snapshots(_ stage: Stage) throws(Failure) {
    // The workload that the demonstration uses: memory that is free and not zero.
    let source = try stage.boot("source", memory: "512M", run: "dirty-then-free:75,\(memcheckGuest)")
    try stage.verify(source, passes: 2)
    func snapshot(_ path: String, _ more: [String]) throws(Failure) -> Child {
        unlink("report.json")
        return try stage.run(
            ["./lacuna", "snapshot", path, "--control", source.control, "--hint-timeout", "5000", "--json", "report.json"] + more,
            seconds: patience)
    }
    func blocks(_ path: String) throws(Failure) -> Int {
        var status = stat()
        try expect(stat(path, &status) == 0, "there is no file \(path)")
        return Int(status.st_blocks) * 512
    }

    var client = try snapshot("skipped.snap", ["--skip-free-pages", "--verify"])
    try expect(client.status == 0, "snapshot failed: \(client.text)")
    let report = try stage.readReport()
    let inUse = (report.ramPages - report.freePages) * 4096
    let size = try blocks("skipped.snap")
    say(
        "\(size >> 20) MiB on the disk for \(inUse >> 20) MiB in use of \(report.ramPages / 256), paused for \(Int(report.downtimeMilliseconds)) ms")
    try expect(Double(size) <= 1.05 * Double(inUse), "the file takes more than 1.05 times what is in use")
    try stage.verify(source, passes: 2)

    client = try snapshot("plain.snap", [])
    try expect(client.status == 0, "plain snapshot failed: \(client.text)")
    say("without the flag: \(try blocks("plain.snap") >> 20) MiB, paused for \(Int(try stage.readReport().downtimeMilliseconds)) ms")
    try expect(try blocks("plain.snap") > 2 * size, "the flag saves less than half")

    // A full disk: a clear word, nothing left behind, and the guest runs on.
    let full = try stage.run(["busybox", "sh", "-c", "mkdir -p small && mount -t tmpfs -o size=8M none small"])
    try expect(full.status == 0, "mount: \(full.text)")
    client = try snapshot("small/a.snap", ["--skip-free-pages"])
    try expect(client.status == 1 && client.text.contains("No space left"), "full disk: \(client.text)")
    try expect(try stage.run(["ls", "small"]).text.isEmpty, "something was left on the full disk")
    try expect(try stage.isRunning(source), "the source does not run after a full disk")
    try stage.verify(source, passes: 1)
    try stage.stop(source)

    // The same file twice: at once, and read in full.
    for (name, flags) in [("at-once", []), ("in-full", ["--full"])] {
        let start = now()
        let guest = try stage.restore(name, "skipped.snap", flags)
        say("\(name): runs after \(Int((now() - start) * 1000)) ms")
        try stage.verify(guest, passes: 9)
        try stage.stop(guest)
    }

    // Cut, and damaged where the header says what is where.
    let broken = try stage.run(["busybox", "sh", "-c", """
        head -c 100000000 skipped.snap > cut.snap
        cp skipped.snap damaged.snap && printf x | dd of=damaged.snap bs=1 seek=100 conv=notrunc
        """])
    try expect(broken.status == 0, "cannot damage: \(broken.text)")
    for name in ["cut.snap", "damaged.snap", "missing.snap"] {
        let child = try stage.run(["./lacuna", "restore", name, "--console", "none"])
        try expect(child.status == 1 && child.text.contains(name), "\(name): \(child.text)")
        say(child.text)
    }

    // To a file and back, as a channel: the guest ends there and goes on here.
    let again = try stage.restore("again", "skipped.snap", [])
    try stage.verify(again, passes: 1)
    client = try stage.run(
        ["./lacuna", "migrate", "--control", again.control, "--to", "file:moved.snap", "--skip-free-pages", "--hint-timeout", "5000"],
        seconds: patience)
    try expect(client.status == 0, "to a file: \(client.text)")
    try expect(try stage.waitForEnd(again.child, seconds: 30) == 0, "the guest did not end with its migration to a file")
    let last = try stage.receive("last", at: "file:moved.snap", until: "the guest runs here now")
    try stage.verify(last, passes: 9)
    try stage.stop(last)
}

extension Stage {
    func restore(_ name: String, _ path: String, _ flags: [String]) throws(Failure) -> Guest {
        let control = "\(name).ctl"
        let child = try start(name, ["./lacuna", "restore", path, "--control", control] + flags)
        try wait(child, for: "the guest runs here now", seconds: patience)
        return Guest(child: child, control: control)
    }
}
