// SPDX-License-Identifier: GPL-2.0
/*
 * lacuna_balloon - tells the host which pages are free, as a bitmap.
 *
 * On request the driver reads the page allocator's free lists, the zones' and
 * the CPUs', under their locks, writes what it sees into a bitmap and hands
 * that to the device. Nothing is allocated, touched or held for it, so a page
 * in the report may be in use again by the time the host reads it: that the
 * host skips nothing it must not skip is the host's duty
 * (protocol/free-page-bitmap.md).
 *
 * Who owns what:
 *
 *   - The work item owns everything in struct lacuna_balloon that has no other
 *     owner named below. It runs on an ordered workqueue, never twice at once.
 *   - probe, remove, freeze and restore own the same fields whenever the work
 *     cannot run: before virtio_device_ready(), and after the core has turned
 *     config interrupts off and cancel_work_sync() has returned.
 *   - Interrupt context touches config_changes (atomic), work (queueing) and
 *     used (waking), nothing else.
 *   - From virtqueue_add_outbuf() until virtqueue_get_buf() returns it, the
 *     device owns a chain: chunk headers, words and the tail are not written
 *     while in_flight is not zero.
 */
#include <linux/atomic.h>
#include <linux/build_bug.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/module.h>
#include <linux/nodemask.h>
#include <linux/pageblock-flags.h>
#include <linux/percpu.h>
#include <linux/poison.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_balloon_bitmap.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "compat.h"
#include "lacuna_walk.h"

/*
 * One chunk of bitmap is what one chain carries: 32 KiB for 1 GiB of memory.
 * Small enough for the page allocator to have it in one piece, large enough
 * that a big guest's report is a few hundred chains.
 */
#define LACUNA_CHUNK_SHIFT	18
#define LACUNA_CHUNK_BITS	(1UL << LACUNA_CHUNK_SHIFT)
#define LACUNA_CHUNK_WORDS	(LACUNA_CHUNK_BITS / LACUNA_WORD_BITS)
#define LACUNA_CHUNK_BYTES	(LACUNA_CHUNK_BITS / BITS_PER_BYTE)

/* The wire counts in 4 KiB whatever the kernel's page size is. */
#define LACUNA_PFN_SHIFT	(PAGE_SHIFT - VIRTIO_BALLOON_BITMAP_PFN_SHIFT)

/* The most descriptors of one chain: a header and a piece of the bitmap. */
#define LACUNA_CHAIN_LENGTH	2

/* How long the device may keep a buffer before the driver stops waiting. */
#define LACUNA_USED_TIMEOUT	(5 * HZ)

/*
 * A list longer than one hold is walked by rotating it, so its end cannot be
 * seen. That many blocks in a row that are known already mean it came round.
 * A few known blocks mean nothing: a block split since it was seen leaves its
 * pieces at the heads of shorter lists.
 */
#define LACUNA_STALE_RUN	128

static unsigned int batch = 512;
module_param(batch, uint, 0644);
MODULE_PARM_DESC(batch, "Free blocks read in one hold of a zone's lock (at least 1)");

/* The device configuration space up to the field this driver reads. */
struct lacuna_config {
	struct {
		__le32 num_pages;
		__le32 actual;
		__le32 free_page_hint_cmd_id;
		__le32 poison_val;
	} balloon;
	__le32 free_page_bitmap_cmd_id;
};

/*
 * A piece of the bitmap. In its own kmalloc()ed memory because the device
 * reads the header. Chunks are made when first needed and live until remove.
 */
struct lacuna_chunk {
	struct virtio_balloon_bitmap_hdr hdr;
	lacuna_word *words;
};

/* The last chain of a report, contiguous as on the wire. */
struct lacuna_tail {
	struct virtio_balloon_bitmap_hdr hdr;
	struct virtio_balloon_bitmap_figures figures;
};

struct lacuna_balloon {
	struct virtio_device *vdev;	/* constant */
	struct virtqueue *bitmap_vq;	/* NULL without the feature */
	struct workqueue_struct *wq;	/* constant */
	struct work_struct work;

	/* Woken for used buffers and for stopping. */
	wait_queue_head_t used;
	/* Set before cancel_work_sync() so that the work does not wait out. */
	bool stopping;
	/* Counts config interrupts, so that the walk asks the device rarely. */
	atomic_t config_changes;

	/* From here on: the work's own. */
	int config_seen;		/* config_changes at the last read */
	u32 cmd_id;			/* the request last taken up */
	unsigned int in_flight;		/* chains the device owns */

	/* Indexed by bit >> LACUNA_CHUNK_SHIFT, NULL where there is no memory. */
	struct lacuna_chunk **chunks;
	unsigned long nr_chunks;
	struct lacuna_tail *tail;
};

/* One walk over all the zones; lives on the work's stack. */
struct lacuna_walk {
	struct lacuna_balloon *vb;
	unsigned int quota;		/* blocks left in this hold */
	unsigned long flags;
	u64 lock_start;
	u64 blocks;
	u64 lock_ns;
	u32 batches;
};

/* ---- requests ---- */

static u32 lacuna_read_cmd_id(struct lacuna_balloon *vb)
{
	u32 cmd_id;

	BUILD_BUG_ON(offsetof(struct lacuna_config, free_page_bitmap_cmd_id) !=
		     VIRTIO_BALLOON_BITMAP_CMD_ID_OFFSET);

	/*
	 * Count first, value second: a change between the two is seen as
	 * news later, at worst once too often.
	 */
	vb->config_seen = atomic_read(&vb->config_changes);
	smp_rmb();
	virtio_cread_le(vb->vdev, struct lacuna_config,
			free_page_bitmap_cmd_id, &cmd_id);
	return cmd_id;
}

/*
 * Is the request being served not wanted any more? Costs an exit to the host
 * only after a config interrupt. May sleep.
 */
static bool lacuna_superseded(struct lacuna_balloon *vb)
{
	if (READ_ONCE(vb->stopping))
		return true;
	if (likely(atomic_read(&vb->config_changes) == vb->config_seen))
		return false;
	return lacuna_read_cmd_id(vb) != vb->cmd_id;
}

/* ---- the bitmap's memory ---- */

static struct lacuna_chunk *lacuna_chunk_alloc(void)
{
	/* Failing is cheap, the report just says less: do not try too hard. */
	const gfp_t gfp = GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN;
	struct lacuna_chunk *chunk;

	chunk = kzalloc(sizeof(*chunk), GFP_KERNEL);
	if (!chunk)
		return NULL;
	chunk->words = (lacuna_word *)
		__get_free_pages(gfp, get_order(LACUNA_CHUNK_BYTES));
	if (!chunk->words) {
		kfree(chunk);
		return NULL;
	}
	return chunk;
}

static void lacuna_free_bitmap(struct lacuna_balloon *vb)
{
	unsigned long i;

	for (i = 0; i < vb->nr_chunks; i++) {
		if (!vb->chunks[i])
			continue;
		free_pages((unsigned long)vb->chunks[i]->words,
			   get_order(LACUNA_CHUNK_BYTES));
		kfree(vb->chunks[i]);
	}
	kvfree(vb->chunks);
	vb->chunks = NULL;
	vb->nr_chunks = 0;
}

/* Make the table reach @count chunks. */
static int lacuna_grow_table(struct lacuna_balloon *vb, unsigned long count)
{
	struct lacuna_chunk **chunks;

	if (count <= vb->nr_chunks)
		return 0;
	chunks = kvcalloc(count, sizeof(*chunks), GFP_KERNEL);
	if (!chunks)
		return -ENOMEM;
	if (vb->nr_chunks)
		memcpy(chunks, vb->chunks, vb->nr_chunks * sizeof(*chunks));
	kvfree(vb->chunks);
	vb->chunks = chunks;
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
static int lacuna_size_bitmap(struct lacuna_balloon *vb)
{
	unsigned long have = 0, missing = 0;
	int nid;

	for_each_online_node(nid) {
		struct zone *zones = NODE_DATA(nid)->node_zones;
		int z;

		for (z = 0; z < MAX_NR_ZONES; z++) {
			unsigned long i, end;

			if (!populated_zone(&zones[z]))
				continue;
			i = zones[z].zone_start_pfn >>
				(LACUNA_CHUNK_SHIFT - LACUNA_PFN_SHIFT);
			end = ((zone_end_pfn(&zones[z]) - 1) >>
				(LACUNA_CHUNK_SHIFT - LACUNA_PFN_SHIFT)) + 1;
			if (lacuna_grow_table(vb, end)) {
				missing += end - i;
				continue;
			}
			for (; i < end; i++) {
				if (!vb->chunks[i])
					vb->chunks[i] = lacuna_chunk_alloc();
				if (vb->chunks[i])
					have++;
				else
					missing++;
			}
		}
		cond_resched();
	}

	if (missing)
		dev_warn_ratelimited(&vb->vdev->dev,
				     "no memory for %lu of the bitmap's chunks\n",
				     missing);
	return have ? 0 : -ENOMEM;
}

static void lacuna_clear_bitmap(struct lacuna_balloon *vb)
{
	unsigned long i;

	for (i = 0; i < vb->nr_chunks; i++) {
		if (vb->chunks[i])
			memset(vb->chunks[i]->words, 0, LACUNA_CHUNK_BYTES);
		cond_resched();
	}
}

/* ---- the walk ---- */

static void lacuna_hold(struct lacuna_walk *walk, spinlock_t *lock)
	__acquires(lock)
{
	spin_lock_irqsave(lock, walk->flags);
	walk->lock_start = ktime_get_ns();
	walk->quota = max(READ_ONCE(batch), 1U);
	walk->batches++;
}

static void lacuna_drop(struct lacuna_walk *walk, spinlock_t *lock)
	__releases(lock)
{
	u64 held = ktime_get_ns() - walk->lock_start;

	spin_unlock_irqrestore(lock, walk->flags);
	if (held > walk->lock_ns)
		walk->lock_ns = held;
}

/*
 * Returns whether the block is news. A block with no chunk (memory that was
 * plugged in a moment ago, or a failed allocation) is left out; calling it
 * known would end a list of such blocks before its time.
 */
static bool lacuna_mark(struct lacuna_walk *walk, unsigned long pfn,
			unsigned int order)
{
	struct lacuna_balloon *vb = walk->vb;
	unsigned long bit = pfn << LACUNA_PFN_SHIFT;
	unsigned long i = bit >> LACUNA_CHUNK_SHIFT;

	if (i >= vb->nr_chunks || !vb->chunks[i])
		return true;
	/*
	 * A block never crosses chunks: it is naturally aligned and, as the
	 * caller's BUILD_BUG_ON says, never larger than one.
	 */
	if (!lacuna_set_block(vb->chunks[i]->words,
			      bit & (LACUNA_CHUNK_BITS - 1),
			      order + LACUNA_PFN_SHIFT))
		return false;
	walk->blocks++;
	return true;
}

/*
 * Read one free list. Called and returns with the list's lock held, and drops
 * it whenever the hold's quota is used up.
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
 *   - and no list is given more visits than there were free blocks to be on it
 *     when it was begun, however fast others free.
 *
 * Each block is on the list while it is looked at, under the lock, so none is
 * reported that was not free at that moment.
 *
 * Returns false to end the walk.
 */
static bool lacuna_walk_list(struct lacuna_walk *walk, spinlock_t *lock,
			     struct list_head *list, unsigned int order,
			     unsigned long visits)
	__must_hold(lock)
{
	unsigned int stale = 0;
	struct list_head *pos;

	for (;;) {
		bool stop;

		list_for_each(pos, list) {
			struct page *page;

			if (!visits || stale >= LACUNA_STALE_RUN)
				return true;
			if (!walk->quota)
				break;
			visits--;
			walk->quota--;
			/* buddy_list and pcp_list are one place in the page. */
			page = list_entry(pos, struct page, buddy_list);
			if (lacuna_mark(walk, page_to_pfn(page), order))
				stale = 0;
			else
				stale++;
		}
		if (pos == list)
			return true;

		list_rotate_to_front(pos, list);
		lacuna_drop(walk, lock);
		cond_resched();
		stop = lacuna_superseded(walk->vb);
		lacuna_hold(walk, lock);
		if (stop)
			return false;
	}
}

static bool lacuna_walk_zone(struct lacuna_walk *walk, struct zone *zone)
{
	bool finished = true;
	unsigned int order;
	int type;

	BUILD_BUG_ON(ARRAY_SIZE(zone->free_area) - 1 + LACUNA_PFN_SHIFT >
		     LACUNA_CHUNK_SHIFT);

	lacuna_hold(walk, &zone->lock);
	/*
	 * Large blocks first: what is split while the lock is dropped turns up
	 * again in the lists still to come and costs a visit, what is merged
	 * upwards would be missed, and allocation splits more than it merges.
	 */
	for (order = ARRAY_SIZE(zone->free_area); finished && order--; ) {
		struct free_area *area = &zone->free_area[order];

		for (type = 0; finished && type < MIGRATE_TYPES; type++)
			finished = lacuna_walk_list(walk, &zone->lock,
						    &area->free_list[type],
						    order, area->nr_free);
	}
	lacuna_drop(walk, &zone->lock);
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
static bool lacuna_walk_cpus(struct lacuna_walk *walk, struct zone *zone)
{
	bool finished = true;
	int cpu;

	BUILD_BUG_ON(offsetof(struct page, pcp_list) !=
		     offsetof(struct page, buddy_list));

	for_each_possible_cpu(cpu) {
		struct per_cpu_pages *pcp =
			per_cpu_ptr(zone->per_cpu_pageset, cpu);
		unsigned int i;

		if (!READ_ONCE(pcp->count))
			continue;
		lacuna_hold(walk, &pcp->lock);
		for (i = 0; finished && i < ARRAY_SIZE(pcp->lists); i++) {
			unsigned int order = i / MIGRATE_PCPTYPES;

			/* The lists after those of the small orders. */
			if (order > PAGE_ALLOC_COSTLY_ORDER)
				order = pageblock_order;
			finished = lacuna_walk_list(walk, &pcp->lock,
						    &pcp->lists[i], order,
						    pcp->count);
		}
		lacuna_drop(walk, &pcp->lock);
		if (!finished)
			break;
		cond_resched();
	}
	return finished;
}

/* Returns false if the request was superseded on the way. */
static bool lacuna_walk_all(struct lacuna_walk *walk)
{
	int nid;

	for_each_online_node(nid) {
		struct zone *zones = NODE_DATA(nid)->node_zones;
		int z;

		for (z = 0; z < MAX_NR_ZONES; z++) {
			if (!populated_zone(&zones[z]))
				continue;
			if (!lacuna_walk_zone(walk, &zones[z]) ||
			    !lacuna_walk_cpus(walk, &zones[z]))
				return false;
			cond_resched();
			if (lacuna_superseded(walk->vb))
				return false;
		}
	}
	return true;
}

/* ---- the queue ---- */

static void lacuna_used(struct virtqueue *vq)
{
	struct lacuna_balloon *vb = vq->vdev->priv;

	wake_up(&vb->used);
}

static unsigned int lacuna_reap(struct lacuna_balloon *vb)
{
	unsigned int len;

	while (vb->in_flight && virtqueue_get_buf(vb->bitmap_vq, &len))
		vb->in_flight--;
	return vb->in_flight;
}

/* Wait until the device owns no more than @target chains. */
static int lacuna_wait_used(struct lacuna_balloon *vb, unsigned int target)
{
	wait_event_timeout(vb->used,
			   lacuna_reap(vb) <= target ||
			   virtqueue_is_broken(vb->bitmap_vq) ||
			   READ_ONCE(vb->stopping),
			   LACUNA_USED_TIMEOUT);
	if (vb->in_flight <= target)
		return 0;
	if (READ_ONCE(vb->stopping))
		return -ESHUTDOWN;
	return virtqueue_is_broken(vb->bitmap_vq) ? -EIO : -ETIMEDOUT;
}

/* Hand one chain to the device, making room first if the ring is full. */
static int lacuna_send(struct lacuna_balloon *vb, struct scatterlist *sg,
		       unsigned int count, void *token)
{
	int err;

	for (;;) {
		err = virtqueue_add_outbuf(vb->bitmap_vq, sg, count, token,
					   GFP_KERNEL);
		if (err != -ENOSPC)
			break;
		/* Full and yet empty cannot be; do not loop on it. */
		if (!vb->in_flight)
			break;
		virtqueue_kick(vb->bitmap_vq);
		err = lacuna_wait_used(vb, vb->in_flight - 1);
		if (err)
			return err;
	}
	if (!err)
		vb->in_flight++;
	return err;
}

static void lacuna_fill_header(struct virtio_balloon_bitmap_hdr *hdr,
			       u32 cmd_id, u16 kind, u16 flags, u64 start,
			       u32 bits)
{
	hdr->cmd_id = cpu_to_le32(cmd_id);
	hdr->kind = cpu_to_le16(kind);
	hdr->flags = cpu_to_le16(flags);
	hdr->start_pfn = cpu_to_le64(start);
	hdr->num_bits = cpu_to_le32(bits);
	hdr->reserved = 0;
}

/*
 * Send the bitmap, a chain for each chunk that has a bit set. @first is set
 * until the report's first chain is sent. Adds the bits sent to @pages.
 */
static int lacuna_send_bitmap(struct lacuna_balloon *vb, bool *first,
			      u64 *pages)
{
	struct scatterlist sg[LACUNA_CHAIN_LENGTH];
	unsigned long i;
	int err;

	BUILD_BUG_ON(LACUNA_CHUNK_BITS > VIRTIO_BALLOON_BITMAP_MAX_BITS);

	for (i = 0; i < vb->nr_chunks; i++) {
		struct lacuna_chunk *chunk = vb->chunks[i];
		unsigned long weight;
		size_t start, length;

		cond_resched();
		if (!chunk)
			continue;
		weight = lacuna_trim(chunk->words, LACUNA_CHUNK_WORDS, &start,
				     &length);
		if (!weight)
			continue;
		if (lacuna_superseded(vb))
			return -ECANCELED;

		lacuna_fill_header(&chunk->hdr, vb->cmd_id,
				   VIRTIO_BALLOON_BITMAP_KIND_PAGES,
				   *first ? VIRTIO_BALLOON_BITMAP_FLAG_FIRST : 0,
				   ((u64)i << LACUNA_CHUNK_SHIFT) +
				   start * LACUNA_WORD_BITS,
				   length * LACUNA_WORD_BITS);
		sg_init_table(sg, ARRAY_SIZE(sg));
		sg_set_buf(&sg[0], &chunk->hdr, sizeof(chunk->hdr));
		sg_set_buf(&sg[1], chunk->words + start,
			   length * sizeof(*chunk->words));
		err = lacuna_send(vb, sg, ARRAY_SIZE(sg), chunk);
		if (err)
			return err;
		*first = false;
		*pages += weight;
	}
	return 0;
}

/* Send the report's last chain. */
static int lacuna_send_tail(struct lacuna_balloon *vb, u16 flags,
			    const struct lacuna_walk *walk, u64 pages,
			    u64 walk_ns)
{
	struct virtio_balloon_bitmap_figures *figures = &vb->tail->figures;
	struct scatterlist sg;

	lacuna_fill_header(&vb->tail->hdr, vb->cmd_id,
			   VIRTIO_BALLOON_BITMAP_KIND_FIGURES,
			   flags | VIRTIO_BALLOON_BITMAP_FLAG_LAST, 0, 0);
	figures->blocks = cpu_to_le64(walk->blocks);
	figures->pages = cpu_to_le64(pages);
	figures->walk_ns = cpu_to_le64(walk_ns);
	figures->lock_ns = cpu_to_le64(walk->lock_ns);
	figures->batches = cpu_to_le32(walk->batches);
	figures->reserved = 0;
	sg_init_one(&sg, vb->tail, sizeof(*vb->tail));
	return lacuna_send(vb, &sg, 1, vb->tail);
}

/*
 * Serve the request in vb->cmd_id. Returns -ECANCELED if it was superseded:
 * then nothing more is sent for it, the device does not want it.
 */
static int lacuna_report(struct lacuna_balloon *vb)
{
	struct lacuna_walk walk = { .vb = vb };
	u64 start, walk_ns = 0, pages = 0;
	bool first = true;
	u16 flags;
	int err;

	err = lacuna_size_bitmap(vb);
	if (!err) {
		lacuna_clear_bitmap(vb);
		start = ktime_get_ns();
		if (!lacuna_walk_all(&walk))
			return -ECANCELED;
		walk_ns = ktime_get_ns() - start;
		err = lacuna_send_bitmap(vb, &first, &pages);
	}

	/*
	 * Out of memory, here or in the DMA mapping, is worth telling so that
	 * the host need not wait. A queue that does not work cannot tell.
	 */
	if (err && err != -ENOMEM)
		return err;
	flags = err ? VIRTIO_BALLOON_BITMAP_FLAG_FAILED : 0;
	if (first)
		flags |= VIRTIO_BALLOON_BITMAP_FLAG_FIRST;
	return lacuna_send_tail(vb, flags, &walk, pages, walk_ns) ?: err;
}

static void lacuna_report_work(struct work_struct *work)
{
	struct lacuna_balloon *vb =
		container_of(work, struct lacuna_balloon, work);
	struct device *dev = &vb->vdev->dev;
	u32 cmd_id;
	int err;

	if (READ_ONCE(vb->stopping) || virtqueue_is_broken(vb->bitmap_vq))
		return;

	/*
	 * Chains the device kept too long last time: their memory is not ours
	 * to write, and the memory that can tell the device so is among it.
	 */
	err = lacuna_wait_used(vb, 0);
	if (err) {
		if (err != -ESHUTDOWN)
			dev_err_ratelimited(dev,
					    "the device keeps %u buffers, no report: %d\n",
					    vb->in_flight, err);
		return;
	}

	cmd_id = lacuna_read_cmd_id(vb);
	if (cmd_id == vb->cmd_id)
		return;
	vb->cmd_id = cmd_id;
	if (cmd_id < VIRTIO_BALLOON_BITMAP_CMD_FIRST)
		return;

	err = lacuna_report(vb);
	virtqueue_kick(vb->bitmap_vq);
	if (err == -ECANCELED) {
		/*
		 * The new value may have been read ahead of its interrupt;
		 * do not depend on that one to come.
		 */
		if (!READ_ONCE(vb->stopping))
			queue_work(vb->wq, &vb->work);
		dev_dbg(dev, "request %u superseded\n", cmd_id);
	} else if (err && err != -ESHUTDOWN) {
		dev_err_ratelimited(dev, "request %u failed: %d\n", cmd_id,
				    err);
	}

	err = lacuna_wait_used(vb, 0);
	if (err && err != -ESHUTDOWN)
		dev_err_ratelimited(dev,
				    "request %u: %u buffers not returned: %d\n",
				    cmd_id, vb->in_flight, err);
}

/* Interrupt context. The core calls this only between probe and remove. */
static void lacuna_config_changed(struct virtio_device *vdev)
{
	struct lacuna_balloon *vb = vdev->priv;

	if (!vb->bitmap_vq)
		return;
	atomic_inc(&vb->config_changes);
	queue_work(vb->wq, &vb->work);
}

/* ---- the driver's life ---- */

/*
 * A page the host skips reads as zero on the other side, or as poison_val if
 * that is negotiated. A guest that checks the contents of free pages when it
 * hands them out must have the latter, or not be helped at all.
 */
static int lacuna_validate(struct virtio_device *vdev)
{
	if (!virtio_has_feature(vdev, VIRTIO_F_VERSION_1)) {
		dev_err(&vdev->dev, "the device does not offer VIRTIO_F_VERSION_1\n");
		return -EINVAL;
	}
	if (!vdev->config->get) {
		dev_err(&vdev->dev, "no access to the configuration space\n");
		return -EINVAL;
	}

	if (!page_poisoning_enabled_static() && !want_init_on_free()) {
		__virtio_clear_bit(vdev, VIRTIO_BALLOON_F_PAGE_POISON);
	} else if (page_poisoning_enabled_static() &&
		   !virtio_has_feature(vdev, VIRTIO_BALLOON_F_PAGE_POISON) &&
		   virtio_has_feature(vdev, VIRTIO_BALLOON_F_FREE_PAGE_BITMAP)) {
		dev_warn(&vdev->dev,
			 "pages are poisoned and the device cannot know: no reports\n");
		__virtio_clear_bit(vdev, VIRTIO_BALLOON_F_FREE_PAGE_BITMAP);
	}
	return 0;
}

static void lacuna_tell_poison(struct virtio_device *vdev)
{
	/* Poisoning takes precedence, as it does in the page allocator. */
	__u32 poison = page_poisoning_enabled_static() ?
		       PAGE_POISON * 0x01010101U : 0;

	if (!virtio_has_feature(vdev, VIRTIO_BALLOON_F_PAGE_POISON))
		return;
	virtio_cwrite_le(vdev, struct virtio_balloon_config, poison_val,
			 &poison);
}

static int lacuna_init_vqs(struct lacuna_balloon *vb)
{
	/*
	 * The first two are never used. They are named because the transports
	 * number the queues that are, one after the other.
	 */
	static const char * const names[LACUNA_MAX_VQS] = {
		"inflate", "deflate", "bitmap",
	};
	vq_callback_t *callbacks[LACUNA_MAX_VQS] = { NULL, NULL, lacuna_used };
	struct virtqueue *vqs[LACUNA_MAX_VQS] = {};
	bool bitmap = virtio_has_feature(vb->vdev,
					 VIRTIO_BALLOON_F_FREE_PAGE_BITMAP);
	int err;

	vb->bitmap_vq = NULL;
	err = lacuna_find_vqs(vb->vdev, bitmap ? 3 : 2, vqs, callbacks, names);
	if (err)
		return err;
	if (!bitmap)
		return 0;
	/* The core warns with a stack trace about a chain that never fits. */
	if (virtqueue_get_vring_size(vqs[2]) < LACUNA_CHAIN_LENGTH) {
		dev_err(&vb->vdev->dev, "the bitmap queue is too small\n");
		vb->vdev->config->del_vqs(vb->vdev);
		return -EINVAL;
	}
	vb->bitmap_vq = vqs[2];
	return 0;
}

/* Bring the device to life; the work may run from here on. */
static int lacuna_start(struct lacuna_balloon *vb)
{
	int err;

	err = lacuna_init_vqs(vb);
	if (err)
		return err;
	lacuna_tell_poison(vb->vdev);

	vb->cmd_id = VIRTIO_BALLOON_BITMAP_CMD_STOP;
	vb->in_flight = 0;
	WRITE_ONCE(vb->stopping, false);
	virtio_device_ready(vb->vdev);

	/* The request may be older than the driver: no interrupt then. */
	if (vb->bitmap_vq)
		queue_work(vb->wq, &vb->work);
	return 0;
}

/*
 * The reverse. The core has switched config interrupts off, so that nothing
 * but the work itself can queue the work, and cancelling forbids that.
 */
static void lacuna_stop(struct lacuna_balloon *vb)
{
	WRITE_ONCE(vb->stopping, true);
	wake_up(&vb->used);
	cancel_work_sync(&vb->work);

	/* After the reset the device reads no buffer any more. */
	virtio_reset_device(vb->vdev);
	if (vb->bitmap_vq) {
		/* Ends the DMA mappings of buffers that never came back. */
		while (virtqueue_detach_unused_buf(vb->bitmap_vq))
			;
	}
	vb->in_flight = 0;
	vb->bitmap_vq = NULL;
	vb->vdev->config->del_vqs(vb->vdev);
}

static int lacuna_probe(struct virtio_device *vdev)
{
	struct lacuna_balloon *vb;
	int err;

	vb = kzalloc(sizeof(*vb), GFP_KERNEL);
	if (!vb)
		return -ENOMEM;
	vb->vdev = vdev;
	vdev->priv = vb;
	INIT_WORK(&vb->work, lacuna_report_work);
	init_waitqueue_head(&vb->used);
	atomic_set(&vb->config_changes, 0);

	vb->tail = kzalloc(sizeof(*vb->tail), GFP_KERNEL);
	if (!vb->tail) {
		err = -ENOMEM;
		goto err_free;
	}

	/*
	 * Ordered: one report at a time. Freezable: the device must not read
	 * buffers while the system image is made.
	 */
	vb->wq = alloc_ordered_workqueue("lacuna_balloon", WQ_FREEZABLE);
	if (!vb->wq) {
		err = -ENOMEM;
		goto err_tail;
	}

	/*
	 * Now rather than at the first request, when memory may be short. If
	 * it is short now, each request tries again.
	 */
	if (virtio_has_feature(vdev, VIRTIO_BALLOON_F_FREE_PAGE_BITMAP))
		lacuna_size_bitmap(vb);

	err = lacuna_start(vb);
	if (err)
		goto err_bitmap;
	return 0;

err_bitmap:
	lacuna_free_bitmap(vb);
	destroy_workqueue(vb->wq);
err_tail:
	kfree(vb->tail);
err_free:
	vdev->priv = NULL;
	kfree(vb);
	return err;
}

static void lacuna_remove(struct virtio_device *vdev)
{
	struct lacuna_balloon *vb = vdev->priv;

	lacuna_stop(vb);
	destroy_workqueue(vb->wq);
	lacuna_free_bitmap(vb);
	kfree(vb->tail);
	vdev->priv = NULL;
	kfree(vb);
}

#ifdef CONFIG_PM_SLEEP
static int lacuna_freeze(struct virtio_device *vdev)
{
	lacuna_stop(vdev->priv);
	return 0;
}

static int lacuna_restore(struct virtio_device *vdev)
{
	return lacuna_start(vdev->priv);
}
#endif

static const unsigned int lacuna_features[] = {
	VIRTIO_BALLOON_F_PAGE_POISON,
	VIRTIO_BALLOON_F_FREE_PAGE_BITMAP,
};

static const struct virtio_device_id lacuna_ids[] = {
	{ VIRTIO_ID_BALLOON, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, lacuna_ids);

static struct virtio_driver lacuna_driver = {
	.driver.name		= KBUILD_MODNAME,
	.driver.owner		= THIS_MODULE,
	.feature_table		= lacuna_features,
	.feature_table_size	= ARRAY_SIZE(lacuna_features),
	.id_table		= lacuna_ids,
	.validate		= lacuna_validate,
	.probe			= lacuna_probe,
	.remove			= lacuna_remove,
	.config_changed		= lacuna_config_changed,
#ifdef CONFIG_PM_SLEEP
	.freeze			= lacuna_freeze,
	.restore		= lacuna_restore,
#endif
};
module_virtio_driver(lacuna_driver);

MODULE_DESCRIPTION("Free page bitmaps for the virtio balloon");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
