// SPDX-License-Identifier: GPL-2.0
/*
 * lacuna_walk.h against an oracle that sets one bit at a time.
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

#include "lacuna_walk.h"

#define BITS	(1UL << 14)
#define WORDS	(BITS / 64)

static uint64_t state = 0x9e3779b97f4a7c15ull;

static uint64_t next_random(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static bool oracle_test(const uint8_t *bytes, unsigned long bit)
{
	return bytes[bit / 8] >> (bit % 8) & 1;
}

static bool oracle_set(uint8_t *bytes, unsigned long bit, unsigned int order)
{
	bool fresh = !oracle_test(bytes, bit);
	unsigned long i;

	for (i = bit; i < bit + (1UL << order); i++)
		bytes[i / 8] |= 1 << (i % 8);
	return fresh;
}

static void check_trim(const lacuna_word *words)
{
	const uint8_t *bytes = (const uint8_t *)words;
	unsigned long i, weight = 0, low = BITS, high = 0;
	size_t first, length;

	for (i = 0; i < BITS; i++) {
		if (!oracle_test(bytes, i))
			continue;
		if (low == BITS)
			low = i;
		high = i;
		weight++;
	}
	assert(lacuna_trim(words, WORDS, &first, &length) == weight);
	if (!weight) {
		assert(first == 0 && length == 0);
		return;
	}
	assert(first == low / 64);
	assert(first + length == high / 64 + 1);
}

int main(void)
{
	lacuna_word *words = malloc(WORDS * sizeof(*words));
	uint8_t *bytes = malloc(BITS / 8);
	unsigned long rounds = 0, blocks = 0, bit;
	unsigned int order;

	assert(words && bytes);

	/* Each block of each order, alone. */
	for (order = 0; order <= 14; order++) {
		unsigned long step = 1UL << order;

		/* A prime number of blocks apart is enough for small ones. */
		if (order < 5)
			step *= 31;
		for (bit = 0; bit + (1UL << order) <= BITS; bit += step) {
			memset(words, 0, BITS / 8);
			memset(bytes, 0, BITS / 8);
			assert(lacuna_set_block(words, bit, order));
			assert(!lacuna_set_block(words, bit, order));
			oracle_set(bytes, bit, order);
			assert(!memcmp(words, bytes, BITS / 8));
			check_trim(words);
			blocks++;
		}
	}

	/* Random mixtures, with blocks seen again under another order. */
	for (rounds = 0; rounds < 2000; rounds++) {
		unsigned int count = next_random() % 60;

		memset(words, 0, BITS / 8);
		memset(bytes, 0, BITS / 8);
		while (count--) {
			order = next_random() % 11;
			bit = next_random() % BITS & ~((1UL << order) - 1);
			assert(lacuna_set_block(words, bit, order) ==
			       oracle_set(bytes, bit, order));
			blocks++;
		}
		assert(!memcmp(words, bytes, BITS / 8));
		check_trim(words);
	}

	printf("bits: %lu blocks ok\n", blocks);
	free(words);
	free(bytes);
	return 0;
}
