// SPDX-License-Identifier: Apache-2.0
import CLinux
import GuestMemory
import Machine
import VhostUser

/// `lacuna vhost-user`: the balloon device out of process.
enum VhostUserCommand {
    static func run(_ words: ArraySlice<String>) throws(Complaint) {
        let arguments = try Arguments(
            words, options: ["socket", "hint-socket", "target", "address-limit", "user", "balloon"], flags: [])
        var options = VhostUserService.Options(
            socket: try arguments.required("socket"), hintSocket: arguments["hint-socket"])
        if let limit = try arguments.size("address-limit") {
            guard (1 << 20...1 << 46).contains(limit) else { throw .usage("--address-limit takes 1M to 64T") }
            options.addressLimit = limit
        }
        if let features = arguments["balloon"] { options.features = try balloonFeatures(features) }
        if let target = try arguments.size("target") {
            guard target % 4096 == 0, let pages = UInt32(exactly: target / 4096) else {
                throw .usage("--target takes whole pages of 4 KiB, less than 16T")
            }
            options.target = pages
        }
        var user: (uid: Int64, gid: Int64) = (-1, -1)
        if let name = arguments["user"], lacuna_find_user(name, &user.uid, &user.gid) != 0 {
            throw Complaint("there is no user '\(name)' in /etc/passwd; choose another --user")
        }

        let service: VhostUserService
        do throws(VhostUserFailure) {
            service = try VhostUserService(options) { write(Array("lacuna: \($0)\n".utf8), to: 2) }
        } catch { throw Complaint("\(error)") }
        // Nothing of what follows needs a privilege: memory and events come as descriptors.
        guard lacuna_drop_privileges(user.uid, user.gid) == 0 else {
            throw Complaint("cannot give up privileges: \(String(cString: strerror(errno))); start as root, or without --user")
        }
        // A front end may cut its files short at any moment.
        SharedFile.survivesTruncation()
        stopOnSignals(service)
        _ = lacuna_forbid_processes()
        write(Array("lacuna: waiting for a front end at \(options.socket)\n".utf8), to: 2)
        do throws(VhostUserFailure) { try service.run() } catch { throw Complaint("\(error)") }
    }

    /// Ends the service, and so removes its sockets, on SIGTERM and SIGINT.
    private static func stopOnSignals(_ service: VhostUserService) {
        var signals = sigset_t()
        sigemptyset(&signals)
        sigaddset(&signals, SIGTERM)
        sigaddset(&signals, SIGINT)
        pthread_sigmask(SIG_BLOCK, &signals, nil)
        let waited = signals
        let isStarted = startThread(named: "signals") {
            var set = waited
            var number: Int32 = 0
            sigwait(&set, &number)
            service.stop()
        }
        // Nobody could end it.
        if !isStarted { exit(1) }
    }
}
