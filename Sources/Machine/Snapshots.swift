// SPDX-License-Identifier: Apache-2.0
public import Migration
import Synchronization

/// One snapshot of a running machine: a migration whose destination is a file, and after which the guest runs on here.
///
/// The guest runs while its memory is written; it is paused only for what it dirtied meanwhile and its state. The file is
/// brought to the disk when it runs again.
///
/// Thread rules: `run` blocks the caller's thread and is called once; `source` may be used as it allows.
public final class SnapshotJob: Sendable {
    /// To call it off, or to let it finish if it waits.
    public let source: MigrationSource
    private let machine: Machine
    private let writer: SnapshotWriter
    private let result = Monitor<Result<ReceiveReport, MigrationError>?>(nil)

    public init(
        of machine: Machine, to path: String, options: MigrationOptions,
        progress: (@Sendable (MigrationProgress, MigrationRound?) -> Void)? = nil
    ) {
        self.machine = machine
        let outgoing = OutgoingMachine(machine)
        writer = SnapshotWriter(path: path, of: machine.memory)
        // The last word to a file is never lost on the way, so that nobody can have taken the guest but this file.
        source = MigrationSource(
            guest: outgoing, trackers: outgoing.trackers, hinter: outgoing.hinter, options: options, progress: progress)
    }

    /// Writes the file. Whether it returns or throws, the machine runs afterwards, unless `keepsPaused` and the file is
    /// whole (or `MigrationError.notResumed` is thrown).
    public func run(keepsPaused: Bool = false) throws(MigrationError) -> MigrationReport {
        let (near, far) = try ByteChannel.pair()
        let receiver = MigrationReceiver(guest: writer)
        try startThreadIfPossible(named: "snapshot") { [result] in
            do throws(MigrationError) {
                let report = try receiver.run(over: far)
                result.update { $0 = .success(report) }
            } catch { result.update { $0 = .failure(error) } }
        }
        let report: MigrationReport
        do throws(MigrationError) {
            report = try source.run(over: near)
        } catch {
            near.shutdown()
            _ = result.wait { $0 }
            throw error
        }
        // The pause ends here: the file takes as long as the disk takes.
        if !keepsPaused { machine.resume() }
        do throws(MigrationError) {
            _ = try result.wait { $0 }.get()
        } catch {
            machine.resume()
            // The destination is a file, and no guest waits there.
            if case .notStarted(let why) = error { throw .machineFailed(doing: "writing the snapshot", why: why) }
            throw error
        }
        return report
    }
}
