// SPDX-License-Identifier: Apache-2.0
//
// A whole program: a "VMM" with 64 MiB of guest memory makes the balloon device, plays the guest's driver itself, asks
// for the free pages, and masks its dirty bitmap.
//
//   cc balloon.c $(pkg-config --cflags --libs lacuna) -o balloon
#include <lacuna.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MEMORY (64u << 20)
#define PAGES (MEMORY / 4096)
#define BITMAP_QUEUE 2

static uint8_t *memory;
static uint64_t dirty[PAGES / 64]; // the pages that have to be sent

static void check(int result, const char *what) {
    if (result == LACUNA_OK)
        return;
    fprintf(stderr, "%s: %s: %s\n", what, lacuna_result_name(result), lacuna_message());
    exit(1);
}

// --- what the device asks of the VMM ---

static void signal_queue(void *context, uint32_t queue) { printf("%s: queue %u interrupts\n", (char *)context, queue); }
static void signal_config(void *context) { printf("%s: the configuration changed\n", (char *)context); }
static void signal_needs_reset(void *context) { printf("%s: needs a reset\n", (char *)context); }

static void mark_dirty(void *context, uint64_t address, uint64_t bytes) {
    (void)context;
    for (uint64_t page = address / 4096; page <= (address + bytes - 1) / 4096; page++)
        __atomic_fetch_or(&dirty[page / 64], 1ull << page % 64, __ATOMIC_ACQ_REL);
}

// --- the guest's driver: a queue at 1 MiB, and a report of 1024 free pages from page 4096 on ---

static void driver_reports(lacuna_device device) {
    struct { uint64_t address; uint32_t length; uint16_t flags, next; } table[3] = {
        { 0x200000, 24, 1, 1 }, { 0x201000, 128, 0, 0 }, { 0x202000, 64, 0, 0 } };
    uint16_t available[5] = { 0, 2, 0, 2 };
    struct { uint32_t command; uint16_t kind, flags; uint64_t start; uint32_t bits, reserved; }
        pages = { 0, 1, 1, 4096, 1024, 0 }, figures = { 0, 2, 2, 0, 0, 0 };

    check(lacuna_device_config_read(device, 16, &pages.command, 4), "configuration");
    figures.command = pages.command;
    memcpy(memory + 0x100000, table, sizeof table);
    memcpy(memory + 0x101000, available, sizeof available);
    memcpy(memory + 0x200000, &pages, sizeof pages);
    memset(memory + 0x201000, 0xff, 128);
    memcpy(memory + 0x202000, &figures, sizeof figures);
    check(lacuna_device_notify(device, BITMAP_QUEUE), "notify");
}

int main(void) {
    lacuna_device device;
    lacuna_window window;
    struct lacuna_device_config config = {
        .size = sizeof config, .abi_version = LACUNA_ABI_VERSION, .context = "balloon", .signal_queue = signal_queue,
        .signal_config = signal_config, .signal_needs_reset = signal_needs_reset, .mark_dirty = mark_dirty };
    struct lacuna_queue queue = { .size = sizeof queue, .index = BITMAP_QUEUE, .entries = 16,
        .descriptors = 0x100000, .available = 0x101000, .used = 0x102000 };
    struct lacuna_report report = { .size = sizeof report };
    struct lacuna_bitmap bitmap = { .size = sizeof bitmap, .bits = PAGES, .page_shift = 12, .words = dirty };

    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 1;
    struct lacuna_region region = { 0, MEMORY, memory };
    check(lacuna_device_create(&config, &device), "create");
    check(lacuna_device_set_memory(device, &region, 1), "memory");

    // The driver comes: VERSION_1 and FREE_PAGE_BITMAP.
    check(lacuna_device_set_features(device, 1ull << 32 | 1ull << 63), "features");
    check(lacuna_device_set_queue(device, &queue), "queue");
    check(lacuna_device_activate(device), "activate");

    // A migration's first round: everything is to be sent, then the hints take out what is free.
    memset(dirty, 0xff, sizeof dirty);
    check(lacuna_tracking_armed(device), "armed"); // after the dirty log was switched on
    check(lacuna_window_open(device, &window), "open");
    driver_reports(device);
    check(lacuna_window_wait(window, 1000, &report), "wait");
    check(lacuna_window_mask(window, &bitmap), "mask");
    check(lacuna_window_close(window), "close");
    printf("%llu of %u pages need not be sent\n", (unsigned long long)bitmap.cleared_count, PAGES);

    check(lacuna_tracking_disarmed(device), "disarmed");
    check(lacuna_device_destroy(device), "destroy");
    return bitmap.cleared_count == 1024 ? 0 : 1;
}
