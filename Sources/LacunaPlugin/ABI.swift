// SPDX-License-Identifier: Apache-2.0
internal import Balloon
public import CLacuna
internal import GuestMemory
internal import Virtio

// The functions of lacuna.h, whose descriptions are there. Each is a check of its arguments and one call of the parts
// behind it.

private let devices = HandleTable<PluginDevice>("device", limit: 256)
private let windows = HandleTable<PluginWindow>("window", limit: 256)

private func take<Value>(_ pointer: UnsafeMutablePointer<Value>?, _ name: String) throws(PluginError) -> UnsafeMutablePointer<Value> {
    guard let pointer = unsafe pointer else { throw .argument("\(name) is NULL") }
    return unsafe pointer
}

/// A copy of a structure that begins with its size: what the caller does not have is 0.
private func copy<Value>(
    _ pointer: UnsafePointer<Value>?, _ name: String, minimum: Int, zero: Value
) throws(PluginError) -> Value {
    guard let pointer = unsafe pointer else { throw .argument("\(name) is NULL") }
    let size = Int(unsafe UnsafeRawPointer(pointer).loadUnaligned(as: UInt32.self))
    guard size >= minimum else {
        throw PluginError(LACUNA_ERROR_VERSION, "\(name)->size is \(size); it is at least \(minimum)")
    }
    var value = zero
    unsafe withUnsafeMutableBytes(of: &value) { bytes in
        unsafe bytes.copyMemory(
            from: UnsafeRawBufferPointer(start: pointer, count: min(size, bytes.count)))
    }
    return value
}

/// Stores a structure, as much of it as the caller has room for; its size stays.
private func store<Value>(_ value: Value, to pointer: UnsafeMutablePointer<Value>) {
    let raw = UnsafeMutableRawPointer(pointer)
    let size = Int(unsafe raw.loadUnaligned(as: UInt32.self))
    unsafe withUnsafeBytes(of: value) { bytes in
        let count = min(size, bytes.count)
        guard count > 4 else { return }
        unsafe (raw + 4).copyMemory(from: bytes.baseAddress! + 4, byteCount: count - 4)
    }
}

// MARK: - The device

@_cdecl("lacuna_device_create")
public func deviceCreate(_ config: UnsafePointer<lacuna_device_config>?, _ device: UnsafeMutablePointer<UInt64>?) -> Int32 {
    call { () throws(PluginError) in
        let device = try unsafe take(device, "device")
        unsafe device.pointee = 0
        let config = try unsafe copy(config, "config", minimum: 80, zero: lacuna_device_config())
        guard unsafe config.abi_version >> 16 == LACUNA_ABI_VERSION >> 16, unsafe config.abi_version & 0xffff <= LACUNA_ABI_VERSION & 0xffff else {
            throw PluginError(
                LACUNA_ERROR_VERSION,
                "ABI version 0x\(String(unsafe config.abi_version, radix: 16)); this library has 0x\(String(LACUNA_ABI_VERSION, radix: 16))")
        }
        guard unsafe config.signal_queue != nil && config.signal_config != nil && config.signal_needs_reset != nil && config.mark_dirty != nil else {
            throw .argument("signal_queue, signal_config, signal_needs_reset and mark_dirty are required")
        }
        let limit = unsafe config.address_limit == 0 ? PluginDevice.defaultLimit : config.address_limit
        guard limit <= PluginDevice.maximumLimit else { throw .argument("address_limit is beyond 2^46") }
        let made = try PluginDevice(host: unsafe Host(config), limit: limit, features: unsafe config.features)
        unsafe device.pointee = try devices.insert(made)
    }
}

@_cdecl("lacuna_device_destroy")
public func deviceDestroy(_ device: UInt64) -> Int32 {
    call { () throws(PluginError) in
        let gone = try devices.remove(device)
        if let window = gone.tracking.withLock({ $0.window }) { _ = try? windows.remove(window) }
        try gone.gate.writing { gone.end() }
    }
}

@_cdecl("lacuna_device_set_memory")
public func deviceSetMemory(_ device: UInt64, _ regions: UnsafePointer<lacuna_region>?, _ count: Int) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        guard let regions = unsafe regions else { throw .argument("regions is NULL") }
        guard count > 0, count <= PluginDevice.maximumRegions else {
            throw .argument("\(count) regions; 1 to \(PluginDevice.maximumRegions) are possible")
        }
        var mappings: [(range: GuestRange, host: UnsafeMutableRawPointer)] = unsafe []
        for index in 0..<count {
            let region = unsafe regions[index]
            guard let host = unsafe region.host else { throw .argument("the host address of region \(index) is NULL") }
            unsafe mappings.append((GuestRange(start: GuestAddress(region.guest_address), size: region.bytes), host))
        }
        try device.gate.writing { () throws(PluginError) in try unsafe device.setMemory(mappings) }
    }
}

@_cdecl("lacuna_device_type")
public func deviceType(_ device: UInt64, _ type: UnsafeMutablePointer<UInt32>?) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        let type = try unsafe take(type, "type")
        unsafe type.pointee = try device.gate.reading { device.balloon.deviceID }
    }
}

@_cdecl("lacuna_device_queue_count")
public func deviceQueueCount(_ device: UInt64, _ count: UnsafeMutablePointer<UInt32>?) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        let count = try unsafe take(count, "count")
        unsafe count.pointee = UInt32(try device.gate.reading { device.queueCount })
    }
}

@_cdecl("lacuna_device_queue_limit")
public func deviceQueueLimit(_ device: UInt64, _ queue: UInt32, _ size: UnsafeMutablePointer<UInt32>?) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        let size = try unsafe take(size, "size")
        unsafe size.pointee = try device.gate.reading { () throws(PluginError) in
            UInt32(device.balloon.queueSizes[try device.checkQueue(queue)])
        }
    }
}

@_cdecl("lacuna_device_features")
public func deviceFeatures(_ device: UInt64, _ features: UnsafeMutablePointer<UInt64>?) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        let features = try unsafe take(features, "features")
        unsafe features.pointee = try device.gate.reading { device.offeredFeatures }
    }
}

@_cdecl("lacuna_device_set_features")
public func deviceSetFeatures(_ device: UInt64, _ features: UInt64) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        try device.gate.writing { () throws(PluginError) in try device.setFeatures(features) }
    }
}

@_cdecl("lacuna_device_config_read")
public func deviceConfigRead(_ device: UInt64, _ offset: UInt32, _ buffer: UnsafeMutableRawPointer?, _ bytes: Int) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        guard let buffer = unsafe buffer, (0...256).contains(bytes) else { throw .argument("no buffer of 0 to 256 bytes") }
        let read = try device.gate.reading { device.balloon.readConfiguration(offset: Int(offset), bytes: bytes) }
        for (index, byte) in read.enumerated() { unsafe buffer.storeBytes(of: byte, toByteOffset: index, as: UInt8.self) }
    }
}

@_cdecl("lacuna_device_config_write")
public func deviceConfigWrite(_ device: UInt64, _ offset: UInt32, _ buffer: UnsafeRawPointer?, _ bytes: Int) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        guard let buffer = unsafe buffer, (0...256).contains(bytes) else { throw .argument("no buffer of 0 to 256 bytes") }
        let written = unsafe Array(UnsafeRawBufferPointer(start: buffer, count: bytes))
        try device.gate.reading { device.balloon.writeConfiguration(offset: Int(offset), bytes: written) }
    }
}

@_cdecl("lacuna_device_set_queue")
public func deviceSetQueue(_ device: UInt64, _ queue: UnsafePointer<lacuna_queue>?) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        let queue = try unsafe copy(queue, "queue", minimum: 48, zero: lacuna_queue())
        guard queue.reserved == 0, queue.next_available <= 0xffff, queue.next_used <= 0xffff else {
            throw .argument("an index beyond 65535, or reserved bits")
        }
        let state: VirtQueueState? =
            queue.entries == 0
            ? nil
            : VirtQueueState(
                size: queue.entries, descriptors: GuestAddress(queue.descriptors),
                available: GuestAddress(queue.available), used: GuestAddress(queue.used),
                nextAvailable: UInt16(queue.next_available), nextUsed: UInt16(queue.next_used))
        try device.gate.writing { () throws(PluginError) in
            try device.setQueue(try device.checkQueue(queue.index), state)
        }
    }
}

@_cdecl("lacuna_device_queue_state")
public func deviceQueueState(_ device: UInt64, _ queue: UnsafeMutablePointer<lacuna_queue>?) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        let queue = try unsafe take(queue, "queue")
        var value = try unsafe copy(UnsafePointer(queue), "queue", minimum: 48, zero: lacuna_queue())
        let index = value.index
        let state = try device.gate.reading { () throws(PluginError) in
            device.queueState(try device.checkQueue(index))
        }
        value.entries = state?.size ?? 0
        value.next_available = UInt32(state?.nextAvailable ?? 0)
        value.next_used = UInt32(state?.nextUsed ?? 0)
        value.reserved = 0
        value.descriptors = state?.descriptors.rawValue ?? 0
        value.available = state?.available.rawValue ?? 0
        value.used = state?.used.rawValue ?? 0
        unsafe store(value, to: queue)
    }
}

@_cdecl("lacuna_device_activate")
public func deviceActivate(_ device: UInt64) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        try device.gate.writing { () throws(PluginError) in try device.activate() }
    }
}

@_cdecl("lacuna_device_notify")
public func deviceNotify(_ device: UInt64, _ queue: UInt32) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        try device.gate.reading { () throws(PluginError) in
            let index = try device.checkQueue(queue)
            if device.isActive { device.balloon.notify(queue: index) }
        }
    }
}

@_cdecl("lacuna_device_reset")
public func deviceReset(_ device: UInt64) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        try device.gate.writing { device.reset() }
    }
}

@_cdecl("lacuna_device_set_target")
public func deviceSetTarget(_ device: UInt64, _ pages: UInt32) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        try device.gate.reading { device.balloon.setTarget(pages: pages) }
    }
}

@_cdecl("lacuna_device_get_status")
public func deviceGetStatus(_ device: UInt64, _ status: UnsafeMutablePointer<lacuna_device_status>?) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        let status = try unsafe take(status, "status")
        var value = try unsafe copy(UnsafePointer(status), "status", minimum: 80, zero: lacuna_device_status())
        try device.gate.reading {
            let counters = device.balloon.counters
            value.is_active = device.isActive ? 1 : 0
            value.can_hint = device.balloon.refusal == nil ? 1 : 0
            value.target_pages = device.balloon.targetPages
            value.actual_pages = device.balloon.actualPages
            value.reserved = 0
            value.inflated_pages = counters.inflatedPages
            value.deflated_pages = counters.deflatedPages
            value.reports_completed = counters.reportsCompleted
            value.reports_failed = counters.reportsFailed &+ counters.reportsVoid
            value.chains_dropped = counters.lateChains &+ counters.staleChains
            value.pages_not_ram = counters.listedPagesNotRAM &+ counters.reportedPagesNotRAM
            value.broken_queues = counters.brokenQueues
        }
        unsafe store(value, to: status)
    }
}

@_cdecl("lacuna_device_save")
public func deviceSave(_ device: UInt64, _ buffer: UnsafeMutableRawPointer?, _ bytes: UnsafeMutablePointer<Int>?) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        let bytes = try unsafe take(bytes, "bytes")
        let state = try device.gate.writing { device.save() }
        let room = unsafe bytes.pointee
        unsafe bytes.pointee = state.count
        guard let buffer = unsafe buffer, room >= state.count else {
            throw PluginError(LACUNA_ERROR_SPACE, "the state has \(state.count) bytes, the buffer \(room)")
        }
        unsafe state.withUnsafeBytes { unsafe buffer.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
    }
}

@_cdecl("lacuna_device_load")
public func deviceLoad(_ device: UInt64, _ buffer: UnsafeRawPointer?, _ bytes: Int) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        guard let buffer = unsafe buffer, bytes >= 0 else { throw .argument("buffer is NULL") }
        let state = unsafe Array(UnsafeRawBufferPointer(start: buffer, count: bytes))
        try device.gate.writing { () throws(PluginError) in try device.load(state) }
    }
}

// MARK: - Hints

@_cdecl("lacuna_tracking_armed")
public func trackingArmed(_ device: UInt64) -> Int32 {
    call { () throws(PluginError) in
        try devices.find(device).tracking.withLock { tracking in
            tracking.isArmed = true
            tracking.generation &+= 1
        }
    }
}

@_cdecl("lacuna_tracking_merge")
public func trackingMerge(_ device: UInt64) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        guard device.tracking.withLock({ $0.isArmed }) else { throw .state("tracking was not declared armed") }
        try device.gate.reading { device.endWindow() }
    }
}

@_cdecl("lacuna_tracking_disarmed")
public func trackingDisarmed(_ device: UInt64) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        device.tracking.withLock { $0.isArmed = false }
        try device.gate.reading {
            device.endWindow()
            // A driver that hints may have its pages back.
            device.balloon.releaseHints()
        }
    }
}

@_cdecl("lacuna_window_open")
public func windowOpen(_ device: UInt64, _ window: UnsafeMutablePointer<UInt64>?) -> Int32 {
    call { () throws(PluginError) in
        let device = try devices.find(device)
        let window = try unsafe take(window, "window")
        unsafe window.pointee = 0
        unsafe window.pointee = try device.gate.reading { () throws(PluginError) in
            let opened: Result<UInt64, PluginError> = device.tracking.withLock { tracking in
                do throws(PluginError) {
                    guard tracking.isArmed else { throw .state("tracking was not declared armed (lacuna_tracking_armed)") }
                    guard tracking.window == nil else {
                        throw PluginError(LACUNA_ERROR_BUSY, "a window of this device is open; close it first")
                    }
                    if let refusal = device.balloon.refusal { throw PluginError(LACUNA_ERROR_REFUSED, refusal) }
                    // The generation is this one: no merge can come in between with the lock held.
                    let made = PluginWindow(
                        device: device, balloon: device.balloon, request: device.balloon.openWindow(),
                        generation: tracking.generation)
                    let handle: UInt64
                    do throws(PluginError) { handle = try windows.insert(made) } catch {
                        // There will be nobody to close it.
                        device.balloon.releaseHints()
                        throw error
                    }
                    tracking.window = handle
                    return .success(handle)
                } catch { return .failure(error) }
            }
            return try opened.get()
        }
    }
}

@_cdecl("lacuna_window_wait")
public func windowWait(_ window: UInt64, _ milliseconds: UInt32, _ report: UnsafeMutablePointer<lacuna_report>?) -> Int32 {
    call { () throws(PluginError) in
        let window = try windows.find(window)
        var value = lacuna_report()
        if let report = unsafe report { value = try unsafe copy(UnsafePointer(report), "report", minimum: 40, zero: value) }
        let found = try window.wait(milliseconds: milliseconds)
        guard let report = unsafe report else { return }
        value.has_figures = found.figures == nil ? 0 : 1
        value.pages = UInt64(found.pages.population)
        value.blocks = found.figures?.blocks ?? 0
        value.walk_nanoseconds = found.figures?.walkNanoseconds ?? 0
        value.longest_lock_nanoseconds = found.figures?.longestLockNanoseconds ?? 0
        unsafe store(value, to: report)
    }
}

@_cdecl("lacuna_window_mask")
public func windowMask(_ window: UInt64, _ bitmap: UnsafeMutablePointer<lacuna_bitmap>?) -> Int32 {
    call { () throws(PluginError) in
        let window = try windows.find(window)
        let pointer = try unsafe take(bitmap, "bitmap")
        var bitmap = try unsafe copy(UnsafePointer(pointer), "bitmap", minimum: 56, zero: lacuna_bitmap())
        guard let words = unsafe bitmap.words, UInt(bitPattern: words) % 8 == 0,
            unsafe UInt(bitPattern: bitmap.cleared) % 8 == 0
        else { throw .argument("words is NULL, or words or cleared is not aligned to 8") }
        let shift = unsafe bitmap.page_shift, address = unsafe bitmap.guest_address, bits = unsafe bitmap.bits
        guard (12...30).contains(shift), unsafe bitmap.reserved == 0, unsafe bitmap.flags & ~LACUNA_BITMAP_SHARED == 0 else {
            throw .argument("page_shift is 12 to 30; reserved and unknown flags are 0")
        }
        // Bounded so that no sum below overflows.
        guard bits > 0, bits <= (1 << 40) >> (UInt64(shift) - 12), address & ((1 << UInt64(shift)) - 1) == 0, address < 1 << 52 else {
            throw .argument("\(bits) bits of pages of 2^\(shift) bytes at 0x\(String(address, radix: 16))")
        }
        let caller = unsafe CallersBitmap(
            words: words, cleared: bitmap.cleared, firstFrame: Int(address >> 12), bits: Int(bits),
            framesPerBit: 1 << Int(shift - 12), isShared: bitmap.flags & LACUNA_BITMAP_SHARED != 0)
        unsafe bitmap.cleared_count = UInt64(try window.mask(caller))
        unsafe store(bitmap, to: pointer)
    }
}

@_cdecl("lacuna_window_close")
public func windowClose(_ window: UInt64) -> Int32 {
    call { () throws(PluginError) in
        let gone = try windows.remove(window)
        gone.device.tracking.withLock { if $0.window == window { $0.window = nil } }
        gone.balloon.closeWindow()
    }
}
