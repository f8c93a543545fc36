// SPDX-License-Identifier: GPL-2.0
/*
 * Checks a bitmap report against the protocol, and against pages that the
 * test device holds itself and that can therefore not be free.
 */
#include <linux/ktime.h>

#include "device.h"

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

static void check_figures(struct test_device *t, u16 flags, size_t length)
{
	struct virtio_balloon_bitmap_hdr *hdr = (void *)copy;
	struct virtio_balloon_bitmap_figures *fig = (void *)(hdr + 1);

	if (le16_to_cpu(hdr->kind) != VIRTIO_BALLOON_BITMAP_KIND_FIGURES ||
	    hdr->start_pfn || hdr->num_bits ||
	    length != sizeof(*hdr) + sizeof(*fig) || fig->reserved ||
	    !(flags & VIRTIO_BALLOON_BITMAP_FLAG_LAST)) {
		t->errors++;
		return;
	}
	if (!(flags & VIRTIO_BALLOON_BITMAP_FLAG_FAILED) &&
	    le64_to_cpu(fig->pages) != t->pages_set)
		t->errors++;
	t->open = false;
	t->done_id = le32_to_cpu(hdr->cmd_id);
	t->report_ns = ktime_get_ns();
	snprintf(t->outcome, sizeof(t->outcome),
		 "id=%u flags=%u chains=%u largest=%u pages=%llu free_before=%llu free_after=%llu blocks=%llu batches=%u walk_ns=%llu lock_ns=%llu total_ns=%llu held_hit=%llu outside=%llu",
		 t->done_id, flags, t->chains, t->largest, t->pages_set,
		 t->free_before, (u64)global_zone_page_state(NR_FREE_PAGES),
		 le64_to_cpu(fig->blocks), le32_to_cpu(fig->batches),
		 le64_to_cpu(fig->walk_ns), le64_to_cpu(fig->lock_ns),
		 t->report_ns - t->request_ns, t->held_hit, t->outside);
}

void check_report(struct test_device *t, size_t length)
{
	struct virtio_balloon_bitmap_hdr *hdr = (void *)copy;
	u64 start = le64_to_cpu(hdr->start_pfn);
	u32 bits = le32_to_cpu(hdr->num_bits);
	u16 flags = le16_to_cpu(hdr->flags);

	if (length < sizeof(*hdr)) {
		t->errors++;
		return;
	}
	if (le32_to_cpu(hdr->cmd_id) !=
	    config_u32(t, VIRTIO_BALLOON_BITMAP_CMD_ID_OFFSET)) {
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

	if (le16_to_cpu(hdr->kind) != VIRTIO_BALLOON_BITMAP_KIND_PAGES) {
		check_figures(t, flags, length);
		return;
	}
	if (start % 64 || bits % 64 || !bits || start < t->next_pfn ||
	    bits > VIRTIO_BALLOON_BITMAP_MAX_BITS ||
	    length != sizeof(*hdr) + bits / 8 || flags & ~1) {
		t->errors++;
		return;
	}
	t->next_pfn = start + bits;
	t->largest = max(t->largest, bits);
	check_bits(t, start, bits);
}
