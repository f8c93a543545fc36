// SPDX-License-Identifier: Apache-2.0
import GuestMemory
import KVM
import Migration
import Virtio

/// What the destination has to build before the first page arrives.
struct MachineDescription {
    /// Goes up with the version of any device's state, so that two releases find out before memory is sent.
    static let version: UInt16 = 3
    var configuration: MachineConfiguration
    var virtioDevices: [UInt32]
    var cpuid: [CPUIDEntry]

    func encode() -> [UInt8] {
        var encoder = StateEncoder()
        encoder.put(Self.version)
        encoder.put(configuration.memorySize)
        encoder.put(UInt16(configuration.vcpus))
        encoder.put(configuration.balloonFeatures)
        encoder.put(UInt16(virtioDevices.count))
        for device in virtioDevices { encoder.put(device) }
        encoder.put(UInt16(cpuid.count))
        for entry in cpuid {
            for value in [entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx] {
                encoder.put(value)
            }
        }
        return encoder.bytes
    }

    init(configuration: MachineConfiguration, virtioDevices: [UInt32], cpuid: [CPUIDEntry]) {
        self.configuration = configuration
        self.virtioDevices = virtioDevices
        self.cpuid = cpuid
    }

    /// The bytes are a peer's.
    init(decoding bytes: [UInt8]) throws(StateError) {
        var decoder = StateDecoder(bytes)
        let version = try decoder.take(UInt16.self)
        guard version == Self.version else {
            throw StateError("the source describes its machine in version \(version) and this side knows version \(Self.version); use the same release on both")
        }
        let size = try decoder.take(UInt64.self)
        configuration = MachineConfiguration(memorySize: size, vcpus: Int(try decoder.take(UInt16.self)))
        configuration.balloonFeatures = try decoder.take()
        var devices: [UInt32] = []
        for _ in 0..<(try decoder.take(UInt16.self)) { devices.append(try decoder.take()) }
        virtioDevices = devices
        var entries: [CPUIDEntry] = []
        let count = try decoder.take(UInt16.self)
        guard count <= 1024 else { throw StateError("\(count) CPUID entries") }
        for _ in 0..<count {
            entries.append(
                CPUIDEntry(
                    function: try decoder.take(), index: try decoder.take(), flags: try decoder.take(),
                    eax: try decoder.take(), ebx: try decoder.take(), ecx: try decoder.take(), edx: try decoder.take()))
        }
        cpuid = entries
        try decoder.finish()
    }
}

extension Machine {
    var description: MachineDescription {
        MachineDescription(configuration: configuration, virtioDevices: transports.map(\.device.deviceID), cpuid: cpuid)
    }

    /// The whole state besides memory, of a paused machine.
    func saveSections() throws(PartFailure) -> [StateSection] {
        var sections: [StateSection] = []
        do throws(KVMError) {
            // vCPUs first: asking for their state may deliver what the interrupt controllers still hold.
            for vcpu in vcpus {
                var encoder = StateEncoder()
                for part in try vcpu.save().parts {
                    encoder.put(part.name)
                    encoder.put(part.bytes)
                }
                sections.append(StateSection(name: "vcpu-\(vcpu.number)", bytes: encoder.bytes))
            }
            let platform = try vm.savePlatform()
            var encoder = StateEncoder()
            for chip in platform.chips { encoder.put(chip) }
            encoder.put(platform.pit)
            encoder.put(platform.clock)
            sections.append(StateSection(name: "platform", bytes: encoder.bytes))
        } catch { throw PartFailure("cannot read the machine's state: \(error)") }
        var encoder = StateEncoder()
        serial.save(into: &encoder)
        sections.append(StateSection(name: "serial", bytes: encoder.bytes))
        encoder = StateEncoder()
        power.save(into: &encoder)
        sections.append(StateSection(name: "power", bytes: encoder.bytes))
        for (index, transport) in transports.enumerated() {
            encoder = StateEncoder()
            transport.save(into: &encoder)
            sections.append(StateSection(name: "virtio-\(index)", bytes: encoder.bytes))
        }
        return sections
    }

    /// Loads the state into a machine that has never run. Untrusted: every section must be there once, whole, and
    /// nothing else.
    func restoreSections(_ sections: [StateSection]) throws(PartFailure) {
        let vcpuNames = vcpus.map { "vcpu-\($0.number)" }
        let names = vcpuNames + ["platform", "serial", "power"] + transports.indices.map { "virtio-\($0)" }
        guard sections.map(\.name).sorted() == names.sorted() else {
            throw PartFailure("the machine's state has the sections \(sections.map(\.name)) instead of \(names)")
        }
        func section(_ name: String) -> StateDecoder { StateDecoder(sections.first { $0.name == name }?.bytes ?? []) }
        var current = ""
        do {
            // The platform's clock before the vCPUs' clock MSRs; the LAPICs come with the vCPUs.
            current = "platform"
            var decoder = section(current)
            var chips: [[UInt8]] = []
            for _ in 0..<3 { chips.append(try decoder.takeBlob(limit: 4096)) }
            let pit = try decoder.takeBlob(limit: 4096)
            let platform = PlatformState(chips: chips, pit: pit, clock: try decoder.take())
            try decoder.finish()
            try vm.restorePlatform(platform)
            for vcpu in vcpus {
                current = "vcpu-\(vcpu.number)"
                decoder = section(current)
                var parts: [(name: String, bytes: [UInt8])] = []
                for _ in 0..<9 { parts.append((try decoder.takeString(limit: 64), try decoder.takeBlob(limit: 1 << 20))) }
                try decoder.finish()
                try vcpu.restore(VCPUState(parts: parts))
            }
            current = "serial"
            decoder = section(current)
            try serial.restore(from: &decoder)
            try decoder.finish()
            current = "power"
            decoder = section(current)
            try power.restore(from: &decoder)
            try decoder.finish()
            for (index, transport) in transports.enumerated() {
                current = "virtio-\(index)"
                decoder = section(current)
                try transport.restore(from: &decoder)
                try decoder.finish()
            }
        } catch { throw PartFailure("cannot load the state of \(current): \(error)") }
        // The interrupt controllers have their state: a notification or an interrupt that was on its way between the
        // two machines is made up for. Before the vCPUs run, so that nobody else serves the queues.
        for transport in transports { transport.kick() }
        serial.repeatInterrupt()
        power.repeatInterrupt()
        pollStatistics(every: balloon.statisticsInterval)
    }
}
