// SPDX-License-Identifier: Apache-2.0
package import GuestMemory

/// The receiver's view of what may come next, and how large it may be. Pure: it looks at headers and memory layout only,
/// so that every order and every number can be tried without a channel.
package struct StreamOrder: Sendable {
    package enum Phase: Equatable, Sendable {
        /// Nothing has come.
        case hello
        /// Between rounds, or within one.
        case memory
        /// State sections come.
        case state
        /// All came; only the source's decision is missing.
        case decision
        /// The guest belongs to this side; nothing may come.
        case committed
        /// The source called it off.
        case ended
    }

    package private(set) var phase = Phase.hello
    /// Rounds completed.
    package private(set) var rounds = 0
    /// Pages that the round under way has named so far. A round names a page once at most, which also bounds what a
    /// round can cost this side.
    private var pagesInRound = 0
    /// True if frames about memory came since the last round's end.
    private var roundIsOpen = false
    /// Pages that verify frames named; they come once, after the last round.
    private var pagesVerified = 0
    private var sections = 0
    private var stateBytes = 0
    /// Data connections that the hello announced; with any, no page is named on this one.
    package private(set) var lanes = 0

    package init() {}

    /// Checks one header against everything that came before; `memory` is nil until the hello was accepted. Throws
    /// `badStream`.
    package mutating func accept(_ header: FrameHeader, memory: GuestMemory?) throws(MigrationError) {
        switch (phase, header.type) {
        case (.hello, .hello):
            guard header.count <= StreamLimits.lanes else {
                throw .badStream("a hello frame announces \(header.count) data connections, more than \(StreamLimits.lanes)")
            }
            try check(header, count: Int(header.count), payload: 0...StreamLimits.descriptionBytes)
            lanes = Int(header.count)
            phase = .memory
        case (.memory, .pages) where pagesVerified == 0, (.memory, .zero) where pagesVerified == 0,
            (.memory, .discard) where pagesVerified == 0:
            guard lanes == 0 else {
                throw .badStream("a \(header.type) frame came on the first connection, and there are \(lanes) for memory")
            }
            // Cannot overflow: both are at most the machine's pages.
            pagesInRound += try header.checkedPages(in: memory).count
            guard let memory, pagesInRound <= memory.ramPages else {
                throw .badStream("round \(rounds + 1) names more pages than the machine has")
            }
            roundIsOpen = true
        case (.memory, .roundEnd) where pagesVerified == 0:
            try check(header, count: rounds + 1)
            guard rounds < StreamLimits.rounds else { throw .badStream("more than \(rounds) rounds") }
            rounds += 1
            (pagesInRound, roundIsOpen) = (0, false)
        case (.memory, .verify) where rounds > 0 && !roundIsOpen:
            guard let memory, let pages = header.pages(in: memory), pages.count <= Verification.pagesInFrame,
                Int(header.payloadBytes) == pages.count * Verification.checksumBytes
            else { throw .badStream("a verify frame of \(header.count) pages has \(header.payloadBytes) bytes") }
            pagesVerified += pages.count
            guard pagesVerified <= memory.ramPages else {
                throw .badStream("verify frames name more pages than the machine has")
            }
        case (.memory, .state) where rounds > 0 && !roundIsOpen, (.state, .state):
            try acceptState(header)
            phase = .state
        case (.memory, .stateEnd) where rounds > 0 && !roundIsOpen, (.state, .stateEnd):
            try check(header, count: sections)
            phase = .decision
        case (.decision, .commit):
            try check(header)
            phase = .committed
        case (.hello, .cancel), (.memory, .cancel), (.state, .cancel), (.decision, .cancel):
            try check(header)
            phase = .ended
        case (.hello, .failure), (.memory, .failure), (.state, .failure), (.decision, .failure):
            try check(header, payload: 0...StreamLimits.textBytes)
            phase = .ended
        default:
            let detail = roundIsOpen ? ", within a round" : pagesVerified > 0 ? ", after checksums" : ""
            throw .badStream("a \(header.type) frame came in the \(phase) phase\(detail)")
        }
    }

    private mutating func acceptState(_ header: FrameHeader) throws(MigrationError) {
        let name = Int(header.count), bytes = Int(header.payloadBytes)
        guard header.address == 0, name >= 1, name <= StreamLimits.sectionNameBytes, name <= bytes else {
            throw .badStream("a state section's name has \(name) bytes")
        }
        guard bytes - name <= StreamLimits.sectionBytes else {
            throw .badStream("a state section has \(bytes - name) bytes, more than \(StreamLimits.sectionBytes)")
        }
        sections += 1
        stateBytes += bytes
        guard sections <= StreamLimits.sections, stateBytes <= StreamLimits.stateBytes else {
            throw .badStream("\(sections) state sections of \(stateBytes) bytes are more than allowed")
        }
    }

    private func check(
        _ header: FrameHeader, count: Int = 0, payload: ClosedRange<Int> = 0...0
    ) throws(MigrationError) {
        try header.check(count: count, payload: payload)
    }
}

/// The same for one data connection, after its join.
package struct LaneOrder: Sendable {
    package let lane: Int
    /// Rounds completed.
    package private(set) var rounds = 0
    /// The source's last word on this connection has come.
    package private(set) var hasEnded = false
    private let map: LaneMap
    private let memory: GuestMemory
    /// Pages that a round may name: the lane's share of the machine.
    private let share: Int
    private var pagesInRound = 0
    private var roundIsOpen = false

    package init(lane: Int, map: LaneMap, memory: GuestMemory) {
        self.lane = lane
        self.map = map
        self.memory = memory
        share = map.pages(of: lane, in: memory)
    }

    /// Checks one header against everything that came before on this connection. Throws `badStream`.
    package mutating func accept(_ header: FrameHeader) throws(MigrationError) {
        switch header.type {
        case _ where hasEnded: throw .badStream("a \(header.type) frame came after the connection's end")
        case .pages, .zero, .discard:
            let pages = try header.checkedPages(in: memory)
            guard map.lane(lane, owns: pages) else {
                throw .badStream("a \(header.type) frame names pages that do not belong to the connection")
            }
            // Cannot overflow: both are at most the machine's pages.
            pagesInRound += pages.count
            guard pagesInRound <= share else {
                throw .badStream("round \(rounds + 1) names more pages than belong to the connection")
            }
            roundIsOpen = true
        case .roundEnd:
            try header.check(count: rounds + 1)
            guard rounds < StreamLimits.rounds else { throw .badStream("more than \(rounds) rounds") }
            rounds += 1
            (pagesInRound, roundIsOpen) = (0, false)
        case .laneEnd where rounds > 0 && !roundIsOpen:
            try header.check(count: rounds)
            hasEnded = true
        default:
            throw .badStream("a \(header.type) frame came on a data connection\(roundIsOpen ? ", within a round" : "")")
        }
    }
}

extension FrameHeader {
    /// The pages of a pages, zero or discard frame; throws unless they are all RAM and the payload is as it must be.
    fileprivate func checkedPages(in memory: GuestMemory?) throws(MigrationError) -> Range<Int> {
        guard let memory, let pages = pages(in: memory) else {
            throw .badStream("a \(type) frame names \(count) pages at \(GuestAddress(address)), which are not all RAM")
        }
        if type == .pages, pages.count > StreamLimits.pagesInFrame {
            throw .badStream("a pages frame holds \(pages.count) pages, more than \(StreamLimits.pagesInFrame)")
        }
        guard Int(payloadBytes) == (type == .pages ? pages.count * pageSize : 0), payloadChecksum == 0 else {
            throw .badStream("a \(type) frame of \(pages.count) pages has \(payloadBytes) bytes")
        }
        return pages
    }

    /// Checks a frame that names no pages.
    fileprivate func check(count expected: Int, payload: ClosedRange<Int> = 0...0) throws(MigrationError) {
        guard Int(count) == expected, address == 0, payload.contains(Int(payloadBytes)),
            payloadBytes > 0 || payloadChecksum == 0
        else {
            throw .badStream(
                "a \(type) frame with count \(count) (not \(expected)), address \(GuestAddress(address)) and "
                    + "\(payloadBytes) bytes")
        }
    }
}
