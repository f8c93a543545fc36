// SPDX-License-Identifier: Apache-2.0
import Balloon
import CLacuna
import CLinux
import GuestMemory

// lacuna-figures LIBRARY: what masking a bitmap of 32 MiB costs through the plugin's C ABI, against the same operation
// called directly. Prints JSON; the status is 1 if the ratio is beyond the limit. lacuna-figures --hint-latency: what a
// request costs over vhost-user.

let bits = 1 << 28
let limit = 1.1
let turns = 8
let rounds = 6

func fail(_ what: String) -> Never {
    let line = Array("lacuna-figures: \(what)\n".utf8)
    _ = write(2, line, line.count)
    exit(2)
}

func nanoseconds() -> Double {
    var now = timespec()
    clock_gettime(CLOCK_MONOTONIC, &now)
    return Double(now.tv_sec) * 1e9 + Double(now.tv_nsec)
}

if CommandLine.arguments.dropFirst() == ["--hint-latency"] { exit(try HintLatency.run() ? 0 : 1) }
guard CommandLine.arguments.count == 2, let library = dlopen(CommandLine.arguments[1], RTLD_NOW) else {
    fail("usage: lacuna-figures LIBRARY | --hint-latency")
}
@MainActor func find<Function>(_ name: String, _ type: Function.Type = Function.self) -> Function {
    guard let symbol = dlsym(library, name) else { fail("no \(name)") }
    return unsafeBitCast(symbol, to: type)
}
typealias Pointer<Value> = UnsafeMutablePointer<Value>?
let create: @convention(c) (UnsafePointer<lacuna_device_config>?, Pointer<UInt64>) -> Int32 = find("lacuna_device_create")
let setMemory: @convention(c) (UInt64, UnsafePointer<lacuna_region>?, Int) -> Int32 = find("lacuna_device_set_memory")
let setFeatures: @convention(c) (UInt64, UInt64) -> Int32 = find("lacuna_device_set_features")
let setQueue: @convention(c) (UInt64, UnsafePointer<lacuna_queue>?) -> Int32 = find("lacuna_device_set_queue")
let activate: @convention(c) (UInt64) -> Int32 = find("lacuna_device_activate")
let readConfiguration: @convention(c) (UInt64, UInt32, UnsafeMutableRawPointer?, Int) -> Int32 = find("lacuna_device_config_read")
let notify: @convention(c) (UInt64, UInt32) -> Int32 = find("lacuna_device_notify")
let armed: @convention(c) (UInt64) -> Int32 = find("lacuna_tracking_armed")
let open: @convention(c) (UInt64, Pointer<UInt64>) -> Int32 = find("lacuna_window_open")
let waitForReport: @convention(c) (UInt64, UInt32, Pointer<lacuna_report>) -> Int32 = find("lacuna_window_wait")
let mask: @convention(c) (UInt64, Pointer<lacuna_bitmap>) -> Int32 = find("lacuna_window_mask")
let closeWindow: @convention(c) (UInt64) -> Int32 = find("lacuna_window_close")
let destroy: @convention(c) (UInt64) -> Int32 = find("lacuna_device_destroy")
let message: @convention(c) () -> UnsafePointer<CChar>? = find("lacuna_message")
@MainActor func check(_ result: Int32, _ what: String) {
    if result != 0 { fail("\(what): \(message().map { String(cString: $0) } ?? "")") }
}

/// The best times of a mask called directly and through the plugin, in nanoseconds, and how many bits it cleared.
struct Best {
    var direct = Double.infinity, plugin = Double.infinity, cleared = 0
}

// A guest of 1 TiB, of which only the driver's pages are ever touched.
let bytes = bits * 4096
guard let memory = lacuna_mmap(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) else {
    fail("cannot map 1 TiB")
}
// The guest: each word of its report has some bits, as in memory that was used for a while.
let chunk = 1 << 22
let pattern: [UInt64] = (0..<chunk / 64).map { UInt64($0) &* 0x9e37_79b9_7f4a_7c15 | 1 << UInt64($0 % 64) }
pattern.withUnsafeBytes { (memory + 0x10_0000).copyMemory(from: $0.baseAddress!, byteCount: $0.count) }

/// How a bitmap was filled leaves more or less of it in the caches, which is not what is compared.
let other = UnsafeMutableRawPointer.allocate(byteCount: 96 << 20, alignment: 4096)
@MainActor func emptyCaches() { memset(other, 1, 96 << 20) }

/// A device with everything of its own, and with the report of such a guest; bitmaps for the direct call; and both in turns,
/// so that they meet the same machine.
@MainActor func measure(_ best: inout Best) {
    var config = lacuna_device_config()
    config.size = UInt32(MemoryLayout<lacuna_device_config>.size)
    config.abi_version = LACUNA_ABI_VERSION
    config.signal_queue = { _, _ in }
    config.signal_config = { _ in }
    config.signal_needs_reset = { _ in }
    config.mark_dirty = { _, _, _ in }
    var device: UInt64 = 0, window: UInt64 = 0
    check(create(&config, &device), "create")
    var region = lacuna_region(guest_address: 0, bytes: UInt64(bytes), host: memory)
    check(setMemory(device, &region, 1), "memory")
    check(setFeatures(device, 1 << 32 | 1 << 63), "features")
    // The rings of the device before.
    memset(memory + 0x10000, 0, 0x30000)
    var queue = lacuna_queue()
    queue.size = UInt32(MemoryLayout<lacuna_queue>.size)
    queue.index = 2
    queue.entries = 256
    (queue.descriptors, queue.available, queue.used) = (0x10000, 0x20000, 0x30000)
    check(setQueue(device, &queue), "queue")
    check(activate(device), "activate")
    check(armed(device), "armed")
    check(open(device, &window), "open")

    var command: UInt32 = 0
    check(readConfiguration(device, 16, &command, 4), "configuration")
    var index: UInt16 = 0
    func send(kind: UInt16, flags: UInt16, start: UInt64, count: UInt32, length: UInt32) {
        let header = memory + 0x40000
        header.storeBytes(of: command, as: UInt32.self)
        header.storeBytes(of: kind, toByteOffset: 4, as: UInt16.self)
        header.storeBytes(of: flags, toByteOffset: 6, as: UInt16.self)
        header.storeBytes(of: start, toByteOffset: 8, as: UInt64.self)
        header.storeBytes(of: count, toByteOffset: 16, as: UInt32.self)
        header.storeBytes(of: 0, toByteOffset: 20, as: UInt32.self)
        for (place, (address, length, next)) in [(UInt64(0x40000), UInt32(24), UInt16(1)), (kind == 1 ? 0x10_0000 : 0x50000, length, 0)].enumerated() {
            let descriptor = memory + 0x10000 + 16 * place
            descriptor.storeBytes(of: address, as: UInt64.self)
            descriptor.storeBytes(of: length, toByteOffset: 8, as: UInt32.self)
            descriptor.storeBytes(of: next, toByteOffset: 12, as: UInt16.self)
            descriptor.storeBytes(of: 1, toByteOffset: 14, as: UInt16.self)
        }
        (memory + 0x20000).storeBytes(of: 0, toByteOffset: 4 + 2 * Int(index % 256), as: UInt16.self)
        index &+= 1
        (memory + 0x20000).storeBytes(of: index, toByteOffset: 2, as: UInt16.self)
        check(notify(device, 2), "notify")
    }
    for start in stride(from: 0, to: bits, by: chunk) {
        send(kind: 1, flags: start == 0 ? 1 : 0, start: UInt64(start), count: UInt32(chunk), length: UInt32(chunk / 8))
    }
    send(kind: 2, flags: 2, start: 0, count: 0, length: 40)
    check(waitForReport(window, 1000, nil), "wait")

    // The same bits, for the direct call.
    let free = PageBitmap(bitCount: bits), target = PageBitmap(bitCount: bits)
    for word in 0..<free.wordCount { free.store(pattern[word % pattern.count], inWord: word) }
    let words = UnsafeMutablePointer<UInt64>.allocate(capacity: bits / 64)
    defer { words.deallocate() }
    var bitmap = lacuna_bitmap()
    bitmap.size = UInt32(MemoryLayout<lacuna_bitmap>.size)
    bitmap.bits = UInt64(bits)
    bitmap.page_shift = 12
    bitmap.words = words
    for _ in 0..<rounds {
        target.set(0..<bits)
        emptyCaches()
        var start = nanoseconds()
        best.cleared = target.subtract(free)
        best.direct = min(best.direct, nanoseconds() - start)
        words.update(repeating: .max, count: bits / 64)
        emptyCaches()
        start = nanoseconds()
        check(mask(window, &bitmap), "mask")
        best.plugin = min(best.plugin, nanoseconds() - start)
        guard bitmap.cleared_count == UInt64(best.cleared) else {
            fail("\(bitmap.cleared_count) bits cleared, directly \(best.cleared)")
        }
    }
    check(closeWindow(window), "close")
    check(destroy(device), "destroy")
}

// Each turn has bitmaps elsewhere in the machine's memory, and comes at another time: the best of all is what the code
// costs, whatever else the machine did.
var best = Best()
for _ in 0..<turns { measure(&best) }
let ratio = best.plugin / best.direct
print("{\"bitmapBytes\": \(bits / 8), \"cleared\": \(best.cleared), \"directMicroseconds\": \(Int(best.direct / 1000)), \"pluginMicroseconds\": \(Int(best.plugin / 1000)), \"ratio\": \(ratio), \"limit\": \(limit)}")
exit(ratio <= limit ? 0 : 1)
