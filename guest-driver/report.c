// SPDX-License-Identifier: GPL-2.0
/*
 * Bitmap reports: on request the driver reads the page allocator's free lists,
 * writes what it sees into a bitmap and hands that to the device. Nothing is
 * allocated, touched or held for it, so a page in the report may be in use
 * again by the time the host reads it: that the host skips nothing it must not
 * skip is the host's duty (protocol/free-page-bitmap.md).
 */
#include <linux/build_bug.h>
#include <linux/ktime.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "lacuna.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

/* The most descriptors of one chain: a header and a piece of the bitmap. */
#define LACUNA_CHAIN_LENGTH	2

static u32 lacuna_read_cmd_id(struct lacuna_balloon *vb)
{
	u32 cmd_id;

	BUILD_BUG_ON(offsetof(struct lacuna_config, free_page_bitmap_cmd_id) !=
		     VIRTIO_BALLOON_BITMAP_CMD_ID_OFFSET);

	vb->report_seen = atomic_read(&vb->config_changes);
	/* Count first, value second: as in lacuna_superseded(). */
	smp_rmb();
	virtio_cread_le(vb->vdev, struct lacuna_config,
			free_page_bitmap_cmd_id, &cmd_id);
	return cmd_id;
}

static unsigned int lacuna_reap(struct lacuna_balloon *vb)
{
	unsigned int len;

	while (vb->in_flight &&
	       virtqueue_get_buf(vb->vqs[LACUNA_VQ_BITMAP], &len))
		vb->in_flight--;
	return vb->in_flight;
}

/* Wait until the device owns no more than @target chains. */
static int lacuna_wait_used(struct lacuna_balloon *vb, unsigned int target)
{
	struct virtqueue *vq = vb->vqs[LACUNA_VQ_BITMAP];

	wait_event_idle_timeout(vb->wait,
				lacuna_reap(vb) <= target ||
				virtqueue_is_broken(vq) ||
				READ_ONCE(vb->stopping),
				LACUNA_USED_TIMEOUT);
	if (vb->in_flight <= target)
		return 0;
	if (READ_ONCE(vb->stopping))
		return -ESHUTDOWN;
	return virtqueue_is_broken(vq) ? -EIO : -ETIMEDOUT;
}

/* Hand one chain to the device, making room first if the ring is full. */
static int lacuna_send(struct lacuna_balloon *vb, struct scatterlist *sg,
		       unsigned int count, void *token)
{
	struct virtqueue *vq = vb->vqs[LACUNA_VQ_BITMAP];
	int err;

	/*
	 * A ring that cannot ever take the chain is not worth the warning
	 * with a stack trace that the core has for it.
	 */
	if (virtqueue_get_vring_size(vq) < count)
		return -ENOMEM;

	for (;;) {
		err = virtqueue_add_outbuf(vq, sg, count, token, GFP_KERNEL);
		if (err != -ENOSPC)
			break;
		/* Full and yet empty cannot be; do not loop on it. */
		if (!vb->in_flight)
			break;
		virtqueue_kick(vq);
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
		lacuna_word *words = vb->words[i];
		unsigned long weight;
		size_t start, length;

		cond_resched();
		if (!words)
			continue;
		weight = lacuna_trim(words, LACUNA_CHUNK_WORDS, &start,
				     &length);
		if (!weight)
			continue;
		if (lacuna_superseded(vb))
			return -ECANCELED;

		lacuna_fill_header(vb->hdrs[i], vb->cmd_id,
				   VIRTIO_BALLOON_BITMAP_KIND_PAGES,
				   *first ? VIRTIO_BALLOON_BITMAP_FLAG_FIRST : 0,
				   ((u64)i << LACUNA_CHUNK_SHIFT) +
				   start * LACUNA_WORD_BITS,
				   length * LACUNA_WORD_BITS);
		sg_init_table(sg, ARRAY_SIZE(sg));
		sg_set_buf(&sg[0], vb->hdrs[i], sizeof(*vb->hdrs[i]));
		sg_set_buf(&sg[1], words + start, length * sizeof(*words));
		err = lacuna_send(vb, sg, ARRAY_SIZE(sg), words);
		if (err)
			return err;
		*first = false;
		*pages += weight;
	}
	return 0;
}

/* Send the report's last chain. */
static int lacuna_send_tail(struct lacuna_balloon *vb, u16 flags,
			    const struct lacuna_figures *f)
{
	struct virtio_balloon_bitmap_figures *figures = &vb->tail->figures;
	struct scatterlist sg;

	lacuna_fill_header(&vb->tail->hdr, vb->cmd_id,
			   VIRTIO_BALLOON_BITMAP_KIND_FIGURES,
			   flags | VIRTIO_BALLOON_BITMAP_FLAG_LAST, 0, 0);
	figures->blocks = cpu_to_le64(f->blocks);
	figures->pages = cpu_to_le64(f->pages);
	figures->walk_ns = cpu_to_le64(f->walk_ns);
	figures->lock_ns = cpu_to_le64(f->lock_ns);
	figures->batches = cpu_to_le32(f->batches);
	figures->reserved = 0;
	sg_init_one(&sg, vb->tail, sizeof(*vb->tail));
	return lacuna_send(vb, &sg, 1, vb->tail);
}

/*
 * Serve the request in vb->cmd_id. Returns -ECANCELED if it was superseded:
 * then nothing more is sent for it, the device does not want it.
 */
static int lacuna_report(struct lacuna_balloon *vb,
			 struct lacuna_figures *figures)
{
	bool first = true;
	u16 flags;
	int err, sent;

	err = lacuna_size_bitmap(vb);
	if (!err) {
		lacuna_clear_bitmap(vb);
		if (!lacuna_walk_memory(vb, figures))
			return -ECANCELED;
		err = lacuna_send_bitmap(vb, &first, &figures->pages);
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
	sent = lacuna_send_tail(vb, flags, figures);
	return sent ? sent : err;
}

static void lacuna_note(struct lacuna_balloon *vb,
			const struct lacuna_figures *f)
{
	struct lacuna_totals *totals = &vb->totals;

	mutex_lock(&vb->figures_lock);
	totals->requests++;
	if (f->error == -ECANCELED)
		totals->stale++;
	else if (f->error)
		totals->failed++;
	else
		totals->reports++;
	totals->pages += f->pages;
	totals->batches += f->batches;
	totals->walk_ns += f->walk_ns;
	totals->lock_ns = max(totals->lock_ns, f->lock_ns);
	vb->last = *f;
	mutex_unlock(&vb->figures_lock);
	trace_lacuna_report(f->cmd_id, f->error, f->blocks, f->pages,
			    f->walk_ns);
}

static void lacuna_overdue(struct lacuna_balloon *vb, u32 cmd_id, int err)
{
	if (err == -ESHUTDOWN)
		return;
	mutex_lock(&vb->figures_lock);
	vb->totals.timeouts++;
	mutex_unlock(&vb->figures_lock);
	dev_err_ratelimited(&vb->vdev->dev,
			    "request %u: %u buffers not returned: %d\n",
			    cmd_id, vb->in_flight, err);
	/* From now on the first buffer to come back starts the work again. */
	WRITE_ONCE(vb->overdue, true);
	/* Either its interrupt sees that, or the buffer is seen here. */
	smp_mb();
	if (!lacuna_reap(vb) && !READ_ONCE(vb->stopping))
		queue_work(vb->wq, &vb->report_work);
}

static void lacuna_report_work(struct work_struct *work)
{
	struct lacuna_balloon *vb =
		container_of(work, struct lacuna_balloon, report_work);
	struct virtqueue *vq = vb->vqs[LACUNA_VQ_BITMAP];
	struct lacuna_figures figures = {};
	u64 start;
	u32 cmd_id;
	int err;

	if (READ_ONCE(vb->stopping) || virtqueue_is_broken(vq))
		return;

	/*
	 * Chains the device kept too long last time: their memory is not ours
	 * to write, and the memory that can tell the device so is among it.
	 */
	err = lacuna_wait_used(vb, 0);
	if (err) {
		lacuna_overdue(vb, vb->cmd_id, err);
		return;
	}
	WRITE_ONCE(vb->overdue, false);

	cmd_id = lacuna_read_cmd_id(vb);
	if (cmd_id == vb->cmd_id)
		return;
	vb->cmd_id = cmd_id;
	if (cmd_id < VIRTIO_BALLOON_BITMAP_CMD_FIRST)
		return;

	trace_lacuna_request(cmd_id);
	start = ktime_get_ns();
	figures.cmd_id = cmd_id;
	figures.error = lacuna_report(vb, &figures);
	virtqueue_kick(vq);

	err = lacuna_wait_used(vb, 0);
	figures.total_ns = ktime_get_ns() - start;
	lacuna_note(vb, &figures);
	if (err)
		lacuna_overdue(vb, cmd_id, err);
	else if (figures.error == -ENOMEM)
		dev_warn_ratelimited(&vb->vdev->dev,
				     "request %u: no memory, an empty report\n",
				     cmd_id);
	/*
	 * The new value may have been read ahead of its interrupt; do not
	 * depend on that one to come.
	 */
	if (figures.error == -ECANCELED && !READ_ONCE(vb->stopping))
		queue_work(vb->wq, &vb->report_work);
}

void lacuna_report_init(struct lacuna_balloon *vb)
{
	INIT_WORK(&vb->report_work, lacuna_report_work);
	mutex_init(&vb->figures_lock);
	mutex_init(&vb->cpus_lock);
}

int lacuna_report_prepare(struct lacuna_balloon *vb)
{
	if (!lacuna_has(vb, VIRTIO_BALLOON_F_FREE_PAGE_BITMAP))
		return 0;
	vb->tail = kzalloc(sizeof(*vb->tail), GFP_KERNEL);
	if (!vb->tail)
		return -ENOMEM;
	/*
	 * Now rather than at the first request, when memory may be short. If
	 * it is short now, each request tries again.
	 */
	lacuna_size_bitmap(vb);
	return 0;
}

void lacuna_report_release(struct lacuna_balloon *vb)
{
	lacuna_free_bitmap(vb);
	kfree(vb->tail);
	vb->tail = NULL;
}
