// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "CLinux.h"
#include <linux/magic.h>
#include <sys/vfs.h>

_Static_assert(lacuna_MSG_DONTWAIT == MSG_DONTWAIT, "a constant of the kernel's");

union control {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(sizeof(int) * LACUNA_MAX_DESCRIPTORS)];
};

ssize_t lacuna_receive(int socket, void *buffer, size_t bytes, int flags, int *descriptors, int *count) {
    union control control;
    struct iovec vector = { .iov_base = buffer, .iov_len = bytes };
    struct msghdr message = {
        .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes,
    };
    *count = 0;
    ssize_t result = recvmsg(socket, &message, flags | MSG_CMSG_CLOEXEC);
    if (result < 0)
        return result;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        size_t here = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < here; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof fd);
            if (*count < LACUNA_MAX_DESCRIPTORS)
                descriptors[(*count)++] = fd;
            else
                close(fd);
        }
    }
    return result;
}

ssize_t lacuna_send(int socket, const void *buffer, size_t bytes, int flags, const int *descriptors, int count) {
    union control control;
    struct iovec vector = { .iov_base = (void *)buffer, .iov_len = bytes };
    struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1 };
    if (count > LACUNA_MAX_DESCRIPTORS || count < 0) {
        errno = EINVAL;
        return -1;
    }
    if (count > 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)count);
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int) * (size_t)count);
        memcpy(CMSG_DATA(&control.header), descriptors, sizeof(int) * (size_t)count);
    }
    return sendmsg(socket, &message, flags | MSG_NOSIGNAL);
}

int lacuna_punch_hole(int fd, uint64_t offset, uint64_t bytes) {
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes);
}

size_t lacuna_file_granule(int fd) {
    struct statfs information;
    if (fstatfs(fd, &information) == 0 && information.f_type == HUGETLBFS_MAGIC && information.f_bsize > 4096)
        return (size_t)information.f_bsize;
    return 4096;
}

int lacuna_memfd(const char *name) { return memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING); }

int lacuna_seal(int fd) {
    return fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
}

int lacuna_seals(int fd) { return fcntl(fd, F_GET_SEALS); }

// --- guards ---

enum { GUARDS = 1024 };

// `start` says who owns a slot: 0 nobody, 1 somebody who is filling it. The rest is written before `start` and read
// after it.
static struct {
    uintptr_t start;
    size_t bytes, granule;
    bool hit;
} guards[GUARDS];

int lacuna_guard_add(void *start, size_t bytes, size_t granule) {
    for (int slot = 0; slot < GUARDS; slot++) {
        uintptr_t nobody = 0;
        if (!__atomic_compare_exchange_n(&guards[slot].start, &nobody, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            continue;
        guards[slot].bytes = bytes;
        guards[slot].granule = granule;
        __atomic_store_n(&guards[slot].hit, false, __ATOMIC_RELAXED);
        __atomic_store_n(&guards[slot].start, (uintptr_t)start, __ATOMIC_RELEASE);
        return slot;
    }
    return -1;
}

void lacuna_guard_remove(int slot) { __atomic_store_n(&guards[slot].start, 0, __ATOMIC_RELEASE); }

bool lacuna_guard_was_hit(int slot) { return __atomic_load_n(&guards[slot].hit, __ATOMIC_RELAXED); }

// Async-signal-safe: loads, stores and the mmap() system call.
static void bus_error(int signal, siginfo_t *information, void *context) {
    (void)context;
    int saved = errno;
    uintptr_t address = (uintptr_t)information->si_addr;
    for (int slot = 0; slot < GUARDS && information->si_code == BUS_ADRERR; slot++) {
        uintptr_t start = __atomic_load_n(&guards[slot].start, __ATOMIC_ACQUIRE);
        if (start <= 1 || address < start || address - start >= guards[slot].bytes)
            continue;
        size_t granule = guards[slot].granule;
        void *page = (void *)(address & ~(uintptr_t)(granule - 1));
        if (mmap(page, granule, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == page) {
            __atomic_store_n(&guards[slot].hit, true, __ATOMIC_RELAXED);
            errno = saved;
            return;
        }
    }
    // Not ours, or no memory left: the access is made again and ends the process as if there were no handler.
    struct sigaction standard = { .sa_handler = SIG_DFL };
    sigaction(signal, &standard, NULL);
    errno = saved;
}

int lacuna_guard_install(void) {
    struct sigaction action = { .sa_sigaction = bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER };
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, NULL);
}
