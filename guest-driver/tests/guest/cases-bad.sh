# SPDX-License-Identifier: GPL-2.0
# Devices that do not do what they should, and ends that come at bad times.

case_small_rings()
{
	expect_log 'request [0-9]*: no memory, an empty report'
	load_driver
	for ring in 1 2 4 64; do
		load_device ring=$ring
		ask 2
		flags=$(value flags "$report")
		if [ $ring = 1 ]; then
			# First, last, failed: honest and empty.
			[ "$flags" = 7 ] && [ "$(value chains "$report")" = 1 ] ||
				fail "ring of 1: $report"
		else
			[ "$flags" = 2 ] || fail "ring of $ring: $report"
			check_complete
		fi
		rmmod lacuna_test_device || fail rmmod
	done
}

# No memory for the bitmap: an answer all the same, and the next one is whole.
case_no_memory()
{
	expect_log 'no memory, an empty report'
	expect_log "no memory for [0-9]* of the bitmap's chunks"
	load_device
	load_test_driver no_memory=1
	ask 2
	[ "$(value flags "$report")" = 7 ] && [ "$(value pages "$report")" = 0 ] ||
		fail "$report"
	[ "$(figure failed_requests)" = 1 ] || fail "not counted"
	echo 0 > /sys/module/lacuna_balloon/parameters/no_memory
	ask 3
	[ "$(value flags "$report")" = 2 ] || fail "$report"
	check_complete
}

case_no_queue()
{
	expect_log 'offers bitmaps and has no queue for them'
	load_device no_queue=1
	load_driver
	inflate 1000
	echo 2 > $params/request
	inflate 0
	grep -q '^none' $params/request || fail "a report without a queue"
}

case_changing_id()
{
	load_device
	load_test_driver batch=8 pause_us=2000
	id=2
	while [ $id -lt 30 ]; do
		echo $id > $params/request
		usleep $((id * 1000))
		id=$((id + 1))
	done
	echo 0 > /sys/module/lacuna_balloon/parameters/pause_us
	wait_for 30 answered 29 || fail "no answer to the last request"
	report=$(cat $params/request)
	[ "$(value errors "$report")" = 0 ] || fail "$report"
	[ "$(figure stale_requests)" -gt 0 ] || fail "no walk was cut short"
	note "$(figure stale_requests) of $(figure requests) given up"
	echo 2000 > /sys/module/lacuna_balloon/parameters/pause_us
	# And a stop in the middle: nothing more comes.
	echo 40 > $params/request
	usleep 20000
	echo 0 > $params/request
	wait_for 10 idle_again || fail "the walk goes on after a stop"
	! answered 40 || fail "an answer after a stop"
	echo 0 > /sys/module/lacuna_balloon/parameters/pause_us
	ask 41
	check_complete
}

idle_again()
{
	[ "$(figure last_request)" = 40 ] && [ "$(figure last_error)" = -125 ]
}

case_slow_device()
{
	load_device ring=2 delay_ms=300
	load_driver
	ask 2
	check_complete
	late_chains=
	echo 3 > $params/request
	echo 4 > $params/request
	ask 5
}

# Bit 5 is the bitmap's queue.
case_bitmap_kept()
{
	expect_log 'buffers not returned'
	load_device keep=32
	load_driver
	echo 2 > $params/request
	wait_for 30 figure_is overdue_buffers 1 || fail "the driver waits for ever"
	# A new request cannot be answered, and costs nothing.
	echo 3 > $params/request
	inflate 1000
	inflate 0
	# They come back at last: on it goes, with no further notice.
	echo 0 > $params/keep
	wait_for 30 answered 3 || fail "no report after the buffers came back"
	ask 4
	check_complete
	# And unloading while they are kept.
	echo 32 > $params/keep
	echo 5 > $params/request
	wait_for 10 keeps bitmap 1 || fail "nothing is kept: $(cat $params/kept)"
	within 10 rmmod lacuna_balloon
}

case_balloon_kept()
{
	expect_log 'the device keeps a buffer of the inflate queue'
	expect_log 'the device keeps a buffer of the deflate queue'
	load_device keep=1
	load_driver
	echo 1000 > $params/target
	wait_for 30 figure_is overdue_buffers 1 || fail "the driver waits for ever"
	# Reports are not held up.
	ask 2
	# It goes on by itself when the buffer comes back.
	echo 0 > $params/keep
	inflate 1000
	[ "$(vmstat balloon_inflate)" -ge 1000 ] || fail "nothing was inflated"
	echo 2 > $params/keep
	echo 0 > $params/target
	wait_for 30 figure_is overdue_buffers 2 || fail "deflate waits for ever"
	[ "$(figure balloon_pages)" = 1000 ] ||
		fail "$(figure balloon_pages) pages, and the device keeps all"
	# Each page is given back once, also those of the kept buffer.
	echo 0 > $params/keep
	wait_for 30 target_is 0 || fail "balloon: $(cat $params/target)"
	[ "$(value wrong "$(cat $params/target)")" = 0 ] ||
		fail "given back twice: $(cat $params/target)"
	# And unloading while it is kept.
	inflate 1000
	total=$(meminfo MemTotal)
	echo 2 > $params/keep
	echo 0 > $params/target
	wait_for 30 figure_is overdue_buffers 3 || fail "deflate, once more"
	within 15 rmmod lacuna_balloon
	[ "$(meminfo MemTotal)" = $((total + 4000)) ] ||
		fail "MemTotal $total, then $(meminfo MemTotal) kB"
	echo 0 > $params/keep
	load_driver
	inflate 500
}

# The deflate queue breaks while the driver waits for the device to have read
# what is in it.
case_broken_queue()
{
	load_device features=0x1
	load_driver
	inflate 1000
	total=$(meminfo MemTotal)
	echo 2 > $params/keep
	echo 0 > $params/target
	wait_for 30 keeps deflate 1 || fail "no deflate buffer"
	echo 1 > $params/break_queue || fail "cannot break it"
	# What the interrupts of a report wake looks at its queue once more.
	ask 2
	[ "$(figure balloon_pages)" = 1000 ] ||
		fail "$(figure balloon_pages) pages, and the device was not told"
	within 15 rmmod lacuna_balloon
	[ "$(meminfo MemTotal)" = $((total + 4000)) ] ||
		fail "MemTotal $total, then $(meminfo MemTotal) kB"
	echo 0 > $params/keep
	load_driver
	inflate 500
}

# Compaction moves a page and the device does not say that it knows. It still
# counts the old one as its own, so the guest must not use it before the device
# was told.
case_compaction_kept()
{
	load_device features=0x1
	load_driver
	scatter_balloon
	expect_log 'the device keeps a buffer of the inflate queue'
	compact_kept 1 1 inflated
	expect_log 'the device keeps a buffer of the deflate queue'
	scatter_balloon
	compact_kept 2 2 deflated
	# Unloading while a page is between the two.
	scatter_balloon
	total=$(meminfo MemTotal)
	echo 1 > $params/keep
	echo 1 > /proc/sys/vm/compact_memory
	wait_for 30 figure_is overdue_buffers 3 || fail "no third time"
	within 15 rmmod lacuna_balloon
	[ "$(meminfo MemTotal)" = $((total + 48000)) ] ||
		fail "MemTotal $total, then $(meminfo MemTotal) kB"
}

# A balloon of 12000 pages with holes between them.
scatter_balloon()
{
	inflate 20000
	echo 60 > $params/fragment
	inflate 24000
	echo 0 > $params/fragment
	inflate 12000
}

# seen COUNTER NUMBER: has the device taken more pages than that?
seen()
{
	[ "$(value "$1" "$(cat $params/target)")" -gt "$2" ]
}

# compact_kept QUEUES TIMES COUNTER: while the device keeps those queues'
# buffers; COUNTER says that it took them.
compact_kept()
{
	count=$(value "$3" "$(cat $params/target)")
	moved=$(vmstat balloon_migrate)
	echo "$1" > $params/keep
	echo 1 > /proc/sys/vm/compact_memory
	wait_for 30 figure_is overdue_buffers "$2" || fail "not overdue"
	moved=$(($(vmstat balloon_migrate) - moved))
	[ $moved = 1 ] || fail "$moved pages were moved"
	echo 0 > $params/keep
	wait_for 10 seen "$3" "$count" || fail "nothing was $3 at last"
	wait_for 30 target_is 12000 || fail "balloon: $(cat $params/target)"
	[ "$(value wrong "$(cat $params/target)")" = 0 ] ||
		fail "balloon: $(cat $params/target)"
	inflate 0
}

reported()
{
	[ "$(value reported "$(cat $params/target)")" -gt 0 ]
}

# The pages must not be free while the device has them: only a reset ends it.
case_reporting_kept()
{
	expect_log 'the device keeps pages, resetting it'
	load_device features=0x20 keep=16
	load_driver
	fill_and_free 64
	wait_for 30 keeps reporting 1 || fail "nothing is kept: $(cat $params/kept)"
	within 15 rmmod lacuna_balloon
	echo 0 > $params/keep
	load_driver
	wait_for 30 reported || fail "no reporting afterwards"
}

# The ring is full of blocks, and the command that ends them is in it.
case_hints_kept()
{
	load_device features=0x8 keep=8
	load_driver
	before=$(free_pages)
	echo 2 > $params/hint
	wait_for 30 keeps hint 64 || fail "not full: $(cat $params/kept)"
	[ "$(figure hint_blocks)" -gt 50 ] ||
		fail "only $(figure hint_blocks) blocks are held"
	[ "$(free_pages)" -lt $((before - 50000)) ] || fail "nothing is held"
	within 15 rmmod lacuna_balloon
	[ "$(free_pages)" -ge $((before - 4000)) ] || fail "memory is lost"
}

# The host has its next wish the instant the driver has read that it is done
# with the last, and before it read how that one ended: the blocks go back, and
# the return of the buffers begins what is next.
case_hints_late()
{
	load_device features=0x8 keep=8
	load_driver
	echo 3 > $params/hint_next
	echo 2 > $params/hint
	wait_for 30 keeps hint 63 || fail "not full: $(cat $params/kept)"
	# The driver waits for room, and reads this there.
	echo 1 > $params/hint
	wait_for 3 released || fail "$(figure hint_blocks) blocks are held"
	[ "$(cat $params/hint_next)" = 0 ] || fail "DONE was not read"
	wait_for 3 keeps hint 64 || fail "something was used: $(cat $params/kept)"
	echo 0 > $params/keep
	wait_for 60 hints_stopped || fail "no hints for 3: $(cat $params/hint)"
	[ "$(value pages "$(cat $params/hint)")" -gt 50000 ] ||
		fail "hints for 3: $(cat $params/hint)"
}

# walk ID: a walk that would last for minutes has read a first block.
walk()
{
	trace batch report
	echo "$1" > $params/request
	wait_for 20 traced lacuna_batch: || fail "no walk begins"
	! answered "$1" || fail "the walk is over already"
}

# The walk of request ID was given up, and nothing was sent for it.
given_up()
{
	traced "lacuna_report: cmd_id=$1 error=-125 " ||
		fail "the walk was not given up: $(tail -n 2 $trace_dir/trace)"
	! answered "$1" || fail "an answer to $1"
}

# Unloading takes what was traced along, so unbinding comes first here.
case_unload_in_walk()
{
	load_device
	for round in 1 2 3; do
		load_test_driver batch=1 pause_us=50000
		walk 2
		if [ $round = 1 ]; then
			within 5 sh -c 'for device in /sys/bus/virtio/drivers/lacuna_balloon/virtio*; do
				echo ${device##*/} > ${device%/*}/unbind
			done'
			given_up 2
		fi
		within 5 rmmod lacuna_balloon
		! answered 2 || fail "an answer to 2"
	done
	load_driver
	ask 2
	check_complete
}

case_unplug_in_walk()
{
	load_device
	load_test_driver batch=1 pause_us=50000
	for round in 1 2 3; do
		walk 2
		within 5 sh -c "echo 1 > $params/replug"
		given_up 2
	done
	walk 2
	within 5 rmmod lacuna_test_device
	traced "lacuna_report: cmd_id=2 error=-125 " ||
		fail "the walk was not given up: $(tail -n 2 $trace_dir/trace)"
	load_device
	echo 0 > /sys/module/lacuna_balloon/parameters/pause_us
	ask 2
	check_complete 90
}

case_reset_in_walk()
{
	load_device
	load_test_driver batch=1 pause_us=50000
	for round in 1 2 3; do
		walk 2
		within 5 sh -c "echo 1 > $params/suspend"
		given_up 2
	done
	echo 0 > /sys/module/lacuna_balloon/parameters/pause_us
	ask 2
	check_complete 90
}

# Everything that is ever allocated comes back.
case_leaks()
{
	load_device features=0x3f
	for round in 1 2 3 4; do cycle; done
	before=$(settled_free)
	for round in 1 2 3 4 5 6 7 8 9 10 11 12; do cycle; done
	# One chunk of bitmap in each round would be 384 KiB.
	lost=$((before - $(settled_free)))
	note "$lost KiB less free after 12 rounds"
	[ $lost -lt 300 ] || fail "$lost KiB are gone"
}

cycle()
{
	load_driver
	ask 2
	inflate 2000
	echo 3 > $params/hint
	ask 3
	echo 1 > $params/suspend
	inflate 2000
	echo 4 > $params/request
	rmmod lacuna_balloon || fail rmmod
	echo 3 > /proc/sys/vm/drop_caches
}
