// SPDX-License-Identifier: Apache-2.0
internal import CLinux

/// State behind a lock, with a way to wait for it to change. `Mutex` of the standard library has no condition to wait
/// on, hence pthreads.
///
/// Thread rules: any thread; not recursive.
@safe final class Monitor<State>: @unchecked Sendable {
    // Sendable: `state` is touched only with `mutex` held, and the pthread objects never move.
    private var state: State
    private let mutex: UnsafeMutablePointer<pthread_mutex_t>
    private let condition: UnsafeMutablePointer<pthread_cond_t>

    init(_ state: State) {
        self.state = state
        unsafe mutex = .allocate(capacity: 1)
        unsafe condition = .allocate(capacity: 1)
        var attributes = pthread_condattr_t()
        // None of these can fail: they allocate nothing, and the clock exists. Monotonic, so that setting the time of
        // day does not stretch a wait.
        unsafe pthread_mutex_init(mutex, nil)
        unsafe pthread_condattr_init(&attributes)
        unsafe pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        unsafe pthread_cond_init(condition, &attributes)
        unsafe pthread_condattr_destroy(&attributes)
    }

    deinit {
        unsafe pthread_cond_destroy(condition)
        unsafe pthread_mutex_destroy(mutex)
        unsafe condition.deallocate()
        unsafe mutex.deallocate()
    }

    func withLock<Result, Failure: Error>(_ body: (inout State) throws(Failure) -> Result) throws(Failure) -> Result {
        unsafe pthread_mutex_lock(mutex)
        defer { unsafe pthread_mutex_unlock(mutex) }
        return try body(&state)
    }

    /// Wakes all who wait, to look again. With the lock held or without.
    func wakeAll() { unsafe pthread_cond_broadcast(condition) }

    /// Waits until `look` finds something, for at most `milliseconds` (0 or less: looks once).
    func wait<Result>(milliseconds: Int, for look: (inout State) -> Result?) -> Result? {
        var deadline = timespec()
        unsafe clock_gettime(CLOCK_MONOTONIC, &deadline)
        // Cut to a day: no caller waits longer, and the sums below cannot overflow.
        let bound = max(0, min(milliseconds, 86_400_000))
        let nanoseconds = deadline.tv_nsec + bound % 1000 * 1_000_000
        deadline.tv_sec += bound / 1000 + nanoseconds / 1_000_000_000
        deadline.tv_nsec = nanoseconds % 1_000_000_000

        unsafe pthread_mutex_lock(mutex)
        defer { unsafe pthread_mutex_unlock(mutex) }
        while true {
            if let result = look(&state) { return result }
            // The access to `state` has ended here: others change it while this thread sleeps.
            if unsafe pthread_cond_timedwait(condition, mutex, &deadline) != 0 { return look(&state) }
        }
    }
}
