// SPDX-License-Identifier: GPL-2.0
/*
 * The walk over the page allocator's lists of free pages: the zones' and the
 * CPUs', each read under its own lock, no more than a batch of blocks in one
 * hold. The logic that survives the lock being dropped is in lacuna_walk.h.
 */
#include <linux/build_bug.h>
#include <linux/delay.h>
#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/module.h>
#include <linux/nodemask.h>
#include <linux/pageblock-flags.h>
#include <linux/percpu.h>
#include <linux/sched.h>

#include "lacuna.h"
#include "trace.h"

static unsigned int batch = 512;
module_param(batch, uint, 0644);
MODULE_PARM_DESC(batch, "Free blocks read in one hold of a free list's lock, interrupts off (at least 1)");

#ifdef LACUNA_TEST_WALK
static bool bitwise;
module_param(bitwise, bool, 0644);
MODULE_PARM_DESC(bitwise, "Test builds: set one bit at a time");

static unsigned int pause_us;
module_param(pause_us, uint, 0644);
MODULE_PARM_DESC(pause_us, "Test builds: sleep so long between two holds");
#endif

/* A walk with what its lock is, and the figures of its holds. */
struct lacuna_locked_walk {
	struct lacuna_walk walk;
	struct lacuna_balloon *vb;
	struct zone *zone;
	int cpu;			/* -1 for the zone's own lists */
	spinlock_t *lock;
	unsigned long flags;
	unsigned int quota;		/* what the hold began with */
	u64 start;
	u64 lock_ns;
	u64 batches;
};

static void lacuna_hold(struct lacuna_locked_walk *w)
	__acquires(w->lock)
{
	w->quota = max(READ_ONCE(batch), 1U);
	w->walk.quota = w->quota;
	w->batches++;
	spin_lock_irqsave(w->lock, w->flags);
	w->start = ktime_get_ns();
}

static void lacuna_drop(struct lacuna_locked_walk *w)
	__releases(w->lock)
{
	u64 held = ktime_get_ns() - w->start;

	spin_unlock_irqrestore(w->lock, w->flags);
	if (held > w->lock_ns)
		w->lock_ns = held;
	trace_lacuna_batch(zone_to_nid(w->zone), w->zone->name, w->cpu,
			   w->quota - w->walk.quota, held);
}

/*
 * Is the request being served not wanted any more? Costs an exit to the host
 * only after a config interrupt. May sleep.
 */
bool lacuna_superseded(struct lacuna_balloon *vb)
{
	u32 cmd_id;
	int seen;

	if (READ_ONCE(vb->stopping))
		return true;
	seen = atomic_read(&vb->config_changes);
	if (likely(seen == vb->report_seen))
		return false;
	/*
	 * Count first, value second: a change between the two is seen as
	 * news later, at worst once too often.
	 */
	smp_rmb();
	virtio_cread_le(vb->vdev, struct lacuna_config,
			free_page_bitmap_cmd_id, &cmd_id);
	if (cmd_id != vb->cmd_id)
		return true;
	vb->report_seen = seen;
	return false;
}

static bool lacuna_pause(struct lacuna_walk *walk)
{
	struct lacuna_locked_walk *w =
		container_of(walk, struct lacuna_locked_walk, walk);
	bool stop;

	lacuna_drop(w);
#ifdef LACUNA_TEST_WALK
	if (pause_us)
		usleep_range(pause_us, pause_us + 10);
#endif
	cond_resched();
	stop = lacuna_superseded(w->vb);
	lacuna_hold(w);
	return !stop;
}

/* buddy_list and pcp_list are one place in the page. */
static __always_inline unsigned long lacuna_pfn_of(struct list_head *pos)
{
	BUILD_BUG_ON(offsetof(struct page, pcp_list) !=
		     offsetof(struct page, buddy_list));
	return page_to_pfn(list_entry(pos, struct page, buddy_list));
}

static bool lacuna_walk_zone(struct lacuna_locked_walk *w)
{
	struct zone *zone = w->zone;
	bool finished = true;
	unsigned int order;
	int type;

	BUILD_BUG_ON(LACUNA_MAX_ORDER + LACUNA_PFN_SHIFT > LACUNA_CHUNK_SHIFT);

	w->cpu = -1;
	w->lock = &zone->lock;
	lacuna_hold(w);
	/*
	 * Large blocks first: what is split while the lock is dropped turns up
	 * again in the lists still to come and costs a visit, what is merged
	 * upwards would be missed, and allocation splits more than it merges.
	 */
	for (order = LACUNA_MAX_ORDER + 1; finished && order--; ) {
		struct free_area *area = &zone->free_area[order];

		for (type = 0; finished && type < MIGRATE_TYPES; type++)
			finished = lacuna_walk_list(&w->walk,
						    &area->free_list[type],
						    order, area->nr_free,
						    lacuna_pfn_of);
	}
	lacuna_drop(w);
	return finished;
}

static bool lacuna_walk_cpu(struct lacuna_locked_walk *w, int cpu)
{
	struct per_cpu_pages *pcp = per_cpu_ptr(w->zone->per_cpu_pageset, cpu);
	bool finished = true;
	unsigned int i;

	if (!READ_ONCE(pcp->count))
		return true;
	w->cpu = cpu;
	w->lock = &pcp->lock;
	lacuna_hold(w);
	for (i = 0; finished && i < ARRAY_SIZE(pcp->lists); i++) {
		unsigned int order = i / MIGRATE_PCPTYPES;

		/* The lists after those of the small orders. */
		if (order > PAGE_ALLOC_COSTLY_ORDER)
			order = pageblock_order;
		finished = lacuna_walk_list(&w->walk, &pcp->lists[i], order,
					    pcp->count, lacuna_pfn_of);
	}
	lacuna_drop(w);
	return finished;
}

/*
 * The pages that the CPUs keep to themselves, up to an eighth of the zone on a
 * small machine. They are as free as those in the buddy lists: they went
 * through everything that is done to a page when it is freed, and are on these
 * lists under the set's own lock. Reading them in place spares the guest the
 * drain that the page allocator does not offer to modules anyway. A CPU that
 * finds its set locked takes from the buddy lists instead, it does not wait.
 */
static bool lacuna_walk_cpus(struct lacuna_locked_walk *w)
{
	struct lacuna_balloon *vb = w->vb;
	bool finished = true;
	int cpu;

	for_each_possible_cpu(cpu) {
		mutex_lock(&vb->cpus_lock);
		if (!vb->offlining)
			finished = lacuna_walk_cpu(w, cpu);
		mutex_unlock(&vb->cpus_lock);
		if (!finished)
			break;
		cond_resched();
	}
	return finished;
}

/*
 * A zone that loses its last memory loses its CPUs' page sets. That happens
 * between the first notice and the last, and only then.
 */
int lacuna_memory_notify(struct notifier_block *nb, unsigned long action,
			 void *arg)
{
	struct lacuna_balloon *vb =
		container_of(nb, struct lacuna_balloon, memory);

	switch (action) {
	case MEM_GOING_OFFLINE:
		mutex_lock(&vb->cpus_lock);
		vb->offlining++;
		mutex_unlock(&vb->cpus_lock);
		break;
	case MEM_OFFLINE:
	case MEM_CANCEL_OFFLINE:
		mutex_lock(&vb->cpus_lock);
		/* It may have begun before this was registered. */
		if (vb->offlining)
			vb->offlining--;
		mutex_unlock(&vb->cpus_lock);
		break;
	}
	return NOTIFY_OK;
}

/*
 * Fill the bitmap. Returns false if the request was superseded on the way.
 */
bool lacuna_walk_memory(struct lacuna_balloon *vb,
			struct lacuna_figures *figures)
{
	struct lacuna_locked_walk w = {
		.vb = vb,
		.walk = {
			.chunks = vb->words,
			.nr_chunks = vb->nr_chunks,
			.pfn_shift = LACUNA_PFN_SHIFT,
			.pause = lacuna_pause,
#ifdef LACUNA_TEST_WALK
			.bitwise = bitwise,
#endif
		},
	};
	u64 start = ktime_get_ns();
	bool finished = true;
	int nid, z;

	for_each_online_node(nid) {
		for (z = 0; finished && z < MAX_NR_ZONES; z++) {
			w.zone = &NODE_DATA(nid)->node_zones[z];
			if (!populated_zone(w.zone))
				continue;
			finished = lacuna_walk_zone(&w) &&
				   lacuna_walk_cpus(&w);
			cond_resched();
			if (finished)
				finished = !lacuna_superseded(vb);
		}
		if (!finished)
			break;
	}

	figures->walk_ns = ktime_get_ns() - start;
	figures->lock_ns = w.lock_ns;
	figures->batches = w.batches;
	figures->blocks = w.walk.blocks;
	return finished;
}
