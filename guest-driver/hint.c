// SPDX-License-Identifier: GPL-2.0
/*
 * Free page hints as the virtio specification has them, for hosts that know
 * nothing better: free memory is allocated block by block, shown to the device
 * and held until the device is done, or until somebody needs it. A host that
 * asks for bitmaps as well chooses by what it asks for.
 */
#include <linux/gfp.h>
#include <linux/jiffies.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/shrinker.h>

#include "lacuna.h"

/* The ids below say stop and done. */
#define LACUNA_HINT_FIRST	(VIRTIO_BALLOON_CMD_ID_DONE + 1)

#define LACUNA_BLOCK_PAGES	(1UL << LACUNA_MAX_ORDER)

/* Only what is free and easy to have, no reclaim and no reserves. */
#define LACUNA_BLOCK_GFP \
	(__GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC)

static u32 lacuna_read_hint_id(struct lacuna_balloon *vb)
{
	u32 id;

	vb->hint_seen = atomic_read(&vb->config_changes);
	/* Count first, value second: as in lacuna_superseded(). */
	smp_rmb();
	virtio_cread_le(vb->vdev, struct lacuna_config,
			balloon.free_page_hint_cmd_id, &id);
	/* Wherever it is read: the next id may follow at once. */
	if (id == VIRTIO_BALLOON_CMD_ID_DONE)
		vb->hint_done = true;
	return id;
}

static bool lacuna_hint_news(struct lacuna_balloon *vb)
{
	return atomic_read(&vb->config_changes) != vb->hint_seen;
}

/* Has the device something else in mind? May sleep. */
static bool lacuna_hint_over(struct lacuna_balloon *vb)
{
	if (READ_ONCE(vb->stopping))
		return true;
	if (!lacuna_hint_news(vb))
		return false;
	return lacuna_read_hint_id(vb) != vb->hint_id;
}

/* Give back @count blocks, or all there are. */
void lacuna_hint_free(struct lacuna_balloon *vb, unsigned long count)
{
	struct page *page;

	while (count--) {
		spin_lock_irq(&vb->hint_lock);
		page = list_first_entry_or_null(&vb->hint_pages, struct page,
						lru);
		if (page) {
			list_del(&page->lru);
			vb->hint_blocks--;
		}
		spin_unlock_irq(&vb->hint_lock);
		if (!page)
			return;
		__free_pages(page, LACUNA_MAX_ORDER);
	}
}

/* What came back: a command's end is news, a block's is only room. */
static void lacuna_hint_reap(struct lacuna_balloon *vb)
{
	unsigned int len;
	void *token;

	while ((token = virtqueue_get_buf(vb->vqs[LACUNA_VQ_HINT], &len)))
		if (token == &vb->hint_start || token == &vb->hint_stop)
			vb->hint_cmds--;
}

static bool lacuna_hint_room(struct lacuna_balloon *vb, unsigned int room)
{
	lacuna_hint_reap(vb);
	return vb->vqs[LACUNA_VQ_HINT]->num_free >= room;
}

/* Wait for @room free places. */
static int lacuna_hint_wait(struct lacuna_balloon *vb, unsigned int room)
{
	struct virtqueue *vq = vb->vqs[LACUNA_VQ_HINT];
	unsigned long end = jiffies + LACUNA_USED_TIMEOUT;

	while (!lacuna_hint_room(vb, room)) {
		long left = (long)(end - jiffies);

		if (left <= 0 || virtqueue_is_broken(vq) || lacuna_hint_over(vb))
			return -EBUSY;
		/* A kick without new buffers would be none with event index. */
		virtqueue_notify(vq);
		/* Reading what the device has in mind may sleep. */
		wait_event_idle_timeout(vb->wait,
					lacuna_hint_room(vb, room) ||
					virtqueue_is_broken(vq) ||
					READ_ONCE(vb->stopping) ||
					lacuna_hint_news(vb), left);
	}
	return 0;
}

static int lacuna_hint_command(struct lacuna_balloon *vb, __virtio32 *place,
			       u32 value)
{
	struct scatterlist sg;
	int err;

	*place = cpu_to_virtio32(vb->vdev, value);
	sg_init_one(&sg, place, sizeof(*place));
	err = virtqueue_add_outbuf(vb->vqs[LACUNA_VQ_HINT], &sg, 1, place,
				   GFP_KERNEL);
	if (!err) {
		vb->hint_cmds++;
		virtqueue_kick(vb->vqs[LACUNA_VQ_HINT]);
	}
	return err;
}

static int lacuna_hint_block(struct lacuna_balloon *vb, struct page *page)
{
	struct scatterlist sg;
	int err;

	sg_init_table(&sg, 1);
	sg_set_page(&sg, page, PAGE_SIZE << LACUNA_MAX_ORDER, 0);
	err = virtqueue_add_inbuf(vb->vqs[LACUNA_VQ_HINT], &sg, 1, page,
				  GFP_KERNEL);
	if (err)
		return err;
	spin_lock_irq(&vb->hint_lock);
	list_add(&page->lru, &vb->hint_pages);
	vb->hint_blocks++;
	spin_unlock_irq(&vb->hint_lock);
	virtqueue_kick(vb->vqs[LACUNA_VQ_HINT]);
	return 0;
}

/* Returns false if the device keeps what it needs to begin. */
static bool lacuna_hint_all(struct lacuna_balloon *vb)
{
	/* The device still reads what a command is written to. */
	if (vb->hint_cmds)
		return false;
	if (lacuna_hint_wait(vb, 2))
		return false;
	if (lacuna_hint_command(vb, &vb->hint_start, vb->hint_id))
		return true;

	/* One place is kept for the command that ends it. */
	while (!lacuna_hint_over(vb) && !lacuna_hint_wait(vb, 2)) {
		struct page *page = alloc_pages(LACUNA_BLOCK_GFP,
						LACUNA_MAX_ORDER);

		if (!page)
			break;
		if (lacuna_hint_block(vb, page)) {
			__free_pages(page, LACUNA_MAX_ORDER);
			break;
		}
		cond_resched();
	}
	if (lacuna_hint_room(vb, 1))
		lacuna_hint_command(vb, &vb->hint_stop,
				    VIRTIO_BALLOON_CMD_ID_STOP);
	return true;
}

/* Have the work begin again when a buffer comes back. */
static void lacuna_hint_later(struct lacuna_balloon *vb)
{
	WRITE_ONCE(vb->hint_waits, true);
	/* Either the interrupt sees that, or its buffer is seen here. */
	smp_mb();
	if (lacuna_hint_room(vb, 2) && !vb->hint_cmds &&
	    !READ_ONCE(vb->stopping))
		queue_work(vb->wq, &vb->hint_work);
	else
		/* A device that missed the last buffer looks again. */
		virtqueue_notify(vb->vqs[LACUNA_VQ_HINT]);
}

static void lacuna_hint_work(struct work_struct *work)
{
	struct lacuna_balloon *vb =
		container_of(work, struct lacuna_balloon, hint_work);
	u32 id, before = vb->hint_id;

	if (READ_ONCE(vb->stopping) ||
	    virtqueue_is_broken(vb->vqs[LACUNA_VQ_HINT]))
		return;
	WRITE_ONCE(vb->hint_waits, false);
	lacuna_hint_reap(vb);
	id = lacuna_read_hint_id(vb);
	if (id >= LACUNA_HINT_FIRST && id != before) {
		vb->hint_id = id;
		if (!lacuna_hint_all(vb)) {
			vb->hint_id = before;
			lacuna_hint_later(vb);
		}
		/* A change seen here may have come with an earlier notice. */
		if (lacuna_read_hint_id(vb) != id && !READ_ONCE(vb->stopping))
			queue_work(vb->wq, &vb->hint_work);
	}
	if (vb->hint_done)
		lacuna_hint_free(vb, ULONG_MAX);
	vb->hint_done = false;
}

static unsigned long lacuna_hint_count(struct shrinker *shrinker,
				       struct shrink_control *control)
{
	struct lacuna_balloon *vb =
		lacuna_shrinker_owner(shrinker, struct lacuna_balloon,
				      shrinker);

	return READ_ONCE(vb->hint_blocks) * LACUNA_BLOCK_PAGES;
}

/* The device may not have seen a block yet: nothing it does to it is harm. */
static unsigned long lacuna_hint_scan(struct shrinker *shrinker,
				      struct shrink_control *control)
{
	struct lacuna_balloon *vb =
		lacuna_shrinker_owner(shrinker, struct lacuna_balloon,
				      shrinker);
	unsigned long blocks = DIV_ROUND_UP(control->nr_to_scan,
					    LACUNA_BLOCK_PAGES);
	unsigned long before = READ_ONCE(vb->hint_blocks);

	blocks = min(blocks, before);
	lacuna_hint_free(vb, blocks);
	return blocks ? blocks * LACUNA_BLOCK_PAGES : SHRINK_STOP;
}

void lacuna_hint_init(struct lacuna_balloon *vb)
{
	INIT_WORK(&vb->hint_work, lacuna_hint_work);
	INIT_LIST_HEAD(&vb->hint_pages);
	spin_lock_init(&vb->hint_lock);
}

int lacuna_hint_prepare(struct lacuna_balloon *vb)
{
	if (!lacuna_has(vb, VIRTIO_BALLOON_F_FREE_PAGE_HINT))
		return 0;
	return lacuna_shrinker_add(&vb->shrinker, vb, lacuna_hint_count,
				   lacuna_hint_scan);
}

void lacuna_hint_release(struct lacuna_balloon *vb)
{
	if (lacuna_has(vb, VIRTIO_BALLOON_F_FREE_PAGE_HINT))
		lacuna_shrinker_remove(&vb->shrinker);
}
