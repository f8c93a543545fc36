/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels this module builds for, in one place.
 */
#ifndef LACUNA_COMPAT_H
#define LACUNA_COMPAT_H

#include <linux/mmzone.h>
#include <linux/shrinker.h>
#include <linux/version.h>
#include <linux/virtio_config.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "lacuna_balloon needs Linux 6.1 or later"
#endif

/*
 * The walk reads the page allocator's own structures. Nobody promised that
 * they stay as they are, so a series that was not looked at is refused.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
#error "lacuna_balloon has not been checked against this kernel series"
#endif

/*
 * The largest block the page allocator keeps, as log2 of its pages. Whether
 * the constant in the headers is that or one more, and its name, changed in
 * 6.4 and 6.8; the array itself says it on all.
 */
#define LACUNA_MAX_ORDER \
	((unsigned int)ARRAY_SIZE(((struct zone *)NULL)->free_area) - 1)

/* Names and callbacks went into one struct in 6.11. */
static inline int lacuna_find_vqs(struct virtio_device *vdev, unsigned int nvqs,
				  struct virtqueue *vqs[],
				  vq_callback_t *callbacks[],
				  const char * const names[])
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct virtqueue_info info[8] = {};
	unsigned int i;

	if (WARN_ON_ONCE(nvqs > ARRAY_SIZE(info)))
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

typedef unsigned long (*lacuna_shrink_t)(struct shrinker *shrinker,
					 struct shrink_control *control);

/* Shrinkers are allocated by their core since 6.7. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
#define LACUNA_SHRINKER			struct shrinker *
#define lacuna_shrinker_owner(s, type, member)	((type *)(s)->private_data)

static inline int lacuna_shrinker_add(struct shrinker **place, void *owner,
				      lacuna_shrink_t count,
				      lacuna_shrink_t scan)
{
	struct shrinker *shrinker = shrinker_alloc(0, "lacuna-balloon");

	if (!shrinker)
		return -ENOMEM;
	shrinker->count_objects = count;
	shrinker->scan_objects = scan;
	shrinker->private_data = owner;
	shrinker_register(shrinker);
	*place = shrinker;
	return 0;
}

static inline void lacuna_shrinker_remove(struct shrinker **place)
{
	shrinker_free(*place);
	*place = NULL;
}
#else
#define LACUNA_SHRINKER			struct shrinker
#define lacuna_shrinker_owner(s, type, member)	container_of(s, type, member)

static inline int lacuna_shrinker_add(struct shrinker *shrinker, void *owner,
				      lacuna_shrink_t count,
				      lacuna_shrink_t scan)
{
	shrinker->count_objects = count;
	shrinker->scan_objects = scan;
	shrinker->seeks = DEFAULT_SEEKS;
	return register_shrinker(shrinker, "lacuna-balloon");
}

static inline void lacuna_shrinker_remove(struct shrinker *shrinker)
{
	unregister_shrinker(shrinker);
}
#endif

/* The source of a trace event's string is given once only since 6.10. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 10, 0)
#define lacuna_assign_str(field, source)	__assign_str(field)
#else
#define lacuna_assign_str(field, source)	__assign_str(field, source)
#endif

#endif /* LACUNA_COMPAT_H */
