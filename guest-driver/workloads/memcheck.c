// SPDX-License-Identifier: GPL-2.0
/*
 * memcheck [--percent P | --mib N] [--seed S] [--passes N] [--hz H] [--ready F]
 *
 * Holds memory whose every byte follows from a seed, the page's number and the
 * page's generation, keeps rewriting, freeing and taking back parts of it, and
 * stops at the first byte that is not what it must be. Run it across a
 * migration: a page wrongly skipped, an old copy of a page, or a byte that
 * survived where fresh memory must be zero all show.
 *
 * In each pass, about one page in sixteen:
 *   - blocks of 64 pages that the pass before gave back are taken again, must
 *     read as zero, and are filled;
 *   - scattered pages are checked and rewritten;
 *   - other blocks are checked and given back, and stay free until the next
 *     pass, so that a report of free pages can catch them.
 * Each eighth pass and the last check all pages.
 *
 * Exit status: 0 all well, 1 a wrong byte, 2 not able to run.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

#include "meminfo.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE	23
#endif

#define PAGE		4096UL
#define WORDS		(PAGE / sizeof(uint64_t))
#define BLOCK_PAGES	64UL
#define BLOCK_BYTES	(BLOCK_PAGES * PAGE)
#define SHARE		16	/* one page in so many changes in a pass */
#define FULL_CHECK	8	/* one pass in so many checks all pages */

/* A page's generation is the pass that wrote it; 0 means given back. */
static uint32_t *generations;
/* The complement of it in other memory: either may be hit as well. */
static uint32_t *complements;
static uint8_t *memory;
static unsigned long blocks;
static uint64_t seed = 1;
static uint32_t pass;
static unsigned long checked;
static uint64_t random_state;

static uint64_t mix(uint64_t x)
{
	x ^= x >> 32;
	x *= 0xd6e8feb86659fd93ull;
	x ^= x >> 32;
	return x;
}

static uint64_t next_random(void)
{
	random_state += 0x9e3779b97f4a7c15ull;
	return mix(mix(random_state) + seed);
}

static uint64_t page_base(unsigned long page, uint32_t generation)
{
	return mix(mix(seed + page * 0x9e3779b97f4a7c15ull) +
		   generation * 0xbf58476d1ce4e5b9ull);
}

static uint64_t page_word(uint64_t base, unsigned long i)
{
	return mix(base + i * 0x9e3779b97f4a7c15ull);
}

static void __attribute__((noreturn))
wrong(unsigned long page, unsigned long offset, unsigned int expected,
      unsigned int found, uint32_t generation, const char *what)
{
	printf("MEMCHECK WRONG pass=%" PRIu32 " page=%lu offset=%lu "
	       "expected=0x%02x found=0x%02x generation=%" PRIu32
	       " what=%s address=%p\n", pass, page, offset, expected, found,
	       generation, what, (void *)(memory + page * PAGE + offset));
	fflush(stdout);
	exit(1);
}

/* Report the first byte that differs between two words at @offset. */
static void __attribute__((noreturn))
wrong_word(unsigned long page, unsigned long offset, uint64_t expected,
	   uint64_t found, uint32_t generation, const char *what)
{
	const uint8_t *e = (const uint8_t *)&expected;
	const uint8_t *f = (const uint8_t *)&found;
	unsigned int i = 0;

	while (i < sizeof(expected) - 1 && e[i] == f[i])
		i++;
	wrong(page, offset + i, e[i], f[i], generation, what);
}

static uint32_t generation_of(unsigned long page)
{
	uint32_t value = generations[page];

	if (value != (uint32_t)~complements[page])
		wrong_word(page, 0, (uint32_t)~complements[page], value, value,
			   "generation-table");
	return value;
}

static void set_generation(unsigned long page, uint32_t value)
{
	generations[page] = value;
	complements[page] = ~value;
}

static void fill(unsigned long page)
{
	uint64_t *words = (uint64_t *)(memory + page * PAGE);
	uint64_t base = page_base(page, pass);
	unsigned long i;

	for (i = 0; i < WORDS; i++)
		words[i] = page_word(base, i);
	set_generation(page, pass);
}

/* Each word is read once and kept: a second read might find it right again. */
static void check(unsigned long page)
{
	const volatile uint64_t *words =
		(const volatile uint64_t *)(memory + page * PAGE);
	uint32_t generation = generation_of(page);
	uint64_t base = page_base(page, generation);
	unsigned long i;

	for (i = 0; i < WORDS; i++) {
		uint64_t found = words[i], expected = page_word(base, i);

		if (found != expected)
			wrong_word(page, i * sizeof(found), expected, found,
				   generation, "content");
	}
	checked++;
}

static void check_zero(unsigned long page)
{
	const volatile uint64_t *words =
		(const volatile uint64_t *)(memory + page * PAGE);
	unsigned long i;

	for (i = 0; i < WORDS; i++) {
		uint64_t found = words[i];

		if (found)
			wrong_word(page, i * sizeof(found), 0, found, 0,
				   "fresh-page-not-zero");
	}
	checked++;
}

static bool is_free(unsigned long block)
{
	return !generation_of(block * BLOCK_PAGES);
}

/*
 * Give a block's pages back. Both ways a process has, because they go through
 * different paths of the kernel.
 */
static void give_back(unsigned long block)
{
	uint8_t *start = memory + block * BLOCK_BYTES;
	unsigned long i;

	for (i = 0; i < BLOCK_PAGES; i++) {
		check(block * BLOCK_PAGES + i);
		set_generation(block * BLOCK_PAGES + i, 0);
	}
	if (block & 1) {
		if (madvise(start, BLOCK_BYTES, MADV_DONTNEED)) {
			perror("MADV_DONTNEED");
			exit(2);
		}
		return;
	}
	if (munmap(start, BLOCK_BYTES) ||
	    mmap(start, BLOCK_BYTES, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
		 0) != start ||
	    madvise(start, BLOCK_BYTES, MADV_NOHUGEPAGE)) {
		perror("remapping");
		exit(2);
	}
}

static void take_again(unsigned long block)
{
	uint8_t *start = memory + block * BLOCK_BYTES;
	unsigned long i;

	/*
	 * A read would only map the kernel's shared zero page and prove
	 * nothing. Populating gets real pages and leaves their bytes alone.
	 */
	if (madvise(start, BLOCK_BYTES, MADV_POPULATE_WRITE)) {
		if (errno != EINVAL) {
			perror("MADV_POPULATE_WRITE");
			exit(2);
		}
		/* Before 5.14: touch a word, each time another one. */
		for (i = 0; i < BLOCK_PAGES; i++) {
			volatile uint64_t *words =
				(volatile uint64_t *)(start + i * PAGE);

			words[next_random() % WORDS] = 0;
		}
	}
	for (i = 0; i < BLOCK_PAGES; i++) {
		check_zero(block * BLOCK_PAGES + i);
		fill(block * BLOCK_PAGES + i);
	}
}

static void run_pass(bool all)
{
	unsigned long share = blocks / (2 * SHARE) + 1, i, block;

	for (block = 0; block < blocks; block++)
		if (is_free(block))
			take_again(block);

	for (i = 0; i < share * BLOCK_PAGES; i++) {
		unsigned long page = next_random() % (blocks * BLOCK_PAGES);

		check(page);
		fill(page);
	}

	if (all)
		for (i = 0; i < blocks * BLOCK_PAGES; i++)
			check(i);

	for (i = 0; i < share; i++) {
		block = next_random() % blocks;
		if (!is_free(block))
			give_back(block);
	}
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec * 1e-9;
}

static void *map(size_t bytes)
{
	void *result = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (result == MAP_FAILED) {
		perror("mmap");
		exit(2);
	}
	/* So that a page given back is free at once, not a part of a huge one. */
	madvise(result, bytes, MADV_NOHUGEPAGE);
	return result;
}

static void __attribute__((noreturn)) usage(void)
{
	fprintf(stderr,
		"usage: memcheck [--percent P | --mib N] [--seed S] [--passes N] [--hz H] [--ready F]\n"
		"  --percent P  share of the memory to hold (20)\n"
		"  --mib N      as much memory instead\n"
		"  --seed S     what the contents follow from (1)\n"
		"  --passes N   stop after so many, 0: never (0)\n"
		"  --hz H       no more than so many passes a second, 0: no limit (0)\n"
		"  --ready F    make this file once all the memory is held\n");
	exit(2);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "percent", required_argument, NULL, 'p' },
		{ "mib", required_argument, NULL, 'm' },
		{ "seed", required_argument, NULL, 's' },
		{ "passes", required_argument, NULL, 'n' },
		{ "hz", required_argument, NULL, 'z' },
		{ "ready", required_argument, NULL, 'r' },
		{ NULL, 0, NULL, 0 },
	};
	unsigned long percent = 20, mib = 0, passes = 0, hz = 0, kb, i;
	const char *ready = NULL;
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case 'p':
			percent = number(optarg, "--percent", 1, 100);
			break;
		case 'm':
			mib = number(optarg, "--mib", 1, 1UL << 24);
			break;
		case 's':
			seed = number(optarg, "--seed", 0, ~0UL);
			break;
		case 'n':
			passes = number(optarg, "--passes", 0, UINT32_MAX - 1);
			break;
		case 'z':
			hz = number(optarg, "--hz", 0, 1000);
			break;
		case 'r':
			ready = optarg;
			break;
		default:
			usage();
		}
	}
	if (optind != argc)
		usage();

	kb = mib ? capped_kb(mib << 10) : percent_kb(percent);
	blocks = (kb << 10) / BLOCK_BYTES;
	if (!blocks) {
		fprintf(stderr, "memcheck: not enough memory\n");
		return 2;
	}
	memory = map(blocks * BLOCK_BYTES);
	generations = map(blocks * BLOCK_PAGES * sizeof(*generations));
	complements = map(blocks * BLOCK_PAGES * sizeof(*complements));

	/* Generation 1, written as pass 1: it checks all that it writes. */
	for (pass = 1; ; pass++) {
		double start = now(), rest;

		checked = 0;
		if (pass == 1) {
			for (i = 0; i < blocks * BLOCK_PAGES; i++)
				fill(i);
			for (i = 0; i < blocks * BLOCK_PAGES; i++)
				check(i);
		} else {
			run_pass(pass % FULL_CHECK == 0 || pass == passes);
		}
		printf("MEMCHECK pass=%" PRIu32 " pages=%lu ok\n", pass,
		       checked);
		fflush(stdout);
		if (pass == 1 && ready) {
			FILE *file = fopen(ready, "w");

			if (!file) {
				perror(ready);
				return 2;
			}
			fclose(file);
		}
		if (passes && pass == passes)
			break;
		/* 0 means free: never a generation. Years away, yet finite. */
		if (pass == UINT32_MAX - 1)
			break;
		rest = hz ? 1.0 / hz - (now() - start) : 0;
		if (rest > 0) {
			struct timespec pause = {
				.tv_sec = (time_t)rest,
				.tv_nsec = (long)((rest - (time_t)rest) * 1e9),
			};

			nanosleep(&pause, NULL);
		}
	}
	printf("MEMCHECK done passes=%" PRIu32 " ok\n", pass);
	return 0;
}
