// SPDX-License-Identifier: GPL-2.0
/*
 * A balloon device inside the guest's own kernel, to test the driver against
 * any kernel with no host that knows the protocol. It asks, reads the rings as
 * a device would, and checks each report against the protocol and against
 * pages that it holds itself and that can therefore not be free.
 *
 *	insmod lacuna_test_device.ko ring=4 indirect=0
 *	echo 2 > /sys/module/lacuna_test_device/parameters/request
 *	cat /sys/module/lacuna_test_device/parameters/request
 *
 * The parameter reads as the outcome of the last report. Writing to suspend
 * takes the driver through freeze and restore. delay_ms keeps each
 * chain so long before it is used; a negative one keeps chains for ever.
 *
 * Written for Linux 6.1 only: nothing but tests needs it.
 */
#include <linux/delay.h>
#include <linux/device.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/vmstat.h>
#include <linux/virtio.h>
#include <linux/virtio_balloon_bitmap.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_ring.h>

#define MAX_VQS		6
#define HELD_PAGES	4096

static unsigned int ring = 8;
module_param(ring, uint, 0444);
static bool indirect = true;
module_param(indirect, bool, 0444);
static int delay_ms;
module_param(delay_ms, int, 0644);

struct test_device {
	struct virtio_device vdev;
	u8 status;
	u8 config[20];
	unsigned int nr_vqs;
	struct virtqueue *vqs[MAX_VQS];
	void *pages[MAX_VQS];
	u16 last_avail;
	struct task_struct *thread;
	wait_queue_head_t kicked;
	bool news;

	/* The report being read; under lock for whoever reads the outcome. */
	struct mutex lock;
	bool open;
	u32 chains, largest, done_id;
	u64 pages_set, held_hit, outside, errors, stale, next_pfn, free_before;
	char outcome[256];
};

static struct test_device *device;
static struct device *root;
static struct page *held[HELD_PAGES];
static u8 *copy;

static struct test_device *to_test(struct virtio_device *vdev)
{
	return container_of(vdev, struct test_device, vdev);
}

static u32 current_id(struct test_device *t)
{
	return le32_to_cpup((__le32 *)(t->config +
				       VIRTIO_BALLOON_BITMAP_CMD_ID_OFFSET));
}

static void check_bits(struct test_device *t, u64 start, u32 bits)
{
	u32 i;

	for (i = 0; i < bits; i++) {
		if (!(copy[24 + i / 8] >> (i % 8) & 1))
			continue;
		t->pages_set++;
		if (!pfn_valid(start + i))
			t->outside++;
	}
	for (i = 0; i < HELD_PAGES; i++) {
		u64 pfn = page_to_pfn(held[i]);

		if (pfn < start || pfn >= start + bits)
			continue;
		pfn -= start;
		if (copy[24 + pfn / 8] >> (pfn % 8) & 1)
			t->held_hit++;
	}
}

static void check_chain(struct test_device *t, size_t length)
{
	struct virtio_balloon_bitmap_hdr *hdr = (void *)copy;
	struct virtio_balloon_bitmap_figures *fig = (void *)(hdr + 1);
	u64 start = le64_to_cpu(hdr->start_pfn);
	u32 bits = le32_to_cpu(hdr->num_bits);
	u16 flags = le16_to_cpu(hdr->flags);

	if (length < sizeof(*hdr)) {
		t->errors++;
		return;
	}
	if (le32_to_cpu(hdr->cmd_id) != current_id(t)) {
		t->stale++;
		return;
	}
	if (flags & VIRTIO_BALLOON_BITMAP_FLAG_FIRST) {
		t->open = true;
		t->chains = 0;
		t->largest = 0;
		t->pages_set = 0;
		t->next_pfn = 0;
	} else if (!t->open) {
		t->errors++;
	}
	t->chains++;
	if (hdr->reserved || flags & ~7)
		t->errors++;

	if (le16_to_cpu(hdr->kind) == VIRTIO_BALLOON_BITMAP_KIND_PAGES) {
		if (start % 64 || bits % 64 || !bits || start < t->next_pfn ||
		    bits > VIRTIO_BALLOON_BITMAP_MAX_BITS ||
		    length != sizeof(*hdr) + bits / 8 || flags & ~1) {
			t->errors++;
			return;
		}
		t->next_pfn = start + bits;
		t->largest = max(t->largest, bits);
		check_bits(t, start, bits);
		return;
	}
	if (le16_to_cpu(hdr->kind) != VIRTIO_BALLOON_BITMAP_KIND_FIGURES ||
	    start || bits || length != sizeof(*hdr) + sizeof(*fig) ||
	    fig->reserved || !(flags & VIRTIO_BALLOON_BITMAP_FLAG_LAST)) {
		t->errors++;
		return;
	}
	if (le64_to_cpu(fig->pages) != t->pages_set)
		t->errors++;
	t->open = false;
	t->done_id = current_id(t);
	snprintf(t->outcome, sizeof(t->outcome),
		 "id=%u flags=%u chains=%u largest=%u pages=%llu free=%llu-%llu blocks=%llu batches=%u walk_ns=%llu lock_ns=%llu held_hit=%llu outside=%llu errors=%llu stale=%llu",
		 t->done_id, flags, t->chains, t->largest, t->pages_set,
		 t->free_before, (u64)global_zone_page_state(NR_FREE_PAGES),
		 le64_to_cpu(fig->blocks), le32_to_cpu(fig->batches),
		 le64_to_cpu(fig->walk_ns), le64_to_cpu(fig->lock_ns),
		 t->held_hit, t->outside, t->errors, t->stale);
}

/* Copies a chain; returns its length, or 0 if it is not a proper one. */
static size_t gather(struct test_device *t, struct vring *vr, u16 head)
{
	struct vring_desc *table = vr->desc;
	unsigned int i = head, count = vr->num, steps = 0;
	size_t length = 0;

	if (le16_to_cpu((__force __le16)table[i].flags) & VRING_DESC_F_INDIRECT) {
		count = le32_to_cpu((__force __le32)table[i].len) / sizeof(*table);
		table = phys_to_virt(le64_to_cpu((__force __le64)table[i].addr));
		i = 0;
	}
	for (;;) {
		u16 flags;
		u32 len;

		if (i >= count || steps++ > count) {
			t->errors++;
			return 0;
		}
		flags = le16_to_cpu((__force __le16)table[i].flags);
		len = le32_to_cpu((__force __le32)table[i].len);
		if (flags & VRING_DESC_F_WRITE || length + len > (1 << 20)) {
			t->errors++;
			return 0;
		}
		memcpy(copy + length,
		       phys_to_virt(le64_to_cpu((__force __le64)table[i].addr)),
		       len);
		length += len;
		if (!(flags & VRING_DESC_F_NEXT))
			return length;
		i = le16_to_cpu((__force __le16)table[i].next);
	}
}

static void drain(struct test_device *t, struct virtqueue *vq)
{
	struct vring vr;

	vring_init(&vr, virtqueue_get_vring_size(vq), t->pages[vq->index],
		   PAGE_SIZE);
	while (t->last_avail !=
	       le16_to_cpu((__force __le16)READ_ONCE(vr.avail->idx))) {
		u16 head, used;

		virt_rmb();
		if (kthread_should_stop() || delay_ms < 0)
			return;
		if (delay_ms)
			msleep(delay_ms);
		head = le16_to_cpu((__force __le16)
				   vr.avail->ring[t->last_avail % vr.num]);
		mutex_lock(&t->lock);
		check_chain(t, gather(t, &vr, head));
		mutex_unlock(&t->lock);
		t->last_avail++;

		used = le16_to_cpu((__force __le16)vr.used->idx);
		vr.used->ring[used % vr.num].id =
			(__force __virtio32)cpu_to_le32(head);
		vr.used->ring[used % vr.num].len = 0;
		virt_wmb();
		WRITE_ONCE(vr.used->idx, (__force __virtio16)cpu_to_le16(used + 1));
		virt_mb();
		local_irq_disable();
		vring_interrupt(0, vq);
		local_irq_enable();
	}
}

static int run(void *data)
{
	struct test_device *t = data;

	while (!kthread_should_stop()) {
		wait_event_interruptible_timeout(t->kicked, t->news ||
						 kthread_should_stop(), HZ / 4);
		t->news = false;
		if (t->nr_vqs == 3 && t->status & VIRTIO_CONFIG_S_DRIVER_OK)
			drain(t, t->vqs[2]);
	}
	return 0;
}

static bool notify(struct virtqueue *vq)
{
	struct test_device *t = to_test(vq->vdev);

	t->news = true;
	wake_up(&t->kicked);
	return true;
}

static void del_vqs(struct virtio_device *vdev)
{
	struct test_device *t = to_test(vdev);

	while (t->nr_vqs) {
		t->nr_vqs--;
		vring_del_virtqueue(t->vqs[t->nr_vqs]);
		free_pages_exact(t->pages[t->nr_vqs],
				 vring_size(ring, PAGE_SIZE));
	}
}

static int find_vqs(struct virtio_device *vdev, unsigned int nvqs,
		    struct virtqueue *vqs[], vq_callback_t *callbacks[],
		    const char * const names[], const bool *ctx,
		    struct irq_affinity *desc)
{
	struct test_device *t = to_test(vdev);
	unsigned int i;

	for (i = 0; i < nvqs; i++) {
		t->pages[i] = alloc_pages_exact(vring_size(ring, PAGE_SIZE),
						GFP_KERNEL | __GFP_ZERO);
		vqs[i] = vring_new_virtqueue(i, ring, PAGE_SIZE, vdev, true,
					     false, t->pages[i], notify,
					     callbacks[i], names[i]);
		if (!vqs[i])
			return -ENOMEM;
		t->vqs[i] = vqs[i];
		t->nr_vqs = i + 1;
	}
	t->last_avail = 0;
	t->thread = kthread_run(run, t, "lacuna_test");
	return PTR_ERR_OR_ZERO(t->thread);
}

static void reset(struct virtio_device *vdev)
{
	struct test_device *t = to_test(vdev);

	t->status = 0;
	memset(t->config, 0, sizeof(t->config));
	if (t->thread)
		kthread_stop(t->thread);
	t->thread = NULL;
}

static void get(struct virtio_device *vdev, unsigned int offset, void *buf,
		unsigned int len)
{
	memcpy(buf, to_test(vdev)->config + offset, len);
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
	to_test(vdev)->status = status;
}

static u64 get_features(struct virtio_device *vdev)
{
	return BIT_ULL(VIRTIO_F_VERSION_1) | BIT_ULL(4) |
	       BIT_ULL(VIRTIO_BALLOON_F_FREE_PAGE_BITMAP) |
	       (indirect ? BIT_ULL(VIRTIO_RING_F_INDIRECT_DESC) : 0);
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
	.reset = reset,
	.find_vqs = find_vqs,
	.del_vqs = del_vqs,
	.get_features = get_features,
	.finalize_features = finalize_features,
};

static int request_set(const char *value, const struct kernel_param *kp)
{
	u32 id;
	int err = kstrtou32(value, 0, &id);

	if (err)
		return err;
	if (!device)
		return -ENODEV;
	mutex_lock(&device->lock);
	device->open = false;
	device->held_hit = 0;
	device->outside = 0;
	device->errors = 0;
	device->stale = 0;
	device->free_before = global_zone_page_state(NR_FREE_PAGES);
	strscpy(device->outcome, "none", sizeof(device->outcome));
	*(__le32 *)(device->config + VIRTIO_BALLOON_BITMAP_CMD_ID_OFFSET) =
		cpu_to_le32(id);
	mutex_unlock(&device->lock);
	virtio_config_changed(&device->vdev);
	return 0;
}

static int request_get(char *buffer, const struct kernel_param *kp)
{
	int length;

	if (!device)
		return -ENODEV;
	mutex_lock(&device->lock);
	length = scnprintf(buffer, PAGE_SIZE, "%s errors=%llu stale=%llu\n",
			   device->outcome, device->errors, device->stale);
	mutex_unlock(&device->lock);
	return length;
}

static const struct kernel_param_ops request_ops = {
	.set = request_set,
	.get = request_get,
};
module_param_cb(request, &request_ops, NULL, 0644);

static int suspend_set(const char *value, const struct kernel_param *kp)
{
	int err;

	if (!device)
		return -ENODEV;
	err = virtio_device_freeze(&device->vdev);
	if (err)
		return err;
	reset(&device->vdev);
	return virtio_device_restore(&device->vdev);
}

static const struct kernel_param_ops suspend_ops = {
	.set = suspend_set,
};
module_param_cb(suspend, &suspend_ops, NULL, 0200);

static void release(struct device *dev)
{
}

static int __init test_init(void)
{
	struct test_device *t;
	int err, i;

	copy = kvmalloc(1 << 20, GFP_KERNEL);
	t = kzalloc(sizeof(*t), GFP_KERNEL);
	root = root_device_register("lacuna_test");
	if (!copy || !t || IS_ERR(root))
		return -ENOMEM;
	for (i = 0; i < HELD_PAGES; i++) {
		held[i] = alloc_page(GFP_KERNEL);
		if (!held[i])
			return -ENOMEM;
	}
	mutex_init(&t->lock);
	init_waitqueue_head(&t->kicked);
	t->vdev.id.device = VIRTIO_ID_BALLOON;
	t->vdev.config = &ops;
	t->vdev.dev.parent = root;
	t->vdev.dev.release = release;
	device = t;
	err = register_virtio_device(&t->vdev);
	return err;
}

static void __exit test_exit(void)
{
	int i;

	unregister_virtio_device(&device->vdev);
	root_device_unregister(root);
	for (i = 0; i < HELD_PAGES; i++)
		__free_page(held[i]);
	kfree(device);
	kvfree(copy);
}

module_init(test_init);
module_exit(test_exit);
MODULE_DESCRIPTION("A device to test lacuna_balloon against");
MODULE_LICENSE("GPL");
