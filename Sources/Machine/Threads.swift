// SPDX-License-Identifier: Apache-2.0
import Migration

/// Starts a detached thread for something that a guest can do without. Its stack is the system's default. Where the
/// system has no room for one more, that is said on standard error, and the answer is false.
@discardableResult
public func startThread(named name: String, _ body: @escaping @Sendable () -> Void) -> Bool {
    do throws(MigrationError) { try startThreadIfPossible(named: name, body) } catch {
        logLine("\(name): \(error)")
        return false
    }
    return true
}
