// SPDX-License-Identifier: Apache-2.0
//
// What a driver is told when its device changes, who tells it, and waits beside each other.
#include "vmm.h"
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define BYTES (4u << 20)
#define HINTS (1ull << 32 | 1ull << 3)
#define STOP 0u
#define DONE 1u

static unsigned signals(struct guest *guest) {
    pthread_mutex_lock(&guest->lock);
    unsigned count = guest->config_signals;
    pthread_mutex_unlock(&guest->lock);
    return count;
}

static uint32_t read_configuration(struct guest *guest, uint32_t offset) {
    uint32_t value;
    OK(abi.device_config_read(guest->device, offset, &value, 4));
    return value;
}

// The driver hears of what came while nobody could be told: a target before it was there, the end of a request with
// another memory.
static void activations(void) {
    struct guest guest;
    struct lacuna_region region;
    lacuna_window window;
    unsigned before;

    guest_create(&guest, BYTES);
    OK(abi.device_set_target(guest.device, 99));
    CHECK(signals(&guest) == 0);
    struct lacuna_queue queue = { .size = sizeof queue, .entries = 16, .descriptors = 0x1000, .available = 0x2000, .used = 0x3000 };
    OK(abi.device_set_features(guest.device, HINTS));
    for (queue.index = 0; queue.index < 3; queue.index++) {
        queue.descriptors += 0x4000, queue.available += 0x4000, queue.used += 0x4000;
        OK(abi.device_set_queue(guest.device, &queue));
    }
    OK(abi.device_activate(guest.device));
    CHECK(signals(&guest) == 1 && read_configuration(&guest, 0) == 99);

    OK(abi.tracking_armed(guest.device));
    OK(abi.window_open(guest.device, &window));
    CHECK(read_configuration(&guest, 8) >= 2);
    before = signals(&guest);
    region = (struct lacuna_region) { 0, BYTES, guest.memory };
    OK(abi.device_set_memory(guest.device, &region, 1));
    CHECK(signals(&guest) > before && read_configuration(&guest, 8) == DONE);
    FAILS(LACUNA_ERROR_FAILED, abi.window_wait(window, 20000, NULL));
    OK(abi.window_close(window));

    // A VMM may hold a lock of its own while it reads for its guest: that never calls back.
    OK(abi.window_open(guest.device, &window));
    OK(abi.tracking_disarmed(guest.device));
    OK(abi.window_close(window));
    OK(abi.tracking_armed(guest.device));
    OK(abi.window_open(guest.device, &window));
    before = signals(&guest);
    CHECK(read_configuration(&guest, 8) == DONE && signals(&guest) == before);
    // The next request takes its turn once DONE was read.
    FAILS(LACUNA_ERROR_TIMEOUT, abi.window_wait(window, 0, NULL));
    CHECK(signals(&guest) == before + 1 && read_configuration(&guest, 8) >= 2);
    OK(abi.window_close(window));
    CHECK(read_configuration(&guest, 8) == STOP);
    guest_destroy(&guest);
}

struct waiter {
    lacuna_window window;
    int result;
};

static void *wait_long(void *context) {
    struct waiter *waiter = context;
    waiter->result = abi.window_wait(waiter->window, 60000, NULL);
    return NULL;
}

// A look takes no longer because another thread waits, and the report is there for both.
static void waits(void) {
    struct guest guest;
    struct timespec start, end;
    struct waiter waiters[3] = { { 0 } };
    pthread_t threads[3];

    guest_create(&guest, BYTES);
    guest_start_driver(&guest, true);
    guest_stop_driver(&guest);
    OK(abi.tracking_armed(guest.device));
    OK(abi.window_open(guest.device, &waiters[0].window));
    for (int i = 0; i < 3; i++) {
        waiters[i].window = waiters[0].window;
        CHECK(pthread_create(&threads[i], NULL, wait_long, &waiters[i]) == 0);
    }
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int i = 0; i < 100; i++) {
        FAILS(LACUNA_ERROR_TIMEOUT, abi.window_wait(waiters[0].window, 0, NULL));
        usleep(1000); // the others may have been slow to begin
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    CHECK(end.tv_sec - start.tv_sec < 30);
    guest_start_driver(&guest, false);
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        CHECK(waiters[i].result == LACUNA_OK);
    }
    OK(abi.window_close(waiters[0].window));
    guest_destroy(&guest);
}

void resume(void) {
    activations();
    waits();
    puts("resume: ok");
}
