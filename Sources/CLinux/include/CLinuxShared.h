// SPDX-License-Identifier: Apache-2.0
// Memory and descriptors that come from another process: descriptor passing (whose CMSG macros Swift does not import),
// and protection from files that their owner cuts short.
#ifndef CLINUX_SHARED_H
#define CLINUX_SHARED_H

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/auxv.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/types.h>

// The most descriptors one message can carry: SCM_MAX_FD of the kernel.
enum { LACUNA_MAX_DESCRIPTORS = 253 };

// recvmsg() of at most `bytes` bytes. `descriptors` has room for LACUNA_MAX_DESCRIPTORS, so that none can be lost; they
// are close-on-exec and the caller's. `*count` is how many there are.
ssize_t lacuna_receive(int socket, void *buffer, size_t bytes, int flags, int *descriptors, int *count);
// sendmsg() with `count` descriptors, without SIGPIPE.
ssize_t lacuna_send(int socket, const void *buffer, size_t bytes, int flags, const int *descriptors, int count);

// fallocate() that makes a hole. 0 or -1 with errno.
int lacuna_punch_hole(int fd, uint64_t offset, uint64_t bytes);
// The bytes of a page of the file's own memory: of a huge page for hugetlbfs, else of a plain page.
size_t lacuna_file_granule(int fd);
// memfd_create() that allows seals; -1 with errno.
int lacuna_memfd(const char *name);
// memfd_create() of huge pages of 2 MiB; -1 with errno.
int lacuna_memfd_huge(const char *name);
// fallocate(): the file's bytes are there. 0 or -1 with errno.
int lacuna_allocate(int fd, uint64_t bytes);
// Nothing can change the file from here on: not its size, not its bytes. 0 or -1 with errno.
int lacuna_seal(int fd);
// fcntl(): the seals on a file; -1 if it can have none.
int lacuna_seals(int fd);
static const int lacuna_MSG_DONTWAIT = MSG_DONTWAIT;
static const int lacuna_EFD_FLAGS = EFD_CLOEXEC | EFD_NONBLOCK;
static const int lacuna_SOCK_SEQPACKET_CLOEXEC = SOCK_SEQPACKET | SOCK_CLOEXEC;

// Gives up every capability and the way to new ones, and becomes user `uid` with group `gid` and no others (-1: stays
// who it is). No memory image of the process will be written. Before any other thread: it is for the calling one and
// those it starts. 0, or -1 with errno.
int lacuna_drop_privileges(int64_t uid, int64_t gid);
// No more threads and processes from here on, unless the user is root.
int lacuna_forbid_processes(void);
// The user and group of a name, or of a number; -1 if there is none.
int lacuna_find_user(const char *name, int64_t *uid, int64_t *gid);

// A mapping of a file that somebody else may truncate: an access beyond its end raises SIGBUS. A guarded mapping gets
// private zero pages in that place instead, and the guard remembers. Takes effect with lacuna_guard_install(), which
// sets the process's SIGBUS handler. Returns a slot, or -1 if all are taken.
int lacuna_guard_add(void *start, size_t bytes, size_t granule);
void lacuna_guard_remove(int slot);
bool lacuna_guard_was_hit(int slot);
int lacuna_guard_install(void);

// Readers that keep coming do not keep a writer out. A GNU extension.
int lacuna_prefer_writers(pthread_rwlockattr_t *attributes);

// A dirty log shared with another process; a byte at a time, since its size need not be a multiple of 8.
static inline void lacuna_fetch_or_8(uint8_t *p, uint8_t v) { __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }

#endif
