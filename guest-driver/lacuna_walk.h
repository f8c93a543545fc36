/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The pure half of the walk: blocks of free pages into words of a bitmap.
 * Nothing here allocates, locks or knows the page allocator, so it builds and
 * is tested in user space (make check).
 *
 * Bits are in little-endian order over the whole bitmap, as on the wire: bit n
 * is bit n % 8 of byte n / 8.
 */
#ifndef LACUNA_WALK_H
#define LACUNA_WALK_H

#ifdef __KERNEL__
#include <linux/bitops.h>
#include <linux/string.h>
#include <linux/types.h>
#include <asm/byteorder.h>

typedef __le64 lacuna_word;

#define lacuna_word_of(x)	cpu_to_le64(x)
#define lacuna_fill_ones(p, n)	memset((p), 0xff, (n) * sizeof(lacuna_word))
#define lacuna_weight(w)	hweight64((__force u64)(w))
#else
#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t lacuna_word;
typedef uint64_t u64;

#define lacuna_word_of(x)	htole64(x)
#define lacuna_fill_ones(p, n)	memset((p), 0xff, (n) * sizeof(lacuna_word))
#define lacuna_weight(w)	((unsigned int)__builtin_popcountll(w))
#endif

#define LACUNA_WORD_SHIFT	6
#define LACUNA_WORD_BITS	(1UL << LACUNA_WORD_SHIFT)

/**
 * lacuna_set_block - mark one free block
 * @words: the bitmap
 * @bit: the block's first bit, a multiple of 1 << @order
 * @order: log2 of the block's number of bits
 *
 * The block must lie inside the bitmap. Because it is naturally aligned it is
 * either a run of whole words or a part of a single one: no edges to treat.
 *
 * Return: whether the block's first bit was clear before, which tells a cursor
 * that has come round to blocks it has seen already.
 */
static inline bool lacuna_set_block(lacuna_word *words, unsigned long bit,
				    unsigned int order)
{
	lacuna_word *word = words + (bit >> LACUNA_WORD_SHIFT);
	unsigned int shift = bit & (LACUNA_WORD_BITS - 1);
	bool fresh = !(*word & lacuna_word_of((u64)1 << shift));

	if (order >= LACUNA_WORD_SHIFT) {
		lacuna_fill_ones(word, (size_t)1 << (order - LACUNA_WORD_SHIFT));
	} else {
		/* order <= 5, so the inner shift is at most 32. */
		u64 ones = ((u64)1 << (1U << order)) - 1;

		*word |= lacuna_word_of(ones << shift);
	}
	return fresh;
}

/**
 * lacuna_trim - find the part of a bitmap that says anything
 * @words: the bitmap
 * @count: its number of words
 * @first: where the first word with a bit set goes
 * @length: where the number of words from there to the last such word goes
 *
 * Return: the number of bits set. With 0, @first and @length are 0 too.
 */
static inline unsigned long lacuna_trim(const lacuna_word *words, size_t count,
					size_t *first, size_t *length)
{
	unsigned long weight = 0;
	size_t i, start = 0, end = 0;

	for (i = 0; i < count; i++) {
		if (!words[i])
			continue;
		if (!end)
			start = i;
		end = i + 1;
		weight += lacuna_weight(words[i]);
	}
	*first = start;
	*length = end - start;
	return weight;
}

#endif /* LACUNA_WALK_H */
