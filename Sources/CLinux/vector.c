// SPDX-License-Identifier: Apache-2.0
// Loops over guest memory and bitmaps, in the widest vectors that the processor has. Each has a plain version for the
// others, which also says what it computes.
#define _GNU_SOURCE
#include "CLinux.h"
#include <cpuid.h>
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,popcnt")))
#define AVX512 __attribute__((target("avx512f,avx512vpopcntdq,popcnt")))

enum level { level_unknown, level_plain, level_avx2, level_avx512 };

// The compiler's own __builtin_cpu_supports() needs a runtime library that a static Swift executable does not link.
static enum level find_level(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_POPCNT))
        return level_plain;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (low & 0x06) != 0x06 || !(b & bit_AVX2))
        return level_plain;
    if ((low & 0xe6) == 0xe6 && (b & bit_AVX512F) && (c & bit_AVX512VPOPCNTDQ))
        return level_avx512;
    return level_avx2;
}

static enum level level(void) {
    static enum level known;
    enum level now = __atomic_load_n(&known, __ATOMIC_RELAXED);
    // Whoever comes at the same time finds the same.
    if (now == level_unknown)
        __atomic_store_n(&known, now = find_level(), __ATOMIC_RELAXED);
    return now;
}

// --- zero? ---

static inline uint64_t or_line(const uint64_t *word) {
    return word[0] | word[1] | word[2] | word[3] | word[4] | word[5] | word[6] | word[7];
}

static bool is_zero_plain(const uint64_t *word, const uint64_t *end) {
    for (; word < end; word += 8)
        if (or_line(word))
            return false;
    return true;
}

AVX2 static bool is_zero_avx2(const uint64_t *word, const uint64_t *end) {
    for (; end - word >= 32; word += 32) {
        const __m256i *v = (const __m256i *)word;
        __m256i a = _mm256_or_si256(_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1));
        __m256i b = _mm256_or_si256(_mm256_loadu_si256(v + 2), _mm256_loadu_si256(v + 3));
        __m256i c = _mm256_or_si256(_mm256_loadu_si256(v + 4), _mm256_loadu_si256(v + 5));
        __m256i d = _mm256_or_si256(_mm256_loadu_si256(v + 6), _mm256_loadu_si256(v + 7));
        a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
        if (!_mm256_testz_si256(a, a))
            return false;
    }
    return is_zero_plain(word, end);
}

bool lacuna_is_zero(const void *p, size_t bytes) {
    const uint64_t *word = p, *end = word + bytes / 8;
    // Most pages that are not zero differ early: one cache line decides before the vector loop starts.
    if (word < end && or_line(word))
        return false;
    return level() >= level_avx2 ? is_zero_avx2(word, end) : is_zero_plain(word, end);
}

// --- everything read, for comparison ---

static uint64_t or_plain(const uint64_t *word, const uint64_t *end) {
    uint64_t sum = 0;
    for (; word < end; word += 8)
        sum |= or_line(word);
    return sum;
}

AVX2 static uint64_t or_avx2(const uint64_t *word, const uint64_t *end) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (; end - word >= 16; word += 16) {
        const __m256i *v = (const __m256i *)word;
        a = _mm256_or_si256(a, _mm256_loadu_si256(v));
        b = _mm256_or_si256(b, _mm256_loadu_si256(v + 1));
        c = _mm256_or_si256(c, _mm256_loadu_si256(v + 2));
        d = _mm256_or_si256(d, _mm256_loadu_si256(v + 3));
    }
    uint64_t parts[4];
    _mm256_storeu_si256((__m256i *)parts, _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d)));
    return parts[0] | parts[1] | parts[2] | parts[3] | or_plain(word, end);
}

uint64_t lacuna_or_words(const void *p, size_t bytes) {
    const uint64_t *word = p, *end = word + bytes / 8;
    return level() >= level_avx2 ? or_avx2(word, end) : or_plain(word, end);
}

// --- bitmaps ---

static size_t and_not_plain(uint64_t *target, const uint64_t *mask, size_t words) {
    size_t cleared = 0;
    for (size_t i = 0; i < words; i++) {
        uint64_t both = target[i] & mask[i];
        cleared += (size_t)__builtin_popcountll(both);
        target[i] ^= both;
    }
    return cleared;
}

AVX2 static size_t and_not_avx2(uint64_t *target, const uint64_t *mask, size_t words) {
    // Bits are counted by nibbles: a table look-up for each half of a byte, and a sum over each eight bytes.
    const __m256i low = _mm256_set1_epi8(0x0f);
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                           2, 3, 2, 3, 3, 4);
    __m256i sum = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 4 <= words; i += 4) {
        __m256i old = _mm256_loadu_si256((const __m256i *)(target + i));
        __m256i both = _mm256_and_si256(old, _mm256_loadu_si256((const __m256i *)(mask + i)));
        _mm256_storeu_si256((__m256i *)(target + i), _mm256_xor_si256(old, both));
        __m256i bytes = _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(both, low)),
                                        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), low)));
        sum = _mm256_add_epi64(sum, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
    }
    uint64_t parts[4];
    _mm256_storeu_si256((__m256i *)parts, sum);
    return parts[0] + parts[1] + parts[2] + parts[3] + and_not_plain(target + i, mask + i, words - i);
}

AVX512 static size_t and_not_avx512(uint64_t *target, const uint64_t *mask, size_t words) {
    __m512i sum = _mm512_setzero_si512();
    size_t i = 0;
    for (; i + 8 <= words; i += 8) {
        __m512i old = _mm512_loadu_si512(target + i);
        __m512i both = _mm512_and_si512(old, _mm512_loadu_si512(mask + i));
        _mm512_storeu_si512(target + i, _mm512_xor_si512(old, both));
        sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(both));
    }
    return (size_t)_mm512_reduce_add_epi64(sum) + and_not_plain(target + i, mask + i, words - i);
}

// Loops that the compiler turns into vectors by itself, for each kind of processor.
static inline __attribute__((always_inline)) void or_and(uint64_t *target, const uint64_t *a, const uint64_t *b,
                                                         size_t words) {
    for (size_t i = 0; i < words; i++)
        target[i] |= a[i] & b[i];
}

AVX2 static void or_and_avx2(uint64_t *target, const uint64_t *a, const uint64_t *b, size_t words) {
    or_and(target, a, b, words);
}

void lacuna_or_and(uint64_t *target, const uint64_t *a, const uint64_t *b, size_t words) {
    level() >= level_avx2 ? or_and_avx2(target, a, b, words) : or_and(target, a, b, words);
}

static inline __attribute__((always_inline)) uint64_t take_and(uint64_t *target, const uint64_t *a, const uint64_t *b,
                                                               uint64_t *taken, size_t words) {
    uint64_t any = 0;
    for (size_t i = 0; i < words; i++) {
        uint64_t bits = target[i] & a[i] & b[i];
        taken[i] = bits;
        target[i] ^= bits;
        any |= bits;
    }
    return any;
}

AVX2 static uint64_t take_and_avx2(uint64_t *target, const uint64_t *a, const uint64_t *b, uint64_t *taken,
                                   size_t words) {
    return take_and(target, a, b, taken, words);
}

bool lacuna_take_and(uint64_t *target, const uint64_t *a, const uint64_t *b, uint64_t *taken, size_t words) {
    return 0 != (level() >= level_avx2 ? take_and_avx2(target, a, b, taken, words) : take_and(target, a, b, taken, words));
}

size_t lacuna_and_not(uint64_t *target, const uint64_t *mask, size_t words) {
    // What the caller's malloc() gave begins behind a header, and each store would touch two cache lines.
    size_t head = (64 - (uintptr_t)target % 64) % 64 / sizeof *target;
    if (head > words)
        head = words;
    size_t cleared = and_not_plain(target, mask, head);
    target += head, mask += head, words -= head;
    switch (level()) {
    case level_avx512: return cleared + and_not_avx512(target, mask, words);
    case level_avx2: return cleared + and_not_avx2(target, mask, words);
    default: return cleared + and_not_plain(target, mask, words);
    }
}
