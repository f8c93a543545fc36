# SPDX-License-Identifier: GPL-2.0
# Everything that the stock driver does.

case_balloon()
{
	load_device features=0x1
	load_driver
	total=$(meminfo MemTotal)
	for pages in 1 255 256 257 20000 19999 300 30000 0; do
		inflate $pages
	done
	inflate 10000
	# Without deflating on OOM, the balloon is not the guest's memory.
	now=$(meminfo MemTotal)
	[ $now -le $((total - 39000)) ] || fail "MemTotal $total, then $now kB"
	ask 2
	check_complete
	# What is in the balloon goes back with the driver.
	rmmod lacuna_balloon || fail rmmod
	[ "$(meminfo MemTotal)" = $total ] || fail "MemTotal is not $total again"
	[ $(($(vmstat balloon_inflate) - $(vmstat balloon_deflate))) = 0 ] ||
		fail "pages stay in the balloon"
}

# Deflates when memory runs out, and nobody is killed.
case_oom()
{
	load_device features=0x4
	load_driver
	killed=$(vmstat oom_kill)
	total=$(meminfo MemTotal)
	want=$(($(meminfo MemAvailable) / 4 * 8 / 10))
	inflate $want 120
	[ "$(meminfo MemTotal)" = $total ] || fail "MemTotal changed"
	# What is left, and a third of what the balloon took.
	use_memory $((($(meminfo MemFree) + want * 4 / 3) / 1024))
	left=$(($(vmstat balloon_inflate) - $(vmstat balloon_deflate)))
	[ "$(vmstat oom_kill)" = "$killed" ] || fail "somebody was killed"
	echo 0 > $params/target
	give_memory_back
	wait_for 60 target_is 0 || fail "$(cat $params/target)"
	note "$want pages wanted, $left left"
	[ $left -lt $want ] || fail "nothing was deflated: $left"
}

# Compaction moves pages of the balloon, and the device hears of each.
case_compaction()
{
	load_device features=0x1
	load_driver
	moved=$(vmstat balloon_migrate)
	scatter_balloon
	for round in 1 2 3; do
		echo 1 > /proc/sys/vm/compact_memory
	done
	moved=$(($(vmstat balloon_migrate) - moved))
	[ $moved -gt 0 ] || fail "no page was moved"
	wait_for 10 target_is 12000 || fail "$(cat $params/target)"
	note "$moved pages moved"
	ask 2
	inflate 0
}

near()
{
	[ "$1" -ge $(($2 * 9 / 10)) ] && [ "$1" -le $(($2 * 11 / 10)) ]
}

fresh_stats()
{
	[ -n "$(sed -n 's/^5=//p' $params/stats)" ]
}

case_stats()
{
	load_device features=0x2
	load_driver
	for round in 1 2 3; do
		wait_for 10 sh -c "echo 1 2>/dev/null > $params/stats" ||
			fail "the device has no buffer"
		wait_for 10 fresh_stats || fail "no figures"
	done
	free=$(sed -n 's/^4=//p' $params/stats)
	total=$(sed -n 's/^5=//p' $params/stats)
	available=$(sed -n 's/^6=//p' $params/stats)
	minor=$(sed -n 's/^3=//p' $params/stats)
	near $((total / 1024)) "$(meminfo MemTotal)" || fail "total $total"
	near $((free / 1024)) "$(meminfo MemFree)" || fail "free $free"
	near $((available / 1024)) "$(meminfo MemAvailable)" ||
		fail "available $available"
	[ "$minor" -gt 1000 ] || fail "minor faults $minor"
	tags=$(grep -c = $params/stats)
	note "$tags figures"
	# What the kernel's own driver reports there.
	case $(uname -r) in
	6.1.*) known=10 ;;
	*) known=16 ;;
	esac
	# Two are about huge pages, which not every kernel has.
	[ -d /sys/kernel/mm/hugepages ] || known=$((known - 2))
	[ "$tags" = $known ] || fail "$tags figures, not $known: $(cat $params/stats)"
}

case_reporting()
{
	load_device features=0x20
	load_driver
	fill_and_free 100
	wait_for 30 reported || fail "nothing is reported"
	before=$(value reported "$(cat $params/target)")
	ask 2
	check_complete 90 $reporting_holds
	echo 1 > $params/suspend
	fill_and_free 100
	wait_for 30 reported || fail "nothing is reported after a suspend"
	note "$before pages"
}

hints_stopped()
{
	[ "$(value stopped "$(cat $params/hint)")" = 1 ]
}

released()
{
	[ "$(figure hint_blocks)" = 0 ]
}

case_hints()
{
	load_device features=0x8
	load_driver
	free=$(free_pages)
	echo 2 > $params/hint
	wait_for 60 hints_stopped || fail "no end: $(cat $params/hint)"
	pages=$(value pages "$(cat $params/hint)")
	[ "$pages" -ge $((free / 2)) ] || fail "$pages of $free pages"
	[ "$(free_pages)" -lt $((free / 2)) ] || fail "nothing is held"
	# Whoever needs memory gets it.
	killed=$(vmstat oom_kill)
	use_memory $((free / 256 / 2))
	give_memory_back
	[ "$(vmstat oom_kill)" = "$killed" ] || fail "somebody was killed"
	echo 1 > $params/hint
	wait_for 10 released || fail "$(figure hint_blocks) blocks are held"
	echo 3 > $params/hint
	wait_for 60 hints_stopped || fail "no second time: $(cat $params/hint)"
	echo 1 > $params/suspend
	released || fail "held over a suspend"
	ask 2
	note "$pages of $free pages"
}

case_suspend()
{
	load_device features=0x37
	load_driver
	ask 2
	inflate 5000
	for round in 1 2 3; do
		echo 1 > $params/suspend
		# The wish is still there, and the pages come back to it.
		wait_for 30 target_is 5000 || fail "$(cat $params/target)"
		ask $((round + 2))
		check_complete 97 $reporting_holds
	done
	inflate 0
}

# The kernel was booted with init_on_free=1: free pages are known to be zero.
case_init_on_free()
{
	grep -q init_on_free=1 /proc/cmdline || fail "booted without"
	load_device features=0x10
	load_driver
	[ "$(value poison "$(cat $params/target)")" = 0x0 ] || fail "poison"
	ask 2
	check_complete
	rmmod lacuna_balloon
	rmmod lacuna_test_device
	# Not able to say so, it must not have free pages' contents changed.
	load_device features=0x20
	load_driver
	never_reports
	ask 2
}

# Feature bit 5 is not taken, and what is freed now is not shown.
never_reports()
{
	[ "$(cut -c 6 /sys/bus/virtio/drivers/lacuna_balloon/virtio*/features)" = 0 ] ||
		fail "free page reporting without PAGE_POISON"
	fill_and_free 64
	# The kernel waits for two seconds before it reports.
	! wait_for 5 reported || fail "reported without PAGE_POISON"
}

# The kernel was booted with page_poison=1: free pages have to read as 0xaa.
case_poisoned()
{
	grep -q page_poison=1 /proc/cmdline || fail "booted without"
	load_device features=0x30
	load_driver
	[ "$(value poison "$(cat $params/target)")" = 0xaaaaaaaa ] ||
		fail "$(cat $params/target)"
	ask 2
	check_complete
	# The device knows what a page has to come back as.
	fill_and_free 64
	wait_for 30 reported || fail "nothing is reported"
	rmmod lacuna_balloon
	rmmod lacuna_test_device
	# A device that cannot know must not be told of free pages.
	expect_log 'the device cannot know: no bitmaps'
	load_device features=0x20
	load_driver
	[ "$(cut -c 64 /sys/bus/virtio/drivers/lacuna_balloon/virtio*/features)" = 0 ] ||
		fail "bitmaps without PAGE_POISON"
	echo 2 > $params/request
	inflate 100
	never_reports
	! answered 2 || fail "a report without PAGE_POISON"
}
