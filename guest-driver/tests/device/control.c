// SPDX-License-Identifier: GPL-2.0
/*
 * What the tests tell the device and ask it, as parameters in sysfs:
 *
 *	request		write a command id; reads as the last report's outcome
 *	target		write the balloon's size in pages; reads as what it got
 *	stats		write anything to ask; reads as "tag=value" of the last
 *	hint		write a free page hint command id; reads as its figures
 *	kept		reads as the buffers of each queue that are not used
 *	break_queue	write the number of a queue that is broken from then on
 *	suspend		write to take the driver through freeze and restore
 *	replug		write to take the device away and bring it back
 */
#include <linux/bitmap.h>
#include <linux/ktime.h>
#include <linux/module.h>

#include "device.h"

static int request_set(const char *value, const struct kernel_param *kp)
{
	u32 id;
	int err = kstrtou32(value, 0, &id);

	if (err || !device)
		return err ? err : -ENODEV;
	mutex_lock(&device->lock);
	device->open = false;
	device->held_hit = 0;
	device->outside = 0;
	device->errors = 0;
	device->stale = 0;
	device->free_before = global_zone_page_state(NR_FREE_PAGES);
	device->request_ns = ktime_get_ns();
	strscpy(device->outcome, "none", sizeof(device->outcome));
	set_config_u32(device, VIRTIO_BALLOON_BITMAP_CMD_ID_OFFSET, id);
	mutex_unlock(&device->lock);
	virtio_config_changed(&device->vdev);
	return 0;
}

static int request_get(char *buffer, const struct kernel_param *kp)
{
	int length;

	mutex_lock(&device->lock);
	length = scnprintf(buffer, PAGE_SIZE,
			   "%s errors=%llu stale=%llu wrong=%llu\n",
			   device->outcome, device->errors, device->stale,
			   device->wrong);
	mutex_unlock(&device->lock);
	return length;
}

static int target_set(const char *value, const struct kernel_param *kp)
{
	u32 pages;
	int err = kstrtou32(value, 0, &pages);

	if (err || !device)
		return err ? err : -ENODEV;
	set_config_u32(device, 0, pages);
	virtio_config_changed(&device->vdev);
	return 0;
}

static int target_get(char *buffer, const struct kernel_param *kp)
{
	int length;

	mutex_lock(&device->lock);
	length = scnprintf(buffer, PAGE_SIZE,
			   "actual=%u inside=%u inflated=%llu deflated=%llu reported=%llu poison=%#x wrong=%llu\n",
			   config_u32(device, 4),
			   bitmap_weight(device->inside,
					 get_num_physpages() + (1UL << 20)),
			   device->inflated, device->deflated,
			   device->reported, config_u32(device, 12),
			   device->wrong);
	mutex_unlock(&device->lock);
	return length;
}

static int stats_set(const char *value, const struct kernel_param *kp)
{
	int head;

	if (!device)
		return -ENODEV;
	mutex_lock(&device->lock);
	head = device->stats_head;
	device->stats_head = -1;
	device->stats_seen = 0;
	mutex_unlock(&device->lock);
	if (head < 0)
		return -EBUSY;
	use_buffer(&device->queues[VQ_STATS], head);
	return 0;
}

static int stats_get(char *buffer, const struct kernel_param *kp)
{
	int tag, length = 0;

	mutex_lock(&device->lock);
	for (tag = 0; tag < VIRTIO_BALLOON_S_NR; tag++)
		if (device->stats_seen & BIT_ULL(tag))
			length += scnprintf(buffer + length, PAGE_SIZE - length,
					    "%d=%llu\n", tag,
					    device->stats[tag]);
	mutex_unlock(&device->lock);
	return length;
}

static int hint_set(const char *value, const struct kernel_param *kp)
{
	u32 id;
	int err = kstrtou32(value, 0, &id);

	if (err || !device)
		return err ? err : -ENODEV;
	mutex_lock(&device->lock);
	if (id >= VIRTIO_BALLOON_CMD_ID_DONE + 1) {
		device->hint_id = id;
		device->hint_start_ns = ktime_get_ns();
		device->hint_last_ns = 0;
		device->hint_stop_ns = 0;
	}
	set_config_u32(device, 8, id);
	mutex_unlock(&device->lock);
	virtio_config_changed(&device->vdev);
	return 0;
}

static int hint_get(char *buffer, const struct kernel_param *kp)
{
	int length;

	mutex_lock(&device->lock);
	length = scnprintf(buffer, PAGE_SIZE,
			   "pages=%llu stopped=%d last_ns=%llu\n",
			   device->hinted, device->hint_stop_ns != 0,
			   device->hint_last_ns ?
			   device->hint_last_ns - device->hint_start_ns : 0);
	mutex_unlock(&device->lock);
	return length;
}

static int kept_get(char *buffer, const struct kernel_param *kp)
{
	if (!device)
		return -ENODEV;
	return scnprintf(buffer, PAGE_SIZE,
			 "inflate=%u deflate=%u hint=%u reporting=%u bitmap=%u\n",
			 READ_ONCE(device->kept[VQ_INFLATE]),
			 READ_ONCE(device->kept[VQ_DEFLATE]),
			 READ_ONCE(device->kept[VQ_HINT]),
			 READ_ONCE(device->kept[VQ_REPORTING]),
			 READ_ONCE(device->kept[VQ_BITMAP]));
}

static int break_set(const char *value, const struct kernel_param *kp)
{
	u32 queue;
	int err = kstrtou32(value, 0, &queue);

	if (err || !device)
		return err ? err : -ENODEV;
	if (queue >= MAX_VQS || !device->queues[queue].vq)
		return -EINVAL;
	__virtqueue_break(device->queues[queue].vq);
	return 0;
}

static int suspend_set(const char *value, const struct kernel_param *kp)
{
	int err;

	if (!device)
		return -ENODEV;
	err = virtio_device_freeze(&device->vdev);
	if (err)
		return err;
	reset_device(&device->vdev);
	return virtio_device_restore(&device->vdev);
}

static int replug_set(const char *value, const struct kernel_param *kp)
{
	if (!device)
		return -ENODEV;
	unregister_virtio_device(&device->vdev);
	return plug_device();
}

#define SYSFS_PARAMETER(name, mode, setter, getter)			\
	static const struct kernel_param_ops name##_ops = {		\
		.set = setter,						\
		.get = getter,						\
	};								\
	module_param_cb(name, &name##_ops, NULL, mode)

SYSFS_PARAMETER(request, 0644, request_set, request_get);
SYSFS_PARAMETER(target, 0644, target_set, target_get);
SYSFS_PARAMETER(stats, 0644, stats_set, stats_get);
SYSFS_PARAMETER(hint, 0644, hint_set, hint_get);
SYSFS_PARAMETER(kept, 0444, NULL, kept_get);
SYSFS_PARAMETER(break_queue, 0200, break_set, NULL);
SYSFS_PARAMETER(suspend, 0200, suspend_set, NULL);
SYSFS_PARAMETER(replug, 0200, replug_set, NULL);
