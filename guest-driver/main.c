// SPDX-License-Identifier: GPL-2.0
/*
 * lacuna_balloon - the memory balloon, and bitmaps of free pages.
 *
 * Takes the place of virtio_balloon: everything that driver does, and on the
 * host's request a bitmap of the pages that are free (report.c). This file is
 * the driver's life: features, queues, start and stop.
 */
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/poison.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_ring.h>

#include "lacuna.h"

/* ---- interrupt context ---- */

static void lacuna_used(struct virtqueue *vq)
{
	struct lacuna_balloon *vb = vq->vdev->priv;

	wake_up_all(&vb->wait);
}

/* Whoever gave up waiting is not there to be woken. */
static void lacuna_balloon_used(struct virtqueue *vq)
{
	struct lacuna_balloon *vb = vq->vdev->priv;

	wake_up_all(&vb->wait);
	if (READ_ONCE(vb->owing) && !READ_ONCE(vb->stopping))
		queue_delayed_work(vb->wq, &vb->size_work, 0);
}

static void lacuna_hint_used(struct virtqueue *vq)
{
	struct lacuna_balloon *vb = vq->vdev->priv;

	wake_up_all(&vb->wait);
	if (READ_ONCE(vb->hint_waits) && !READ_ONCE(vb->stopping))
		queue_work(vb->wq, &vb->hint_work);
}

static void lacuna_bitmap_used(struct virtqueue *vq)
{
	struct lacuna_balloon *vb = vq->vdev->priv;

	wake_up_all(&vb->wait);
	if (READ_ONCE(vb->overdue) && !READ_ONCE(vb->stopping))
		queue_work(vb->wq, &vb->report_work);
}

/* The core calls this only between probe and remove. */
static void lacuna_config_changed(struct virtio_device *vdev)
{
	struct lacuna_balloon *vb = vdev->priv;

	if (READ_ONCE(vb->stopping))
		return;
	atomic_inc(&vb->config_changes);
	wake_up_all(&vb->wait);
	pm_wakeup_event(&vdev->dev, LACUNA_AWAKE_MS);
	queue_delayed_work(vb->wq, &vb->size_work, 0);
	if (vb->vqs[LACUNA_VQ_HINT])
		queue_work(vb->wq, &vb->hint_work);
	if (vb->vqs[LACUNA_VQ_BITMAP])
		queue_work(vb->wq, &vb->report_work);
}

/* ---- features and queues ---- */

static void lacuna_no_bitmaps(struct virtio_device *vdev)
{
	if (!virtio_has_feature(vdev, VIRTIO_BALLOON_F_FREE_PAGE_BITMAP))
		return;
	dev_warn(&vdev->dev,
		 "pages are poisoned and the device cannot know: no bitmaps\n");
	__virtio_clear_bit(vdev, VIRTIO_BALLOON_F_FREE_PAGE_BITMAP);
}

/*
 * A page the host skips reads as zero on the other side, or as poison_val if
 * that is negotiated; a page that is reported comes back as either, too. A
 * guest that counts on the contents of free pages must be able to say so.
 */
static int lacuna_validate(struct virtio_device *vdev)
{
	bool poison = page_poisoning_enabled_static();

	if (!vdev->config->get) {
		dev_err(&vdev->dev, "no access to the configuration space\n");
		return -EINVAL;
	}

	if (!virtio_has_feature(vdev, VIRTIO_F_VERSION_1))
		__virtio_clear_bit(vdev, VIRTIO_BALLOON_F_FREE_PAGE_BITMAP);

	if (!poison && !want_init_on_free()) {
		__virtio_clear_bit(vdev, VIRTIO_BALLOON_F_PAGE_POISON);
	} else if (!virtio_has_feature(vdev, VIRTIO_BALLOON_F_PAGE_POISON)) {
		__virtio_clear_bit(vdev, VIRTIO_BALLOON_F_REPORTING);
		if (poison)
			lacuna_no_bitmaps(vdev);
	}

	/*
	 * Page numbers are the guest's own, not an IOMMU's. And adding a
	 * buffer must not allocate when memory is what is being freed.
	 */
	__virtio_clear_bit(vdev, VIRTIO_F_ACCESS_PLATFORM);
	__virtio_clear_bit(vdev, VIRTIO_RING_F_INDIRECT_DESC);
	return 0;
}

static void lacuna_tell_poison(struct virtio_device *vdev)
{
	/* Poisoning takes precedence, as it does in the page allocator. */
	__u32 poison = page_poisoning_enabled_static() ?
		       PAGE_POISON * 0x01010101U : 0;

	if (virtio_has_feature(vdev, VIRTIO_BALLOON_F_PAGE_POISON))
		virtio_cwrite_le(vdev, struct virtio_balloon_config,
				 poison_val, &poison);
}

static bool lacuna_wants(struct lacuna_balloon *vb, enum lacuna_queue queue,
			 bool bitmap)
{
	switch (queue) {
	case LACUNA_VQ_STATS:
		return lacuna_has(vb, VIRTIO_BALLOON_F_STATS_VQ);
	case LACUNA_VQ_HINT:
		return lacuna_has(vb, VIRTIO_BALLOON_F_FREE_PAGE_HINT);
	case LACUNA_VQ_REPORTING:
		return lacuna_has(vb, VIRTIO_BALLOON_F_REPORTING);
	case LACUNA_VQ_BITMAP:
		return bitmap;
	default:
		return true;
	}
}

/*
 * Transports number the queues that there are, one after the other. They can
 * be given places without a queue as well, which comes to the same, but some
 * 6.12 crash when such queues are taken down again.
 */
static int lacuna_find(struct lacuna_balloon *vb, bool bitmap)
{
	static const struct {
		vq_callback_t *callback;
		const char *name;
	} all[LACUNA_VQS] = {
		[LACUNA_VQ_INFLATE] = { lacuna_balloon_used, "inflate" },
		[LACUNA_VQ_DEFLATE] = { lacuna_balloon_used, "deflate" },
		[LACUNA_VQ_STATS] = { lacuna_stats_request, "stats" },
		[LACUNA_VQ_HINT] = { lacuna_hint_used, "free_page_vq" },
		[LACUNA_VQ_REPORTING] = { lacuna_used, "reporting_vq" },
		[LACUNA_VQ_BITMAP] = { lacuna_bitmap_used, "bitmap" },
	};
	vq_callback_t *callbacks[LACUNA_VQS];
	const char *names[LACUNA_VQS];
	struct virtqueue *vqs[LACUNA_VQS] = {};
	unsigned int i, count = 0;
	int err;

	for (i = 0; i < LACUNA_VQS; i++) {
		if (!lacuna_wants(vb, i, bitmap))
			continue;
		callbacks[count] = all[i].callback;
		names[count++] = all[i].name;
	}
	err = lacuna_find_vqs(vb->vdev, count, vqs, callbacks, names);
	count = 0;
	for (i = 0; i < LACUNA_VQS; i++) {
		bool there = !err && lacuna_wants(vb, i, bitmap);

		vb->vqs[i] = there ? vqs[count++] : NULL;
	}
	return err;
}

static int lacuna_init_vqs(struct lacuna_balloon *vb)
{
	bool bitmap = lacuna_has(vb, VIRTIO_BALLOON_F_FREE_PAGE_BITMAP);
	int err;

	err = lacuna_find(vb, bitmap);
	if (err && bitmap) {
		/* The balloon itself is of use without. */
		err = lacuna_find(vb, false);
		if (!err)
			dev_err(&vb->vdev->dev,
				"the device offers bitmaps and has no queue for them\n");
	}
	return err;
}

/* ---- start and stop ---- */

/* Bring the device to life; the works may run from here on. */
static int lacuna_start(struct lacuna_balloon *vb)
{
	struct virtio_device *vdev = vb->vdev;
	int err;

	err = lacuna_init_vqs(vb);
	if (err)
		return err;
	lacuna_tell_poison(vdev);

	vb->cmd_id = VIRTIO_BALLOON_BITMAP_CMD_STOP;
	vb->in_flight = 0;
	vb->overdue = false;
	vb->hint_id = VIRTIO_BALLOON_CMD_ID_STOP;
	vb->hint_cmds = 0;
	vb->hint_done = false;
	vb->hint_waits = false;
	vb->owing = NULL;
	WRITE_ONCE(vb->dead, false);
	WRITE_ONCE(vb->stopping, false);

	virtio_device_ready(vdev);

	lacuna_stats_start(vb);
	lacuna_reporting_start(vb);
	lacuna_write_actual(vb);
	/* What the device wants may be older than the driver: no interrupt. */
	lacuna_config_changed(vdev);
	return 0;
}

/*
 * Nobody uses the device any more, and it stops using us. Config interrupts
 * are off already.
 *
 * What waits with a limit is waited for. What waits without one, because the
 * pages it has to do with must not be free while the device has them, gets
 * that limit here: then the device is reset first, and its users see that.
 */
static void lacuna_stop(struct lacuna_balloon *vb)
{
	struct virtio_device *vdev = vb->vdev;
	unsigned int i;

	WRITE_ONCE(vb->stopping, true);
	/* Pairs with the one in lacuna_reporting(). */
	smp_mb();
	wake_up_all(&vb->wait);
	if (!wait_event_idle_timeout(vb->wait, !atomic_read(&vb->waiters),
				     LACUNA_USED_TIMEOUT)) {
		dev_err(&vdev->dev, "the device keeps pages, resetting it\n");
		virtio_reset_device(vdev);
		WRITE_ONCE(vb->dead, true);
		wake_up_all(&vb->wait);
	}

	cancel_delayed_work_sync(&vb->size_work);
	cancel_work_sync(&vb->stats_work);
	cancel_work_sync(&vb->hint_work);
	cancel_work_sync(&vb->report_work);
	lacuna_reporting_stop(vb);

	if (!vb->dead) {
		lacuna_balloon_empty(vb);
		lacuna_write_actual(vb);
		virtio_reset_device(vdev);
		mutex_lock(&vb->balloon_lock);
		WRITE_ONCE(vb->dead, true);
		mutex_unlock(&vb->balloon_lock);
	}
	/* From here on it reads no buffer and has no page. */
	lacuna_balloon_empty(vb);
	lacuna_hint_free(vb, ULONG_MAX);

	/* Ends the DMA mappings of buffers that never came back. */
	for (i = 0; i < LACUNA_VQS; i++)
		while (vb->vqs[i] && virtqueue_detach_unused_buf(vb->vqs[i]))
			;
	memset(vb->vqs, 0, sizeof(vb->vqs));
	vdev->config->del_vqs(vdev);
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
	vb->stopping = true;
	init_waitqueue_head(&vb->wait);
	lacuna_report_init(vb);
	lacuna_balloon_init(vb);
	lacuna_stats_init(vb);
	lacuna_hint_init(vb);

	/* Freezable: the device must not be in use when an image is made. */
	vb->wq = alloc_workqueue("lacuna_balloon", WQ_FREEZABLE | WQ_UNBOUND,
				 0);
	if (!vb->wq) {
		err = -ENOMEM;
		goto err_free;
	}
	vb->memory.notifier_call = lacuna_memory_notify;
	err = register_memory_notifier(&vb->memory);
	if (err)
		goto err_wq;
	err = lacuna_report_prepare(vb);
	if (err)
		goto err_memory;
	err = lacuna_balloon_prepare(vb);
	if (err)
		goto err_report;
	err = lacuna_hint_prepare(vb);
	if (err)
		goto err_balloon;

	err = lacuna_start(vb);
	if (err)
		goto err_hint;
	device_set_wakeup_capable(&vdev->dev, true);
	lacuna_debugfs_add(vb);
	return 0;

err_hint:
	lacuna_hint_release(vb);
err_balloon:
	lacuna_balloon_release(vb);
err_report:
	lacuna_report_release(vb);
err_memory:
	unregister_memory_notifier(&vb->memory);
err_wq:
	destroy_workqueue(vb->wq);
err_free:
	vdev->priv = NULL;
	kfree(vb);
	return err;
}

static void lacuna_remove(struct virtio_device *vdev)
{
	struct lacuna_balloon *vb = vdev->priv;

	lacuna_debugfs_remove(vb);
	lacuna_stop(vb);
	lacuna_hint_release(vb);
	lacuna_balloon_release(vb);
	unregister_memory_notifier(&vb->memory);
	destroy_workqueue(vb->wq);
	lacuna_report_release(vb);
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
	VIRTIO_BALLOON_F_MUST_TELL_HOST,
	VIRTIO_BALLOON_F_STATS_VQ,
	VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
	VIRTIO_BALLOON_F_FREE_PAGE_HINT,
	VIRTIO_BALLOON_F_PAGE_POISON,
	VIRTIO_BALLOON_F_REPORTING,
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

static int __init lacuna_init(void)
{
	int err;

	lacuna_debugfs_create();
	err = register_virtio_driver(&lacuna_driver);
	if (err)
		lacuna_debugfs_destroy();
	return err;
}
module_init(lacuna_init);

static void __exit lacuna_exit(void)
{
	unregister_virtio_driver(&lacuna_driver);
	lacuna_debugfs_destroy();
}
module_exit(lacuna_exit);

MODULE_DESCRIPTION("Virtio memory balloon with bitmaps of free pages");
MODULE_AUTHOR("The Lacuna project");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.2.0");
