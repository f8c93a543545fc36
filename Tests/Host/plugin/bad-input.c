// SPDX-License-Identifier: Apache-2.0
//
// What a VMM can get wrong: each mistake is a result and a message, and the device goes on.
#include "vmm.h"
#include <sys/mman.h>

#define BYTES (4u << 20)

// A page of memory whose end is the end of what may be touched.
static void *at_the_edge(size_t bytes) {
    uint8_t *pages = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(pages != MAP_FAILED && mprotect(pages + PAGE, PAGE, PROT_NONE) == 0);
    return pages + PAGE - bytes;
}

static void creation(void) {
    struct guest guest = { 0 };
    struct lacuna_device_config good = guest_config(&guest), config;
    lacuna_device device = 77;

    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_create(NULL, &device));
    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_create(&good, NULL));
    CHECK(device == 0);
#define WRONG(result, change) do { config = good; config.change; FAILS(result, abi.device_create(&config, &device)); } while (0)
    WRONG(LACUNA_ERROR_VERSION, size = 0);
    WRONG(LACUNA_ERROR_VERSION, size = sizeof config - 1);
    WRONG(LACUNA_ERROR_VERSION, abi_version = 0);
    WRONG(LACUNA_ERROR_VERSION, abi_version = 0x00020000);
    WRONG(LACUNA_ERROR_VERSION, abi_version = LACUNA_ABI_VERSION + 1);
    WRONG(LACUNA_ERROR_ARGUMENT, address_limit = 1ull << 47);
    WRONG(LACUNA_ERROR_ARGUMENT, signal_queue = NULL);
    WRONG(LACUNA_ERROR_ARGUMENT, signal_config = NULL);
    WRONG(LACUNA_ERROR_ARGUMENT, signal_needs_reset = NULL);
    WRONG(LACUNA_ERROR_ARGUMENT, mark_dirty = NULL);
#undef WRONG
    // A caller of a later version has more than this library knows.
    struct { struct lacuna_device_config config; uint64_t more[4]; } later = { good, { 1, 2, 3, 4 } };
    later.config.size = sizeof later;
    OK(abi.device_create(&later.config, &device));
    OK(abi.device_destroy(device));
    // So many and no more, and all gone afterwards.
    lacuna_device all[300];
    unsigned made = 0;
    while (made < 300 && abi.device_create(&good, &all[made]) == LACUNA_OK)
        made++;
    CHECK(made == 256);
    FAILS(LACUNA_ERROR_RESOURCES, abi.device_create(&good, &device));
    for (unsigned i = 0; i < made; i++)
        OK(abi.device_destroy(all[i]));
    OK(abi.device_create(&good, &device));
    CHECK(device != all[0]);
    OK(abi.device_destroy(device));
}

// Every call with a handle that is not one.
static void handle(uint64_t wrong) {
    struct lacuna_region region = { 0, PAGE, NULL };
    struct lacuna_queue queue = { .size = sizeof queue };
    struct lacuna_device_status status = { .size = sizeof status };
    struct lacuna_report report = { .size = sizeof report };
    struct lacuna_bitmap bitmap = { .size = sizeof bitmap };
    uint32_t half;
    uint64_t word;
    size_t bytes = 0;

    FAILS(LACUNA_ERROR_HANDLE, abi.device_destroy(wrong));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_set_memory(wrong, &region, 1));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_type(wrong, &half));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_queue_count(wrong, &half));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_queue_limit(wrong, 0, &half));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_features(wrong, &word));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_set_features(wrong, 0));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_config_read(wrong, 0, &half, 4));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_config_write(wrong, 0, &half, 4));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_set_queue(wrong, &queue));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_queue_state(wrong, &queue));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_activate(wrong));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_notify(wrong, 0));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_reset(wrong));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_set_target(wrong, 0));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_get_status(wrong, &status));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_save(wrong, NULL, &bytes));
    FAILS(LACUNA_ERROR_HANDLE, abi.device_load(wrong, &half, 4));
    FAILS(LACUNA_ERROR_HANDLE, abi.tracking_armed(wrong));
    FAILS(LACUNA_ERROR_HANDLE, abi.tracking_merge(wrong));
    FAILS(LACUNA_ERROR_HANDLE, abi.tracking_disarmed(wrong));
    FAILS(LACUNA_ERROR_HANDLE, abi.window_open(wrong, &word));
    FAILS(LACUNA_ERROR_HANDLE, abi.window_wait(wrong, 0, &report));
    FAILS(LACUNA_ERROR_HANDLE, abi.window_mask(wrong, &bitmap));
    FAILS(LACUNA_ERROR_HANDLE, abi.window_close(wrong));
}

static void memory(struct guest *guest) {
    uint8_t *m = guest->memory;
    struct { struct lacuna_region regions[2]; size_t count; int result; } cases[] = {
        { { { 0, BYTES, m } }, 0, LACUNA_ERROR_ARGUMENT },
        { { { 0, BYTES, m } }, 5000, LACUNA_ERROR_ARGUMENT },
        { { { 0, BYTES, NULL } }, 1, LACUNA_ERROR_ARGUMENT },
        { { { 0, 0, m } }, 1, LACUNA_ERROR_MEMORY },
        { { { 0, 100, m } }, 1, LACUNA_ERROR_MEMORY },
        { { { 1, PAGE, m } }, 1, LACUNA_ERROR_MEMORY },
        { { { 0, PAGE, m + 8 } }, 1, LACUNA_ERROR_MEMORY },
        { { { 1ull << 32, PAGE, m } }, 1, LACUNA_ERROR_MEMORY },
        { { { UINT64_MAX - PAGE + 1, PAGE, m } }, 1, LACUNA_ERROR_MEMORY },
        { { { 0, UINT64_MAX - PAGE + 1, m } }, 1, LACUNA_ERROR_MEMORY },
        { { { 0, 2 * PAGE, m }, { PAGE, PAGE, m } }, 2, LACUNA_ERROR_MEMORY },
        { { { 0, PAGE, m }, { 0, PAGE, m + PAGE } }, 2, LACUNA_ERROR_MEMORY },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        FAILS(cases[i].result, abi.device_set_memory(guest->device, cases[i].regions, cases[i].count));
    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_set_memory(guest->device, NULL, 1));
    // Out of order is no mistake.
    struct lacuna_region two[2] = { { BYTES / 2, BYTES / 2, m + BYTES / 2 }, { 0, BYTES / 2, m } };
    OK(abi.device_set_memory(guest->device, two, 2));
}

static void queues(struct guest *guest) {
    struct lacuna_queue good = { .size = sizeof good, .index = 0, .entries = 16, .descriptors = 0x1000, .available = 0x2000,
        .used = 0x3000 }, queue;
    uint32_t half;
    char bytes[300];

    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_queue_limit(guest->device, 99, &half));
    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_queue_limit(guest->device, 0, NULL));
    FAILS(LACUNA_ERROR_STATE, abi.device_activate(guest->device));
    FAILS(LACUNA_ERROR_FEATURES, abi.device_set_features(guest->device, 1ull << 60));
    FAILS(LACUNA_ERROR_FEATURES, abi.device_set_features(guest->device, 1ull << 63));
    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_set_queue(guest->device, NULL));
#define WRONG(result, change) do { queue = good; queue.change; FAILS(result, abi.device_set_queue(guest->device, &queue)); } while (0)
    WRONG(LACUNA_ERROR_VERSION, size = 47);
    WRONG(LACUNA_ERROR_ARGUMENT, index = 99);
    WRONG(LACUNA_ERROR_ARGUMENT, next_used = 65536);
    WRONG(LACUNA_ERROR_ARGUMENT, next_available = 65536);
    WRONG(LACUNA_ERROR_ARGUMENT, reserved = 1);
    WRONG(LACUNA_ERROR_QUEUE, entries = 15);
    WRONG(LACUNA_ERROR_QUEUE, entries = 1u << 31);
    WRONG(LACUNA_ERROR_QUEUE, next_available = 17);
    WRONG(LACUNA_ERROR_QUEUE, descriptors = BYTES);
    WRONG(LACUNA_ERROR_QUEUE, descriptors = BYTES - 16);
    WRONG(LACUNA_ERROR_QUEUE, descriptors = 8);
    WRONG(LACUNA_ERROR_QUEUE, descriptors = UINT64_MAX - 15);
    WRONG(LACUNA_ERROR_QUEUE, available = 1ull << 40);
    WRONG(LACUNA_ERROR_QUEUE, used = 2);
#undef WRONG
    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_config_read(guest->device, 0, NULL, 4));
    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_config_read(guest->device, 0, bytes, 257));
    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_config_write(guest->device, 0, NULL, 4));
    OK(abi.device_config_read(guest->device, UINT32_MAX, bytes, 256));
    OK(abi.device_config_write(guest->device, UINT32_MAX, bytes, 256));
    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_notify(guest->device, 99));
    OK(abi.device_notify(guest->device, 0)); // without a driver: no effect
}

static void running(struct guest *guest) {
    struct lacuna_queue queue = { .size = sizeof queue, .index = 0, .entries = 16, .descriptors = 0x1000,
        .available = 0x2000, .used = 0x3000 };
    struct lacuna_region moved = { BYTES, BYTES, guest->memory };

    FAILS(LACUNA_ERROR_STATE, abi.device_activate(guest->device));
    FAILS(LACUNA_ERROR_STATE, abi.device_set_features(guest->device, FEATURES));
    FAILS(LACUNA_ERROR_STATE, abi.device_set_queue(guest->device, &queue));
    FAILS(LACUNA_ERROR_STATE, abi.device_load(guest->device, &queue, sizeof queue));
    // The active queue would not be in this memory: nothing changes.
    FAILS(LACUNA_ERROR_QUEUE, abi.device_set_memory(guest->device, &moved, 1));
}

static uint64_t words[BYTES / PAGE / 64 + 1];

static void windows(struct guest *guest) {
    lacuna_window window, other, old;
    struct lacuna_report report = { .size = sizeof report };
    struct lacuna_bitmap good = { .size = sizeof good, .bits = BYTES / PAGE, .page_shift = 12, .words = words }, bitmap;

    memset(words, 0xff, sizeof words);
    FAILS(LACUNA_ERROR_STATE, abi.window_open(guest->device, &window));
    FAILS(LACUNA_ERROR_STATE, abi.tracking_merge(guest->device));
    OK(abi.tracking_disarmed(guest->device));
    OK(abi.tracking_armed(guest->device));
    FAILS(LACUNA_ERROR_ARGUMENT, abi.window_open(guest->device, NULL));
    OK(abi.window_open(guest->device, &window));
    FAILS(LACUNA_ERROR_BUSY, abi.window_open(guest->device, &other));
    FAILS(LACUNA_ERROR_STATE, abi.window_mask(window, &good)); // before a report
    report.size = 39;
    FAILS(LACUNA_ERROR_VERSION, abi.window_wait(window, 20000, &report));
    report.size = sizeof report;
    OK(abi.window_wait(window, 20000, &report));
    OK(abi.window_wait(window, 0, NULL));

    FAILS(LACUNA_ERROR_ARGUMENT, abi.window_mask(window, NULL));
#define WRONG(result, change) do { bitmap = good; bitmap.change; FAILS(result, abi.window_mask(window, &bitmap)); } while (0)
    WRONG(LACUNA_ERROR_VERSION, size = 55);
    WRONG(LACUNA_ERROR_ARGUMENT, words = NULL);
    WRONG(LACUNA_ERROR_ARGUMENT, words = (uint64_t *)((char *)words + 4));
    WRONG(LACUNA_ERROR_ARGUMENT, cleared = (uint64_t *)((char *)words + 4));
    WRONG(LACUNA_ERROR_ARGUMENT, bits = 0);
    WRONG(LACUNA_ERROR_ARGUMENT, bits = 1ull << 41);
    WRONG(LACUNA_ERROR_ARGUMENT, page_shift = 11);
    WRONG(LACUNA_ERROR_ARGUMENT, page_shift = 31);
    WRONG(LACUNA_ERROR_ARGUMENT, guest_address = 1);
    WRONG(LACUNA_ERROR_ARGUMENT, guest_address = 1ull << 60);
    WRONG(LACUNA_ERROR_ARGUMENT, flags = 2);
    WRONG(LACUNA_ERROR_ARGUMENT, reserved = 1);
#undef WRONG
    for (size_t i = 0; i < BYTES / PAGE / 64; i++)
        CHECK(words[i] == UINT64_MAX); // none of those touched it

    // No word beyond the bitmap's end is touched, whatever its place and size; against a bit at a time.
    for (unsigned shift = 12; shift <= 16; shift += 2) {
        for (unsigned bits = 1; bits < 200; bits += 7) {
            for (unsigned first = 0; first < 130; first += 13) {
                size_t count = (bits + 63) / 64;
                uint64_t *edge = at_the_edge(8 * count), *cleared = at_the_edge(8 * count);
                unsigned expected = 0;
                memset(edge, 0xff, 8 * count);
                bitmap = good;
                bitmap.words = edge;
                bitmap.cleared = cleared;
                bitmap.bits = bits;
                bitmap.page_shift = shift;
                bitmap.guest_address = (uint64_t)first << shift;
                bitmap.flags = bits % 2 ? LACUNA_BITMAP_SHARED : 0;
                OK(abi.window_mask(window, &bitmap));
                for (unsigned bit = 0; bit < 64 * count; bit++) {
                    bool gone = bit < bits;
                    for (uint64_t page = (uint64_t)(first + bit) << (shift - 12); gone && page < (uint64_t)(first + bit + 1) << (shift - 12); page++)
                        gone = page < guest_pages(guest) && (guest->free[page / 64] >> page % 64 & 1);
                    CHECK((edge[bit / 64] >> bit % 64 & 1) == !gone);
                    CHECK((cleared[bit / 64] >> bit % 64 & 1) == gone);
                    expected += gone;
                }
                CHECK(bitmap.cleared_count == expected);
                munmap((void *)((uintptr_t)edge & ~(uintptr_t)(PAGE - 1)), 2 * PAGE);
                munmap((void *)((uintptr_t)cleared & ~(uintptr_t)(PAGE - 1)), 2 * PAGE);
            }
        }
    }
    // Beyond the guest's memory: nothing is free there.
    bitmap = good;
    bitmap.guest_address = 1ull << 40;
    OK(abi.window_mask(window, &bitmap));
    CHECK(bitmap.cleared_count == 0);

    // Too late.
    memset(words, 0xff, sizeof words);
    OK(abi.tracking_merge(guest->device));
    FAILS(LACUNA_ERROR_STALE, abi.window_mask(window, &good));
    FAILS(LACUNA_ERROR_STALE, abi.window_wait(window, 0, NULL));
    OK(abi.window_close(window));
    FAILS(LACUNA_ERROR_HANDLE, abi.window_mask(window, &good));
    FAILS(LACUNA_ERROR_HANDLE, abi.window_close(window));
    old = window;
    OK(abi.window_open(guest->device, &window));
    FAILS(LACUNA_ERROR_HANDLE, abi.window_mask(old, &good));
    OK(abi.window_wait(window, 20000, NULL));
    OK(abi.tracking_disarmed(guest->device));
    FAILS(LACUNA_ERROR_STALE, abi.window_mask(window, &good));
    OK(abi.window_close(window));
    for (size_t i = 0; i < BYTES / PAGE / 64; i++)
        CHECK(words[i] == UINT64_MAX);

    // A device that goes takes its window along.
    OK(abi.tracking_armed(guest->device));
    guest_stop_driver(guest);
    OK(abi.window_open(guest->device, &window));
    FAILS(LACUNA_ERROR_TIMEOUT, abi.window_wait(window, 1, NULL));
    OK(abi.device_reset(guest->device));
    FAILS(LACUNA_ERROR_FAILED, abi.window_wait(window, 20000, NULL));
    OK(abi.window_close(window));
    FAILS(LACUNA_ERROR_REFUSED, abi.window_open(guest->device, &window));
}

static void *destroy_later(void *context) {
    struct guest *guest = context;
    OK(abi.device_destroy(guest->device));
    return NULL;
}

// A wait on one thread ends when another one ends the device.
static void destroyed_while_waiting(void) {
    struct guest guest;
    lacuna_window window;
    pthread_t thread;
    int result;

    guest_create(&guest, BYTES);
    guest_start_driver(&guest, true);
    guest_stop_driver(&guest);
    OK(abi.tracking_armed(guest.device));
    OK(abi.window_open(guest.device, &window));
    CHECK(pthread_create(&thread, NULL, destroy_later, &guest) == 0);
    result = abi.window_wait(window, 60000, NULL);
    CHECK(result == LACUNA_ERROR_FAILED || result == LACUNA_ERROR_HANDLE || result == LACUNA_ERROR_STALE);
    pthread_join(thread, NULL);
    FAILS(LACUNA_ERROR_HANDLE, abi.window_close(window));
    munmap(guest.memory, guest.bytes);
    free((void *)guest.log);
    free((void *)guest.free);
}

static void callbacks(void) {
    struct guest guest;

    guest_create(&guest, BYTES);
    guest_start_driver(&guest, true);
    guest.calls_back = true;
    OK(abi.device_set_target(guest.device, 5));
    CHECK(guest.reentrant_result == LACUNA_ERROR_REENTRANT);
    guest.reentrant_result = 0;
    lacuna_window window;
    OK(abi.tracking_armed(guest.device));
    OK(abi.window_open(guest.device, &window));
    OK(abi.window_wait(window, 20000, NULL)); // the queue's signals and the device's writes call back, too
    CHECK(guest.reentrant_result == LACUNA_ERROR_REENTRANT);
    guest.calls_back = false;
    guest_destroy(&guest);
}

// Saved states that are none: cut short, and with bytes changed at random.
static void states(void) {
    struct guest guest, other;
    size_t bytes = 0, room;
    uint8_t *state, *changed;
    uint64_t random = 88172645463325252ull;
    unsigned loaded = 0, refused = 0;

    guest_create(&guest, BYTES);
    guest_create(&other, BYTES);
    guest_start_driver(&guest, true);
    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_save(guest.device, NULL, NULL));
    FAILS(LACUNA_ERROR_SPACE, abi.device_save(guest.device, NULL, &bytes));
    state = malloc(bytes);
    changed = malloc(bytes);
    room = bytes - 1;
    FAILS(LACUNA_ERROR_SPACE, abi.device_save(guest.device, state, &room));
    CHECK(room == bytes);
    OK(abi.device_save(guest.device, state, &bytes));
    FAILS(LACUNA_ERROR_ARGUMENT, abi.device_load(other.device, NULL, bytes));
    for (size_t cut = 0; cut < bytes; cut++)
        FAILS(LACUNA_ERROR_CORRUPT, abi.device_load(other.device, state, cut));
    for (unsigned i = 0; i < 20000; i++) {
        int result;
        memcpy(changed, state, bytes);
        for (unsigned j = 0; j <= i % 4; j++) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            changed[random % bytes] = (uint8_t)(random >> 32);
        }
        result = abi.device_load(other.device, changed, bytes);
        CHECK(result == LACUNA_OK || result == LACUNA_ERROR_CORRUPT);
        result == LACUNA_OK ? loaded++ : refused++;
        OK(abi.device_reset(other.device));
    }
    CHECK(loaded > 0 && refused > 0);
    OK(abi.device_load(other.device, state, bytes));
    free(state);
    free(changed);
    guest_destroy(&guest);
    guest_destroy(&other);
}

void bad_input(void) {
    struct guest guest;
    struct lacuna_device_status status = { .size = sizeof status };

    creation();
    guest_create(&guest, BYTES);
    handle(0);
    handle(guest.device + 1);
    handle(guest.device + (1ull << 32));
    handle(UINT64_MAX);
    memory(&guest);
    queues(&guest);
    // Scattered runs of free pages, to have something to mask.
    for (size_t page = DRIVER_PAGES; page < guest_pages(&guest); page++)
        if (page % 97 < 61)
            guest.free[page / 64] |= 1ull << page % 64;
    guest_start_driver(&guest, true);
    running(&guest);
    windows(&guest);
    FAILS(LACUNA_ERROR_VERSION, (status.size = 79, abi.device_get_status(guest.device, &status)));
    status.size = sizeof status;
    OK(abi.device_get_status(guest.device, &status));
    CHECK(status.is_active == 0 && status.reports_completed >= 2);
    uint64_t gone = guest.device;
    guest_destroy(&guest);
    handle(gone);
    destroyed_while_waiting();
    callbacks();
    states();
    CHECK(strcmp(abi.result_name(LACUNA_ERROR_STALE), "LACUNA_ERROR_STALE") == 0);
    CHECK(abi.result_name(1000) && abi.result_name(-1000));
    puts("bad input: all refused");
}
