# SPDX-License-Identifier: GPL-2.0
# Bitmap reports: what is in them, how long locks are held, what is seen.

case_report()
{
	load_device
	load_driver
	ask 2
	check_complete
	note "$(value pages "$report") pages in $(value blocks "$report") blocks"
	for id in 3 4 5; do
		ask $id
		check_complete
	done
	[ "$(figure requests)" = 4 ] && [ "$(figure reports)" = 4 ] ||
		fail "debugfs counts $(figure requests) requests"
	[ "$(figure last_request)" = 5 ] || fail "debugfs: last request"
	[ "$(figure last_pages)" = "$(value pages "$report")" ] ||
		fail "debugfs: pages"
	[ "$(figure last_walk_ns)" -gt 0 ] || fail "debugfs: no walk time"
}

# The stop id, the reserved one, and one that was answered already.
case_ids()
{
	load_device
	load_driver
	ask 2
	for id in 0 1; do
		echo $id > $params/request
	done
	ask 3
	ask 4294967295
	ask 2
	[ "$(figure requests)" = 4 ] || fail "$(figure requests) requests"
}

# The device asked before the driver looked: there is no interrupt for that.
case_asked_early()
{
	load_device early=9
	load_driver
	wait_for 20 answered 9 || fail "no answer: $(cat $params/request)"
	ask 10
}

# With all free memory in single pages, no hold reads more than a batch, and
# the tracepoints tell of each.
case_fragmented()
{
	load_device
	load_driver batch=256
	# Pages in one piece first, so that compaction has nothing to undo.
	echo 97 > $params/fragment
	echo 1 > $trace_dir/events/lacuna_balloon/enable
	echo > $trace_dir/trace
	echo 8192 > $trace_dir/buffer_size_kb
	ask 2
	cp $trace_dir/trace /tmp/trace
	echo 0 > $trace_dir/events/lacuna_balloon/enable
	check_complete 95
	grep -q 'lacuna_request: cmd_id=2' /tmp/trace || fail "no request traced"
	grep -q 'lacuna_report: cmd_id=2 error=0' /tmp/trace ||
		fail "no report traced"
	most=$(sed -n 's/.*lacuna_batch:.* blocks=\([0-9]*\) .*/\1/p' /tmp/trace |
		sort -n | tail -n 1)
	traced=$(grep -c lacuna_batch: /tmp/trace)
	[ "$most" = 256 ] || fail "a hold of $most blocks, batch=256"
	[ "$traced" = "$(value batches "$report")" ] ||
		fail "$traced batches traced: $report"
	blocks=$(value blocks "$report")
	[ "$blocks" -gt $(($(value pages "$report") * 6 / 10)) ] ||
		fail "not fragmented: $report"
	note "$blocks blocks, $traced holds, longest $(value lock_ns "$report") ns"
	rm /tmp/trace
	echo 0 > $params/fragment
}

# Batches of one block each, and changed under way.
case_batches()
{
	load_device
	load_driver batch=1
	ask 2
	check_complete 95
	[ "$(value batches "$report")" -ge "$(value blocks "$report")" ] ||
		fail "batch=1: $report"
	echo 0 > /sys/module/lacuna_balloon/parameters/batch
	ask 3
	echo 4294967295 > /sys/module/lacuna_balloon/parameters/batch
	ask 4
	check_complete
}

# The same lists read while others take and free pages as fast as they can.
case_churn()
{
	load_device
	load_test_driver batch=16
	for i in 1 2 3; do
		( while :; do
			dd if=/dev/zero of=/tmp/churn.$i bs=64k count=500 \
				2>/dev/null
			rm -f /tmp/churn.$i
		done ) &
		churners="$churners $!"
	done
	id=2
	while [ $id -lt 40 ]; do
		echo $((id % 3 * 100)) \
			> /sys/module/lacuna_balloon/parameters/pause_us
		ask $id
		id=$((id + 1))
	done
	kill $churners
	wait
	rm -f /tmp/churn.*
}

# The same with other numbers of processors.
many()
{
	[ "$(nproc)" = "$1" ] || fail "$(nproc) processors"
	load_device
	load_driver batch=32
	for id in 2 3 4 5 6; do
		ask $id
		check_complete
	done
}

case_report_1cpu()
{
	many 1
}

case_report_8cpus()
{
	many 8
}
