// SPDX-License-Identifier: Apache-2.0
import Migration

/// Starts a detached thread. Its stack is the system's default.
public func startThread(named name: String, _ body: @escaping @Sendable () -> Void) {
    do throws(MigrationError) { try startThreadIfPossible(named: name, body) } catch {
        // The only causes are limits on threads that a machine cannot run without.
        preconditionFailure(error.description)
    }
}
