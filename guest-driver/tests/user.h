/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What lacuna_walk.h takes from the kernel, for its tests in user space.
 */
#ifndef LACUNA_TESTS_USER_H
#define LACUNA_TESTS_USER_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/cdefs.h>

#include "list.h"

typedef uint64_t lacuna_word;
typedef uint64_t u64;

#define lacuna_word_of(x)	htole64(x)
#define lacuna_weight(w)	((unsigned int)__builtin_popcountll(w))
#define WRITE_ONCE(x, value) \
	__atomic_store_n(&(x), (value), __ATOMIC_RELAXED)

#endif /* LACUNA_TESTS_USER_H */
