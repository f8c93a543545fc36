/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM lacuna_balloon

#if !defined(LACUNA_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define LACUNA_TRACE_H

#include <linux/tracepoint.h>

/* A request was taken up. */
TRACE_EVENT(lacuna_request,
	TP_PROTO(u32 cmd_id),
	TP_ARGS(cmd_id),
	TP_STRUCT__entry(
		__field(u32, cmd_id)
	),
	TP_fast_assign(
		__entry->cmd_id = cmd_id;
	),
	TP_printk("cmd_id=%u", __entry->cmd_id)
);

/* A lock was dropped; @cpu is -1 for the zone's own lists. */
TRACE_EVENT(lacuna_batch,
	TP_PROTO(int nid, const char *zone, int cpu, unsigned int blocks,
		 u64 held_ns),
	TP_ARGS(nid, zone, cpu, blocks, held_ns),
	TP_STRUCT__entry(
		__field(int, nid)
		__string(zone, zone)
		__field(int, cpu)
		__field(unsigned int, blocks)
		__field(u64, held_ns)
	),
	TP_fast_assign(
		__entry->nid = nid;
		lacuna_assign_str(zone, zone);
		__entry->cpu = cpu;
		__entry->blocks = blocks;
		__entry->held_ns = held_ns;
	),
	TP_printk("node=%d zone=%s cpu=%d blocks=%u held_ns=%llu",
		  __entry->nid, __get_str(zone), __entry->cpu, __entry->blocks,
		  __entry->held_ns)
);

/* A report ended; @error is 0 if all of it was sent. */
TRACE_EVENT(lacuna_report,
	TP_PROTO(u32 cmd_id, int error, u64 blocks, u64 pages, u64 walk_ns),
	TP_ARGS(cmd_id, error, blocks, pages, walk_ns),
	TP_STRUCT__entry(
		__field(u32, cmd_id)
		__field(int, error)
		__field(u64, blocks)
		__field(u64, pages)
		__field(u64, walk_ns)
	),
	TP_fast_assign(
		__entry->cmd_id = cmd_id;
		__entry->error = error;
		__entry->blocks = blocks;
		__entry->pages = pages;
		__entry->walk_ns = walk_ns;
	),
	TP_printk("cmd_id=%u error=%d blocks=%llu pages=%llu walk_ns=%llu",
		  __entry->cmd_id, __entry->error, __entry->blocks,
		  __entry->pages, __entry->walk_ns)
);

#endif /* LACUNA_TRACE_H */

#undef TRACE_INCLUDE_PATH
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_PATH .
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
