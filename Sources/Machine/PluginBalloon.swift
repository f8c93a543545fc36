// SPDX-License-Identifier: Apache-2.0
internal import CLacuna
internal import CLinux
public import GuestMemory
import Migration
import Synchronization
public import Virtio

/// `liblacuna.so`, loaded as any VMM would load it: by name, with nothing known of it but its header.
private final class PluginLibrary: @unchecked Sendable {
    // Sendable: pointers to functions that any thread may call.
    let create: @convention(c) (UnsafePointer<lacuna_device_config>?, UnsafeMutablePointer<UInt64>?) -> Int32
    let destroy: @convention(c) (UInt64) -> Int32
    let setMemory: @convention(c) (UInt64, UnsafePointer<lacuna_region>?, Int) -> Int32
    let type: @convention(c) (UInt64, UnsafeMutablePointer<UInt32>?) -> Int32
    let queueCount: @convention(c) (UInt64, UnsafeMutablePointer<UInt32>?) -> Int32
    let queueLimit: @convention(c) (UInt64, UInt32, UnsafeMutablePointer<UInt32>?) -> Int32
    let features: @convention(c) (UInt64, UnsafeMutablePointer<UInt64>?) -> Int32
    let setFeatures: @convention(c) (UInt64, UInt64) -> Int32
    let configRead: @convention(c) (UInt64, UInt32, UnsafeMutableRawPointer?, Int) -> Int32
    let configWrite: @convention(c) (UInt64, UInt32, UnsafeRawPointer?, Int) -> Int32
    let setQueue: @convention(c) (UInt64, UnsafePointer<lacuna_queue>?) -> Int32
    let activate: @convention(c) (UInt64) -> Int32
    let notify: @convention(c) (UInt64, UInt32) -> Int32
    let reset: @convention(c) (UInt64) -> Int32
    let setTarget: @convention(c) (UInt64, UInt32) -> Int32
    let getStatus: @convention(c) (UInt64, UnsafeMutablePointer<lacuna_device_status>?) -> Int32
    let save: @convention(c) (UInt64, UnsafeMutableRawPointer?, UnsafeMutablePointer<Int>?) -> Int32
    let load: @convention(c) (UInt64, UnsafeRawPointer?, Int) -> Int32
    let trackingArmed: @convention(c) (UInt64) -> Int32
    let trackingMerge: @convention(c) (UInt64) -> Int32
    let trackingDisarmed: @convention(c) (UInt64) -> Int32
    let windowOpen: @convention(c) (UInt64, UnsafeMutablePointer<UInt64>?) -> Int32
    let windowWait: @convention(c) (UInt64, UInt32, UnsafeMutablePointer<lacuna_report>?) -> Int32
    let windowMask: @convention(c) (UInt64, UnsafeMutablePointer<lacuna_bitmap>?) -> Int32
    let windowClose: @convention(c) (UInt64) -> Int32
    private let message: @convention(c) () -> UnsafePointer<CChar>?

    init(_ path: String) throws(MachineError) {
        // The kernel says where it put the dynamic loader: nowhere, for a static executable.
        guard getauxval(UInt(AT_BASE)) != 0 else {
            throw MachineError("a static executable cannot load the balloon's plugin; build lacuna without -static-executable")
        }
        // Never unloaded: a library with a runtime in it cannot be.
        guard let handle = dlopen(path, RTLD_NOW | RTLD_LOCAL) else {
            let why = dlerror().map { String(cString: $0) } ?? "unknown"
            throw MachineError("cannot load the balloon's plugin: \(why); give --balloon plugin:PATH of a liblacuna.so")
        }
        func find<Function>(_ name: String) throws(MachineError) -> Function {
            guard let symbol = dlsym(handle, "lacuna_\(name)") else {
                throw MachineError("\(path) has no lacuna_\(name); give --balloon plugin:PATH of a liblacuna.so")
            }
            return unsafeBitCast(symbol, to: Function.self)
        }
        create = try find("device_create")
        destroy = try find("device_destroy")
        setMemory = try find("device_set_memory")
        type = try find("device_type")
        queueCount = try find("device_queue_count")
        queueLimit = try find("device_queue_limit")
        features = try find("device_features")
        setFeatures = try find("device_set_features")
        configRead = try find("device_config_read")
        configWrite = try find("device_config_write")
        setQueue = try find("device_set_queue")
        activate = try find("device_activate")
        notify = try find("device_notify")
        reset = try find("device_reset")
        setTarget = try find("device_set_target")
        getStatus = try find("device_get_status")
        save = try find("device_save")
        load = try find("device_load")
        trackingArmed = try find("tracking_armed")
        trackingMerge = try find("tracking_merge")
        trackingDisarmed = try find("tracking_disarmed")
        windowOpen = try find("window_open")
        windowWait = try find("window_wait")
        windowMask = try find("window_mask")
        windowClose = try find("window_close")
        message = try find("message")
    }

    /// What the last failed call on this thread said.
    var lastMessage: String { message().map { String(cString: $0) } ?? "" }
}

/// The balloon out of `liblacuna.so` (protocol/plugin-abi.md), in the place of the one that is linked in.
///
/// Thread rules: those of `VirtioDevice`.
public final class PluginBalloon: VirtioDevice {
    /// What callbacks get as their context.
    fileprivate final class Context: Sendable {
        let memory: GuestMemory
        /// Of the current activation.
        let signals = Mutex<DeviceSignals?>(nil)
        init(_ memory: GuestMemory) { self.memory = memory }
        var current: DeviceSignals? { signals.withLock { $0 } }

        static func from(_ pointer: UnsafeMutableRawPointer?) -> Context? {
            pointer.map { Unmanaged<Context>.fromOpaque($0).takeUnretainedValue() }
        }
    }

    private let library: PluginLibrary
    fileprivate let device: UInt64
    fileprivate let context: Context
    public let deviceID: UInt32
    public let offeredFeatures: UInt64
    public let queueSizes: [UInt16]

    init(path: String, memory: GuestMemory, features: UInt64) throws(MachineError) {
        let library = try PluginLibrary(path), context = Context(memory)
        var config = lacuna_device_config()
        config.size = UInt32(MemoryLayout<lacuna_device_config>.size)
        config.abi_version = LACUNA_ABI_VERSION
        config.address_limit = 1 << 42
        config.features = features
        config.context = Unmanaged.passUnretained(context).toOpaque()
        config.signal_queue = { Context.from($0)?.current?.usedBuffer(queue: Int($1)) }
        config.signal_config = { Context.from($0)?.current?.configurationChanged() }
        config.signal_needs_reset = { Context.from($0)?.current?.needsReset() }
        config.discard = { context, address, bytes in
            let first = Int(address / 4096)
            return (try? Context.from(context)?.memory.discard(pages: first..<first + Int(bytes / 4096))) != nil ? 0 : -1
        }
        config.mark_dirty = { Context.from($0)?.memory.logWrite(GuestAddress($1), bytes: Int($2)) }
        config.log = { _, _, text in if let text { logLine("balloon: \(String(cString: text))") } }
        var device: UInt64 = 0, count: UInt32 = 0, number: UInt32 = 0, offered: UInt64 = 0
        func check(_ result: Int32) throws(MachineError) {
            guard result == LACUNA_OK else { throw MachineError("the balloon's plugin: \(library.lastMessage)") }
        }
        try check(library.create(&config, &device))
        let regions = memory.regions.map {
            lacuna_region(guest_address: $0.range.start.rawValue, bytes: $0.range.size, host: $0.host)
        }
        try check(library.setMemory(device, regions, regions.count))
        try check(library.type(device, &number))
        try check(library.features(device, &offered))
        try check(library.queueCount(device, &count))
        var sizes: [UInt16] = []
        for queue in 0..<count {
            var size: UInt32 = 0
            try check(library.queueLimit(device, queue, &size))
            sizes.append(UInt16(clamping: size))
        }
        (deviceID, offeredFeatures, queueSizes) = (number, offered, sizes)
        self.library = library
        self.device = device
        self.context = context
    }

    deinit { _ = library.destroy(device) }

    private var status: lacuna_device_status {
        var status = lacuna_device_status()
        status.size = UInt32(MemoryLayout<lacuna_device_status>.size)
        _ = library.getStatus(device, &status)
        return status
    }

    /// Why no report of free pages can be had now; nil if one can.
    public var refusal: String? {
        status.can_hint == 1 ? nil : "the guest's balloon driver is not ready to report free pages (the device is a plugin's)"
    }

    public func setTarget(pages: UInt32) { _ = library.setTarget(device, pages) }
    public var actualPages: UInt32 { status.actual_pages }

    public func activate(features: UInt64, queues: [VirtQueue?], signals: DeviceSignals) {
        context.signals.withLock { $0 = signals }
        // After `restore` it is, with its queues where they were.
        guard status.is_active == 0 else { return }
        var isGood = library.setFeatures(device, features) == LACUNA_OK
        for (index, queue) in queues.enumerated() {
            guard let state = queue?.state else { continue }
            var wanted = lacuna_queue()
            wanted.size = UInt32(MemoryLayout<lacuna_queue>.size)
            wanted.index = UInt32(index)
            wanted.entries = state.size
            wanted.next_available = UInt32(state.nextAvailable)
            wanted.next_used = UInt32(state.nextUsed)
            wanted.descriptors = state.descriptors.rawValue
            wanted.available = state.available.rawValue
            wanted.used = state.used.rawValue
            isGood = isGood && library.setQueue(device, &wanted) == LACUNA_OK
        }
        isGood = isGood && library.activate(device) == LACUNA_OK
        if !isGood {
            logLine("balloon: \(library.lastMessage)")
            signals.needsReset()
        }
    }

    public func reset() {
        context.signals.withLock { $0 = nil }
        _ = library.reset(device)
    }

    public func readConfiguration(offset: Int, count: Int) -> UInt64 {
        var value: UInt64 = 0
        _ = library.configRead(device, UInt32(clamping: offset), &value, min(max(count, 0), 8))
        return value
    }

    public func writeConfiguration(offset: Int, count: Int, value: UInt64) {
        var value = value
        _ = library.configWrite(device, UInt32(clamping: offset), &value, min(max(count, 0), 8))
    }

    public func notify(queue: Int) { _ = library.notify(device, UInt32(queue)) }

    /// Begins the state, so that one of the linked-in balloon is not taken for it.
    private static let mark: UInt32 = 0x6e69_6c70

    public func save(into encoder: inout StateEncoder) {
        var bytes = 0
        _ = library.save(device, nil, &bytes)
        var state = [UInt8](repeating: 0, count: bytes)
        guard library.save(device, &state, &bytes) == LACUNA_OK else { return }
        encoder.put(Self.mark)
        encoder.put(state)
    }

    public func restore(from decoder: inout StateDecoder) throws(StateError) {
        guard try decoder.take(UInt32.self) == Self.mark else {
            throw StateError("the source's balloon is no plugin's; give both sides the same --balloon")
        }
        // A bitmap of balloon pages in runs: no more than this for any guest.
        let state = try decoder.takeBlob(limit: 64 << 20)
        guard library.load(device, state, state.count) == LACUNA_OK else { throw StateError(library.lastMessage) }
    }

    // MARK: - The hint window

    private struct Hinting {
        var isArmed = false
        var window: UInt64 = 0
        var request: UInt32 = 0
    }
    private let hinting = Mutex(Hinting())

    fileprivate func request() throws(PartFailure) -> UInt32 {
        let result: Result<UInt32, PartFailure> = hinting.withLock { state in
            // The migration's own types see to it that this comes after arming (rule W1).
            if !state.isArmed { _ = library.trackingArmed(device) }
            state.isArmed = true
            if state.window != 0 { _ = library.windowClose(state.window) }
            state.window = 0
            guard library.windowOpen(device, &state.window) == LACUNA_OK else {
                return .failure(PartFailure(library.lastMessage))
            }
            state.request &+= 1
            return .success(state.request)
        }
        return try result.get()
    }

    fileprivate func wait(_ request: UInt32, milliseconds: Int) -> HintReport? {
        let window = hinting.withLock { $0.request == request ? $0.window : 0 }
        var report = lacuna_report()
        report.size = UInt32(MemoryLayout<lacuna_report>.size)
        guard window != 0, library.windowWait(window, UInt32(clamping: milliseconds), &report) == LACUNA_OK else { return nil }
        // What the mask takes out of a bitmap of everything is the report.
        let count = context.memory.frameCount
        var everything = [UInt64](repeating: .max, count: (count + 63) / 64), free = everything
        var bitmap = lacuna_bitmap()
        bitmap.size = UInt32(MemoryLayout<lacuna_bitmap>.size)
        bitmap.bits = UInt64(count)
        bitmap.page_shift = 12
        let result = everything.withUnsafeMutableBufferPointer { words in
            free.withUnsafeMutableBufferPointer { cleared in
                bitmap.words = words.baseAddress
                bitmap.cleared = cleared.baseAddress
                return library.windowMask(window, &bitmap)
            }
        }
        guard result == LACUNA_OK else { return nil }
        let pages = PageBitmap(bitCount: count)
        for (index, word) in free.enumerated() where word != 0 { pages.merge(word, intoWord: index) }
        return HintReport(
            request: request, pages: pages,
            figures: report.has_figures == 0
                ? nil
                : HintFigures(
                    blocks: report.blocks, pages: report.pages, walkNanoseconds: report.walk_nanoseconds,
                    longestLockNanoseconds: report.longest_lock_nanoseconds, batches: 0))
    }

    fileprivate func stop() {
        hinting.withLock { state in
            guard state.isArmed else { return }
            _ = library.trackingMerge(device)
            if state.window != 0 { _ = library.windowClose(state.window) }
            state.window = 0
        }
    }

    fileprivate func finish() {
        stop()
        hinting.withLock { $0.isArmed = false }
        _ = library.trackingDisarmed(device)
    }
}

/// The plugin as the migration's hinter.
final class PluginHinter: FreePageHinter {
    private let balloon: PluginBalloon
    init(_ balloon: PluginBalloon) { self.balloon = balloon }
    var refusal: String? { balloon.refusal }
    var method: String { "plugin" }
    func request() throws(PartFailure) -> UInt32 { try balloon.request() }
    func wait(for request: UInt32, milliseconds: Int) -> HintReport? { balloon.wait(request, milliseconds: milliseconds) }
    func stop() { balloon.stop() }
    func finish() { balloon.finish() }
}
