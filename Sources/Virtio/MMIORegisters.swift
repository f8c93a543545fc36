// SPDX-License-Identifier: Apache-2.0

/// Register offsets and constants of the virtio-mmio transport, version 2 (virtio 1.3, section 4.2.2), for the
/// transport and for whoever plays its driver.
public enum MMIO {
    /// "virt", little-endian.
    public static let magic: UInt32 = 0x7472_6976
    public static let version: UInt32 = 2
    /// "LACU", little-endian.
    public static let vendor: UInt32 = 0x5543_414c
    /// Bytes of the register window, configuration space included: one page.
    public static let windowBytes: UInt64 = 0x1000

    public enum Register: UInt64, Sendable, CaseIterable {
        case magicValue = 0x000
        case version = 0x004
        case deviceID = 0x008
        case vendorID = 0x00c
        case deviceFeatures = 0x010
        case deviceFeaturesSelect = 0x014
        case driverFeatures = 0x020
        case driverFeaturesSelect = 0x024
        case queueSelect = 0x030
        case queueSizeMax = 0x034
        case queueSize = 0x038
        case queueReady = 0x044
        case queueNotify = 0x050
        case interruptStatus = 0x060
        case interruptAcknowledge = 0x064
        case status = 0x070
        case queueDescriptorsLow = 0x080
        case queueDescriptorsHigh = 0x084
        case queueDriverLow = 0x090
        case queueDriverHigh = 0x094
        case queueDeviceLow = 0x0a0
        case queueDeviceHigh = 0x0a4
        case sharedMemorySelect = 0x0ac
        case sharedMemoryLengthLow = 0x0b0
        case sharedMemoryLengthHigh = 0x0b4
        case sharedMemoryBaseLow = 0x0b8
        case sharedMemoryBaseHigh = 0x0bc
        case configurationGeneration = 0x0fc
    }

    /// Where the device's configuration space begins.
    public static let configuration: UInt64 = 0x100
}

/// Bits of the device status (virtio 1.3, section 2.1).
public struct DeviceStatus: OptionSet, Sendable, Hashable {
    public let rawValue: UInt32
    public init(rawValue: UInt32) { self.rawValue = rawValue }

    public static let acknowledge = DeviceStatus(rawValue: 1)
    public static let driver = DeviceStatus(rawValue: 2)
    public static let driverOK = DeviceStatus(rawValue: 4)
    public static let featuresOK = DeviceStatus(rawValue: 8)
    /// Set by the device only.
    public static let needsReset = DeviceStatus(rawValue: 64)
    public static let failed = DeviceStatus(rawValue: 128)

    /// What a driver may set.
    static let settable: DeviceStatus = [.acknowledge, .driver, .driverOK, .featuresOK, .failed]
}

/// What a driver did to the registers that it should not have.
public struct MMIOCounters: Sendable, Codable, Equatable {
    /// Accesses with a wrong size or alignment, to a register that does not exist or in the wrong direction.
    public var badAccesses: UInt64 = 0
    /// Register writes that are not allowed in the device's present state.
    public var misplacedWrites: UInt64 = 0
    /// `FEATURES_OK` refused.
    public var refusedFeatures: UInt64 = 0
    /// Queues whose set-up was refused.
    public var refusedQueues: UInt64 = 0
    public init() {}
}
