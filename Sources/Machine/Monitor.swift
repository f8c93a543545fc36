// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// A mutex with a condition variable around a value: what waits for a change of that value waits here, not by polling.
package final class Monitor<State>: @unchecked Sendable {
    // Sendable: `state` is touched under the mutex only. The pthread objects must not move, so they live on the heap.
    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let condition = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    private var state: State

    package init(_ initial: State) {
        state = initial
        pthread_mutex_init(mutex, nil)
        var attributes = pthread_condattr_t()
        pthread_condattr_init(&attributes)
        // Limits are spans of time: setting the clock must not stretch them.
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        pthread_cond_init(condition, &attributes)
        pthread_condattr_destroy(&attributes)
    }

    deinit {
        pthread_cond_destroy(condition)
        pthread_mutex_destroy(mutex)
        condition.deallocate()
        mutex.deallocate()
    }

    /// Runs `body` under the lock and wakes everyone who waits.
    @discardableResult
    package func update<Result>(_ body: (inout State) -> Result) -> Result {
        pthread_mutex_lock(mutex)
        defer {
            pthread_cond_broadcast(condition)
            pthread_mutex_unlock(mutex)
        }
        return body(&state)
    }

    /// Runs `body` under the lock.
    package func read<Result>(_ body: (State) -> Result) -> Result {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        return body(state)
    }

    /// Waits until `body` returns a value, as `wait(until:)` does, but not beyond `nanoseconds`; nil then.
    func wait<Result>(nanoseconds: UInt64, until body: (inout State) -> Result?) -> Result? {
        var limit = timespec()
        clock_gettime(CLOCK_MONOTONIC, &limit)
        let end = UInt64(limit.tv_nsec) + nanoseconds % 1_000_000_000
        limit.tv_sec += Int(nanoseconds / 1_000_000_000 + end / 1_000_000_000)
        limit.tv_nsec = Int(end % 1_000_000_000)
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        while true {
            if let result = body(&state) { return result }
            if pthread_cond_timedwait(condition, mutex, &limit) != 0 { return body(&state) }
        }
    }

    /// Waits until `body` returns a value. It is called under the lock, once at first and after each update.
    package func wait<Result>(until body: (inout State) -> Result?) -> Result {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        while true {
            if let result = body(&state) { return result }
            pthread_cond_wait(condition, mutex)
        }
    }
}

/// Starts a detached thread. Its stack is the system's default.
public func startThread(named name: String, _ body: @escaping @Sendable () -> Void) {
    final class Body: Sendable {
        let name: String
        let run: @Sendable () -> Void
        init(_ name: String, _ run: @escaping @Sendable () -> Void) {
            self.name = name
            self.run = run
        }
    }
    var thread = pthread_t()
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    pthread_attr_setdetachstate(&attributes, Int32(PTHREAD_CREATE_DETACHED))
    let argument = Unmanaged.passRetained(Body(name, body)).toOpaque()
    let result = pthread_create(
        &thread, &attributes,
        { argument in
            let body = Unmanaged<Body>.fromOpaque(argument!).takeRetainedValue()
            lacuna_name_thread(body.name)
            body.run()
            return nil
        }, argument)
    pthread_attr_destroy(&attributes)
    // The only causes are limits on threads that a machine cannot run without.
    precondition(result == 0, "pthread_create: errno \(result)")
}
