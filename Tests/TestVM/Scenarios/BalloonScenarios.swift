// SPDX-License-Identifier: Apache-2.0
import CLinux
import Migration

/// The balloon as the stock Linux driver drives it, on each kernel that the bed brings.
let balloonScenarios: [Scenario] = [
    Scenario(name: "boot-6.12", memory: 2048, limit: 300, isQuick: true) { stage throws(Failure) in
        let guest = try stage.boot("guest", memory: "256M", cpus: 2, run: "poweroff", until: "GUEST-BOOTED", kernel: .backports)
        try expect(guest.child.text.contains("kernel=6.12."), "the guest runs another kernel")
        try expect(guest.child.text.contains("lacuna_balloon"), "the module is not loaded")
        let status = try stage.waitForEnd(guest.child, seconds: 60)
        try expect(status == 0, "status \(status) after the guest switched itself off")
    },
]
