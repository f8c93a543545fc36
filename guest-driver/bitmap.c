// SPDX-License-Identifier: GPL-2.0
/*
 * The bitmap's memory: chunks that are made when memory first needs them and
 * live until the device is removed.
 */
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/module.h>
#include <linux/nodemask.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "lacuna.h"

/* Failing is cheap, the report just says less: do not try too hard. */
#define LACUNA_BITMAP_GFP	(GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN)

#ifdef LACUNA_TEST_WALK
static bool no_memory;
module_param(no_memory, bool, 0644);
MODULE_PARM_DESC(no_memory, "Test builds: there is no memory for the bitmap");
#endif

/* Headers have memory of their own because the device reads them. */
static int lacuna_make_chunk(struct lacuna_balloon *vb, unsigned long i)
{
#ifdef LACUNA_TEST_WALK
	if (no_memory)
		return -ENOMEM;
#endif
	if (!vb->hdrs[i])
		vb->hdrs[i] = kzalloc(sizeof(*vb->hdrs[i]), LACUNA_BITMAP_GFP);
	if (!vb->hdrs[i])
		return -ENOMEM;
	if (!vb->words[i])
		vb->words[i] = (lacuna_word *)
			__get_free_pages(LACUNA_BITMAP_GFP,
					 get_order(LACUNA_CHUNK_BYTES));
	return vb->words[i] ? 0 : -ENOMEM;
}

void lacuna_free_bitmap(struct lacuna_balloon *vb)
{
	unsigned long i;

	for (i = 0; i < vb->nr_chunks; i++) {
		kfree(vb->hdrs[i]);
		free_pages((unsigned long)vb->words[i],
			   get_order(LACUNA_CHUNK_BYTES));
	}
	kvfree(vb->hdrs);
	kvfree(vb->words);
	vb->hdrs = NULL;
	vb->words = NULL;
	vb->nr_chunks = 0;
}

/* Make the tables reach @count chunks. */
static int lacuna_grow_tables(struct lacuna_balloon *vb, unsigned long count)
{
	struct virtio_balloon_bitmap_hdr **hdrs;
	lacuna_word **words;

	if (count <= vb->nr_chunks)
		return 0;
	words = kvcalloc(count, sizeof(*words), LACUNA_BITMAP_GFP);
	hdrs = kvcalloc(count, sizeof(*hdrs), LACUNA_BITMAP_GFP);
	if (!words || !hdrs) {
		kvfree(words);
		kvfree(hdrs);
		return -ENOMEM;
	}
	if (vb->nr_chunks) {
		memcpy(words, vb->words, vb->nr_chunks * sizeof(*words));
		memcpy(hdrs, vb->hdrs, vb->nr_chunks * sizeof(*hdrs));
	}
	kvfree(vb->words);
	kvfree(vb->hdrs);
	vb->words = words;
	vb->hdrs = hdrs;
	vb->nr_chunks = count;
	return 0;
}

/*
 * Have a chunk for every zone's memory. Memory that was plugged in since the
 * last request gets its chunks here; memory that goes away keeps them.
 *
 * A chunk that cannot be had leaves its memory out of the report, which is
 * always right, and is tried again next time. Only having none is an error.
 */
int lacuna_size_bitmap(struct lacuna_balloon *vb)
{
	unsigned int shift = LACUNA_CHUNK_SHIFT - LACUNA_PFN_SHIFT;
	unsigned long have = 0, missing = 0;
	int nid, z;

	for_each_online_node(nid) {
		for (z = 0; z < MAX_NR_ZONES; z++) {
			struct zone *zone = &NODE_DATA(nid)->node_zones[z];
			unsigned long i, end;

			if (!populated_zone(zone))
				continue;
			i = zone->zone_start_pfn >> shift;
			end = ((zone_end_pfn(zone) - 1) >> shift) + 1;
			if (lacuna_grow_tables(vb, end)) {
				missing += end - i;
				continue;
			}
			for (; i < end; i++) {
				if (lacuna_make_chunk(vb, i))
					missing++;
				else
					have++;
				cond_resched();
			}
		}
	}

	if (missing)
		dev_warn_ratelimited(&vb->vdev->dev,
				     "no memory for %lu of the bitmap's chunks\n",
				     missing);
	return have ? 0 : -ENOMEM;
}

void lacuna_clear_bitmap(struct lacuna_balloon *vb)
{
	unsigned long i;

	for (i = 0; i < vb->nr_chunks; i++) {
		if (vb->words[i])
			memset(vb->words[i], 0, LACUNA_CHUNK_BYTES);
		cond_resched();
	}
}
