/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lacuna.h - the virtio balloon device with free-page hints, for a VMM written in any language.
 *
 * The library has no threads of its own and opens no files. A VMM gives it the guest's memory and the driver's
 * accesses, and gets signals for the driver. For a live migration it asks the guest, through the balloon, which pages
 * are free, and clears their bits in its own dirty bitmap.
 *
 * Results. Every call returns LACUNA_OK (0) or one of the negative codes below; lacuna_message() then has a sentence
 * for a person. No call ends the process, throws, or writes to standard output or error, whatever the guest does.
 *
 * Handles are numbers, never reused within 2^32 creations. One that was never given out, or whose object is gone, is
 * LACUNA_ERROR_HANDLE; 0 never is a handle.
 *
 * Threads. Any call may be made on any thread at any time, and at the same time as any other, unless its description
 * says otherwise. None waits for the guest but lacuna_window_wait().
 *
 * Callbacks come on the thread of the call that causes them. A callback must not call this library
 * (LACUNA_ERROR_REENTRANT) and must not wait for a thread that is in a call of it. `discard` and `mark_dirty` are called
 * with the device locked.
 *
 * Versions. Every structure begins with its own size, set by the caller to sizeof of what it was compiled with. Later
 * versions only add fields at the end: a library reads and writes no more than the caller's size and takes what is
 * absent as 0. A structure smaller than that of version 1 is LACUNA_ERROR_VERSION.
 *
 * protocol/plugin-abi.md is the specification; examples/balloon.c is a whole program.
 */
#ifndef LACUNA_H
#define LACUNA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What this header describes. The upper half changes when old programs would break; the lower half grows. */
#define LACUNA_ABI_VERSION 0x00010000u

/* --- results --- */

#define LACUNA_OK 0
#define LACUNA_ERROR_ARGUMENT (-1)   /* NULL, or a value out of range */
#define LACUNA_ERROR_HANDLE (-2)     /* no such device or window, or not any more */
#define LACUNA_ERROR_VERSION (-3)    /* another ABI version, or a structure that is too small */
#define LACUNA_ERROR_STATE (-4)      /* not now: not active, tracking not armed, nothing to mask with */
#define LACUNA_ERROR_MEMORY (-5)     /* regions that overlap, are not whole pages, or lie beyond the limit */
#define LACUNA_ERROR_QUEUE (-6)      /* a queue of a wrong size, or not within memory */
#define LACUNA_ERROR_FEATURES (-7)   /* features that were not offered, or that do not go together */
#define LACUNA_ERROR_SPACE (-8)      /* the buffer is too small; the size needed was stored */
#define LACUNA_ERROR_REFUSED (-9)    /* no report can be had now; the message says why */
#define LACUNA_ERROR_TIMEOUT (-10)   /* no report in time; the window is still open */
#define LACUNA_ERROR_FAILED (-11)    /* the guest gave up, sent nonsense, or its driver is gone */
#define LACUNA_ERROR_STALE (-12)     /* a dirty log was merged, or tracking ended, since the window was opened */
#define LACUNA_ERROR_BUSY (-13)      /* the device has a window open already */
#define LACUNA_ERROR_REENTRANT (-14) /* called from within a callback */
#define LACUNA_ERROR_CORRUPT (-15)   /* a saved state that no device can be in */
#define LACUNA_ERROR_RESOURCES (-16) /* too many devices or windows */

/* What the library implements. Any thread. */
uint32_t lacuna_abi_version(void);

/* The name of a result ("LACUNA_ERROR_STALE"), static; never NULL. Any thread. */
const char *lacuna_result_name(int result);

/*
 * What the last failed call on this thread had to say, in one line without an end; "" if none failed. Valid until the
 * next call on this thread. Never NULL. May be called from a callback.
 */
const char *lacuna_message(void);

/* --- the device --- */

typedef uint64_t lacuna_device;

#define LACUNA_LOG_WARNING 1
#define LACUNA_LOG_NOTE 2

struct lacuna_device_config {
    uint32_t size;        /* sizeof(struct lacuna_device_config) */
    uint32_t abi_version; /* LACUNA_ABI_VERSION */
    /*
     * The end of guest-physical address space that regions may reach, in bytes, up to 2^46; 0: 2^40. Each bitmap takes
     * 1/32768 of the highest region's end.
     */
    uint64_t address_limit;
    /*
     * Balloon features to offer, as a mask of virtio feature bits; 0: all but DEFLATE_ON_OOM and PAGE_REPORTING, which a
     * guest pays for. VERSION_1 is always offered.
     */
    uint64_t features;
    /* Handed to every callback. */
    void *context;
    /* Interrupts the driver for used buffers of this queue. Required. */
    void (*signal_queue)(void *context, uint32_t queue);
    /* Interrupts the driver for a change of the configuration space. Required. */
    void (*signal_config)(void *context);
    /* DEVICE_NEEDS_RESET is to be set in the device status; signal_config follows. Required. */
    void (*signal_needs_reset)(void *context);
    /*
     * Gives whole pages of guest memory back to the host: they must read as zero afterwards. 0, or anything else if that
     * is not possible; the library clears them then. May be NULL: anonymous private memory is discarded by the library
     * itself, with MADV_DONTNEED.
     */
    int (*discard)(void *context, uint64_t guest_address, uint64_t bytes);
    /*
     * The library has written to guest memory. The bytes are in place. Required: a migration that does not know of
     * these writes loses them.
     */
    void (*mark_dirty)(void *context, uint64_t guest_address, uint64_t bytes);
    /* A line about what the guest did wrong. The text is valid during the call. May be NULL. */
    void (*log)(void *context, int level, const char *text);
};

/*
 * Makes a device with no memory and no driver, and stores its handle. ARGUMENT, VERSION, RESOURCES (more than 256
 * devices).
 */
int lacuna_device_create(const struct lacuna_device_config *config, lacuna_device *device);

/*
 * Ends a device and its windows. When it returns no callback of it runs or will run, and its memory is not touched any
 * more. HANDLE.
 */
int lacuna_device_destroy(lacuna_device device);

struct lacuna_region {
    uint64_t guest_address; /* bytes, a multiple of 4096 */
    uint64_t bytes;         /* a multiple of 4096 */
    void *host;             /* readable and writable, `bytes` bytes, a multiple of 4096 */
};

/*
 * Sets the guest's RAM, all of it, in any order; at most 4096 regions. It may change at any time, also with the driver
 * active (hotplug): queues and balloon go on, and the configuration is signalled. The mappings stay the caller's, who must keep them until the next
 * set_memory or destroy returned. Open windows end (FAILED). ARGUMENT, HANDLE, MEMORY; QUEUE if a queue of the active
 * driver is not in the new memory: then nothing was changed.
 */
int lacuna_device_set_memory(lacuna_device device, const struct lacuna_region *regions, size_t count);

/* The virtio device type: 5. */
int lacuna_device_type(lacuna_device device, uint32_t *type);
/* The number of queues, and the largest size of one, in descriptors. ARGUMENT: there is no such queue. */
int lacuna_device_queue_count(lacuna_device device, uint32_t *count);
int lacuna_device_queue_limit(lacuna_device device, uint32_t queue, uint32_t *size);

/* The virtio features to offer to the driver. */
int lacuna_device_features(lacuna_device device, uint64_t *features);
/* The driver's choice (FEATURES_OK). FEATURES: refuse it. STATE: the driver is active. */
int lacuna_device_set_features(lacuna_device device, uint64_t features);

/*
 * The configuration space, little-endian. Any offset; bytes beyond the end read as 0, and writes to fields that are not
 * the driver's are ignored. `bytes` is at most 256, all of one moment. To be called with the offset and size of the
 * driver's own access. Reading calls no callback: a lock of the VMM's may be held around it.
 */
int lacuna_device_config_read(lacuna_device device, uint32_t offset, void *buffer, size_t bytes);
int lacuna_device_config_write(lacuna_device device, uint32_t offset, const void *buffer, size_t bytes);

struct lacuna_queue {
    uint32_t size;             /* sizeof(struct lacuna_queue) */
    uint32_t index;
    uint32_t entries;          /* a power of two up to the limit; 0: the driver does not use this queue */
    uint32_t next_available;   /* 0 for a new driver; after a migration what lacuna_device_queue_state() said */
    uint32_t next_used;
    uint32_t reserved;         /* 0 */
    uint64_t descriptors;      /* guest-physical addresses */
    uint64_t available;
    uint64_t used;
};

/* Sets a queue up, before activate. ARGUMENT, HANDLE, QUEUE; STATE: the driver is active, or there is no memory. */
int lacuna_device_set_queue(lacuna_device device, const struct lacuna_queue *queue);
/* Where a queue is and how far it got. `queue->size` and `queue->index` are the caller's. */
int lacuna_device_queue_state(lacuna_device device, struct lacuna_queue *queue);

/*
 * DRIVER_OK. STATE: active already, or no features or memory were set. QUEUE. Signals the configuration, since it may
 * have changed before.
 */
int lacuna_device_activate(lacuna_device device);

/*
 * The driver notified this queue. Serves what waits there; callbacks come during the call. ARGUMENT; without effect on
 * a queue that is not set up, or while the driver is not active.
 */
int lacuna_device_notify(lacuna_device device, uint32_t queue);

/*
 * The driver reset the device. When it returns the queues are not touched any more. Target and counters stay; tracking
 * stays armed; a window ends (FAILED).
 */
int lacuna_device_reset(lacuna_device device);

/* Asks the driver to have so many pages of 4 KiB in the balloon. */
int lacuna_device_set_target(lacuna_device device, uint32_t pages);

struct lacuna_device_status {
    uint32_t size;                 /* sizeof(struct lacuna_device_status) */
    uint32_t is_active;            /* 1 from activate to reset */
    uint32_t can_hint;             /* 1 if a window can be opened now */
    uint32_t target_pages;         /* of 4 KiB */
    uint32_t actual_pages;         /* what the driver says is in the balloon */
    uint32_t reserved;
    uint64_t inflated_pages;       /* over the queues, since create */
    uint64_t deflated_pages;
    uint64_t reports_completed;
    uint64_t reports_failed;       /* the driver gave up, or sent nonsense */
    uint64_t chains_dropped;       /* of reports: late, or answering another request */
    uint64_t pages_not_ram;        /* page numbers that the driver made up */
    uint64_t broken_queues;
};

int lacuna_device_get_status(lacuna_device device, struct lacuna_device_status *status);

/*
 * Saves the device for a migration or a snapshot, the driver's choice and queues included, tracking and windows
 * excluded. The vCPUs are stopped. `*bytes` is the buffer's size and becomes the state's. SPACE, with the size stored,
 * if it does not fit or `buffer` is NULL.
 */
int lacuna_device_save(lacuna_device device, void *buffer, size_t *bytes);
/*
 * Loads a state into a device that has its memory, and activates it if it was active. The bytes are not trusted.
 * CORRUPT: the device is as after a reset. STATE: the driver is active, or there is no memory. Signals the
 * configuration, since it may have changed.
 */
int lacuna_device_load(lacuna_device device, const void *buffer, size_t bytes);

/* --- hints --- */

/*
 * The order of a round, which is what makes skipping safe:
 *
 *   1. arm the tracking of writes to all guest memory, the VMM's own included, and say so: lacuna_tracking_armed()
 *   2. lacuna_window_open()       the guest is asked
 *   3. lacuna_window_wait()       until its answer is whole, or not longer than this
 *   4. lacuna_window_mask()       clears the bits of free pages in the bitmap of what is to be sent
 *   5. lacuna_window_close()
 *   6. send what is left; then say lacuna_tracking_merge(), collect the dirty log into the bitmap, and go to 2
 *
 * A page whose bit was cleared need not be sent. If an earlier round sent it, the destination has to be told to make it
 * zero: `cleared` tells which those are. Nothing may be discarded because of a hint: the page may be in use again.
 */

/* The caller's dirty tracking is armed for all of guest memory. To be said after it is true. */
int lacuna_tracking_armed(lacuna_device device);
/*
 * A dirty log is about to be merged into the bitmap: from here on an open window cannot mask any more (STALE). Waits for
 * a mask that is going on. To be said before the first bit is merged. STATE: not armed.
 */
int lacuna_tracking_merge(lacuna_device device);
/* Tracking ends: an open window is over, and none can be opened. No effect if it was not armed. */
int lacuna_tracking_disarmed(lacuna_device device);

typedef uint64_t lacuna_window;

/*
 * Asks the guest for its free pages. STATE: tracking was not declared armed. BUSY: a window is open. REFUSED: the guest
 * cannot be asked now; the message says why.
 */
int lacuna_window_open(lacuna_device device, lacuna_window *window);

struct lacuna_report {
    uint32_t size; /* sizeof(struct lacuna_report) */
    uint32_t has_figures;
    uint64_t pages; /* free pages in the report */
    /* The guest's own figures, which it may have made up. */
    uint64_t blocks;
    uint64_t walk_nanoseconds;
    uint64_t longest_lock_nanoseconds;
};

/*
 * Waits for the report, for at most `milliseconds` (a day at most; 0: looks once). Afterwards, any number of calls
 * return at once. `report` may be NULL. HANDLE, TIMEOUT, FAILED, STALE. Waits in its own thread; meanwhile the other
 * calls work, this one on other threads too, and close or destroy end the wait. May signal the configuration.
 */
int lacuna_window_wait(lacuna_window window, uint32_t milliseconds, struct lacuna_report *report);

/* Others set bits of the bitmap during the call: words are changed atomically. */
#define LACUNA_BITMAP_SHARED 1u

struct lacuna_bitmap {
    uint32_t size;          /* sizeof(struct lacuna_bitmap) */
    uint32_t flags;         /* LACUNA_BITMAP_... */
    uint64_t guest_address; /* of bit 0, a multiple of the page size */
    uint64_t bits;
    uint32_t page_shift;    /* 12 to 30. A page larger than 4 KiB is cleared only if all of it is free. */
    uint32_t reserved;      /* 0 */
    uint64_t *words;        /* (bits + 63) / 64 words, little-endian, bit 0 the least significant; aligned to 8 */
    /* NULL, or as many words, into which the bits that were set and are now clear are stored. */
    uint64_t *cleared;
    /* Stored by the call: bits that were set and are now clear. */
    uint64_t cleared_count;
};

/*
 * Clears the bits of the pages that the report has free; may be called for several bitmaps (one for each memory slot,
 * say). Touches nothing else, and nothing at all if it fails. STATE: no report was waited for. STALE: too late.
 * ARGUMENT, HANDLE.
 */
int lacuna_window_mask(lacuna_window window, struct lacuna_bitmap *bitmap);

/* Ends the wish; the handle is gone. What the guest sends later is dropped. HANDLE. */
int lacuna_window_close(lacuna_window window);

#ifdef __cplusplus
}
#endif
#endif
