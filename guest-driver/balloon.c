// SPDX-License-Identifier: GPL-2.0
/*
 * Inflating and deflating, on the host's wish, when memory runs out, and when
 * compaction moves a page of the balloon. The list of pages and their
 * isolation are the kernel's (mm/balloon_compaction.c).
 *
 * A page is in the balloon from before the device is told of it until the
 * device has said that it knows it is not, or was reset. A device that keeps a
 * buffer for longer than LACUNA_USED_TIMEOUT stops all that until the buffer
 * comes back; nothing waits for it without a limit.
 */
#include <linux/mm.h>
#include <linux/oom.h>
#include <linux/sched.h>

#include "lacuna.h"

/* How many page numbers an OOM notice takes back, at most. */
#define LACUNA_OOM_PFNS		256
/* Before others, who may have to write or kill for it. */
#define LACUNA_OOM_PRIORITY	80

/* After an allocation that failed. */
#define LACUNA_RETRY		(HZ / 5)

void lacuna_write_actual(struct lacuna_balloon *vb)
{
	unsigned int pages = READ_ONCE(vb->nr_pages);
	u32 actual = pages * LACUNA_PFNS_PER_PAGE;

	WRITE_ONCE(vb->told, pages);
	virtio_cwrite_le(vb->vdev, struct virtio_balloon_config, actual,
			 &actual);
}

/* Pages to take (positive) or to give back. */
static s64 lacuna_distance(struct lacuna_balloon *vb)
{
	u32 target;

	virtio_cread_le(vb->vdev, struct virtio_balloon_config, num_pages,
			&target);
	/* Up to whole pages, or it would go back and forth. */
	return (s64)DIV_ROUND_UP_ULL(target, LACUNA_PFNS_PER_PAGE) -
	       vb->nr_pages;
}

static void lacuna_add_pfns(struct lacuna_balloon *vb, struct page *page)
{
	/* As in the specification: the device's page numbers have 32 bits. */
	u32 pfn = page_to_pfn(page) << LACUNA_PFN_SHIFT;
	unsigned int i;

	BUILD_BUG_ON(LACUNA_PFNS_PER_PAGE > LACUNA_PFNS_MAX);

	for (i = 0; i < LACUNA_PFNS_PER_PAGE; i++)
		vb->pfns[vb->nr_pfns++] = cpu_to_virtio32(vb->vdev, pfn + i);
}

/* Without DEFLATE_ON_OOM, pages in the balloon are not the guest's memory. */
static void lacuna_manage(struct lacuna_balloon *vb, struct page *page,
			  long count)
{
	if (!lacuna_has(vb, VIRTIO_BALLOON_F_DEFLATE_ON_OOM))
		adjust_managed_page_count(page, count);
}

/* Give a page that has left the balloon back to the kernel. */
static void lacuna_put(struct lacuna_balloon *vb, struct page *page)
{
	lacuna_manage(vb, page, 1);
	put_page(page);
}

/*
 * Back into the balloon with a page whose leaving the device was not told of.
 * Compaction may still be about to let go of it, and until then its place in
 * a list is not ours.
 */
static bool lacuna_readmit(struct lacuna_balloon *vb, struct page *page)
{
	unsigned long flags;

	if (page_count(page) != 1 || !trylock_page(page))
		return false;
	spin_lock_irqsave(&vb->balloon.pages_lock, flags);
	balloon_page_insert(&vb->balloon, page);
	__count_vm_event(BALLOON_INFLATE);
	spin_unlock_irqrestore(&vb->balloon.pages_lock, flags);
	unlock_page(page);
	return true;
}

static void lacuna_release(struct lacuna_balloon *vb, struct list_head *pages)
{
	struct page *page, *next;

	list_for_each_entry_safe(page, next, pages, lru) {
		list_del(&page->lru);
		vb->nr_pages--;
		lacuna_put(vb, page);
	}
}

/* The device knows of the pages that wait for it: they are the guest's. */
static void lacuna_release_leaving(struct lacuna_balloon *vb)
{
	lacuna_release(vb, &vb->leaving);
	if (vb->limbo) {
		vb->nr_pages--;
		lacuna_put(vb, vb->limbo);
		vb->limbo = NULL;
	}
}

static bool lacuna_broken(struct lacuna_balloon *vb)
{
	return virtqueue_is_broken(vb->vqs[LACUNA_VQ_INFLATE]) ||
	       virtqueue_is_broken(vb->vqs[LACUNA_VQ_DEFLATE]);
}

/*
 * Is the device able to take a buffer? If it owes one, look whether that came
 * back at last.
 */
static bool lacuna_ready(struct lacuna_balloon *vb)
{
	struct page *page, *next;
	bool used = false;

	if (READ_ONCE(vb->dead) || lacuna_broken(vb))
		return false;
	if (vb->owing) {
		if (!lacuna_returned(vb, vb->owing, &used) || !used)
			return false;
		/* Only that one says that pages have left. */
		if (vb->owing == vb->vqs[LACUNA_VQ_DEFLATE])
			lacuna_release_leaving(vb);
		WRITE_ONCE(vb->owing, NULL);
		dev_info(&vb->vdev->dev, "the device returned the buffer\n");
		/* Its interrupt may come too late to see that it was owed. */
		if (!READ_ONCE(vb->stopping))
			queue_delayed_work(vb->wq, &vb->size_work, 0);
	}
	if (vb->limbo) {
		if (!lacuna_readmit(vb, vb->limbo))
			return false;
		vb->limbo = NULL;
	}
	list_for_each_entry_safe(page, next, &vb->untold, lru) {
		list_del(&page->lru);
		if (!lacuna_readmit(vb, page)) {
			list_add(&page->lru, &vb->untold);
			return false;
		}
	}
	return true;
}

/*
 * Send the page numbers gathered and wait for them to be used. Called with
 * balloon_lock held and after lacuna_ready(), so that the queue is empty.
 */
static int lacuna_tell(struct lacuna_balloon *vb, enum lacuna_queue queue)
{
	struct virtqueue *vq = vb->vqs[queue];
	struct scatterlist sg;
	bool used = false;
	int err;

	sg_init_one(&sg, vb->pfns, vb->nr_pfns * sizeof(vb->pfns[0]));
	/*
	 * No sleeping for memory: that may end in the OOM notifier, which
	 * needs the lock.
	 */
	err = virtqueue_add_outbuf(vq, &sg, 1, vb, GFP_NOWAIT);
	if (err)
		return err;
	virtqueue_kick(vq);

	wait_event_idle_timeout(vb->wait, lacuna_returned(vb, vq, &used),
				LACUNA_USED_TIMEOUT);
	if (used)
		return 0;
	if (READ_ONCE(vb->dead) || virtqueue_is_broken(vq))
		return -EIO;
	WRITE_ONCE(vb->owing, vq);
	/* Either the interrupt sees that nobody waits, or it is seen here. */
	smp_mb();
	if (lacuna_returned(vb, vq, &used) && used) {
		WRITE_ONCE(vb->owing, NULL);
		return 0;
	}
	mutex_lock(&vb->figures_lock);
	vb->totals.timeouts++;
	mutex_unlock(&vb->figures_lock);
	dev_err(&vb->vdev->dev, "the device keeps a buffer of the %s queue\n",
		vq->name);
	return -ETIMEDOUT;
}

/* Take up to @count pages. Returns how many it took. */
static unsigned int lacuna_inflate(struct lacuna_balloon *vb, u64 count)
{
	struct page *page, *next;
	LIST_HEAD(pages);
	unsigned int taken = 0;

	count = min_t(u64, count, LACUNA_PFNS_MAX / LACUNA_PFNS_PER_PAGE);
	while (count--) {
		page = balloon_page_alloc();
		if (!page)
			break;
		list_add_tail(&page->lru, &pages);
	}
	if (list_empty(&pages)) {
		dev_info_ratelimited(&vb->vdev->dev,
				     "no memory left for the balloon\n");
		return 0;
	}

	mutex_lock(&vb->balloon_lock);
	if (!lacuna_ready(vb)) {
		mutex_unlock(&vb->balloon_lock);
		list_for_each_entry_safe(page, next, &pages, lru) {
			list_del(&page->lru);
			put_page(page);
		}
		return 0;
	}
	vb->nr_pfns = 0;
	list_for_each_entry(page, &pages, lru) {
		lacuna_add_pfns(vb, page);
		lacuna_manage(vb, page, -1);
		taken++;
	}
	balloon_page_list_enqueue(&vb->balloon, &pages);
	vb->nr_pages += taken;
	/*
	 * Whatever comes of it: the device may have seen the numbers, so the
	 * pages stay in the balloon.
	 */
	lacuna_tell(vb, LACUNA_VQ_INFLATE);
	mutex_unlock(&vb->balloon_lock);
	return taken;
}

/* Give back up to @count pages. Returns how many it gave. */
static unsigned int lacuna_deflate(struct lacuna_balloon *vb, u64 count)
{
	struct page *page, *next;
	LIST_HEAD(pages);
	unsigned int given;

	mutex_lock(&vb->balloon_lock);
	/* After a reset there is nobody to tell, and no reason to wait. */
	if (!READ_ONCE(vb->dead) && !lacuna_ready(vb)) {
		mutex_unlock(&vb->balloon_lock);
		return 0;
	}
	count = min_t(u64, count, LACUNA_PFNS_MAX / LACUNA_PFNS_PER_PAGE);
	count = min_t(u64, count, vb->nr_pages);
	given = balloon_page_list_dequeue(&vb->balloon, &pages, count);
	if (given && !READ_ONCE(vb->dead)) {
		int err;

		vb->nr_pfns = 0;
		list_for_each_entry(page, &pages, lru)
			lacuna_add_pfns(vb, page);
		err = lacuna_tell(vb, LACUNA_VQ_DEFLATE);
		if (err == -ETIMEDOUT) {
			/* Perhaps told, so not ours before it says so. */
			list_splice_init(&pages, &vb->leaving);
			given = 0;
		} else if (err && !READ_ONCE(vb->dead)) {
			/*
			 * Not told, so not ours yet. Compaction may have one
			 * of them locked at this moment: they go back into the
			 * balloon before it is next used.
			 */
			list_splice_init(&pages, &vb->untold);
			given = 0;
			if (!READ_ONCE(vb->stopping))
				queue_delayed_work(vb->wq, &vb->size_work,
						   LACUNA_RETRY);
		}
	}
	vb->nr_pages -= given;
	list_for_each_entry_safe(page, next, &pages, lru) {
		list_del(&page->lru);
		lacuna_put(vb, page);
	}
	mutex_unlock(&vb->balloon_lock);
	return given;
}

static void lacuna_size_work(struct work_struct *work)
{
	struct lacuna_balloon *vb =
		container_of(to_delayed_work(work), struct lacuna_balloon,
			     size_work);
	unsigned int done = 0;
	s64 distance;
	bool ready;

	if (READ_ONCE(vb->stopping) || lacuna_broken(vb))
		return;
	mutex_lock(&vb->balloon_lock);
	ready = lacuna_ready(vb);
	mutex_unlock(&vb->balloon_lock);
	/* A buffer that came back late may have changed it. */
	if (READ_ONCE(vb->nr_pages) != READ_ONCE(vb->told))
		lacuna_write_actual(vb);

	distance = lacuna_distance(vb);
	if (ready && !distance)
		return;
	if (ready && distance > 0)
		done = lacuna_inflate(vb, distance);
	else if (ready)
		done = lacuna_deflate(vb, -distance);
	if (done)
		lacuna_write_actual(vb);
	/*
	 * One buffer at a time, so that a suspend need not wait for all. If
	 * the device owes one, it is tried again when that comes back.
	 */
	if (!READ_ONCE(vb->stopping) && !READ_ONCE(vb->owing))
		queue_delayed_work(vb->wq, &vb->size_work,
				   done ? 0 : LACUNA_RETRY);
}

#ifdef CONFIG_BALLOON_COMPACTION
/*
 * Put @newpage in the place of @page, which compaction took off the list.
 * Called with both pages locked.
 */
static int lacuna_migrate_page(struct balloon_dev_info *info,
			       struct page *newpage, struct page *page,
			       enum migrate_mode mode)
{
	struct lacuna_balloon *vb =
		container_of(info, struct lacuna_balloon, balloon);
	unsigned long flags;
	bool freed;

	/*
	 * Inflating allocates, and that may end up here; it is simpler to
	 * come back later than to know who holds the lock.
	 */
	if (!mutex_trylock(&vb->balloon_lock))
		return -EAGAIN;
	if (!lacuna_ready(vb)) {
		mutex_unlock(&vb->balloon_lock);
		return -EAGAIN;
	}

	/* The zones' sizes leave out what is in the balloon. */
	if (page_zone(page) != page_zone(newpage)) {
		lacuna_manage(vb, page, 1);
		lacuna_manage(vb, newpage, -1);
	}

	get_page(newpage);
	spin_lock_irqsave(&info->pages_lock, flags);
	balloon_page_insert(info, newpage);
	info->isolated_pages--;
	__count_vm_event(BALLOON_MIGRATE);
	spin_unlock_irqrestore(&info->pages_lock, flags);

	vb->nr_pfns = 0;
	lacuna_add_pfns(vb, newpage);
	freed = !lacuna_tell(vb, LACUNA_VQ_INFLATE);
	if (freed) {
		vb->nr_pfns = 0;
		lacuna_add_pfns(vb, page);
		freed = !lacuna_tell(vb, LACUNA_VQ_DEFLATE);
	}
	balloon_page_finalize(page);
	if (freed || READ_ONCE(vb->dead)) {
		put_page(page);
	} else {
		/*
		 * The device has not said that it knows. The page waits for
		 * that, or goes back into the balloon: lacuna_ready() lets no
		 * other come here before. It is counted as managed when it is
		 * put, which for a page that stays in its zone was done.
		 */
		lacuna_manage(vb, page, -1);
		vb->nr_pages++;
		vb->limbo = page;
		/* Without a buffer that comes back, nothing else would. */
		if (!vb->owing && !READ_ONCE(vb->stopping))
			queue_delayed_work(vb->wq, &vb->size_work,
					   LACUNA_RETRY);
	}
	mutex_unlock(&vb->balloon_lock);
	return MIGRATEPAGE_SUCCESS;
}
#endif

static int lacuna_oom(struct notifier_block *nb, unsigned long unused,
		      void *arg)
{
	struct lacuna_balloon *vb =
		container_of(nb, struct lacuna_balloon, oom);
	unsigned long *freed = arg;
	unsigned int given;

	if (READ_ONCE(vb->stopping))
		return NOTIFY_OK;
	given = lacuna_deflate(vb, LACUNA_OOM_PFNS / LACUNA_PFNS_PER_PAGE);
	if (given)
		lacuna_write_actual(vb);
	*freed += given;
	return NOTIFY_OK;
}

void lacuna_balloon_init(struct lacuna_balloon *vb)
{
	INIT_DELAYED_WORK(&vb->size_work, lacuna_size_work);
	mutex_init(&vb->balloon_lock);
	INIT_LIST_HEAD(&vb->leaving);
	INIT_LIST_HEAD(&vb->untold);
	balloon_devinfo_init(&vb->balloon);
#ifdef CONFIG_BALLOON_COMPACTION
	vb->balloon.migratepage = lacuna_migrate_page;
#endif
}

int lacuna_balloon_prepare(struct lacuna_balloon *vb)
{
	if (!lacuna_has(vb, VIRTIO_BALLOON_F_DEFLATE_ON_OOM))
		return 0;
	vb->oom.notifier_call = lacuna_oom;
	vb->oom.priority = LACUNA_OOM_PRIORITY;
	return register_oom_notifier(&vb->oom);
}

void lacuna_balloon_release(struct lacuna_balloon *vb)
{
	if (lacuna_has(vb, VIRTIO_BALLOON_F_DEFLATE_ON_OOM))
		unregister_oom_notifier(&vb->oom);
}

/*
 * Give everything back. With the device alive, only what it acknowledges;
 * after its reset, all of it.
 */
void lacuna_balloon_empty(struct lacuna_balloon *vb)
{
	while (vb->nr_pages) {
		if (READ_ONCE(vb->dead)) {
			mutex_lock(&vb->balloon_lock);
			lacuna_release_leaving(vb);
			lacuna_release(vb, &vb->untold);
			mutex_unlock(&vb->balloon_lock);
		}
		if (lacuna_deflate(vb, vb->nr_pages))
			continue;
		if (!READ_ONCE(vb->dead))
			return;
		/* The rest is in the hands of compaction for a moment. */
		schedule_timeout_idle(1);
	}
}
