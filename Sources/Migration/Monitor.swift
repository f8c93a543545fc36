// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// State behind a lock, with a way to wait for it to change: `Mutex` has no condition to wait on.
///
/// Thread rules: any thread; not recursive.
package final class Monitor<State>: @unchecked Sendable {
    // Sendable: `state` is touched only with `mutex` held. The pthread objects must not move, so they live on the heap.
    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let condition = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    private var state: State

    package init(_ state: State) {
        self.state = state
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

    /// Looks at the state; nobody is woken.
    package func read<Result>(_ body: (State) -> Result) -> Result {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        return body(state)
    }

    /// Changes the state and wakes everybody who waits.
    @discardableResult
    package func update<Result>(_ body: (inout State) -> Result) -> Result {
        pthread_mutex_lock(mutex)
        defer {
            pthread_cond_broadcast(condition)
            pthread_mutex_unlock(mutex)
        }
        return body(&state)
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

    /// The same for at most `nanoseconds` (a day at the most); nil if `body` never returned a value. Where it takes
    /// something out of the state that others wait for, `wakes` wakes them.
    package func wait<Result>(
        nanoseconds: UInt64, wakes: Bool = false, until body: (inout State) -> Result?
    ) -> Result? {
        var limit = timespec()
        clock_gettime(CLOCK_MONOTONIC, &limit)
        let end = UInt64(limit.tv_nsec) + min(nanoseconds, 86_400 * 1_000_000_000)
        limit.tv_sec += Int(end / 1_000_000_000)
        limit.tv_nsec = Int(end % 1_000_000_000)
        pthread_mutex_lock(mutex)
        defer {
            if wakes { pthread_cond_broadcast(condition) }
            pthread_mutex_unlock(mutex)
        }
        while true {
            if let result = body(&state) { return result }
            if pthread_cond_timedwait(condition, mutex, &limit) != 0 { return body(&state) }
        }
    }

    /// The same with a limit in milliseconds; less than 0 counts as 0.
    func wait<Result>(milliseconds: Int, wakes: Bool = false, until body: (inout State) -> Result?) -> Result? {
        wait(nanoseconds: UInt64(max(0, min(milliseconds, 86_400_000))) * 1_000_000, wakes: wakes, until: body)
    }
}

/// Starts a detached thread. Throws `machineFailed` where the system has no room for one more.
package func startThreadIfPossible(
    named name: String, _ body: @escaping @Sendable () -> Void
) throws(MigrationError) {
    final class Body: Sendable {
        let name: String
        let run: @Sendable () -> Void
        init(_ name: String, _ run: @escaping @Sendable () -> Void) {
            self.name = name
            self.run = run
        }
    }
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    pthread_attr_setdetachstate(&attributes, Int32(PTHREAD_CREATE_DETACHED))
    let argument = Unmanaged.passRetained(Body(name, body))
    var thread = pthread_t()
    let code = pthread_create(
        &thread, &attributes,
        { argument in
            let body = Unmanaged<Body>.fromOpaque(argument!).takeRetainedValue()
            lacuna_name_thread(body.name)
            body.run()
            return nil
        }, argument.toOpaque())
    pthread_attr_destroy(&attributes)
    guard code == 0 else {
        argument.release()
        throw .machineFailed(doing: "starting a thread", why: errnoText(code))
    }
}
