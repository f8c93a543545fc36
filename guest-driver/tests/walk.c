// SPDX-License-Identifier: GPL-2.0
/*
 * lacuna_walk.h against a model of the page allocator's lists: blocks of each
 * order that are split and merged as the kernel does it, by others, whenever
 * the walk drops its lock.
 *
 *	tests/walk [SEED [ROUNDS]]
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

#define LACUNA_TEST_WALK
#include "lacuna_walk.h"

#define ORDERS	11
#define PAGES	(1UL << 15)
#define CHUNKS	2
#define FIRST	(LACUNA_CHUNK_BITS - PAGES / 2)	/* half in each chunk */
#define NONE	255

static uint64_t state;

static uint64_t next_random(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static unsigned long below(unsigned long limit)
{
	return next_random() % limit;
}

/* ---- the model ---- */

struct page {
	struct list_head list;
	unsigned char order;	/* of the free block that begins here, or NONE */
	bool taken;		/* by a user */
	bool touched;		/* since the walk began */
	bool looked;		/* at as free by the walk */
};

static struct page pages[PAGES];
static struct list_head lists[ORDERS];
static unsigned long counts[ORDERS];

static void insert(unsigned long i, unsigned int order)
{
	pages[i].order = order;
	/* The kernel puts some at the end, too. */
	list_insert_after(&pages[i].list,
			  below(4) ? &lists[order] : lists[order].prev);
	counts[order]++;
}

static void take_off(unsigned long i)
{
	counts[pages[i].order]--;
	pages[i].order = NONE;
	list_remove(&pages[i].list);
}

static void touch(unsigned long i, unsigned int order)
{
	unsigned long j;

	for (j = i; j < i + (1UL << order); j++)
		pages[j].touched = true;
}

static void set_taken(unsigned long i, unsigned int order, bool taken)
{
	unsigned long j;

	for (j = i; j < i + (1UL << order); j++) {
		assert(pages[j].taken != taken);
		pages[j].taken = taken;
	}
}

static void free_block(unsigned long i, unsigned int order)
{
	set_taken(i, order, false);
	touch(i, order);
	while (order < ORDERS - 1) {
		unsigned long buddy = i ^ (1UL << order);

		if (pages[buddy].order != order)
			break;
		take_off(buddy);
		touch(buddy, order);
		i &= ~(1UL << order);
		order++;
	}
	insert(i, order);
}

/* Returns the block's first page, or PAGES. */
static unsigned long take_block(unsigned int order)
{
	unsigned int from = order;
	unsigned long i;

	while (from < ORDERS && lists[from].next == &lists[from])
		from++;
	if (from == ORDERS)
		return PAGES;
	i = (struct page *)lists[from].next - pages;
	take_off(i);
	touch(i, from);
	while (from > order) {
		from--;
		insert(i + (1UL << from), from);
	}
	set_taken(i, order, true);
	return i;
}

static void fresh_model(void)
{
	unsigned long i;
	unsigned int order;

	memset(counts, 0, sizeof(counts));
	for (order = 0; order < ORDERS; order++)
		list_init(&lists[order]);
	for (i = 0; i < PAGES; i++)
		pages[i] = (struct page){ .order = NONE, .taken = true };
	for (i = 0; i < PAGES; i += 1UL << (ORDERS - 1))
		free_block(i, ORDERS - 1);
}

/* Any of these may be what others do while the lock is dropped. */
static void churn(unsigned long steps)
{
	while (steps--) {
		unsigned long i = below(PAGES);

		if (pages[i].taken)
			free_block(i, 0);
		else
			take_block(below(3) ? 0 : below(ORDERS));
	}
}

/* The worst case: each free block is a single page. */
static void all_singles(void)
{
	unsigned long i;

	while (take_block(0) != PAGES)
		;
	for (i = 0; i < PAGES; i += 2)
		free_block(i, 0);
}

/* ---- the walk ---- */

static struct {
	unsigned int quota;
	unsigned long steps;	/* of churn in each pause */
	unsigned long in_hold, holds, longest, visits;
	unsigned long end_after;	/* holds; 0 for no end */
} run;

static unsigned long pfn_of(struct list_head *pos)
{
	struct page *page = (struct page *)pos;
	unsigned long i = page - pages, j;

	/* A cursor that outlived its block would be here with a taken page. */
	assert(i < PAGES && page->order < ORDERS);
	for (j = i; j < i + (1UL << page->order); j++) {
		assert(!pages[j].taken);
		pages[j].looked = true;
	}
	run.visits++;
	run.in_hold++;
	return FIRST + i;
}

static void end_hold(void)
{
	assert(run.in_hold <= run.quota);
	if (run.in_hold > run.longest)
		run.longest = run.in_hold;
	run.in_hold = 0;
	run.holds++;
}

static bool pause_walk(struct lacuna_walk *walk)
{
	end_hold();
	churn(run.steps);
	walk->quota = run.quota;
	return run.end_after == 0 || run.holds < run.end_after;
}

static bool bit_set(lacuna_word **chunks, unsigned long pfn)
{
	const unsigned char *bytes =
		(const unsigned char *)chunks[pfn >> LACUNA_CHUNK_SHIFT];

	pfn &= LACUNA_CHUNK_BITS - 1;
	return bytes[pfn / 8] >> (pfn % 8) & 1;
}

/*
 * One walk with the allocator as it is. With @all, every page that was free
 * from before the walk to after it and was left alone must be reported.
 */
static void walk_once(lacuna_word **chunks, unsigned int quota,
		      unsigned long steps, bool all, bool bitwise)
{
	struct lacuna_walk walk = {
		.chunks = chunks,
		.nr_chunks = CHUNKS,
		.quota = quota,
		.pause = pause_walk,
		.bitwise = bitwise,
	};
	unsigned long i, most = 0, end_after = run.end_after;
	unsigned int order;
	bool finished = true;

	memset(&run, 0, sizeof(run));
	run.quota = quota;
	run.steps = steps;
	run.end_after = end_after;
	for (i = 0; i < CHUNKS; i++)
		if (chunks[i])
			memset(chunks[i], 0, LACUNA_CHUNK_BYTES);
	for (i = 0; i < PAGES; i++) {
		pages[i].touched = false;
		pages[i].looked = false;
	}

	for (order = ORDERS; finished && order--; ) {
		most += 2 * counts[order] + LACUNA_STALE_RUN;
		finished = lacuna_walk_list(&walk, &lists[order], order,
					    counts[order], pfn_of);
	}
	end_hold();
	assert(finished || end_after);
	assert(run.visits <= most);

	for (i = 0; i < PAGES; i++) {
		unsigned long pfn = FIRST + i;
		bool set;

		if (!chunks[pfn >> LACUNA_CHUNK_SHIFT])
			continue;
		set = bit_set(chunks, pfn);
		/* None that was not seen free, and all that were. */
		assert(set == pages[i].looked);
		if (all && !pages[i].taken && !pages[i].touched)
			assert(set);
	}
}

int main(int argc, char **argv)
{
	unsigned long rounds = argc > 2 ? strtoul(argv[2], NULL, 0) : 300;
	uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
	unsigned long round, i, walks = 0;
	lacuna_word *chunks[CHUNKS], *some[CHUNKS];

	state = seed * 0x9e3779b97f4a7c15ull + 1;
	for (i = 0; i < CHUNKS; i++) {
		chunks[i] = malloc(LACUNA_CHUNK_BYTES);
		assert(chunks[i]);
	}
	some[0] = NULL;
	some[1] = chunks[1];

	for (round = 0; round < rounds; round++) {
		unsigned int quota = 1 + below(below(2) ? 8 : 600);

		fresh_model();
		if (round % 4 == 0)
			all_singles();
		else
			churn(below(PAGES));

		/* Nobody else about: exactly what is free. */
		walk_once(chunks, quota, 0, true, false);
		for (i = 0; i < PAGES; i++)
			assert(bit_set(chunks, FIRST + i) == !pages[i].taken);
		walk_once(chunks, quota, 0, true, round & 1);

		/* Others slower than the walk: what they left alone. */
		quota = 64 + below(500);
		walk_once(chunks, quota, below(quota / 16), true, round & 1);

		/* As fast as they like: it ends, and tells no lies. */
		quota = 1 + below(40);
		walk_once(chunks, quota, below(200), false, false);

		/* Half of the memory has no bitmap. */
		walk_once(some, quota, below(40), false, false);

		/* Superseded on the way. */
		run.end_after = 1 + below(5);
		walk_once(chunks, quota, below(40), false, false);
		run.end_after = 0;

		walks += 6;
	}

	/* A free page more or less makes no hold any longer. */
	fresh_model();
	all_singles();
	walk_once(chunks, 512, 64, true, false);
	assert(run.longest == 512 && run.holds >= PAGES / 2 / 512);

	printf("walk: seed %llu, %lu walks ok\n", (unsigned long long)seed,
	       walks + 1);
	for (i = 0; i < CHUNKS; i++)
		free(chunks[i]);
	return 0;
}
