// SPDX-License-Identifier: GPL-2.0
/*
 * A balloon device inside the guest's own kernel, to test the driver on any
 * kernel with no host that knows the protocol, and to play devices that no
 * host would. It reads the rings as a device does.
 *
 *	insmod lacuna_test_device.ko ring=4 features=0x10
 *	echo 2 > /sys/module/lacuna_test_device/parameters/request
 *	cat /sys/module/lacuna_test_device/parameters/request
 *
 * What else can be told and asked is in control.c.
 */
#include <linux/bitmap.h>
#include <linux/delay.h>
#include <linux/device.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/version.h>
#include <linux/virtio_ids.h>

#include "device.h"

static unsigned int ring = 64;
module_param(ring, uint, 0444);
MODULE_PARM_DESC(ring, "Size of the bitmap's ring; the others have 64");

static ulong features;
module_param(features, ulong, 0444);
MODULE_PARM_DESC(features, "Balloon feature bits offered besides the bitmap");

static bool no_queue;
module_param(no_queue, bool, 0444);
MODULE_PARM_DESC(no_queue, "Offer the bitmap and refuse its queue");

static bool bitmap = true;
module_param(bitmap, bool, 0444);
MODULE_PARM_DESC(bitmap, "Offer the bitmap");

static unsigned int keep;
module_param(keep, uint, 0644);
MODULE_PARM_DESC(keep, "Queues, a bit for each, whose buffers are not used");

static unsigned int delay_ms;
module_param(delay_ms, uint, 0644);
MODULE_PARM_DESC(delay_ms, "How long to keep each chain of the bitmap");

static unsigned int early;
module_param(early, uint, 0444);
MODULE_PARM_DESC(early, "Command id that is there when the driver is ready");

static unsigned int hint_next;
module_param(hint_next, uint, 0644);
MODULE_PARM_DESC(hint_next, "Hint command id that follows the instant DONE is read");

struct test_device *device;
struct page *held[HELD_PAGES];
u8 *copy;
static struct device *root;

/* ---- the rings ---- */

static void add_segment(struct test_device *t, struct chain *c,
			const struct vring_desc *desc)
{
	u32 len = le32_to_cpu((__force __le32)desc->len);
	u64 addr = le64_to_cpu((__force __le64)desc->addr);

	if (le16_to_cpu((__force __le16)desc->flags) & VRING_DESC_F_WRITE) {
		if (c->writable < ARRAY_SIZE(c->segments)) {
			c->segments[c->writable].addr = addr;
			c->segments[c->writable++].len = len;
		}
		return;
	}
	if (c->length + len > COPY_BYTES) {
		t->wrong++;
		return;
	}
	memcpy(copy + c->length, phys_to_virt(addr), len);
	c->length += len;
}

static void gather(struct test_device *t, struct vring *vr, struct chain *c)
{
	struct vring_desc *table = vr->desc;
	unsigned int i = c->head, count = vr->num, steps = 0;

	if (le16_to_cpu((__force __le16)table[i].flags) &
	    VRING_DESC_F_INDIRECT) {
		count = le32_to_cpu((__force __le32)table[i].len) /
			sizeof(*table);
		table = phys_to_virt(le64_to_cpu((__force __le64)table[i].addr));
		i = 0;
	}
	for (;;) {
		if (i >= count || steps++ > count) {
			t->wrong++;
			return;
		}
		add_segment(t, c, &table[i]);
		if (!(le16_to_cpu((__force __le16)table[i].flags) &
		      VRING_DESC_F_NEXT))
			return;
		i = le16_to_cpu((__force __le16)table[i].next);
	}
}

static void ring_of(struct test_queue *q, struct vring *vr)
{
	vring_init(vr, virtqueue_get_vring_size(q->vq), q->pages, PAGE_SIZE);
}

void use_buffer(struct test_queue *q, u16 head)
{
	struct vring vr;
	u16 used;

	ring_of(q, &vr);
	used = le16_to_cpu((__force __le16)vr.used->idx);
	vr.used->ring[used % vr.num].id = (__force __virtio32)cpu_to_le32(head);
	vr.used->ring[used % vr.num].len = 0;
	/* The entry before the index, the index before the interrupt. */
	virt_wmb();
	WRITE_ONCE(vr.used->idx, (__force __virtio16)cpu_to_le16(used + 1));
	/* See above. */
	virt_mb();
	local_irq_disable();
	vring_interrupt(0, q->vq);
	local_irq_enable();
}

/* ---- what the queues carry ---- */

static void move_pages(struct test_device *t, size_t length, bool in)
{
	const __le32 *pfn = (const __le32 *)copy;

	for (; length >= sizeof(*pfn); length -= sizeof(*pfn), pfn++) {
		u32 n = le32_to_cpu(*pfn);

		if (n >= get_num_physpages() + (1UL << 20) ||
		    !!test_bit(n, t->inside) == in) {
			t->wrong++;
			continue;
		}
		if (in) {
			__set_bit(n, t->inside);
			t->inflated++;
		} else {
			__clear_bit(n, t->inside);
			t->deflated++;
		}
	}
}

static void read_stats(struct test_device *t, size_t length)
{
	const struct virtio_balloon_stat *s = (const void *)copy;

	for (; length >= sizeof(*s); length -= sizeof(*s), s++) {
		u16 tag = le16_to_cpu((__force __le16)s->tag);

		if (tag >= VIRTIO_BALLOON_S_NR) {
			t->wrong++;
			continue;
		}
		t->stats[tag] = le64_to_cpu((__force __le64)s->val);
		t->stats_seen |= BIT_ULL(tag);
	}
}

static void count_pages(struct chain *c, u64 *count)
{
	unsigned int i;

	for (i = 0; i < c->writable; i++)
		*count += c->segments[i].len >> PAGE_SHIFT;
}

static void take_hint(struct test_device *t, struct chain *c)
{
	u64 now = ktime_get_ns();

	if (c->length == sizeof(u32)) {
		u32 id = le32_to_cpup((__le32 *)copy);

		if (id == VIRTIO_BALLOON_CMD_ID_STOP) {
			/* Of an older request, that does not end this one. */
			if (t->hint_begun == t->hint_id)
				t->hint_stop_ns = now;
			return;
		}
		t->hint_begun = id;
		t->hinted = 0;
		return;
	}
	count_pages(c, &t->hinted);
	t->hint_last_ns = now;
}

/* Returns whether the buffer is to be used now. */
static bool take(struct test_device *t, int index, struct chain *c)
{
	switch (index) {
	case VQ_INFLATE:
	case VQ_DEFLATE:
		move_pages(t, c->length, index == VQ_INFLATE);
		break;
	case VQ_STATS:
		read_stats(t, c->length);
		t->stats_head = c->head;
		return false;
	case VQ_HINT:
		take_hint(t, c);
		break;
	case VQ_REPORTING:
		count_pages(c, &t->reported);
		break;
	case VQ_BITMAP:
		check_report(t, c->length);
		break;
	}
	return true;
}

static void drain(struct test_device *t, int index)
{
	struct test_queue *q = &t->queues[index];
	static struct chain c;
	struct vring vr;
	u16 avail;

	if (!q->vq)
		return;
	ring_of(q, &vr);
	avail = le16_to_cpu((__force __le16)READ_ONCE(vr.avail->idx));
	WRITE_ONCE(t->kept[index], READ_ONCE(keep) & BIT(index) ?
				   (u16)(avail - q->last_avail) : 0);
	while (q->last_avail !=
	       le16_to_cpu((__force __le16)READ_ONCE(vr.avail->idx))) {
		bool used;

		/* The index before what it counts. */
		virt_rmb();
		if (kthread_should_stop() || READ_ONCE(keep) & BIT(index))
			return;
		if (index == VQ_BITMAP && delay_ms)
			msleep(delay_ms);
		memset(&c, 0, sizeof(c));
		c.head = le16_to_cpu((__force __le16)
				     vr.avail->ring[q->last_avail % vr.num]);
		mutex_lock(&t->lock);
		gather(t, &vr, &c);
		used = take(t, index, &c);
		mutex_unlock(&t->lock);
		q->last_avail++;
		if (used)
			use_buffer(q, c.head);
	}
}

static int run(void *data)
{
	struct test_device *t = data;
	int i;

	while (!kthread_should_stop()) {
		wait_event_interruptible_timeout(t->kicked, t->news ||
						 kthread_should_stop(), HZ / 4);
		t->news = false;
		if (!(t->status & VIRTIO_CONFIG_S_DRIVER_OK))
			continue;
		for (i = 0; i < MAX_VQS; i++)
			drain(t, i);
	}
	return 0;
}

/* ---- the transport ---- */

static bool notify(struct virtqueue *vq)
{
	struct test_device *t = to_test(vq->vdev);

	t->news = true;
	wake_up(&t->kicked);
	return true;
}

static unsigned int ring_size(int index)
{
	return index == VQ_BITMAP ? ring : 64;
}

static void del_vqs(struct virtio_device *vdev)
{
	struct test_device *t = to_test(vdev);
	int i;

	for (i = 0; i < MAX_VQS; i++) {
		struct test_queue *q = &t->queues[i];

		if (!q->vq)
			continue;
		vring_del_virtqueue(q->vq);
		free_pages_exact(q->pages, vring_size(ring_size(i), PAGE_SIZE));
		memset(q, 0, sizeof(*q));
	}
}

static int make_vq(struct test_device *t, int i, unsigned int number,
		   vq_callback_t *callback, const char *name)
{
	struct test_queue *q = &t->queues[i];
	size_t bytes = vring_size(ring_size(i), PAGE_SIZE);

	if (i == VQ_BITMAP && no_queue)
		return -ENOENT;
	q->pages = alloc_pages_exact(bytes, GFP_KERNEL | __GFP_ZERO);
	if (!q->pages)
		return -ENOMEM;
	q->vq = vring_new_virtqueue(number, ring_size(i), PAGE_SIZE, &t->vdev,
				    true, false, q->pages, notify, callback,
				    name);
	if (!q->vq) {
		free_pages_exact(q->pages, bytes);
		q->pages = NULL;
		return -ENOMEM;
	}
	q->last_avail = 0;
	return 0;
}

static int begin(struct test_device *t)
{
	if (t->thread)
		return 0;
	t->stats_head = -1;
	t->thread = kthread_run(run, t, "lacuna_test");
	return PTR_ERR_OR_ZERO(t->thread);
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
static int find_vqs(struct virtio_device *vdev, unsigned int nvqs,
		    struct virtqueue *vqs[], struct virtqueue_info info[],
		    struct irq_affinity *desc)
#define CALLBACK(i)	(info[i].callback)
#define NAME(i)		(info[i].name)
#else
static int find_vqs(struct virtio_device *vdev, unsigned int nvqs,
		    struct virtqueue *vqs[], vq_callback_t *callbacks[],
		    const char * const names[], const bool *ctx,
		    struct irq_affinity *desc)
#define CALLBACK(i)	(callbacks[i])
#define NAME(i)		(names[i])
#endif
{
	/* As the drivers call them, in the order of their numbers. */
	static const char * const kinds[MAX_VQS] = {
		"inflate", "deflate", "stats", "free_page_vq", "reporting_vq",
		"bitmap",
	};
	struct test_device *t = to_test(vdev);
	unsigned int i, number = 0;
	int err = nvqs > MAX_VQS ? -EINVAL : 0, kind;

	for (i = 0; !err && i < nvqs; i++) {
		vqs[i] = NULL;
		if (!NAME(i))
			continue;
		kind = match_string(kinds, MAX_VQS, NAME(i));
		err = kind < 0 ? kind :
		      make_vq(t, kind, number++, CALLBACK(i), NAME(i));
		if (!err)
			vqs[i] = t->queues[kind].vq;
	}
	if (!err)
		err = begin(t);
	if (err)
		del_vqs(vdev);
	return err;
}

void reset_device(struct virtio_device *vdev)
{
	struct test_device *t = to_test(vdev);

	if (t->thread)
		kthread_stop(t->thread);
	t->thread = NULL;
	t->status = 0;
	mutex_lock(&t->lock);
	set_config_u32(t, VIRTIO_BALLOON_BITMAP_CMD_ID_OFFSET, 0);
	set_config_u32(t, 4, 0);
	set_config_u32(t, 8, 0);
	/* Nothing a driver would write. */
	set_config_u32(t, 12, 0x12345678);
	memset(t->kept, 0, sizeof(t->kept));
	/* What was in the balloon is the guest's again. */
	bitmap_zero(t->inside, get_num_physpages() + (1UL << 20));
	mutex_unlock(&t->lock);
}

static void get(struct virtio_device *vdev, unsigned int offset, void *buf,
		unsigned int len)
{
	struct test_device *t = to_test(vdev);
	u32 next = READ_ONCE(hint_next);

	memcpy(buf, t->config + offset, len);
	/* Whoever waits to the last for DONE to be read goes on right here. */
	if (offset == 8 && next && config_u32(t, 8) == VIRTIO_BALLOON_CMD_ID_DONE) {
		WRITE_ONCE(hint_next, 0);
		t->hint_id = next;
		t->hint_stop_ns = 0;
		set_config_u32(t, 8, next);
		virtio_config_changed(vdev);
	}
}

static void set(struct virtio_device *vdev, unsigned int offset,
		const void *buf, unsigned int len)
{
	memcpy(to_test(vdev)->config + offset, buf, len);
}

static u8 get_status(struct virtio_device *vdev)
{
	return to_test(vdev)->status;
}

static void set_status(struct virtio_device *vdev, u8 status)
{
	struct test_device *t = to_test(vdev);

	if (early && status & ~t->status & VIRTIO_CONFIG_S_DRIVER_OK)
		set_config_u32(t, VIRTIO_BALLOON_BITMAP_CMD_ID_OFFSET, early);
	t->status = status;
}

static u64 get_features(struct virtio_device *vdev)
{
	return BIT_ULL(VIRTIO_F_VERSION_1) | features |
	       BIT_ULL(VIRTIO_RING_F_INDIRECT_DESC) |
	       (bitmap ? BIT_ULL(VIRTIO_BALLOON_F_FREE_PAGE_BITMAP) : 0);
}

static int finalize_features(struct virtio_device *vdev)
{
	vring_transport_features(vdev);
	return 0;
}

static const struct virtio_config_ops ops = {
	.get = get,
	.set = set,
	.get_status = get_status,
	.set_status = set_status,
	.reset = reset_device,
	.find_vqs = find_vqs,
	.del_vqs = del_vqs,
	.get_features = get_features,
	.finalize_features = finalize_features,
};

/* The last reference is gone; what it is part of lives on. */
static void release(struct device *dev)
{
}

int plug_device(void)
{
	memset(&device->vdev, 0, sizeof(device->vdev));
	device->vdev.id.device = VIRTIO_ID_BALLOON;
	device->vdev.config = &ops;
	device->vdev.dev.parent = root;
	device->vdev.dev.release = release;
	return register_virtio_device(&device->vdev);
}

/* ---- the module ---- */

static void release_all(void)
{
	int i;

	memory_release();
	for (i = 0; i < HELD_PAGES && held[i]; i++)
		__free_page(held[i]);
	if (device)
		kvfree(device->inside);
	kfree(device);
	kvfree(copy);
}

static int __init test_init(void)
{
	int err = -ENOMEM, i;

	root = root_device_register("lacuna_test");
	if (IS_ERR(root))
		return PTR_ERR(root);
	copy = kvmalloc(COPY_BYTES, GFP_KERNEL);
	device = kzalloc(sizeof(*device), GFP_KERNEL);
	if (!copy || !device)
		goto fail;
	mutex_init(&device->lock);
	init_waitqueue_head(&device->kicked);
	device->inside = kvcalloc(BITS_TO_LONGS(get_num_physpages() +
						(1UL << 20)),
				  sizeof(long), GFP_KERNEL);
	if (!device->inside)
		goto fail;
	for (i = 0; i < HELD_PAGES; i++) {
		held[i] = alloc_page(GFP_KERNEL);
		if (!held[i])
			goto fail;
	}
	err = plug_device();
	if (!err)
		return 0;
fail:
	release_all();
	root_device_unregister(root);
	return err;
}

static void __exit test_exit(void)
{
	unregister_virtio_device(&device->vdev);
	root_device_unregister(root);
	release_all();
}

module_init(test_init);
module_exit(test_exit);
MODULE_DESCRIPTION("A device to test lacuna_balloon against");
MODULE_LICENSE("GPL");
