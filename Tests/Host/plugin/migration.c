// SPDX-License-Identifier: Apache-2.0
//
// Migrates plain memory while threads allocate, write and free its pages. The guest clears a page when it frees it and
// relies on that when it allocates it again (init_on_free), so at the end every page has to be the same on both sides,
// the free ones, too.
#include "vmm.h"

#define BYTES (32u << 20)
#define WRITERS 2
#define ROUNDS 6

struct writer {
    struct guest *guest;
    uint64_t random;
    size_t first, end; // its pages
    _Atomic bool *stop;
    _Atomic uint64_t *steps;
    pthread_t thread;
};

static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static bool is_free(struct guest *guest, size_t page) {
    return atomic_load_explicit(&guest->free[page / 64], memory_order_acquire) >> page % 64 & 1;
}

// One allocation and some writes, or one release.
static void step(struct writer *writer) {
    struct guest *guest = writer->guest;
    size_t page = writer->first + next(&writer->random) % (writer->end - writer->first);
    uint64_t *words = (uint64_t *)(guest->memory + page * PAGE);

    if (is_free(guest, page)) {
        // Taken out of the free list before its first write.
        atomic_fetch_and_explicit(&guest->free[page / 64], ~(1ull << page % 64), memory_order_acq_rel);
        for (unsigned i = 0; i < PAGE / 8; i++)
            CHECK(words[i] == 0); // as it was when it was freed
        for (unsigned i = 0; i < 8; i++)
            words[next(&writer->random) % (PAGE / 8)] = next(&writer->random) | 1;
    } else if (next(&writer->random) % 2) {
        words[next(&writer->random) % (PAGE / 8)] = next(&writer->random);
    } else {
        memset(words, 0, PAGE);
        guest_wrote(guest, page);
        atomic_fetch_or_explicit(&guest->free[page / 64], 1ull << page % 64, memory_order_acq_rel);
        return;
    }
    guest_wrote(guest, page);
}

static void *run(void *context) {
    struct writer *writer = context;
    while (!atomic_load(writer->stop)) {
        step(writer);
        atomic_fetch_add(writer->steps, 1);
    }
    return NULL;
}

// Collects the log into the bitmap.
static void merge(struct guest *guest, uint64_t *bitmap) {
    for (size_t i = 0; i < guest_pages(guest) / 64; i++)
        bitmap[i] |= atomic_exchange_explicit(&guest->log[i], 0, memory_order_acq_rel);
}

static size_t send_all(struct guest *source, struct guest *destination, uint64_t *bitmap, uint64_t *held) {
    size_t sent = 0;
    for (size_t page = 0; page < guest_pages(source); page++) {
        if (!(bitmap[page / 64] >> page % 64 & 1))
            continue;
        bitmap[page / 64] &= ~(1ull << page % 64);
        held[page / 64] |= 1ull << page % 64;
        memcpy(destination->memory + page * PAGE, source->memory + page * PAGE, PAGE);
        sent++;
    }
    return sent;
}

int migrate(unsigned seed, bool forget_discards) {
    static struct guest source, destination;
    static uint64_t bitmap[BYTES / PAGE / 64], cleared[BYTES / PAGE / 64], held[BYTES / PAGE / 64];
    struct writer writers[WRITERS];
    _Atomic bool stop = false;
    _Atomic uint64_t steps = 0;
    size_t pages = BYTES / PAGE, share = (pages - DRIVER_PAGES) / WRITERS, sent = 0, skipped = 0, discarded = 0;
    size_t state_bytes = 0, wrong = 0;
    void *state;

    guest_create(&source, BYTES);
    guest_create(&destination, BYTES);
    memset(held, 0, sizeof held);
    for (size_t page = DRIVER_PAGES; page < pages; page++)
        source.free[page / 64] |= 1ull << page % 64;
    guest_start_driver(&source, true);
    for (unsigned i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer) { &source, seed * 7919 + i + 1, DRIVER_PAGES + i * share, DRIVER_PAGES + (i + 1) * share,
            &stop, &steps, 0 };
        // Some pages are in use, and some were, before.
        for (unsigned j = 0; j < 20000; j++)
            step(&writers[i]);
        CHECK(pthread_create(&writers[i].thread, NULL, run, &writers[i]) == 0);
    }

    // Arm: forget what was before, as everything is to be sent.
    for (size_t i = 0; i < pages / 64; i++)
        atomic_exchange(&source.log[i], 0);
    memset(bitmap, 0xff, sizeof bitmap);
    OK(abi.tracking_armed(source.device));

    for (unsigned round = 0; round < ROUNDS; round++) {
        lacuna_window window;
        struct lacuna_report report = { .size = sizeof report };
        struct lacuna_bitmap mask = { .size = sizeof mask, .bits = pages, .page_shift = 12, .words = bitmap, .cleared = cleared };
        uint64_t before = atomic_load(&steps);

        OK(abi.window_open(source.device, &window));
        OK(abi.window_wait(window, 20000, &report));
        CHECK(report.has_figures == 1 && report.pages <= pages);
        OK(abi.window_mask(window, &mask));
        OK(abi.window_close(window));
        skipped += mask.cleared_count;
        // What was sent before and is free now has to read as zero over there.
        for (size_t page = 0; page < pages; page++) {
            if (!(cleared[page / 64] & held[page / 64]) || !((cleared[page / 64] & held[page / 64]) >> page % 64 & 1))
                continue;
            if (!forget_discards)
                memset(destination.memory + page * PAGE, 0, PAGE);
            held[page / 64] &= ~(1ull << page % 64);
            discarded++;
        }
        sent += send_all(&source, &destination, bitmap, held);
        // The guest goes on meanwhile, at least a bit.
        while (atomic_load(&steps) < before + 2000)
            ;
        OK(abi.tracking_merge(source.device));
        merge(&source, bitmap);
    }

    // The stopped round: never waits for the guest.
    atomic_store(&stop, true);
    for (unsigned i = 0; i < WRITERS; i++)
        pthread_join(writers[i].thread, NULL);
    guest_stop_driver(&source);
    FAILS(LACUNA_ERROR_SPACE, abi.device_save(source.device, NULL, &state_bytes));
    state = malloc(state_bytes);
    OK(abi.device_save(source.device, state, &state_bytes));
    OK(abi.tracking_merge(source.device));
    merge(&source, bitmap);
    sent += send_all(&source, &destination, bitmap, held);
    OK(abi.tracking_disarmed(source.device));

    for (size_t page = 0; page < pages; page++)
        wrong += memcmp(source.memory + page * PAGE, destination.memory + page * PAGE, PAGE) != 0;
    printf("seed %u: %zu pages sent, %zu skipped, %zu discarded, %zu wrong\n", seed, sent, skipped, discarded, wrong);
    CHECK(skipped > pages / 4 && discarded > 0);
    if (wrong)
        return 1;

    // The device goes on over there, and so does its driver.
    OK(abi.device_load(destination.device, state, state_bytes));
    free(state);
    destination.command = source.command;
    destination.available = source.available;
    destination.used = source.used;
    memcpy((void *)destination.free, (void *)source.free, pages / 8);
    guest_start_driver(&destination, false);
    lacuna_window window;
    struct lacuna_report report = { .size = sizeof report };
    OK(abi.tracking_armed(destination.device));
    OK(abi.window_open(destination.device, &window));
    OK(abi.window_wait(window, 20000, &report));
    CHECK(report.pages > 0);
    OK(abi.window_close(window));
    guest_destroy(&source);
    guest_destroy(&destination);
    return 0;
}
