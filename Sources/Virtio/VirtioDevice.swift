// SPDX-License-Identifier: Apache-2.0
public import GuestMemory

/// Feature bits every transport and device shares (virtio 1.3, section 6), as masks.
public enum VirtioFeature {
    /// `VIRTIO_F_INDIRECT_DESC`, bit 28: a descriptor may point at a table of descriptors.
    public static let indirectDescriptors: UInt64 = 1 << 28
    /// `VIRTIO_F_EVENT_IDX`, bit 29: each side names the buffer it wants to hear of.
    public static let eventIndex: UInt64 = 1 << 29
    /// `VIRTIO_F_RING_PACKED`, bit 34: the layout of section 2.8.
    public static let packedRing: UInt64 = 1 << 34
    /// `VIRTIO_F_VERSION_1`, bit 32. Every device here requires it.
    public static let version1: UInt64 = 1 << 32
}

/// A virtio device as its transport sees it: queues, features, configuration space. It knows nothing of registers or
/// interrupts.
///
/// Thread rules: a transport calls `activate`, `reset`, `notify`, `save` and `restore` one at a time, each on whatever
/// thread caused it (`notify`: the vCPU that wrote the register). `readConfiguration` and `writeConfiguration` may come
/// at the same time as those and as each other. A device must not call its transport from within these, except through
/// `DeviceSignals`, which never wait for the transport.
///
/// Error model: nothing a driver does may trap. A broken virtqueue is reported with `DeviceSignals.needsReset`.
public protocol VirtioDevice: AnyObject, Sendable {
    /// The device type (virtio 1.3, section 5).
    var deviceID: UInt32 { get }
    /// The features offered to the driver, as a mask of 64 bits. Constant.
    var offeredFeatures: UInt64 { get }
    /// The largest size of each queue, in descriptors: powers of two. Constant; its count is the number of queues.
    var queueSizes: [UInt16] { get }

    /// Whether the device can work with this choice of features. The transport has checked already that each was
    /// offered and that `VIRTIO_F_VERSION_1` is among them; what is left are dependencies between features.
    func accepts(features: UInt64) -> Bool
    /// The driver is ready (`DRIVER_OK`). `queues` has one entry for each of `queueSizes`, nil for those the driver did
    /// not enable.
    func activate(features: UInt64, queues: [VirtQueue?], signals: DeviceSignals)
    /// Back to the state before the first driver. Queues and signals handed out earlier are dead when this is called.
    func reset()
    /// Reads `count` (1, 2, 4 or 8) bytes of the configuration space, little-endian. Any offset is allowed; bytes
    /// beyond the end read as 0.
    func readConfiguration(offset: Int, count: Int) -> UInt64
    /// Writes `count` (1, 2, 4 or 8) bytes of the configuration space, little-endian. Fields a driver may not write
    /// keep their value.
    func writeConfiguration(offset: Int, count: Int, value: UInt64)
    /// The driver made buffers available in this queue.
    func notify(queue: Int)

    /// Appends the device's own state; queues and negotiated features are the transport's.
    func save(into encoder: inout StateEncoder)
    /// Takes the state that `save` wrote, untrusted, into a device that was just reset. `activate` follows if a driver
    /// was active. After an error the device is reset again.
    func restore(from decoder: inout StateDecoder) throws(StateError)
}

extension VirtioDevice {
    public func accepts(features: UInt64) -> Bool { true }
}

/// What an active device tells its driver. Valid from `activate` to the next reset; without effect afterwards.
///
/// Thread rules: callable from any thread, also with the device's own locks held. The calls never wait for the
/// transport or the guest.
public struct DeviceSignals: Sendable {
    private let used: @Sendable (Int) -> Void
    private let changed: @Sendable () -> Void
    private let broken: @Sendable () -> Void

    /// For transports and tests.
    public init(
        usedBuffer: @escaping @Sendable (Int) -> Void, configurationChanged: @escaping @Sendable () -> Void,
        needsReset: @escaping @Sendable () -> Void
    ) {
        used = usedBuffer
        changed = configurationChanged
        broken = needsReset
    }

    /// Buffers of this queue were used. The caller asks `VirtQueue.wantsInterrupt` first.
    public func usedBuffer(queue: Int) { used(queue) }
    /// The configuration space changed. To be called after the change can be read.
    public func configurationChanged() { changed() }
    /// The device cannot go on until the driver resets it (virtio 1.3, section 2.1.2).
    public func needsReset() { broken() }
}
