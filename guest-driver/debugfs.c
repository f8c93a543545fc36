// SPDX-License-Identifier: GPL-2.0
/*
 * Figures of the last report and totals, in
 * /sys/kernel/debug/lacuna_balloon/DEVICE: one "name value" on each line.
 */
#include <linux/debugfs.h>
#include <linux/seq_file.h>

#include "lacuna.h"

static struct dentry *lacuna_root;

static int lacuna_figures_show(struct seq_file *file, void *unused)
{
	struct lacuna_balloon *vb = file->private;
	struct lacuna_figures last;
	struct lacuna_totals totals;

	mutex_lock(&vb->figures_lock);
	last = vb->last;
	totals = vb->totals;
	mutex_unlock(&vb->figures_lock);

	seq_printf(file, "last_request %u\n", last.cmd_id);
	seq_printf(file, "last_error %d\n", last.error);
	seq_printf(file, "last_blocks %llu\n", last.blocks);
	seq_printf(file, "last_pages %llu\n", last.pages);
	seq_printf(file, "last_batches %llu\n", last.batches);
	seq_printf(file, "last_walk_ns %llu\n", last.walk_ns);
	seq_printf(file, "last_longest_hold_ns %llu\n", last.lock_ns);
	seq_printf(file, "last_total_ns %llu\n", last.total_ns);
	seq_printf(file, "requests %llu\n", totals.requests);
	seq_printf(file, "reports %llu\n", totals.reports);
	seq_printf(file, "stale_requests %llu\n", totals.stale);
	seq_printf(file, "failed_requests %llu\n", totals.failed);
	seq_printf(file, "pages %llu\n", totals.pages);
	seq_printf(file, "batches %llu\n", totals.batches);
	seq_printf(file, "walk_ns %llu\n", totals.walk_ns);
	seq_printf(file, "longest_hold_ns %llu\n", totals.lock_ns);
	seq_printf(file, "overdue_buffers %llu\n", totals.timeouts);
	seq_printf(file, "balloon_pages %u\n", READ_ONCE(vb->nr_pages));
	seq_printf(file, "hint_blocks %lu\n", READ_ONCE(vb->hint_blocks));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(lacuna_figures);

void lacuna_debugfs_create(void)
{
	lacuna_root = debugfs_create_dir("lacuna_balloon", NULL);
}

void lacuna_debugfs_destroy(void)
{
	debugfs_remove(lacuna_root);
}

void lacuna_debugfs_add(struct lacuna_balloon *vb)
{
	vb->debugfs = debugfs_create_file(dev_name(&vb->vdev->dev), 0444,
					  lacuna_root, vb,
					  &lacuna_figures_fops);
}

void lacuna_debugfs_remove(struct lacuna_balloon *vb)
{
	debugfs_remove(vb->debugfs);
}
