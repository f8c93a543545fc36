// SPDX-License-Identifier: GPL-2.0
/*
 * Memory statistics and free page reporting: what the kernel counts and
 * isolates, passed on.
 */
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/swap.h>
#include <linux/vmstat.h>

#include "lacuna.h"

/* ---- statistics ---- */

static void lacuna_stat(struct lacuna_balloon *vb, unsigned int *count,
			u16 tag, u64 value)
{
	if (WARN_ON_ONCE(*count >= ARRAY_SIZE(vb->stats)))
		return;
	vb->stats[*count].tag = cpu_to_virtio16(vb->vdev, tag);
	vb->stats[*count].val = cpu_to_virtio64(vb->vdev, value);
	++*count;
}

static void lacuna_stat_pages(struct lacuna_balloon *vb, unsigned int *count,
			      u16 tag, u64 pages)
{
	lacuna_stat(vb, count, tag, pages << PAGE_SHIFT);
}

static void lacuna_event_stats(struct lacuna_balloon *vb, unsigned int *count)
{
#ifdef CONFIG_VM_EVENT_COUNTERS
	unsigned long events[NR_VM_EVENT_ITEMS];
#ifdef VIRTIO_BALLOON_S_OOM_KILL
	unsigned long stalls = 0;
	int zone;
#endif

	all_vm_events(events);
	lacuna_stat_pages(vb, count, VIRTIO_BALLOON_S_SWAP_IN, events[PSWPIN]);
	lacuna_stat_pages(vb, count, VIRTIO_BALLOON_S_SWAP_OUT,
			  events[PSWPOUT]);
	lacuna_stat(vb, count, VIRTIO_BALLOON_S_MAJFLT, events[PGMAJFAULT]);
	lacuna_stat(vb, count, VIRTIO_BALLOON_S_MINFLT, events[PGFAULT]);
#ifdef CONFIG_HUGETLB_PAGE
	lacuna_stat(vb, count, VIRTIO_BALLOON_S_HTLB_PGALLOC,
		    events[HTLB_BUDDY_PGALLOC]);
	lacuna_stat(vb, count, VIRTIO_BALLOON_S_HTLB_PGFAIL,
		    events[HTLB_BUDDY_PGALLOC_FAIL]);
#endif
	/* Kernels whose headers know the tag report it (since 6.12). */
#ifdef VIRTIO_BALLOON_S_OOM_KILL
	lacuna_stat(vb, count, VIRTIO_BALLOON_S_OOM_KILL, events[OOM_KILL]);
	for (zone = 0; zone < MAX_NR_ZONES; zone++)
		stalls += events[ALLOCSTALL_NORMAL - ZONE_NORMAL + zone];
	lacuna_stat(vb, count, VIRTIO_BALLOON_S_ALLOC_STALL, stalls);
	lacuna_stat_pages(vb, count, VIRTIO_BALLOON_S_ASYNC_SCAN,
			  events[PGSCAN_KSWAPD]);
	lacuna_stat_pages(vb, count, VIRTIO_BALLOON_S_DIRECT_SCAN,
			  events[PGSCAN_DIRECT]);
	lacuna_stat_pages(vb, count, VIRTIO_BALLOON_S_ASYNC_RECLAIM,
			  events[PGSTEAL_KSWAPD]);
	lacuna_stat_pages(vb, count, VIRTIO_BALLOON_S_DIRECT_RECLAIM,
			  events[PGSTEAL_DIRECT]);
#endif
#endif
}

static unsigned int lacuna_gather_stats(struct lacuna_balloon *vb)
{
	unsigned int count = 0;
	struct sysinfo info;

	lacuna_event_stats(vb, &count);
	si_meminfo(&info);
	lacuna_stat_pages(vb, &count, VIRTIO_BALLOON_S_MEMFREE, info.freeram);
	lacuna_stat_pages(vb, &count, VIRTIO_BALLOON_S_MEMTOT, info.totalram);
	lacuna_stat_pages(vb, &count, VIRTIO_BALLOON_S_AVAIL,
			  si_mem_available());
	lacuna_stat_pages(vb, &count, VIRTIO_BALLOON_S_CACHES,
			  global_node_page_state(NR_FILE_PAGES));
	return count;
}

/* The device keeps the buffer until it wants the next figures. */
static void lacuna_send_stats(struct lacuna_balloon *vb)
{
	struct virtqueue *vq = vb->vqs[LACUNA_VQ_STATS];
	struct scatterlist sg;

	sg_init_one(&sg, vb->stats,
		    lacuna_gather_stats(vb) * sizeof(vb->stats[0]));
	if (!virtqueue_add_outbuf(vq, &sg, 1, vb, GFP_KERNEL))
		virtqueue_kick(vq);
}

static void lacuna_stats_work(struct work_struct *work)
{
	struct lacuna_balloon *vb =
		container_of(work, struct lacuna_balloon, stats_work);
	unsigned int len;

	if (READ_ONCE(vb->stopping))
		return;
	if (virtqueue_get_buf(vb->vqs[LACUNA_VQ_STATS], &len) ||
	    vb->stats_due)
		lacuna_send_stats(vb);
	vb->stats_due = false;
}

/* Interrupt context. */
void lacuna_stats_request(struct virtqueue *vq)
{
	struct lacuna_balloon *vb = vq->vdev->priv;

	if (READ_ONCE(vb->stopping))
		return;
	pm_wakeup_event(&vb->vdev->dev, LACUNA_AWAKE_MS);
	queue_work(vb->wq, &vb->stats_work);
}

void lacuna_stats_init(struct lacuna_balloon *vb)
{
	INIT_WORK(&vb->stats_work, lacuna_stats_work);
}

/* Give the device its first buffer. */
void lacuna_stats_start(struct lacuna_balloon *vb)
{
	if (!vb->vqs[LACUNA_VQ_STATS])
		return;
	vb->stats_due = true;
	queue_work(vb->wq, &vb->stats_work);
}

/* ---- free page reporting ---- */

/*
 * The pages are isolated while this runs and free again when it returns. So
 * there is no giving up before the device has let go of them, or was reset.
 */
static int lacuna_reporting(struct page_reporting_dev_info *info,
			    struct scatterlist *sg, unsigned int count)
{
	struct lacuna_balloon *vb =
		container_of(info, struct lacuna_balloon, reporting);
	struct virtqueue *vq = vb->vqs[LACUNA_VQ_REPORTING];
	bool used = false;
	int err;

	atomic_inc(&vb->waiters);
	/* Either the one who stops sees the waiter, or it is seen here. */
	smp_mb__after_atomic();
	if (READ_ONCE(vb->stopping)) {
		err = -ESHUTDOWN;
		goto out;
	}
	err = virtqueue_add_inbuf(vq, sg, count, vb, GFP_NOWAIT);
	if (err)
		goto out;
	virtqueue_kick(vq);
	wait_event_idle(vb->wait, lacuna_returned(vb, vq, &used));
	if (!used)
		err = -EIO;
out:
	if (atomic_dec_and_test(&vb->waiters))
		wake_up_all(&vb->wait);
	return err;
}

/* The device works already. Without reporting the rest does, too. */
void lacuna_reporting_start(struct lacuna_balloon *vb)
{
	struct device *dev = &vb->vdev->dev;
	int err;

	if (!vb->vqs[LACUNA_VQ_REPORTING])
		return;
	if (virtqueue_get_vring_size(vb->vqs[LACUNA_VQ_REPORTING]) <
	    PAGE_REPORTING_CAPACITY) {
		dev_warn(dev, "no free page reporting: the queue is too small\n");
		return;
	}
	memset(&vb->reporting, 0, sizeof(vb->reporting));
	vb->reporting.report = lacuna_reporting;
#if defined(CONFIG_ARM64) && defined(CONFIG_ARM64_64K_PAGES)
	/* The default would be 512 MiB there; this is 2 MiB. */
	vb->reporting.order = 5;
#endif
	err = page_reporting_register(&vb->reporting);
	if (err)
		dev_warn(dev, "no free page reporting: %d\n", err);
	else
		vb->reporting_registered = true;
}

void lacuna_reporting_stop(struct lacuna_balloon *vb)
{
	if (vb->reporting_registered)
		page_reporting_unregister(&vb->reporting);
	vb->reporting_registered = false;
}
