// SPDX-License-Identifier: GPL-2.0
/*
 * dirty-then-free PERCENT
 *
 * Fills PERCENT of the machine's memory with bytes that no zero-page check can
 * drop and frees it: what a page cache or a large process leaves behind.
 */
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>

#include "meminfo.h"

int main(int argc, char **argv)
{
	unsigned long bytes, words, i;
	uint64_t x = 0x9e3779b97f4a7c15ull;
	uint64_t *memory;

	if (argc != 2) {
		fprintf(stderr, "usage: dirty-then-free PERCENT\n");
		return 2;
	}
	bytes = percent_kb(number(argv[1], "PERCENT", 1, 100)) << 10;
	bytes &= ~0xffful;
	if (!bytes) {
		printf("DIRTY-THEN-FREE filled=0\n");
		return 0;
	}

	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	/*
	 * One state over all pages: no two are alike, so neither compression
	 * nor page merging in the host shrinks them. The lowest bit is set so
	 * that there is no zero word.
	 */
	words = bytes / sizeof(*memory);
	for (i = 0; i < words; i++) {
		/*
		 * Another process may be taking memory at the same time, so
		 * what was available at the start is not what is there now.
		 */
		if (!(i & ((4UL << 20) / sizeof(*memory) - 1)) &&
		    meminfo_kb("MemAvailable") < HEADROOM_KB)
			break;
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		memory[i] = x | 1;
	}
	if (munmap(memory, bytes)) {
		perror("munmap");
		return 1;
	}
	printf("DIRTY-THEN-FREE filled=%lu\n",
	       (i * sizeof(*memory)) >> 20);
	return 0;
}
