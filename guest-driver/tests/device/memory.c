// SPDX-License-Identifier: GPL-2.0
/*
 * What the tests do to the guest's memory itself: sums over the contents of
 * every page, to count those that changed, and free memory in single pages.
 *
 *	echo 1 > parameters/sums		take the sums
 *	echo 2 > parameters/sums		compare; then read it: the count
 *	echo PERCENT > parameters/fragment	take so much of what is free,
 *						free every other page; 0 undoes
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/vmalloc.h>

#include "device.h"

static u64 *sums;
static u64 changed;

static bool countable(unsigned long pfn)
{
	struct page *page;

	if (!pfn_valid(pfn))
		return false;
	page = pfn_to_page(pfn);
	return !PageReserved(page) && !is_zone_device_page(page);
}

static u64 sum_page(unsigned long pfn)
{
	const u64 *word = __va((phys_addr_t)pfn << PAGE_SHIFT);
	u64 sum = 1;
	int i;

	for (i = 0; i < PAGE_SIZE / 8; i++)
		sum = sum * 0x100000001b3ull + READ_ONCE(word[i]);
	return sum;
}

static int sums_set(const char *value, const struct kernel_param *kp)
{
	unsigned long end = get_num_physpages() + (1UL << 20), pfn;
	u8 what;
	int err = kstrtou8(value, 0, &what);

	if (err)
		return err;
	if (what == 1 && !sums)
		sums = vzalloc(end * sizeof(*sums));
	if (!sums)
		return -ENOMEM;
	changed = 0;
	for (pfn = 0; pfn < end; pfn++) {
		if (!countable(pfn))
			continue;
		if (what == 1)
			sums[pfn] = sum_page(pfn);
		else if (sums[pfn] != sum_page(pfn))
			changed++;
		cond_resched();
	}
	return 0;
}

static int sums_get(char *buffer, const struct kernel_param *kp)
{
	return scnprintf(buffer, PAGE_SIZE, "%llu\n", changed);
}

static const struct kernel_param_ops sums_ops = {
	.set = sums_set,
	.get = sums_get,
};
module_param_cb(sums, &sums_ops, NULL, 0644);

static LIST_HEAD(kept);
static unsigned long kept_pages;

static void free_kept(void)
{
	struct page *page, *next;

	list_for_each_entry_safe(page, next, &kept, lru) {
		list_del(&page->lru);
		__free_page(page);
		cond_resched();
	}
	kept_pages = 0;
}

/* Pages with an odd number stay taken, so that none of the others can merge. */
static int fragment_set(const char *value, const struct kernel_param *kp)
{
	struct page *page, *next;
	LIST_HEAD(taken);
	unsigned long count;
	u8 percent;
	int err = kstrtou8(value, 0, &percent);

	if (err)
		return err;
	free_kept();
	count = global_zone_page_state(NR_FREE_PAGES) / 100 * percent;
	while (count--) {
		page = alloc_page(GFP_HIGHUSER_MOVABLE | __GFP_NORETRY |
				  __GFP_NOWARN);
		if (!page)
			break;
		list_add(&page->lru, &taken);
		cond_resched();
	}
	list_for_each_entry_safe(page, next, &taken, lru) {
		if (page_to_pfn(page) & 1) {
			list_move(&page->lru, &kept);
			kept_pages++;
		} else {
			list_del(&page->lru);
			__free_page(page);
		}
		cond_resched();
	}
	return 0;
}

static int fragment_get(char *buffer, const struct kernel_param *kp)
{
	return scnprintf(buffer, PAGE_SIZE, "%lu\n", kept_pages);
}

static const struct kernel_param_ops fragment_ops = {
	.set = fragment_set,
	.get = fragment_get,
};
module_param_cb(fragment, &fragment_ops, NULL, 0644);

void memory_release(void)
{
	free_kept();
	vfree(sums);
}
