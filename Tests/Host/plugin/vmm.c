// SPDX-License-Identifier: Apache-2.0
#include "vmm.h"
#include <dlfcn.h>
#include <sys/mman.h>

struct abi abi;

_Noreturn void fail(const char *file, int line, const char *what) {
    fprintf(stderr, "%s:%d: not so: %s (%s)\n", file, line, what, abi.message ? abi.message() : "");
    exit(1);
}

// --- callbacks ---

static void signal_queue(void *context, uint32_t queue) {
    struct guest *guest = context;
    (void)queue;
    if (guest->calls_back)
        guest->reentrant_result = abi.device_reset(guest->device);
    pthread_mutex_lock(&guest->lock);
    guest->queue_signals++;
    pthread_cond_broadcast(&guest->changed);
    pthread_mutex_unlock(&guest->lock);
}

static void signal_config(void *context) {
    struct guest *guest = context;
    if (guest->calls_back)
        guest->reentrant_result = abi.device_set_target(guest->device, 7);
    pthread_mutex_lock(&guest->lock);
    guest->config_signals++;
    pthread_cond_broadcast(&guest->changed);
    pthread_mutex_unlock(&guest->lock);
}

static void signal_needs_reset(void *context) {
    struct guest *guest = context;
    pthread_mutex_lock(&guest->lock);
    guest->resets++;
    pthread_mutex_unlock(&guest->lock);
}

static void mark_dirty(void *context, uint64_t address, uint64_t bytes) {
    struct guest *guest = context;
    CHECK(bytes > 0 && address < guest->bytes && bytes <= guest->bytes - address);
    if (guest->calls_back)
        guest->reentrant_result = abi.device_notify(guest->device, 0);
    for (uint64_t page = address / PAGE; page <= (address + bytes - 1) / PAGE; page++)
        guest_wrote(guest, page);
}

static int discard(void *context, uint64_t address, uint64_t bytes) {
    struct guest *guest = context;
    CHECK(address % PAGE == 0 && bytes % PAGE == 0 && address < guest->bytes && bytes <= guest->bytes - address);
    return madvise(guest->memory + address, bytes, MADV_DONTNEED);
}

struct lacuna_device_config guest_config(struct guest *guest) {
    return (struct lacuna_device_config) {
        .size = sizeof(struct lacuna_device_config), .abi_version = LACUNA_ABI_VERSION, .address_limit = 1ull << 32,
        .context = guest, .signal_queue = signal_queue, .signal_config = signal_config,
        .signal_needs_reset = signal_needs_reset, .discard = discard, .mark_dirty = mark_dirty };
}

// --- the guest ---

void guest_create(struct guest *guest, size_t bytes) {
    struct lacuna_device_config config;
    struct lacuna_region region;

    memset(guest, 0, sizeof *guest);
    pthread_mutex_init(&guest->lock, NULL);
    pthread_cond_init(&guest->changed, NULL);
    guest->bytes = bytes;
    guest->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(guest->memory != MAP_FAILED);
    guest->log = calloc(guest_pages(guest) / 64, 8);
    guest->free = calloc(guest_pages(guest) / 64, 8);
    config = guest_config(guest);
    OK(abi.device_create(&config, &guest->device));
    region = (struct lacuna_region) { 0, bytes, guest->memory };
    OK(abi.device_set_memory(guest->device, &region, 1));
}

void guest_destroy(struct guest *guest) {
    if (guest->has_driver)
        guest_stop_driver(guest);
    OK(abi.device_destroy(guest->device));
    munmap(guest->memory, guest->bytes);
    free((void *)guest->log);
    free((void *)guest->free);
    pthread_cond_destroy(&guest->changed);
    pthread_mutex_destroy(&guest->lock);
}

// --- the driver: the layout of its pages, all of guest-physical memory's beginning ---

enum { TABLE = 1 * PAGE, AVAILABLE = 2 * PAGE, USED = 3 * PAGE, HEADERS = 4 * PAGE, BITMAP = 8 * PAGE, ENTRIES = 16 };

static void put(struct guest *guest, uint64_t place, const void *bytes, size_t count) {
    memcpy(guest->memory + place, bytes, count);
    for (uint64_t page = place / PAGE; page <= (place + count - 1) / PAGE; page++)
        guest_wrote(guest, page);
}

// Sends readable buffers as one chain and waits until it is used.
static void send_chain(struct guest *guest, const uint64_t *places, const uint32_t *lengths, unsigned count) {
    uint16_t head = 0, slot = guest->available % ENTRIES;
    for (unsigned i = 0; i < count; i++) {
        struct { uint64_t address; uint32_t length; uint16_t flags, next; } descriptor =
            { places[i], lengths[i], i + 1 < count, (uint16_t)(i + 1) };
        put(guest, TABLE + 16 * i, &descriptor, 16);
    }
    put(guest, AVAILABLE + 4 + 2 * slot, &head, 2);
    guest->available++;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    put(guest, AVAILABLE + 2, &guest->available, 2);
    OK(abi.device_notify(guest->device, ARMED_BITMAP_QUEUE));
    guest->used++;
    CHECK(*(volatile uint16_t *)(guest->memory + USED + 2) == guest->used);
}

static void report(struct guest *guest, uint32_t command) {
    struct { uint32_t command; uint16_t kind, flags; uint64_t start; uint32_t bits, reserved; }
        header = { command, 1, 1, 0, 0, 0 };
    uint64_t figures[5] = { 1, 2, 3, 4, 5 };
    // A quarter of the memory at a time, so that a report takes several chains.
    size_t step = guest_pages(guest) / 4;

    for (size_t start = 0; start < guest_pages(guest); start += step) {
        for (size_t word = 0; word < step / 64; word++) {
            uint64_t bits = atomic_load_explicit(&guest->free[start / 64 + word], memory_order_acquire);
            put(guest, BITMAP + 8 * word, &bits, 8);
        }
        header.start = start;
        header.bits = (uint32_t)step;
        put(guest, HEADERS, &header, sizeof header);
        send_chain(guest, (uint64_t[]) { HEADERS, BITMAP }, (uint32_t[]) { 24, (uint32_t)(step / 8) }, 2);
        header.flags = 0;
    }
    header.kind = 2;
    header.flags = 2;
    header.start = header.bits = 0;
    put(guest, HEADERS, &header, sizeof header);
    put(guest, HEADERS + 24, figures, sizeof figures);
    send_chain(guest, (uint64_t[]) { HEADERS }, (uint32_t[]) { 24 + 40 }, 1);
}

static void *drive(void *context) {
    struct guest *guest = context;
    unsigned seen = 0;

    for (;;) {
        uint32_t command;
        pthread_mutex_lock(&guest->lock);
        while (seen == guest->config_signals && !guest->stop_driver)
            pthread_cond_wait(&guest->changed, &guest->lock);
        seen = guest->config_signals;
        pthread_mutex_unlock(&guest->lock);
        if (guest->stop_driver)
            return NULL;
        OK(abi.device_config_read(guest->device, 16, &command, 4));
        if (command >= 2 && command != guest->command) {
            guest->command = command;
            report(guest, command);
        }
    }
}

// fresh: negotiates and sets its queue up; otherwise it goes on with what it has, on the destination.
void guest_start_driver(struct guest *guest, bool fresh) {
    struct lacuna_queue queue = { .size = sizeof queue, .index = ARMED_BITMAP_QUEUE, .entries = ENTRIES,
        .descriptors = TABLE, .available = AVAILABLE, .used = USED };
    if (fresh) {
        OK(abi.device_set_features(guest->device, FEATURES));
        OK(abi.device_set_queue(guest->device, &queue));
        OK(abi.device_activate(guest->device));
    }
    guest->stop_driver = false;
    CHECK(pthread_create(&guest->driver, NULL, drive, guest) == 0);
    guest->has_driver = true;
}

void guest_stop_driver(struct guest *guest) {
    pthread_mutex_lock(&guest->lock);
    guest->stop_driver = true;
    pthread_cond_broadcast(&guest->changed);
    pthread_mutex_unlock(&guest->lock);
    pthread_join(guest->driver, NULL);
    guest->has_driver = false;
}

int main(int count, char **words) {
    void *library;
    bool forget = count > 2 && strcmp(words[2], "--forget-discards") == 0;

    if (count < 2) {
        fprintf(stderr, "usage: vmm LIBRARY [--forget-discards]\n");
        return 2;
    }
    library = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
#define LOAD(name) *(void **)&abi.name = dlsym(library, "lacuna_" #name); if (!abi.name) { fprintf(stderr, "no lacuna_" #name "\n"); return 1; }
    FUNCTIONS(LOAD)
    CHECK(abi.abi_version() == LACUNA_ABI_VERSION);

    if (forget)
        return migrate(1, true);
    bad_input();
    resume();
    for (unsigned seed = 1; seed <= 10; seed++)
        if (migrate(seed, false) != 0)
            return 1;
    dlclose(library);
    puts("ok");
    return 0;
}
