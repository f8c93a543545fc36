// SPDX-License-Identifier: Apache-2.0
internal import CLinux
public import GuestMemory

/// A call to vhost that failed: which one, and the errno.
public struct VhostError: Error, Equatable, CustomStringConvertible {
    public let call: String
    public let errno: Int32
    public init(call: String, errno: Int32) {
        self.call = call
        self.errno = errno
    }
    public var description: String { unsafe "\(call): \(String(cString: strerror(errno))) (errno \(errno))" }
}

/// Where one ring lies, in guest-physical addresses, and where in it to go on.
public struct VhostRing: Sendable, Equatable {
    public var size: UInt16
    public var descriptors: GuestAddress
    public var available: GuestAddress
    public var used: GuestAddress
    /// The next entry of the available ring to take.
    public var nextAvailable: UInt16
    public init(
        size: UInt16, descriptors: GuestAddress, available: GuestAddress, used: GuestAddress, nextAvailable: UInt16
    ) {
        self.size = size
        self.descriptors = descriptors
        self.available = available
        self.used = used
        self.nextAvailable = nextAvailable
    }
}

/// An open `/dev/vhost-vsock`: the kernel serves a guest's receive and transmit rings (0 and 1), and logs what it writes
/// to the rings.
///
/// Thread rules: `takeLog` from any one thread; the others one at a time. Closing is `deinit`'s.
@safe final class VhostVsock: Sendable {
    private let descriptor: Int32
    /// Readable when the kernel has used buffers of a ring.
    let calls: [Int32]
    /// Written to when the driver has made buffers available.
    let kicks: [Int32]
    /// Through which ring 0 gets its buffers.
    let receive: ReceiveHandover
    private let memory: GuestMemory
    private nonisolated(unsafe) let log: UnsafeMutablePointer<UInt64>
    private let logWords: Int

    /// Opens the device for `memory`, as the guest with the address `cid`.
    init(memory: GuestMemory, cid: UInt32) throws(VhostError) {
        let descriptor = unsafe lacuna_open("/dev/vhost-vsock", O_RDWR | O_CLOEXEC, 0)
        guard descriptor >= 0 else { throw VhostError(call: "open /dev/vhost-vsock", errno: lacuna_errno()) }
        let events = (0..<4).map { _ in eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK)) }
        // The kernel's log: one bit a page, written behind this process's back, so in a mapping of its own.
        let words = (memory.frameCount + 63) / 64
        let mapping = unsafe lacuna_mmap(words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard events.allSatisfy({ $0 >= 0 }), let mapping = unsafe mapping, let receive = ReceiveHandover(memory: memory)
        else {
            let code = lacuna_errno()
            for event in events + [descriptor] where event >= 0 { close(event) }
            throw VhostError(call: "cannot make the log and events of a vhost device", errno: code)
        }
        self.descriptor = descriptor
        self.memory = memory
        self.receive = receive
        (calls, kicks) = (Array(events[..<2]), Array(events[2...]))
        unsafe log = mapping.assumingMemoryBound(to: UInt64.self)
        logWords = words
        // All is set from here on, and deinit cleans up.
        try unsafe call("VHOST_SET_OWNER", lacuna_VHOST_SET_OWNER)
        var offered: UInt64 = 0
        try call("VHOST_GET_FEATURES", lacuna_VHOST_GET_FEATURES, &offered)
        guard offered & 1 << 32 != 0, offered & 1 << UInt64(VHOST_F_LOG_ALL) != 0 else {
            throw VhostError(call: "the features of /dev/vhost-vsock", errno: ENOTSUP)
        }
        try setMemory()
        var base = UInt64(UInt(bitPattern: mapping))
        try call("VHOST_SET_LOG_BASE", lacuna_VHOST_SET_LOG_BASE, &base)
        try setLogging(false)
        var number = UInt64(cid)
        try call("VHOST_VSOCK_SET_GUEST_CID", lacuna_VHOST_VSOCK_SET_GUEST_CID, &number)
    }

    deinit {
        // The descriptor first: closing it ends the kernel's use of all the others.
        for descriptor in [descriptor] + calls + kicks { close(descriptor) }
        unsafe munmap(log, logWords * 8)
    }

    private func call(_ name: String, _ request: UInt, _ argument: UnsafeMutableRawPointer? = nil) throws(VhostError) {
        while unsafe lacuna_ioctl_pointer(descriptor, request, argument) < 0 {
            let code = lacuna_errno()
            if code != EINTR { throw VhostError(call: name, errno: code) }
        }
    }

    private func call<Value: BitwiseCopyable>(_ name: String, _ request: UInt, _ value: inout Value) throws(VhostError) {
        try unsafe withUnsafeMutablePointer(to: &value) { (pointer) throws(VhostError) in
            try unsafe call(name, request, UnsafeMutableRawPointer(pointer))
        }
    }

    /// struct vhost_memory: a count and padding (8 bytes), then for each region its guest address, size, host address
    /// and flags.
    private func setMemory() throws(VhostError) {
        var table: [UInt64] = [UInt64(memory.regions.count)]
        for region in memory.regions {
            let host = unsafe UInt64(UInt(bitPattern: region.host))
            table += [region.range.start.rawValue, region.range.size, host, 0]
        }
        let failure: VhostError? = unsafe table.withUnsafeMutableBytes { bytes in
            do throws(VhostError) {
                try unsafe call("VHOST_SET_MEM_TABLE", lacuna_VHOST_SET_MEM_TABLE, bytes.baseAddress)
                return nil
            } catch { return error }
        }
        if let failure { throw failure }
    }

    /// Whether the kernel logs. The virtio features are always the same: version 1 and nothing else.
    func setLogging(_ on: Bool) throws(VhostError) {
        var features: UInt64 = 1 << 32 | (on ? 1 << UInt64(VHOST_F_LOG_ALL) : 0)
        try call("VHOST_SET_FEATURES", lacuna_VHOST_SET_FEATURES, &features)
    }

    /// Hands the rings to the kernel, which serves them from here on.
    func start(_ rings: [VhostRing]) throws(VhostError) {
        for (index, ring) in rings.enumerated() {
            let number = UInt32(index), count = Int(ring.size)
            var state = vhost_vring_state(index: number, num: UInt32(ring.size))
            try call("VHOST_SET_VRING_NUM", lacuna_VHOST_SET_VRING_NUM, &state)
            state.num = UInt32(ring.nextAvailable)
            try call("VHOST_SET_VRING_BASE", lacuna_VHOST_SET_VRING_BASE, &state)
            guard let descriptors = unsafe memory.hostPointer(ring.descriptors, bytes: 16 * count),
                let available = unsafe memory.hostPointer(ring.available, bytes: 6 + 2 * count),
                let used = unsafe memory.hostPointer(ring.used, bytes: 6 + 8 * count)
            else { throw VhostError(call: "ring \(index) is not in guest RAM", errno: EFAULT) }
            var addresses = vhost_vring_addr()
            addresses.index = number
            // Writes to the used ring are entered into the log at the used ring's guest address.
            addresses.flags = 1 << UInt32(VHOST_VRING_F_LOG)
            addresses.desc_user_addr = UInt64(UInt(bitPattern: descriptors))
            addresses.avail_user_addr = UInt64(UInt(bitPattern: available))
            if index == 0 {
                guard let own = receive.begin(ring) else { throw VhostError(call: "a ring of \(ring.size)", errno: EINVAL) }
                addresses.avail_user_addr = own
            }
            addresses.used_user_addr = UInt64(UInt(bitPattern: used))
            addresses.log_guest_addr = ring.used.rawValue
            try call("VHOST_SET_VRING_ADDR", lacuna_VHOST_SET_VRING_ADDR, &addresses)
            var file = vhost_vring_file(index: number, fd: kicks[index])
            try call("VHOST_SET_VRING_KICK", lacuna_VHOST_SET_VRING_KICK, &file)
            file.fd = calls[index]
            try call("VHOST_SET_VRING_CALL", lacuna_VHOST_SET_VRING_CALL, &file)
        }
        try setRunning(true)
        // Whatever the driver made available while nobody served it.
        for index in rings.indices { kick(index) }
    }

    /// Takes the rings back. When it returns the kernel touches guest memory no more. Returns where each ring stands.
    func stop(rings: Int) throws(VhostError) -> [UInt16] {
        try setRunning(false)
        var bases: [UInt16] = []
        for index in 0..<rings {
            var state = vhost_vring_state(index: UInt32(index), num: 0)
            try call("VHOST_GET_VRING_BASE", lacuna_VHOST_GET_VRING_BASE, &state)
            bases.append(UInt16(truncatingIfNeeded: state.num))
        }
        return bases
    }

    private func setRunning(_ on: Bool) throws(VhostError) {
        var running: Int32 = on ? 1 : 0
        try call("VHOST_VSOCK_SET_RUNNING", lacuna_VHOST_VSOCK_SET_RUNNING, &running)
    }

    func kick(_ ring: Int) {
        if ring == 0 { receive.handOver() }
        signal(ring)
    }

    /// Hands over receive buffers that the driver made available without a word, if there are any.
    func offerReceiveBuffers() { if receive.handOver() { signal(0) } }

    private func signal(_ ring: Int) {
        var one: UInt64 = 1
        unsafe _ = write(kicks[ring], &one, 8)
    }

    /// Takes what the kernel has logged: words of one bit a page.
    func takeLog(_ body: (_ index: Int, _ bits: UInt64) -> Void) {
        for index in 0..<logWords {
            // A look first: most words are clean, and stay unmapped zero pages.
            if unsafe lacuna_load_relaxed_64(log + index) == 0 { continue }
            // The kernel sets bits atomically (set_bit), so none is lost by taking the word in one step.
            body(index, unsafe lacuna_exchange_64(log + index, 0))
        }
    }
}
