/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels this module builds for, in one place.
 */
#ifndef LACUNA_COMPAT_H
#define LACUNA_COMPAT_H

#include <linux/version.h>
#include <linux/virtio_config.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "lacuna_balloon needs Linux 6.1 or later"
#endif

/*
 * The walk reads the page allocator's own structures. Nobody promised that
 * they stay as they are, so an unknown series has to be looked at first.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(8, 0, 0)
#error "lacuna_balloon has not been checked against this kernel series"
#endif

#define LACUNA_MAX_VQS	3

/* Names and callbacks went into one struct in 6.11. */
static inline int lacuna_find_vqs(struct virtio_device *vdev, unsigned int nvqs,
				  struct virtqueue *vqs[],
				  vq_callback_t *callbacks[],
				  const char * const names[])
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct virtqueue_info info[LACUNA_MAX_VQS] = {};
	unsigned int i;

	if (WARN_ON_ONCE(nvqs > LACUNA_MAX_VQS))
		return -EINVAL;
	for (i = 0; i < nvqs; i++) {
		info[i].name = names[i];
		info[i].callback = callbacks[i];
	}
	return virtio_find_vqs(vdev, nvqs, vqs, info, NULL);
#else
	return virtio_find_vqs(vdev, nvqs, vqs, callbacks, names, NULL);
#endif
}

#endif /* LACUNA_COMPAT_H */
