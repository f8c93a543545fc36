/* SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR Apache-2.0 */
/*
 * Free page bitmaps for the virtio balloon (device ID 5).
 *
 * The layouts and the rules that go with them are specified in
 * protocol/free-page-bitmap.md. Guest driver and device model both include
 * this file. All fields are little-endian.
 */
#ifndef _LINUX_VIRTIO_BALLOON_BITMAP_H
#define _LINUX_VIRTIO_BALLOON_BITMAP_H

#include <linux/types.h>

/* Feature bit. Requires VIRTIO_F_VERSION_1. */
#define VIRTIO_BALLOON_F_FREE_PAGE_BITMAP	63

/*
 * Offset of the command id in the device configuration space: it follows
 * num_pages, actual, free_page_hint_cmd_id and poison_val.
 */
#define VIRTIO_BALLOON_BITMAP_CMD_ID_OFFSET	16

/* Values of free_page_bitmap_cmd_id. 1 is reserved. */
#define VIRTIO_BALLOON_BITMAP_CMD_STOP		0
#define VIRTIO_BALLOON_BITMAP_CMD_FIRST		2

/* start_pfn counts pages of this size, whatever the driver's page size is. */
#define VIRTIO_BALLOON_BITMAP_PFN_SHIFT		12

/* struct virtio_balloon_bitmap_hdr.kind */
#define VIRTIO_BALLOON_BITMAP_KIND_PAGES	1	/* a bitmap follows */
#define VIRTIO_BALLOON_BITMAP_KIND_FIGURES	2	/* the figures follow */

/* struct virtio_balloon_bitmap_hdr.flags */
#define VIRTIO_BALLOON_BITMAP_FLAG_FIRST	(1 << 0)
#define VIRTIO_BALLOON_BITMAP_FLAG_LAST		(1 << 1)
/* With LAST only: the driver gave up, the report is to be thrown away. */
#define VIRTIO_BALLOON_BITMAP_FLAG_FAILED	(1 << 2)

/* The most bits one chain may carry: 16 GiB of guest memory, 512 KiB. */
#define VIRTIO_BALLOON_BITMAP_MAX_BITS		(1U << 22)

/* First bytes of each device-readable chain. */
struct virtio_balloon_bitmap_hdr {
	__le32 cmd_id;		/* the request this answers */
	__le16 kind;
	__le16 flags;
	__le64 start_pfn;	/* of bit 0; a multiple of 64 */
	__le32 num_bits;	/* a multiple of 64; bytes that follow = num_bits / 8 */
	__le32 reserved;	/* 0 */
};

/* Follows a header of kind FIGURES (num_bits is 0 there). */
struct virtio_balloon_bitmap_figures {
	__le64 blocks;		/* free blocks found */
	__le64 pages;		/* free pages found, in units of 4 KiB */
	__le64 walk_ns;		/* first lock taken to last lock dropped */
	__le64 lock_ns;		/* longest single hold of a free-list lock */
	__le32 batches;		/* times a free-list lock was taken */
	__le32 reserved;	/* 0 */
};

#endif /* _LINUX_VIRTIO_BALLOON_BITMAP_H */
