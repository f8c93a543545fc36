// SPDX-License-Identifier: Apache-2.0
internal import CLacuna
internal import CLinux
internal import Synchronization

/// Why a call fails: its result, and a sentence for a person.
struct PluginError: Error {
    let code: Int32
    let message: String
    init(_ code: Int32, _ message: String) {
        self.code = code
        self.message = message
    }
    static func argument(_ message: String) -> PluginError { PluginError(LACUNA_ERROR_ARGUMENT, message) }
    static func state(_ message: String) -> PluginError { PluginError(LACUNA_ERROR_STATE, message) }
}

/// What every call goes through: nothing but a result leaves.
func call(_ body: () throws(PluginError) -> Void) -> Int32 {
    do throws(PluginError) {
        guard lacuna_plugin_in_callback() == 0 else {
            throw PluginError(LACUNA_ERROR_REENTRANT, "a callback must not call the library")
        }
        try body()
        return LACUNA_OK
    } catch {
        unsafe error.message.withCString { unsafe lacuna_plugin_set_message($0) }
        return error.code
    }
}

/// Objects behind numbers: a number that was never given out, or whose object is gone, finds nothing.
final class HandleTable<Object: Sendable>: Sendable {
    private struct Slot {
        // Part of the handle; goes up each time the slot is emptied.
        var generation: UInt32 = 1
        var object: Object?
    }
    private let slots = Mutex<[Slot]>([])
    private let limit: Int
    private let what: String

    init(_ what: String, limit: Int) {
        self.what = what
        self.limit = limit
    }

    func insert(_ object: Object) throws(PluginError) -> UInt64 {
        let handle: UInt64? = slots.withLock { slots in
            var place = slots.firstIndex { $0.object == nil }
            if place == nil, slots.count < limit {
                slots.append(Slot())
                place = slots.count - 1
            }
            guard let place else { return nil }
            slots[place].object = object
            return UInt64(slots[place].generation) << 32 | UInt64(place + 1)
        }
        guard let handle else { throw PluginError(LACUNA_ERROR_RESOURCES, "there are \(limit) \(what)s already") }
        return handle
    }

    private static func place(_ handle: UInt64, _ slots: [Slot]) -> Int? {
        let place = Int(handle & 0xffff_ffff) - 1
        guard slots.indices.contains(place), slots[place].object != nil,
            slots[place].generation == UInt32(handle >> 32)
        else { return nil }
        return place
    }

    func find(_ handle: UInt64) throws(PluginError) -> Object {
        guard let object = slots.withLock({ slots in Self.place(handle, slots).flatMap { slots[$0].object } }) else {
            throw missing(handle)
        }
        return object
    }

    /// Exactly one caller gets the object.
    func remove(_ handle: UInt64) throws(PluginError) -> Object {
        let object: Object? = slots.withLock { slots in
            guard let place = Self.place(handle, slots) else { return nil }
            defer {
                slots[place].object = nil
                slots[place].generation = slots[place].generation == .max ? 1 : slots[place].generation + 1
            }
            return slots[place].object
        }
        guard let object else { throw missing(handle) }
        return object
    }

    private func missing(_ handle: UInt64) -> PluginError {
        PluginError(LACUNA_ERROR_HANDLE, "there is no \(what) 0x\(String(handle, radix: 16)), or not any more")
    }
}

/// Many readers or one writer; writers do not starve. Not recursive: calls from within callbacks are refused before.
@safe final class ReadWriteLock: @unchecked Sendable {
    // Sendable: the pthread object never moves.
    private let lock: UnsafeMutablePointer<pthread_rwlock_t>

    init() {
        unsafe lock = .allocate(capacity: 1)
        var attributes = pthread_rwlockattr_t()
        unsafe pthread_rwlockattr_init(&attributes)
        unsafe lacuna_prefer_writers(&attributes)
        unsafe pthread_rwlock_init(lock, &attributes)
        unsafe pthread_rwlockattr_destroy(&attributes)
    }
    deinit {
        unsafe pthread_rwlock_destroy(lock)
        unsafe lock.deallocate()
    }

    func reading<Result>(_ body: () throws(PluginError) -> Result) throws(PluginError) -> Result {
        unsafe pthread_rwlock_rdlock(lock)
        defer { unsafe pthread_rwlock_unlock(lock) }
        return try body()
    }
    func writing<Result>(_ body: () throws(PluginError) -> Result) throws(PluginError) -> Result {
        unsafe pthread_rwlock_wrlock(lock)
        defer { unsafe pthread_rwlock_unlock(lock) }
        return try body()
    }
}

/// The caller's callbacks, until its device is destroyed.
@safe final class Host: @unchecked Sendable {
    // Sendable: fixed at init; the caller promises that its functions may be called on any thread with its context.
    private let config: lacuna_device_config
    private let lock = ReadWriteLock()
    private var isAlive = true

    init(_ config: lacuna_device_config) { unsafe self.config = unsafe config }

    /// When it returns no callback runs or will run.
    func end() { try? lock.writing { isAlive = false } }

    private func callback<Result>(_ fallback: Result, _ body: () -> Result) -> Result {
        (try? lock.reading {
            guard isAlive else { return fallback }
            lacuna_plugin_enter_callback()
            defer { lacuna_plugin_leave_callback() }
            return body()
        }) ?? fallback
    }

    func signalQueue(_ queue: Int) { callback(()) { unsafe config.signal_queue?(config.context, UInt32(queue)) } }
    func signalConfiguration() { callback(()) { unsafe config.signal_config?(config.context) } }
    func signalNeedsReset() { callback(()) { unsafe config.signal_needs_reset?(config.context) } }
    var canDiscard: Bool { unsafe config.discard != nil }
    func discard(_ address: UInt64, _ bytes: Int) -> Bool {
        callback(false) { unsafe config.discard?(config.context, address, UInt64(bytes)) == 0 }
    }
    func markDirty(_ address: UInt64, _ bytes: Int) {
        callback(()) { unsafe config.mark_dirty?(config.context, address, UInt64(bytes)) }
    }
    func log(_ level: Int32, _ text: String) {
        callback(()) { unsafe text.withCString { unsafe config.log?(config.context, level, $0) } }
    }
}
