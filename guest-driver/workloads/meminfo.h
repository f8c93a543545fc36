/* SPDX-License-Identifier: GPL-2.0 */
/*
 * How much memory a workload may take.
 */
#ifndef LACUNA_MEMINFO_H
#define LACUNA_MEMINFO_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Left to the rest of the guest, so that taking it all ends in no OOM kill. */
#define HEADROOM_KB	(40UL << 10)

static unsigned long meminfo_kb(const char *name)
{
	size_t length = strlen(name);
	char line[256];
	unsigned long kb = 0;
	FILE *file = fopen("/proc/meminfo", "r");

	if (!file) {
		perror("/proc/meminfo");
		exit(2);
	}
	while (fgets(line, sizeof(line), file)) {
		if (!strncmp(line, name, length) && line[length] == ':') {
			kb = strtoul(line + length + 1, NULL, 10);
			break;
		}
	}
	fclose(file);
	return kb;
}

/* No more than can be had now. */
static unsigned long capped_kb(unsigned long wanted)
{
	unsigned long available = meminfo_kb("MemAvailable");

	available = available > HEADROOM_KB ? available - HEADROOM_KB : 0;
	return wanted < available ? wanted : available;
}

static unsigned long percent_kb(unsigned long percent)
{
	return capped_kb(meminfo_kb("MemTotal") / 100 * percent);
}

/* A whole decimal number between the limits, or the end of the program. */
static unsigned long number(const char *text, const char *what,
			    unsigned long low, unsigned long high)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	if (*text < '0' || *text > '9' || *end || value < low || value > high) {
		fprintf(stderr, "%s: \"%s\" is not between %lu and %lu\n",
			what, text, low, high);
		exit(2);
	}
	return value;
}

#endif /* LACUNA_MEMINFO_H */
