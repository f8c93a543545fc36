// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "CLinux.h"
#include <grp.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/vfs.h>

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

int lacuna_memfd_huge(const char *name) { return memfd_create(name, MFD_CLOEXEC | MFD_HUGETLB | 21u << 26); }

int lacuna_allocate(int fd, uint64_t bytes) { return fallocate(fd, 0, 0, (off_t)bytes); }

int lacuna_seal(int fd) {
    return fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
}

int lacuna_seals(int fd) { return fcntl(fd, F_GET_SEALS); }

// --- privileges ---

int lacuna_drop_privileges(int64_t uid, int64_t gid) {
    struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
    struct __user_cap_data_struct none[2];
    struct rlimit nothing = { 0, 0 };

    memset(none, 0, sizeof none);
    if (uid >= 0) {
        // Groups first: they need the privilege that goes with the user.
        if (setgroups(0, NULL) != 0 || setresgid((gid_t)gid, (gid_t)gid, (gid_t)gid) != 0 ||
            setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid) != 0)
            return -1;
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || syscall(SYS_capset, &header, none) != 0)
        return -1;
    return setrlimit(RLIMIT_CORE, &nothing);
}

int lacuna_forbid_processes(void) {
    struct rlimit nothing = { 0, 0 };
    return setrlimit(RLIMIT_NPROC, &nothing);
}

// Read here rather than by getpwnam(), which a static executable can only call with the libraries of the C library it
// was linked with at hand.
int lacuna_find_user(const char *name, int64_t *uid, int64_t *gid) {
    char line[1024], *end;
    unsigned long number = strtoul(name, &end, 10);
    bool is_number = *name != 0 && *end == 0, found = false;
    FILE *file = fopen("/etc/passwd", "re");

    if (file == NULL)
        return -1;
    while (!found && fgets(line, sizeof line, file) != NULL) {
        char *fields[4], *rest = line;
        int count = 0;
        while (count < 4 && (fields[count] = strsep(&rest, ":")) != NULL)
            count++;
        if (count < 4)
            continue;
        found = is_number ? strtoul(fields[2], NULL, 10) == number : strcmp(fields[0], name) == 0;
        if (found) {
            *uid = (int64_t)strtoul(fields[2], NULL, 10);
            *gid = (int64_t)strtoul(fields[3], NULL, 10);
        }
    }
    fclose(file);
    return found ? 0 : -1;
}

int lacuna_prefer_writers(pthread_rwlockattr_t *attributes) {
    return pthread_rwlockattr_setkind_np(attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
}

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
