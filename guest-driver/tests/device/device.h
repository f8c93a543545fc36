/* SPDX-License-Identifier: GPL-2.0 */
/* The test device's state and what its files share. */
#ifndef LACUNA_TEST_DEVICE_H
#define LACUNA_TEST_DEVICE_H

#include <linux/mm.h>
#include <linux/vmstat.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/virtio.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_balloon_bitmap.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <linux/wait.h>

enum {
	VQ_INFLATE,
	VQ_DEFLATE,
	VQ_STATS,
	VQ_HINT,
	VQ_REPORTING,
	VQ_BITMAP,
	MAX_VQS
};

#define COPY_BYTES	(1 << 20)
#define HELD_PAGES	4096

struct test_queue {
	struct virtqueue *vq;
	void *pages;
	u16 last_avail;
};

struct test_device {
	struct virtio_device vdev;
	u8 status;
	u8 config[20];
	struct test_queue queues[MAX_VQS];
	struct task_struct *thread;
	wait_queue_head_t kicked;
	bool news;
	/* Buffers that each queue has and the device leaves alone. */
	unsigned int kept[MAX_VQS];

	/* All below. */
	struct mutex lock;

	/* The balloon: a bit for each page in it. */
	unsigned long *inside;
	u64 inflated, deflated, wrong;

	/* Statistics: the buffer the driver waits for, or -1. */
	int stats_head;
	u64 stats[VIRTIO_BALLOON_S_NR];
	u64 stats_seen;

	/* Free page reporting and hints in blocks. */
	u64 reported, hinted;
	u64 hint_start_ns, hint_last_ns, hint_stop_ns;
	u32 hint_id, hint_begun;

	/* The bitmap report being read. */
	bool open;
	u32 chains, largest, done_id;
	u64 pages_set, held_hit, outside, errors, stale, next_pfn, free_before;
	u64 request_ns, report_ns;
	char outcome[320];
};

struct segment {
	u64 addr;
	u32 len;
	bool write;
};

/* One chain: the readable part copied, the writable segments as they are. */
struct chain {
	u16 head;
	size_t length;
	unsigned int writable;
	struct segment segments[64];
};

extern struct test_device *device;
extern struct page *held[HELD_PAGES];
extern u8 *copy;

static inline struct test_device *to_test(struct virtio_device *vdev)
{
	return container_of(vdev, struct test_device, vdev);
}

static inline u32 config_u32(struct test_device *t, unsigned int offset)
{
	return le32_to_cpup((__le32 *)(t->config + offset));
}

static inline void set_config_u32(struct test_device *t, unsigned int offset,
				  u32 value)
{
	*(__le32 *)(t->config + offset) = cpu_to_le32(value);
}

/* device.c */
void use_buffer(struct test_queue *q, u16 head);
void reset_device(struct virtio_device *vdev);
int plug_device(void);

/* memory.c */
void memory_release(void);

/* report.c */
void check_report(struct test_device *t, size_t length);

#endif
