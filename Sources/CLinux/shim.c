// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "CLinux.h"
#include <stdio.h>

void lacuna_copy(void *to, const void *from, size_t bytes) {
    memcpy(to, from, bytes);
    __asm__ volatile("" : : "r"(to), "r"(from) : "memory");
}

bool lacuna_is_zero(const void *p, size_t bytes) {
    const uint64_t *word = p, *end = word + bytes / 8;
    // Most pages that are not zero differ early: one cache line decides before the vector loop starts.
    for (; word < end; word += 8) {
        uint64_t any = word[0] | word[1] | word[2] | word[3] | word[4] | word[5] | word[6] | word[7];
        if (any)
            return false;
    }
    return true;
}

__attribute__((target("sse4.2"))) static uint32_t crc32c_hardware(uint32_t crc, const uint8_t *p, size_t bytes) {
    uint64_t sum = crc;
    for (; bytes >= 8; p += 8, bytes -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        sum = __builtin_ia32_crc32di(sum, word);
    }
    uint32_t rest = (uint32_t)sum;
    for (; bytes; p++, bytes--)
        rest = __builtin_ia32_crc32qi(rest, *p);
    return rest;
}

uint32_t lacuna_crc32c(uint32_t crc, const void *p, size_t bytes) {
    // Every CPU that runs KVM with nested paging has SSE 4.2; the project supports no other.
    return ~crc32c_hardware(~crc, p, bytes);
}

size_t lacuna_popcount(const uint64_t *words, size_t count) {
    size_t bits = 0;
    for (size_t i = 0; i < count; i++)
        bits += (size_t)__builtin_popcountll(words[i]);
    return bits;
}

size_t lacuna_and_not(uint64_t *target, const uint64_t *mask, size_t words) {
    size_t cleared = 0;
    for (size_t i = 0; i < words; i++) {
        uint64_t both = target[i] & mask[i];
        if (both) {
            cleared += (size_t)__builtin_popcountll(both);
            target[i] ^= both;
        }
    }
    return cleared;
}

_Static_assert(lacuna_SEEK_DATA == SEEK_DATA && lacuna_SEEK_HOLE == SEEK_HOLE, "values of <unistd.h>");

int lacuna_rename(const char *from, const char *to) { return rename(from, to); }

static void nothing(int signal) { (void)signal; }

int lacuna_install_empty_handler(int signal) {
    // No SA_RESTART: interrupting the call is the point.
    struct sigaction action = { .sa_handler = nothing };
    sigemptyset(&action.sa_mask);
    return sigaction(signal, &action, NULL);
}

int lacuna_ignore_signal(int signal) {
    struct sigaction action = { .sa_handler = SIG_IGN };
    sigemptyset(&action.sa_mask);
    return sigaction(signal, &action, NULL);
}

int lacuna_pthread_kill(pthread_t thread, int signal) { return pthread_kill(thread, signal); }

void lacuna_name_thread(const char *name) {
    char cut[16] = {0};
    strncpy(cut, name, sizeof cut - 1);
    pthread_setname_np(pthread_self(), cut);
}

int lacuna_accept(int fd) { return accept4(fd, NULL, NULL, SOCK_CLOEXEC); }
