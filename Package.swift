// swift-tools-version: 6.2
// SPDX-License-Identifier: Apache-2.0
import PackageDescription

/// What every Swift target is compiled with. No `unsafeFlags`: a VMM written in Swift must be able to depend on these
/// libraries; link flags belong to the scripts that build the executable.
let common: [SwiftSetting] = [
    .treatAllWarnings(as: .error),
    .enableUpcomingFeature("ExistentialAny"),
]

/// For the targets that touch bytes a guest chose: `unsafe` then marks every line a reviewer must read.
let guestFacing: [SwiftSetting] = common + [.strictMemorySafety()]

let package = Package(
    name: "lacuna",
    products: [
        .executable(name: "lacuna", targets: ["lacuna"]),
        .library(name: "GuestMemory", targets: ["GuestMemory"]),
        .library(name: "Virtio", targets: ["Virtio"]),
        .library(name: "Balloon", targets: ["Balloon"]),
        .library(name: "KVM", targets: ["KVM"]),
        .library(name: "VhostUser", targets: ["VhostUser"]),
        .library(name: "LacunaPlugin", type: .dynamic, targets: ["LacunaPlugin"]),
        .library(name: "Vhost", targets: ["Vhost"]),
        .library(name: "Migration", targets: ["Migration"]),
        .library(name: "Machine", targets: ["Machine"]),
    ],
    targets: [
        .target(name: "CLinux"),
        .target(name: "GuestMemory", dependencies: ["CLinux"], swiftSettings: guestFacing),
        .target(name: "Virtio", dependencies: ["GuestMemory"], swiftSettings: guestFacing),
        .target(name: "Balloon", dependencies: ["CLinux", "GuestMemory", "Virtio"], swiftSettings: guestFacing),
        .target(name: "KVM", dependencies: ["CLinux"], swiftSettings: common),
        .target(name: "CLacuna"),
        .target(
            name: "LacunaPlugin", dependencies: ["Balloon", "CLacuna", "CLinux", "GuestMemory", "Virtio"],
            exclude: ["examples", "install", "lacuna.map"],
            swiftSettings: guestFacing),
        .target(
            name: "VhostUser", dependencies: ["Balloon", "CLinux", "GuestMemory", "Virtio"],
            swiftSettings: guestFacing),
        .target(
            name: "Vhost", dependencies: ["CLinux", "GuestMemory", "Virtio"], swiftSettings: guestFacing),
        .target(name: "Migration", dependencies: ["CLinux", "GuestMemory"], swiftSettings: common),
        .target(
            name: "Machine",
            dependencies: ["CLacuna", "CLinux", "GuestMemory", "Virtio", "Balloon", "KVM", "Migration", "Vhost"],
            swiftSettings: common),
        .target(
            name: "DirtyBench", dependencies: ["CLinux", "GuestMemory", "KVM", "Machine", "Migration"],
            swiftSettings: common),
        .executableTarget(
            name: "lacuna",
            dependencies: ["Balloon", "CLinux", "DirtyBench", "GuestMemory", "Machine", "Migration", "VhostUser"],
            swiftSettings: common),

        .target(
            name: "TestSupport", dependencies: ["GuestMemory", "Virtio"], path: "Tests/TestSupport",
            swiftSettings: common),
        .testTarget(
            name: "GuestMemoryTests", dependencies: ["CLinux", "GuestMemory", "TestSupport"], swiftSettings: common),
        .testTarget(name: "VirtioTests", dependencies: ["GuestMemory", "Vhost", "Virtio", "TestSupport"], swiftSettings: common),
        .testTarget(name: "BalloonTests", dependencies: ["Balloon", "GuestMemory", "TestSupport"], swiftSettings: common),
        .testTarget(
            name: "VhostUserTests",
            dependencies: ["Balloon", "CLinux", "GuestMemory", "TestSupport", "VhostUser", "VhostUserSupport", "Virtio"],
            swiftSettings: common),
        .target(
            name: "VhostUserSupport", dependencies: ["CLinux", "GuestMemory", "TestSupport", "VhostUser"],
            path: "Tests/VhostUserSupport", swiftSettings: common),
        .executableTarget(
            name: "lacuna-figures",
            dependencies: ["Balloon", "CLacuna", "CLinux", "GuestMemory", "TestSupport", "VhostUserSupport", "Virtio"],
            path: "Tests/Figures", swiftSettings: common),
        .testTarget(
            name: "MigrationTests", dependencies: ["CLinux", "GuestMemory", "Migration", "TestSupport"], swiftSettings: common),
        .testTarget(name: "CommandTests", dependencies: ["CLinux", "Machine", "Migration", "lacuna"], swiftSettings: common),
        .testTarget(name: "MachineTests", dependencies: ["CLinux", "GuestMemory", "KVM", "Machine", "Migration", "TestSupport"], swiftSettings: common),
        .executableTarget(
            name: "lacuna-races", dependencies: ["GuestMemory", "Migration", "TestSupport"], path: "Tests/Races",
            exclude: ["exceptions"], swiftSettings: common),
        .executableTarget(
            name: "lacuna-scenarios", dependencies: ["CLinux", "Migration"], path: "Tests/TestVM/Scenarios",
            swiftSettings: common),
    ],
    swiftLanguageModes: [.v6]
)
