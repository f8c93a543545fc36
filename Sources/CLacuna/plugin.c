// SPDX-License-Identifier: Apache-2.0
#include "CLacuna.h"
#include <stdio.h>

// The ABI's layout on 64-bit machines, as protocol/plugin-abi.md has it.
_Static_assert(sizeof(struct lacuna_device_config) == 80, "layout of the ABI");
_Static_assert(sizeof(struct lacuna_region) == 24, "layout of the ABI");
_Static_assert(sizeof(struct lacuna_queue) == 48, "layout of the ABI");
_Static_assert(sizeof(struct lacuna_device_status) == 80, "layout of the ABI");
_Static_assert(sizeof(struct lacuna_report) == 40, "layout of the ABI");
_Static_assert(sizeof(struct lacuna_bitmap) == 56, "layout of the ABI");

static _Thread_local int callbacks;
static _Thread_local char message[512];

int lacuna_plugin_in_callback(void) { return callbacks > 0; }
void lacuna_plugin_enter_callback(void) { callbacks++; }
void lacuna_plugin_leave_callback(void) { callbacks--; }
void lacuna_plugin_set_message(const char *text) { snprintf(message, sizeof message, "%s", text); }
const char *lacuna_message(void) { return message; }
uint32_t lacuna_abi_version(void) { return LACUNA_ABI_VERSION; }

const char *lacuna_result_name(int result) {
    static const char *const names[] = {
        "LACUNA_OK", "LACUNA_ERROR_ARGUMENT", "LACUNA_ERROR_HANDLE", "LACUNA_ERROR_VERSION", "LACUNA_ERROR_STATE",
        "LACUNA_ERROR_MEMORY", "LACUNA_ERROR_QUEUE", "LACUNA_ERROR_FEATURES", "LACUNA_ERROR_SPACE",
        "LACUNA_ERROR_REFUSED", "LACUNA_ERROR_TIMEOUT", "LACUNA_ERROR_FAILED", "LACUNA_ERROR_STALE",
        "LACUNA_ERROR_BUSY", "LACUNA_ERROR_REENTRANT", "LACUNA_ERROR_CORRUPT", "LACUNA_ERROR_RESOURCES",
    };
    int count = (int)(sizeof names / sizeof names[0]);
    return result > 0 || result <= -count ? "unknown result" : names[-result];
}

size_t lacuna_plugin_and_not_shared(uint64_t *target, const uint64_t *mask, uint64_t *cleared, size_t words) {
    size_t count = 0;
    for (size_t i = 0; i < words; i++) {
        uint64_t gone = lacuna_plugin_and_not_word(target + i, mask[i], 1);
        count += (size_t)__builtin_popcountll(gone);
        if (cleared)
            cleared[i] = gone;
    }
    return count;
}

size_t lacuna_plugin_and_not_noting(uint64_t *target, const uint64_t *mask, uint64_t *cleared, size_t words) {
    size_t count = 0;
    for (size_t i = 0; i < words; i++) {
        uint64_t gone = target[i] & mask[i];
        target[i] &= ~mask[i];
        cleared[i] = gone;
        count += (size_t)__builtin_popcountll(gone);
    }
    return count;
}

uint64_t lacuna_plugin_and_not_word(uint64_t *target, uint64_t mask, int shared) {
    uint64_t before;
    if (mask == 0)
        return 0;
    // Acquire-release: who sees the bit gone also sees what came before; nothing is read because of it.
    if (shared)
        return __atomic_fetch_and(target, ~mask, __ATOMIC_ACQ_REL) & mask;
    before = *target;
    *target = before & ~mask;
    return before & mask;
}
