/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The pure half of the walk: how a free list that changes under way is read in
 * bounded holds, and how its blocks become words of a bitmap. Nothing here
 * allocates, locks or knows the page allocator's structures, so it builds and
 * is fuzzed in user space against a model of them (make check).
 *
 * Bits are in little-endian order over the whole bitmap, as on the wire: bit n
 * is bit n % 8 of byte n / 8.
 */
#ifndef LACUNA_WALK_H
#define LACUNA_WALK_H

#ifdef __KERNEL__
#include <linux/bitops.h>
#include <linux/compiler.h>
#include <linux/list.h>
#include <linux/string.h>
#include <linux/types.h>
#include <asm/byteorder.h>

typedef __le64 lacuna_word;

#define lacuna_word_of(x)	cpu_to_le64(x)
#define lacuna_weight(w)	hweight64((__force u64)(w))
#else
#include "tests/user.h"
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
		size_t count = (size_t)1 << (order - LACUNA_WORD_SHIFT);

		/*
		 * At most a few words: stores one by one beat a call of
		 * memset(), which is what plain ones would be turned into.
		 */
		while (count--)
			WRITE_ONCE(*word++, lacuna_word_of(~(u64)0));
	} else {
		/* order <= 5, so the inner shift is at most 32. */
		u64 ones = ((u64)1 << (1U << order)) - 1;

		*word |= lacuna_word_of(ones << shift);
	}
	return fresh;
}

/**
 * lacuna_set_block_bitwise - what lacuna_set_block() does, one bit at a time
 * @words: the bitmap
 * @bit: the block's first bit, a multiple of 1 << @order
 * @order: log2 of the block's number of bits
 *
 * For comparison only: the tests' oracle, and the slow walk of test builds.
 *
 * Return: as lacuna_set_block().
 */
static inline bool lacuna_set_block_bitwise(lacuna_word *words,
					    unsigned long bit,
					    unsigned int order)
{
	unsigned char *bytes = (unsigned char *)words;
	bool fresh = !(bytes[bit / 8] >> (bit % 8) & 1);
	unsigned long i;

	for (i = bit; i < bit + (1UL << order); i++)
		bytes[i / 8] |= 1U << (i % 8);
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

/*
 * One chunk of bitmap is what one chain carries: 32 KiB for 1 GiB of memory.
 * Small enough for the page allocator to have it in one piece, large enough
 * that a big guest's report is a few hundred chains.
 */
#define LACUNA_CHUNK_SHIFT	18
#define LACUNA_CHUNK_BITS	(1UL << LACUNA_CHUNK_SHIFT)
#define LACUNA_CHUNK_WORDS	(LACUNA_CHUNK_BITS / LACUNA_WORD_BITS)
#define LACUNA_CHUNK_BYTES	(LACUNA_CHUNK_BITS / 8)

/*
 * A list longer than one hold is walked by rotating it, so its end cannot be
 * seen. So many blocks in a row that are known already, and an eighth of those
 * looked at, mean it came round. Fewer mean nothing: a block split since it
 * was seen leaves its pieces in the shorter lists.
 */
#define LACUNA_STALE_RUN	128
#define LACUNA_STALE_SHIFT	3

/**
 * struct lacuna_walk - one walk over all the lists; lives on the stack
 * @chunks: the bitmap, indexed by bit >> LACUNA_CHUNK_SHIFT; NULL where there
 *	is none
 * @nr_chunks: how many entries @chunks has
 * @pfn_shift: log2 of the bits that stand for one of the kernel's pages
 * @quota: blocks that may still be read in this hold
 * @blocks: free blocks found
 * @pause: drops the lock, lets others run, takes the lock again and sets
 *	@quota to more than 0; returns false if the walk is to end
 * @bitwise: in test builds, set bits one at a time
 */
struct lacuna_walk {
	lacuna_word **chunks;
	unsigned long nr_chunks;
	unsigned int pfn_shift;
	unsigned int quota;
	u64 blocks;
	bool (*pause)(struct lacuna_walk *walk);
#ifdef LACUNA_TEST_WALK
	bool bitwise;
#endif
};

/**
 * lacuna_mark - note one free block
 * @walk: the walk
 * @pfn: the kernel's number of the block's first page
 * @order: log2 of the block's number of pages
 *
 * A block with no chunk (memory that was plugged in a moment ago, or a failed
 * allocation) is left out; calling it known would end a list of such blocks
 * before its time.
 *
 * Return: whether the block is news.
 */
static inline bool lacuna_mark(struct lacuna_walk *walk, unsigned long pfn,
			       unsigned int order)
{
	unsigned long bit = pfn << walk->pfn_shift;
	unsigned long i = bit >> LACUNA_CHUNK_SHIFT;
	bool fresh;

	if (i >= walk->nr_chunks || !walk->chunks[i])
		return true;
	/*
	 * A block never crosses chunks: it is naturally aligned and, as the
	 * callers see to, never larger than one.
	 */
	bit &= LACUNA_CHUNK_BITS - 1;
	order += walk->pfn_shift;
#ifdef LACUNA_TEST_WALK
	if (walk->bitwise)
		fresh = lacuna_set_block_bitwise(walk->chunks[i], bit, order);
	else
#endif
		fresh = lacuna_set_block(walk->chunks[i], bit, order);
	if (fresh)
		walk->blocks++;
	return fresh;
}

/**
 * lacuna_walk_list - read one free list
 * @walk: the walk
 * @list: the list's head
 * @order: log2 of the number of pages of its blocks
 * @count: how many blocks there are in it, at most
 * @pfn_of: the number of the first page of the block at a place in the list
 *
 * Called and returns with the list's lock held, and has @walk->pause drop it
 * whenever the hold's quota is used up.
 *
 * Between holds the place in the list is kept by the list itself: it is
 * rotated so that the next block stands first, and what was seen moves behind
 * it. Any block may come or go in the meantime without harm, and once all of
 * the list was seen its order is nearly what it was before. Each hold starts
 * at the first block, hence:
 *
 *   - meeting the end means that the whole list was seen in this hold, or in
 *     this one and those before it;
 *   - a list that never ends in one hold comes round to blocks known already;
 *   - and no list is given more than twice its length and a little, however
 *     fast others free.
 *
 * Each block is on the list while it is looked at, under the lock, so none is
 * reported that was not free at that moment.
 *
 * Return: false if the walk is to end.
 */
static __always_inline bool
lacuna_walk_list(struct lacuna_walk *walk, struct list_head *list,
		 unsigned int order, unsigned long count,
		 unsigned long (*pfn_of)(struct list_head *))
{
	unsigned long visits = 2 * count + LACUNA_STALE_RUN;
	unsigned long seen = 0, stale = 0;
	struct list_head *pos;

	for (;;) {
		list_for_each(pos, list) {
			if (seen == visits ||
			    stale >= LACUNA_STALE_RUN +
				     (seen >> LACUNA_STALE_SHIFT))
				return true;
			if (!walk->quota)
				break;
			seen++;
			walk->quota--;
			if (lacuna_mark(walk, pfn_of(pos), order))
				stale = 0;
			else
				stale++;
		}
		if (pos == list)
			return true;

		list_rotate_to_front(pos, list);
		if (!walk->pause(walk))
			return false;
	}
}

#endif /* LACUNA_WALK_H */
