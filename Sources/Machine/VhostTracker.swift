// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import Migration
import Vhost

/// The device number of virtio-vsock (virtio 1.3, section 5).
let vsockDeviceID: UInt32 = 19

/// What the kernel's vhost writes to guest memory: a writer like the vCPUs (rule W3), with a log of its own.
final class VhostTracker: DirtyTracker {
    private let device: VsockDevice
    init(_ device: VsockDevice) { self.device = device }

    func arm() throws(PartFailure) {
        do throws(VhostError) { try device.startLog() } catch { throw PartFailure("cannot start vhost's log: \(error)") }
    }
    func collect(into bitmap: PageBitmap) throws(PartFailure) { device.collectDirty(into: bitmap) }
    func disarm() { device.endLog() }
}
