// SPDX-License-Identifier: Apache-2.0
// A VMM of the test's own: loads the plugin with dlopen(), so that nothing but lacuna.h is known of it.
#ifndef VMM_H
#define VMM_H

#include <lacuna.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Every function of the ABI, by its name without the prefix.
#define FUNCTIONS(F) \
    F(abi_version) F(result_name) F(message) F(device_create) F(device_destroy) F(device_set_memory) F(device_type) \
    F(device_queue_count) F(device_queue_limit) F(device_features) F(device_set_features) F(device_config_read) \
    F(device_config_write) F(device_set_queue) F(device_queue_state) F(device_activate) F(device_notify) \
    F(device_reset) F(device_set_target) F(device_get_status) F(device_save) F(device_load) F(tracking_armed) \
    F(tracking_merge) F(tracking_disarmed) F(window_open) F(window_wait) F(window_mask) F(window_close)

struct abi {
#define MEMBER(name) __typeof__(&lacuna_##name) name;
    FUNCTIONS(MEMBER)
#undef MEMBER
};
extern struct abi abi;

#define PAGE 4096u
#define FEATURES (1ull << 32 | 1ull << 63 | 1ull << 0)
#define ARMED_BITMAP_QUEUE 2

_Noreturn void fail(const char *file, int line, const char *what);
#define CHECK(condition) ((condition) ? (void)0 : fail(__FILE__, __LINE__, #condition))
#define OK(call) CHECK((call) == LACUNA_OK)
// The call fails with this result, and says something about it.
#define FAILS(result, call) (CHECK((call) == (result)), CHECK(abi.message()[0] != 0))

// One guest: memory, a device, and a driver on a thread of its own that answers what the device asks.
struct guest {
    uint8_t *memory;
    size_t bytes;
    lacuna_device device;
    // What the device said.
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned config_signals, queue_signals, resets;
    // Pages written, by the guest or by the device; the migration takes the bits.
    _Atomic uint64_t *log;
    // The guest's free pages, as its driver sees them.
    _Atomic uint64_t *free;
    // The driver.
    pthread_t driver;
    bool has_driver, stop_driver;
    // The driver's command of the last report; available and used indices of its queue.
    uint32_t command;
    uint16_t available, used;
    // A callback that calls back in.
    int reentrant_result;
    bool calls_back;
};

void guest_create(struct guest *guest, size_t bytes);
void guest_destroy(struct guest *guest);
void guest_start_driver(struct guest *guest, bool fresh);
void guest_stop_driver(struct guest *guest);
struct lacuna_device_config guest_config(struct guest *guest);
static inline size_t guest_pages(const struct guest *guest) { return guest->bytes / PAGE; }
static inline void guest_wrote(struct guest *guest, uint64_t page) {
    atomic_fetch_or_explicit(&guest->log[page / 64], 1ull << page % 64, memory_order_acq_rel);
}

// The guest's memory that is the driver's: queue and buffers. Writers keep away from it.
#define DRIVER_PAGES 32

void bad_input(void);
void resume(void);
int migrate(unsigned seed, bool forget_discards);

#endif
