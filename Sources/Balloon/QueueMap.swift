// SPDX-License-Identifier: Apache-2.0

/// What the balloon's queues are for, and which number each has with the driver at hand.
///
/// The specification numbers them once and for all (1.3, section 5.5.2). Linux numbers the queues of the negotiated
/// features without gaps. Which of the two a driver does shows in the queues that it enabled before `DRIVER_OK`
/// (protocol/free-page-bitmap.md, section 3).
struct QueueMap {
    /// The raw value is the specification's number.
    enum Role: Int, CaseIterable {
        case inflate, deflate, statistics, hints, reporting, bitmap

        /// The feature that brings the queue; nil: it is always there.
        var feature: UInt64? {
            switch self {
            case .inflate, .deflate: nil
            case .statistics: BalloonFeature.statistics
            case .hints: BalloonFeature.freePageHint
            case .reporting: BalloonFeature.pageReporting
            case .bitmap: BalloonFeature.freePageBitmap
            }
        }
    }

    static let queueCount = Role.allCases.count

    /// By queue number; nil for a number without a use, or whose queue is not enabled.
    private let roles: [Role?]

    /// No driver, no queue.
    init() { roles = Array(repeating: nil, count: Self.queueCount) }

    /// - Parameter isEnabled: by queue number.
    init(features: UInt64, isEnabled: [Bool]) {
        let present = Role.allCases.filter { role in role.feature.map { features & $0 != 0 } ?? true }
        func enabled(_ number: Int) -> Bool { number < isEnabled.count && isEnabled[number] }
        // With the bitmap's feature its own number decides. Otherwise a queue outside the gapless range does: only
        // a driver that goes by the specification has one there.
        let isFixed =
            features & BalloonFeature.freePageBitmap != 0
            ? enabled(Role.bitmap.rawValue) : (present.count..<Self.queueCount).contains(where: enabled)
        var roles: [Role?] = Array(repeating: nil, count: Self.queueCount)
        for (place, role) in present.enumerated() {
            let number = isFixed ? role.rawValue : place
            if enabled(number) { roles[number] = role }
        }
        self.roles = roles
    }

    func role(of number: Int) -> Role? { roles.indices.contains(number) ? roles[number] : nil }
    func number(of role: Role) -> Int? { roles.firstIndex(of: role) }
}
