/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the module's files share: the device's state, who owns which part of
 * it, and the functions that cross files.
 */
#ifndef LACUNA_H
#define LACUNA_H

#include <linux/atomic.h>
#include <linux/balloon_compaction.h>
#include <linux/device.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/page_reporting.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/virtio.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_balloon_bitmap.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "compat.h"
#include "lacuna_walk.h"

/* The wire counts in 4 KiB whatever the kernel's page size is. */
#define LACUNA_PFN_SHIFT	(PAGE_SHIFT - VIRTIO_BALLOON_BITMAP_PFN_SHIFT)
#define LACUNA_PFNS_PER_PAGE	(1U << LACUNA_PFN_SHIFT)

/* How many page numbers one buffer of the inflate or deflate queue carries. */
#define LACUNA_PFNS_MAX		256

/* How long the device may keep a buffer before the driver stops waiting. */
#define LACUNA_USED_TIMEOUT	(5 * HZ)

/* How long what the host wants keeps the machine from suspending again. */
#define LACUNA_AWAKE_MS		1000

/* Queues in the order in which transports number those that exist. */
enum lacuna_queue {
	LACUNA_VQ_INFLATE,
	LACUNA_VQ_DEFLATE,
	LACUNA_VQ_STATS,
	LACUNA_VQ_HINT,
	LACUNA_VQ_REPORTING,
	LACUNA_VQ_BITMAP,
	LACUNA_VQS
};

/* The device configuration space up to the last field this driver reads. */
struct lacuna_config {
	struct {
		__le32 num_pages;
		__le32 actual;
		__le32 free_page_hint_cmd_id;
		__le32 poison_val;
	} balloon;
	__le32 free_page_bitmap_cmd_id;
};

/* The last chain of a report, contiguous as on the wire. */
struct lacuna_tail {
	struct virtio_balloon_bitmap_hdr hdr;
	struct virtio_balloon_bitmap_figures figures;
};

/* What debugfs shows. */
struct lacuna_figures {
	u32 cmd_id;
	int error;
	u64 blocks;
	u64 pages;
	u64 walk_ns;
	u64 lock_ns;		/* the longest hold */
	u64 batches;
	u64 total_ns;		/* request read to last buffer returned */
};

struct lacuna_totals {
	u64 requests;
	u64 reports;
	u64 stale;		/* requests given up for a newer one */
	u64 failed;
	u64 pages;
	u64 batches;
	u64 walk_ns;
	u64 lock_ns;		/* the longest hold of all */
	u64 timeouts;		/* times the device kept a buffer too long */
};

/*
 * One balloon device.
 *
 *   - probe, remove, freeze and restore own everything while nothing else can
 *     run: before virtio_device_ready(), and after lacuna_stop() has stopped
 *     the rest.
 *   - Interrupt context touches config_changes (atomic), the works (queueing)
 *     and the wait queue (waking), nothing else.
 *   - From virtqueue_add_*() until virtqueue_get_buf() returns it, the device
 *     owns a buffer and what it is made of.
 */
struct lacuna_balloon {
	struct virtio_device *vdev;		/* constant */
	struct workqueue_struct *wq;		/* constant; freezable */
	struct virtqueue *vqs[LACUNA_VQS];	/* NULL where there is none */

	/* Woken for used buffers, config changes and stopping. */
	wait_queue_head_t wait;
	/* Nothing new is begun. Set first of all when stopping. */
	bool stopping;
	/* The device was reset: it reads no buffer any more, none comes back. */
	bool dead;
	/* Users of a queue that wait for the device without a limit. */
	atomic_t waiters;
	/* Counts config interrupts, so that others ask the device rarely. */
	atomic_t config_changes;

	/* The balloon (balloon.c). */
	struct delayed_work size_work;
	struct mutex balloon_lock;
	/* Under balloon_lock from here on. */
	struct balloon_dev_info balloon;	/* has a lock of its own */
	unsigned int nr_pages;			/* the kernel's pages in it */
	unsigned int told;			/* nr_pages as last written */
	unsigned int nr_pfns;
	__virtio32 pfns[LACUNA_PFNS_MAX];
	struct virtqueue *owing;		/* still has pfns, long overdue */
	/*
	 * Pages that left the list and are still in the balloon for the
	 * device: those of a deflate buffer that it owes, those of one that
	 * could not be sent, and the one that compaction replaced.
	 */
	struct list_head leaving;
	struct list_head untold;
	struct page *limbo;
	struct notifier_block oom;

	/* Statistics (stats.c); the work's own. */
	struct work_struct stats_work;
	bool stats_due;				/* with no buffer used */
	struct virtio_balloon_stat stats[VIRTIO_BALLOON_S_NR];

	/* Free page reporting (stats.c); page_reporting's work calls. */
	struct page_reporting_dev_info reporting;
	bool reporting_registered;

	/* Free page hints in blocks (hint.c). */
	struct work_struct hint_work;
	int hint_seen;				/* the work's own */
	u32 hint_id;				/* the work's own */
	bool hint_done;				/* the work's own: DONE was read */
	bool hint_waits;			/* the work has to be begun again */
	unsigned int hint_cmds;			/* the work's own */
	__virtio32 hint_start, hint_stop;	/* the device's while hint_cmds */
	spinlock_t hint_lock;			/* the two below */
	struct list_head hint_pages;
	unsigned long hint_blocks;
	LACUNA_SHRINKER shrinker;

	/* Bitmap reports (report.c); the work's own. */
	struct work_struct report_work;
	int report_seen;		/* config_changes at the last read */
	u32 cmd_id;			/* the request last taken up */
	unsigned int in_flight;		/* chains the device owns */
	bool overdue;			/* the work gave up waiting for them */
	/* Indexed by bit >> LACUNA_CHUNK_SHIFT, NULL where there is no memory. */
	lacuna_word **words;
	struct virtio_balloon_bitmap_hdr **hdrs;
	unsigned long nr_chunks;
	struct lacuna_tail *tail;

	/*
	 * CPUs' page sets of a zone may be given up while memory is going
	 * offline; nobody looks at them then.
	 */
	struct mutex cpus_lock;		/* held while looking */
	unsigned int offlining;		/* under cpus_lock */
	struct notifier_block memory;

	/* Figures (debugfs.c). */
	struct mutex figures_lock;
	struct lacuna_figures last;
	struct lacuna_totals totals;
	struct dentry *debugfs;
};

static inline bool lacuna_has(struct lacuna_balloon *vb, unsigned int feature)
{
	return virtio_has_feature(vb->vdev, feature);
}

/*
 * Has the device used the one buffer of @vq, or will it never? The vq's user
 * sees to it that there are not two of these at once for one queue.
 */
static inline bool lacuna_returned(struct lacuna_balloon *vb,
				   struct virtqueue *vq, bool *used)
{
	unsigned int len;

	if (virtqueue_get_buf(vq, &len))
		*used = true;
	return *used || virtqueue_is_broken(vq) || READ_ONCE(vb->dead);
}

/* report.c */
void lacuna_report_init(struct lacuna_balloon *vb);
int lacuna_report_prepare(struct lacuna_balloon *vb);
void lacuna_report_release(struct lacuna_balloon *vb);

/* bitmap.c */
int lacuna_size_bitmap(struct lacuna_balloon *vb);
void lacuna_clear_bitmap(struct lacuna_balloon *vb);
void lacuna_free_bitmap(struct lacuna_balloon *vb);

/* zones.c */
bool lacuna_superseded(struct lacuna_balloon *vb);
bool lacuna_walk_memory(struct lacuna_balloon *vb,
			struct lacuna_figures *figures);
int lacuna_memory_notify(struct notifier_block *nb, unsigned long action,
			 void *arg);

/* balloon.c */
void lacuna_balloon_init(struct lacuna_balloon *vb);
int lacuna_balloon_prepare(struct lacuna_balloon *vb);
void lacuna_balloon_release(struct lacuna_balloon *vb);
void lacuna_balloon_empty(struct lacuna_balloon *vb);
void lacuna_write_actual(struct lacuna_balloon *vb);

/* stats.c */
void lacuna_stats_init(struct lacuna_balloon *vb);
void lacuna_stats_start(struct lacuna_balloon *vb);
void lacuna_stats_request(struct virtqueue *vq);
void lacuna_reporting_start(struct lacuna_balloon *vb);
void lacuna_reporting_stop(struct lacuna_balloon *vb);

/* hint.c */
void lacuna_hint_init(struct lacuna_balloon *vb);
int lacuna_hint_prepare(struct lacuna_balloon *vb);
void lacuna_hint_release(struct lacuna_balloon *vb);
void lacuna_hint_free(struct lacuna_balloon *vb, unsigned long count);

/* debugfs.c */
void lacuna_debugfs_create(void);
void lacuna_debugfs_destroy(void);
void lacuna_debugfs_add(struct lacuna_balloon *vb);
void lacuna_debugfs_remove(struct lacuna_balloon *vb);

#endif /* LACUNA_H */
