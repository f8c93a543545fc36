// SPDX-License-Identifier: Apache-2.0
// What Swift cannot import: the variadic ioctl(), ioctl request numbers (function-like macros), atomics on memory that
// somebody else maps too, and a few byte loops that want vector instructions. No logic lives here.
#ifndef CLINUX_H
#define CLINUX_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <arpa/inet.h>
#include <linux/kvm.h>
#include <linux/vhost.h>
#include <linux/vm_sockets.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include "virtio_balloon_bitmap.h"
#include "CLinuxShared.h"

_Static_assert(sizeof(struct virtio_balloon_bitmap_hdr) == 24, "layout on the wire");
_Static_assert(sizeof(struct virtio_balloon_bitmap_figures) == 40, "layout on the wire");

// ioctl(2). The request numbers below are `unsigned long` constants of <linux/kvm.h>.
static inline int lacuna_ioctl_none(int fd, unsigned long request, unsigned long argument) {
    return ioctl(fd, request, argument);
}
static inline int lacuna_ioctl_pointer(int fd, unsigned long request, void *argument) {
    return ioctl(fd, request, argument);
}
static inline int lacuna_open(const char *path, int flags, unsigned mode) { return open(path, flags, mode); }
static inline int lacuna_fcntl_setfl(int fd, int flags) { return fcntl(fd, F_SETFL, flags); }
extern char **environ;
static inline char **lacuna_environ(void) { return environ; }
static inline int lacuna_set_cloexec(int fd) { return fcntl(fd, F_SETFD, FD_CLOEXEC); }
static inline int lacuna_fcntl_getfl(int fd) { return fcntl(fd, F_GETFL); }
// A descriptor of its own for the same file, close-on-exec.
static inline int lacuna_duplicate(int fd) { return fcntl(fd, F_DUPFD_CLOEXEC, 0); }
static inline int lacuna_errno(void) { return errno; }
// pidfd_open(2): readable once the process has ended. Older glibc has no function for it.
static inline int lacuna_pidfd_open(pid_t process) { return (int)syscall(SYS_pidfd_open, process, 0); }
// lseek() to the next data or hole of a sparse file; <unistd.h> has the names with _GNU_SOURCE only.
static const int lacuna_SEEK_DATA = 3;
static const int lacuna_SEEK_HOLE = 4;
// The room of a pipe or a FIFO, in bytes; the kernel makes it a power of two pages. <fcntl.h> as above.
static inline int lacuna_set_pipe_size(int fd, int bytes) { return fcntl(fd, 1031 /* F_SETPIPE_SZ */, bytes); }
int lacuna_rename(const char *from, const char *to);
// A file without a name in `folder`, which is gone with its last descriptor (O_TMPFILE); and a name for it, a new one.
int lacuna_open_unnamed(const char *folder);
int lacuna_give_name(int file, const char *path);
// mmap() with NULL for MAP_FAILED, a cast that Swift does not import.
static inline void *lacuna_mmap(size_t bytes, int protection, int flags, int fd, off_t offset) {
    void *mapping = mmap(NULL, bytes, protection, flags, fd, offset);
    return mapping == MAP_FAILED ? NULL : mapping;
}

// Enumerations in glibc's headers that Swift imports as types that do not combine.
static const int lacuna_SOCK_STREAM_CLOEXEC = SOCK_STREAM | SOCK_CLOEXEC;
static const int lacuna_MSG_NOSIGNAL = MSG_NOSIGNAL;
static const int lacuna_MSG_PEEK = MSG_PEEK;
// A macro that looks at a type's size.
static const int lacuna_SO_VM_SOCKETS_CONNECT_TIMEOUT = SO_VM_SOCKETS_CONNECT_TIMEOUT;

#define LACUNA_REQUEST(name) static const unsigned long lacuna_##name = name
LACUNA_REQUEST(KVM_GET_API_VERSION);
LACUNA_REQUEST(KVM_CREATE_VM);
LACUNA_REQUEST(KVM_CHECK_EXTENSION);
LACUNA_REQUEST(KVM_GET_VCPU_MMAP_SIZE);
LACUNA_REQUEST(KVM_GET_SUPPORTED_CPUID);
LACUNA_REQUEST(KVM_GET_MSR_INDEX_LIST);
LACUNA_REQUEST(KVM_SET_USER_MEMORY_REGION);
LACUNA_REQUEST(KVM_GET_DIRTY_LOG);
LACUNA_REQUEST(KVM_CLEAR_DIRTY_LOG);
LACUNA_REQUEST(KVM_RESET_DIRTY_RINGS);
LACUNA_REQUEST(KVM_SET_TSS_ADDR);
LACUNA_REQUEST(KVM_SET_IDENTITY_MAP_ADDR);
LACUNA_REQUEST(KVM_CREATE_IRQCHIP);
LACUNA_REQUEST(KVM_CREATE_PIT2);
LACUNA_REQUEST(KVM_IRQ_LINE);
LACUNA_REQUEST(KVM_GET_IRQCHIP);
LACUNA_REQUEST(KVM_SET_IRQCHIP);
LACUNA_REQUEST(KVM_GET_PIT2);
LACUNA_REQUEST(KVM_SET_PIT2);
LACUNA_REQUEST(KVM_GET_CLOCK);
LACUNA_REQUEST(KVM_SET_CLOCK);
LACUNA_REQUEST(KVM_CREATE_VCPU);
LACUNA_REQUEST(KVM_RUN);
LACUNA_REQUEST(KVM_GET_REGS);
LACUNA_REQUEST(KVM_SET_REGS);
LACUNA_REQUEST(KVM_GET_SREGS);
LACUNA_REQUEST(KVM_SET_SREGS);
LACUNA_REQUEST(KVM_GET_FPU);
LACUNA_REQUEST(KVM_SET_FPU);
LACUNA_REQUEST(KVM_GET_MSRS);
LACUNA_REQUEST(KVM_SET_MSRS);
LACUNA_REQUEST(KVM_GET_LAPIC);
LACUNA_REQUEST(KVM_SET_LAPIC);
LACUNA_REQUEST(KVM_SET_CPUID2);
LACUNA_REQUEST(KVM_GET_MP_STATE);
LACUNA_REQUEST(KVM_SET_MP_STATE);
LACUNA_REQUEST(KVM_GET_VCPU_EVENTS);
LACUNA_REQUEST(KVM_SET_VCPU_EVENTS);
LACUNA_REQUEST(KVM_GET_DEBUGREGS);
LACUNA_REQUEST(KVM_SET_DEBUGREGS);
LACUNA_REQUEST(KVM_GET_XSAVE);
LACUNA_REQUEST(KVM_GET_XSAVE2);
LACUNA_REQUEST(KVM_SET_XSAVE);
LACUNA_REQUEST(KVM_GET_XCRS);
LACUNA_REQUEST(KVM_SET_XCRS);
LACUNA_REQUEST(KVM_KVMCLOCK_CTRL);
LACUNA_REQUEST(KVM_ENABLE_CAP);
LACUNA_REQUEST(KVM_GET_TSC_KHZ);
LACUNA_REQUEST(KVM_SET_TSC_KHZ);
LACUNA_REQUEST(VHOST_SET_OWNER);
LACUNA_REQUEST(VHOST_GET_FEATURES);
LACUNA_REQUEST(VHOST_SET_FEATURES);
LACUNA_REQUEST(VHOST_SET_MEM_TABLE);
LACUNA_REQUEST(VHOST_SET_LOG_BASE);
LACUNA_REQUEST(VHOST_SET_VRING_NUM);
LACUNA_REQUEST(VHOST_SET_VRING_ADDR);
LACUNA_REQUEST(VHOST_SET_VRING_BASE);
LACUNA_REQUEST(VHOST_GET_VRING_BASE);
LACUNA_REQUEST(VHOST_SET_VRING_KICK);
LACUNA_REQUEST(VHOST_SET_VRING_CALL);
LACUNA_REQUEST(VHOST_VSOCK_SET_GUEST_CID);
LACUNA_REQUEST(VHOST_VSOCK_SET_RUNNING);
#undef LACUNA_REQUEST

// The parts of struct kvm_run that live in unions.
static inline uint8_t lacuna_run_io_direction(const struct kvm_run *run) { return run->io.direction; }
static inline uint8_t lacuna_run_io_size(const struct kvm_run *run) { return run->io.size; }
static inline uint16_t lacuna_run_io_port(const struct kvm_run *run) { return run->io.port; }
static inline uint32_t lacuna_run_io_count(const struct kvm_run *run) { return run->io.count; }
static inline uint64_t lacuna_run_io_offset(const struct kvm_run *run) { return run->io.data_offset; }
static inline uint64_t lacuna_run_mmio_address(const struct kvm_run *run) { return run->mmio.phys_addr; }
static inline uint32_t lacuna_run_mmio_length(const struct kvm_run *run) { return run->mmio.len; }
static inline bool lacuna_run_mmio_is_write(const struct kvm_run *run) { return run->mmio.is_write; }
static inline uint8_t *lacuna_run_mmio_data(struct kvm_run *run) { return run->mmio.data; }
static inline uint32_t lacuna_run_system_event(const struct kvm_run *run) { return run->system_event.type; }
static inline uint64_t lacuna_run_fail_reason(const struct kvm_run *run) {
    return run->fail_entry.hardware_entry_failure_reason;
}
static inline uint32_t lacuna_run_internal_suberror(const struct kvm_run *run) { return run->internal.suberror; }
// struct kvm_clear_dirty_log keeps its bitmap in a union.
static inline struct kvm_clear_dirty_log lacuna_clear_log(uint32_t slot, uint64_t first, uint32_t pages, void *words) {
    return (struct kvm_clear_dirty_log){ .slot = slot, .first_page = first, .num_pages = pages, .dirty_bitmap = words };
}
// KVM_CAP_DIRTY_LOG_RING: the kernel writes an entry's slot and offset before it sets the dirty flag, and must see that
// they were read before it sees the reset flag.
static inline bool lacuna_ring_entry_is_dirty(const struct kvm_dirty_gfn *entry) {
    return __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY;
}
static inline void lacuna_ring_entry_harvested(struct kvm_dirty_gfn *entry) {
    __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
}
// Set by a signal handler's thread while the vCPU thread may be about to enter KVM_RUN: must not be reordered or torn.
static inline void lacuna_run_set_immediate_exit(struct kvm_run *run, uint8_t value) {
    __atomic_store_n(&run->immediate_exit, value, __ATOMIC_SEQ_CST);
}

// Atomics on plain memory: guest memory, log bitmaps shared with another thread or the kernel.
static inline uint16_t lacuna_load_acquire_16(const void *p) {
    return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE);
}
static inline void lacuna_store_release_16(void *p, uint16_t v) { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE); }
static inline uint64_t lacuna_load_relaxed_64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void lacuna_store_relaxed_64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline uint64_t lacuna_load_64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline uint64_t lacuna_fetch_or_64(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
static inline uint64_t lacuna_fetch_and_64(uint64_t *p, uint64_t v) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }
static inline uint64_t lacuna_exchange_64(uint64_t *p, uint64_t v) {
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);
}
static inline void lacuna_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Copies out of or into memory that a running guest may change at the same time. A plain memcpy() may read a byte
// twice; the volatile pass-through stops the compiler from merging this copy with a later look at the source.
void lacuna_copy(void *to, const void *from, size_t bytes);
// True if all `bytes` (a multiple of 64) at `p` (8-byte aligned) are zero.
bool lacuna_is_zero(const void *p, size_t bytes);
// All words of `bytes` (a multiple of 64) at `p` (8-byte aligned) in one OR: what reading memory costs.
uint64_t lacuna_or_words(const void *p, size_t bytes);
// CRC-32C (Castagnoli, RFC 3720 appendix B.4) of `bytes`, continuing from `crc` (start with 0).
uint32_t lacuna_crc32c(uint32_t crc, const void *p, size_t bytes);
// target &= ~mask over `words`; returns how many bits that cleared.
size_t lacuna_and_not(uint64_t *target, const uint64_t *mask, size_t words);
// target |= a & b over `words`.
void lacuna_or_and(uint64_t *target, const uint64_t *a, const uint64_t *b, size_t words);
// taken = target & a & b and target &= ~taken, over `words`; true if any bit was taken.
bool lacuna_take_and(uint64_t *target, const uint64_t *a, const uint64_t *b, uint64_t *taken, size_t words);
size_t lacuna_popcount(const uint64_t *words, size_t count);
// target |= source over `words`.
void lacuna_or(uint64_t *target, const uint64_t *source, size_t words);
// target |= source, source = 0, over `words`, while others may still set bits of `source`. Those are lost from it.
void lacuna_or_and_clear(uint64_t *target, uint64_t *source, size_t words);
// The bits from `first` up to `end`, which is above it.
void lacuna_set_range(uint64_t *words, size_t first, size_t end);
void lacuna_clear_range(uint64_t *words, size_t first, size_t end);
// One bit of `summary` for each word that is not 0.
void lacuna_summarize(const uint64_t *words, uint64_t *summary, size_t count);
// The first of words[from ..< count] that is not 0, or not all ones; `count` (or a `from` above it) if there is none.
size_t lacuna_find_word(const uint64_t *words, size_t from, size_t count);
size_t lacuna_find_hole(const uint64_t *words, size_t from, size_t count);

// sigaction() for a signal whose only purpose is to interrupt a system call with EINTR.
int lacuna_install_empty_handler(int signal);
int lacuna_ignore_signal(int signal);
int lacuna_pthread_kill(pthread_t thread, int signal);
// GNU extensions, which Swift's importer hides. The name is cut to 15 bytes.
void lacuna_name_thread(const char *name);
int lacuna_accept(int fd); // accept4() with SOCK_CLOEXEC

#endif
