// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "CLinux.h"
#include <stdio.h>

void lacuna_copy(void *to, const void *from, size_t bytes) {
    memcpy(to, from, bytes);
    __asm__ volatile("" : : "r"(to), "r"(from) : "memory");
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

_Static_assert(lacuna_SEEK_DATA == SEEK_DATA && lacuna_SEEK_HOLE == SEEK_HOLE, "values of <unistd.h>");

int lacuna_rename(const char *from, const char *to) { return rename(from, to); }

int lacuna_open_unnamed(const char *folder) { return open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600); }

int lacuna_give_name(int file, const char *path) {
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    return linkat(AT_FDCWD, link, AT_FDCWD, path, AT_SYMLINK_FOLLOW);
}
void lacuna_or(uint64_t *target, const uint64_t *source, size_t words) {
    for (size_t i = 0; i < words; i++)
        target[i] |= source[i];
}

// ThreadSanitizer cannot know that a bit lost here is set again elsewhere (DoubleBufferedLog).
__attribute__((no_sanitize("thread"))) void lacuna_or_and_clear(uint64_t *target, uint64_t *source, size_t words) {
    for (size_t i = 0; i < words; i++) {
        target[i] |= source[i];
        source[i] = 0;
    }
}

void lacuna_set_range(uint64_t *words, size_t first, size_t end) {
    size_t i = first / 64, last = (end - 1) / 64;
    uint64_t head = ~0ull << (first % 64), tail = ~0ull >> (63 - (end - 1) % 64);
    if (i == last) {
        words[i] |= head & tail;
        return;
    }
    words[i++] |= head;
    memset(words + i, 0xff, (last - i) * 8);
    words[last] |= tail;
}

void lacuna_clear_range(uint64_t *words, size_t first, size_t end) {
    size_t i = first / 64, last = (end - 1) / 64;
    uint64_t head = ~0ull << (first % 64), tail = ~0ull >> (63 - (end - 1) % 64);
    if (i == last) {
        words[i] &= ~(head & tail);
        return;
    }
    words[i++] &= ~head;
    memset(words + i, 0, (last - i) * 8);
    words[last] &= ~tail;
}

void lacuna_summarize(const uint64_t *words, uint64_t *summary, size_t count) {
    for (size_t first = 0; first < count; first += 64) {
        size_t here = count - first < 64 ? count - first : 64;
        uint64_t any = 0, marks = 0;
        for (size_t i = 0; i < here; i++)
            any |= words[first + i];
        // Most stretches are clean: the second look is rare.
        for (size_t i = 0; any && i < here; i++)
            marks |= (uint64_t)(words[first + i] != 0) << i;
        summary[first / 64] = marks;
    }
}

size_t lacuna_find_word(const uint64_t *words, size_t from, size_t count) {
    for (; from + 16 <= count; from += 16) {
        uint64_t any = 0;
        for (int i = 0; i < 16; i++)
            any |= words[from + i];
        if (any)
            break;
    }
    while (from < count && !words[from])
        from++;
    return from;
}

size_t lacuna_find_hole(const uint64_t *words, size_t from, size_t count) {
    for (; from + 16 <= count; from += 16) {
        uint64_t all = ~0ull;
        for (int i = 0; i < 16; i++)
            all &= words[from + i];
        if (~all)
            break;
    }
    while (from < count && !~words[from])
        from++;
    return from;
}

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
