// SPDX-License-Identifier: Apache-2.0
internal import GuestMemory
internal import Synchronization
internal import Virtio

/// One virtqueue as the front end set it up. Plain data: `VirtQueue.init` checks it when the device starts.
struct Ring {
    /// Addresses in the front end's own address space.
    struct Addresses: Equatable {
        var descriptors: UInt64
        var used: UInt64
        var available: UInt64
    }

    var size: UInt32 = 0
    /// The next entry of the available ring to take.
    var base: UInt16 = 0
    var addresses: Addresses?
    var kick: OwnedDescriptor?
    var isEnabled = false
    /// Serving guest memory.
    var live: VirtQueue?

    /// Ready to be served, as far as the front end goes.
    var isStarted: Bool { isEnabled && addresses != nil && size != 0 && kick != nil }

    /// Ends all access to guest memory and remembers how far it got. A buffer that was taken and not given back is
    /// taken again later: the balloon's queues are served in order.
    mutating func stop() {
        guard let queue = live else { return }
        queue.disable()
        base = queue.state.nextUsed
        live = nil
    }
}

/// What the device's signals need, for whichever thread gives one.
///
/// Its lock is a leaf: nothing is called with it held but system calls that do not wait.
final class SignalBox: Sendable {
    struct State {
        var calls: [Int: OwnedDescriptor] = [:]
        var errors: [Int: OwnedDescriptor] = [:]
        var backendChannel: OwnedDescriptor?
        /// The driver has yet to be told of a change of the configuration.
        var configurationChanged = false
        var needsReset = false
        /// Which activation is the current one: the signals of an earlier one are dead.
        var epoch: UInt64 = 0
    }
    let state = Mutex(State())

    /// Makes signals for the activation that begins now.
    func begin() -> DeviceSignals {
        let epoch = state.withLock { state in
            state.epoch &+= 1
            return state.epoch
        }
        return DeviceSignals(
            usedBuffer: { [self] index in
                state.withLock { if $0.epoch == epoch { $0.calls[index]?.signal() } }
            },
            configurationChanged: { [self] in
                state.withLock { state in
                    guard state.epoch == epoch else { return }
                    state.configurationChanged = true
                    Self.tellConfigurationChange(&state)
                }
            },
            needsReset: { [self] in
                state.withLock { state in
                    guard state.epoch == epoch else { return }
                    state.needsReset = true
                    for error in state.errors.values { error.signal() }
                    state.configurationChanged = true
                    Self.tellConfigurationChange(&state)
                }
            })
    }

    /// Kills the signals handed out so far.
    func end() { state.withLock { $0.epoch &+= 1 } }

    /// Tries again what did not fit into the channel. Returns the channel to wait for, if it still does not.
    func flush() -> OwnedDescriptor? {
        state.withLock { state in
            guard state.configurationChanged else { return nil }
            Self.tellConfigurationChange(&state)
            return state.configurationChanged ? state.backendChannel : nil
        }
    }

    /// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
    private static let configurationChangeMessage: UInt32 = 2

    private static func tellConfigurationChange(_ state: inout State) {
        guard let channel = state.backendChannel else { return }
        switch sendMessage(to: channel, configurationChangeMessage, flags: MessageHeader.version) {
        case .sent: state.configurationChanged = false
        case .full: break  // `flush` tries again
        case .gone:
            state.backendChannel = nil
            state.configurationChanged = false
        }
    }
}
