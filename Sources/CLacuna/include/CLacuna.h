// SPDX-License-Identifier: Apache-2.0
// What the library's Swift half needs besides the ABI: the things of a thread.
#ifndef CLACUNA_H
#define CLACUNA_H
#include "lacuna.h"

// Between a callback's beginning and its end on this thread.
int lacuna_plugin_in_callback(void);
void lacuna_plugin_enter_callback(void);
void lacuna_plugin_leave_callback(void);
// Stores what lacuna_message() returns on this thread, cut to its room.
void lacuna_plugin_set_message(const char *text);

// target &= ~mask, by atomic operations on the target; the bits that were cleared go to `cleared`. Returns their number.
size_t lacuna_plugin_and_not_shared(uint64_t *target, const uint64_t *mask, uint64_t *cleared, size_t words);
// The same without others, and with `cleared`.
size_t lacuna_plugin_and_not_noting(uint64_t *target, const uint64_t *mask, uint64_t *cleared, size_t words);
// One word, either way.
uint64_t lacuna_plugin_and_not_word(uint64_t *target, uint64_t mask, int shared);
#endif
