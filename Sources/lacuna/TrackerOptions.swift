// SPDX-License-Identifier: Apache-2.0
import Machine

extension Arguments {
    /// The options that are of this host, not of the guest: how dirty pages are found, and the guest's address here.
    static let trackerOptions: Set<String> = ["dirty-tracker", "dirty-ring-size", "vsock-cid"]

    /// The guest's vsock address. 0 to 2 and the last have meanings of their own.
    func vsockCID() throws(Complaint) -> UInt32? {
        try integer("vsock-cid", in: 3...Int(UInt32.max) - 1).map { UInt32($0) }
    }

    func ringEntries() throws(Complaint) -> Int {
        let entries = try integer("dirty-ring-size", in: 1024...65536) ?? DirtyTracking.defaultRingEntries
        guard entries & (entries - 1) == 0 else {
            throw .usage("--dirty-ring-size takes a power of two from 1024 to 65536, not \(entries)")
        }
        return entries
    }

    /// What `--dirty-tracker` and `--dirty-ring-size` say.
    func dirtyTracking() throws(Complaint) -> DirtyTracking {
        let entries = self["dirty-ring-size"] == nil ? nil : try ringEntries()
        let way = self["dirty-tracker"] ?? "bitmap"
        if entries != nil, way != "ring" { throw .usage("--dirty-ring-size is for --dirty-tracker ring only") }
        switch way {
        case "bitmap": return .bitmap
        case "manual": return .manual
        case "ring": return .ring(entries: entries ?? DirtyTracking.defaultRingEntries)
        default: throw .usage("--dirty-tracker takes bitmap, manual or ring, not '\(way)'")
        }
    }
}
