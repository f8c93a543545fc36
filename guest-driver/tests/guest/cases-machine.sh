# SPDX-License-Identifier: GPL-2.0
# With the machine's own balloon device, memory and power.

add_balloon()
{
	wait_for 20 monitor_ready || fail "no monitor: $(tail -c 200 /tmp/monitor)"
	monitor "device_add virtio-balloon-pci,id=b0,$1" ''
	wait_for 20 bound || fail "no device came: $(tail -c 200 /tmp/monitor)"
}

bound()
{
	ls -d /sys/bus/virtio/drivers/lacuna_balloon/virtio* > /dev/null 2>&1
}

unbound()
{
	! bound
}

remove_balloon()
{
	monitor "device_del b0" ''
	wait_for 30 unbound || fail "the device does not go"
}

actual_is()
{
	monitor "info balloon" 'actual=[0-9]+'
	grep -q "actual=$1[^0-9]" /tmp/monitor
}

# QEMU's device: size, figures, removal from a running system.
case_qemu()
{
	size=$(($(tr ' ' '\n' < /proc/cmdline | sed -n 's/^driver.mib=//p')))
	load_driver
	add_balloon deflate-on-oom=on,free-page-reporting=on
	total=$(meminfo MemTotal)
	free=$(meminfo MemFree)
	monitor "balloon $((size - 200))" ''
	wait_for 60 actual_is $((size - 200)) || fail "$(tail -c 200 /tmp/monitor)"
	[ $((free - $(meminfo MemFree))) -gt 190000 ] || fail "not inflated"
	monitor "qom-set /machine/peripheral/b0 guest-stats-polling-interval 1" \
		''
	wait_for 20 guest_stats || fail "no figures: $(tail -c 200 /tmp/monitor)"
	monitor "balloon $size" ''
	wait_for 60 actual_is $size || fail "$(tail -c 200 /tmp/monitor)"
	remove_balloon
	[ "$(meminfo MemTotal)" = "$total" ] || fail "MemTotal"
}

guest_stats()
{
	monitor "qom-get /machine/peripheral/b0 guest-stats" 'last-update'
	grep -q 'stat-total-memory[^0-9]*[1-9]' /tmp/monitor
}

# To RAM and back, with a balloon that is full.
case_sleep()
{
	load_driver
	add_balloon deflate-on-oom=on,free-page-reporting=on
	size=$(($(tr ' ' '\n' < /proc/cmdline | sed -n 's/^driver.mib=//p')))
	monitor "balloon $((size - 100))" ''
	wait_for 60 actual_is $((size - 100)) || fail "$(tail -c 200 /tmp/monitor)"
	# The alarm comes by way of the HPET, and on a busy host late.
	may_log 'hpet: Lost [0-9]+ RTC interrupts'
	echo 0 > /sys/class/rtc/rtc0/wakealarm
	echo +3 > /sys/class/rtc/rtc0/wakealarm
	echo mem > /sys/power/state || fail "cannot suspend"
	wait_for 60 actual_is $((size - 100)) || fail "$(tail -c 200 /tmp/monitor)"
	dmesg | grep -q 'PM: suspend exit' || fail "was not asleep"
	remove_balloon
}

# Memory that is plugged in is part of the next report, on another node.
case_hotplug()
{
	load_device
	load_driver
	ask 2
	check_complete
	before=$(value pages "$report")
	echo online_movable > /sys/devices/system/memory/auto_online_blocks
	nodes=$(ls -d /sys/devices/system/node/node* | wc -l)
	wait_for 20 monitor_ready || fail "no monitor: $(tail -c 200 /tmp/monitor)"
	monitor "object_add memory-backend-ram,id=m0,size=256M" ''
	monitor "device_add pc-dimm,id=d0,memdev=m0,node=$((nodes - 1))" ''
	wait_for 30 memory_came || fail "no memory came: $(tail -c 200 /tmp/monitor)"
	ask 3
	check_complete
	grown=$(($(value pages "$report") - before))
	[ $grown -gt 60000 ] || fail "the report grew by $grown pages"
	# And off again while reports are being made: when a walk reads a CPU's
	# set, and the last block, with which the zone goes, when a walk comes to
	# that node.
	rmmod lacuna_balloon || fail "rmmod"
	load_test_driver batch=1
	id=4
	blocks=$(movable_blocks)
	for block in $blocks; do
		if [ "$block" = "${blocks##* }" ]; then
			offline_on_lists $block $((nodes - 1))
			[ "$ended" = no ] || fail "$block went after the walk"
		else
			offline_in_walk $block 'cpu=[0-9]' 2000
		fi
		ask $id
		id=$((id + 1))
	done
	[ -z "$(movable_blocks)" ] || fail "left: $(movable_blocks)"
	shrunk=$(($(value pages "$report") - before))
	[ $shrunk -lt 8192 ] || fail "$shrunk pages of what was taken off"
	# Once more with something on a CPU's lists: as long as a walk is on them
	# the zone has to stay.
	block=${blocks##* }
	echo online_movable > $block/state || fail "$block does not come back"
	for cpu in 4 5 6 7; do
		taskset -c $cpu dd if=/dev/zero of=/tmp/fill bs=64k count=64 2> /dev/null
		rm /tmp/fill
	done
	# Nothing else in the trace, so that to look takes no time.
	echo 'zone == "Movable"' > $trace_dir/events/lacuna_balloon/lacuna_batch/filter ||
		fail "no filter"
	trace batch
	pause=/sys/module/lacuna_balloon/parameters/pause_us
	echo 4 > /sys/module/lacuna_balloon/parameters/batch
	# Slower the nearer it comes: few pages are left on the lists by then.
	echo 3000 > $pause
	echo 99$id > $params/request
	wait_for 120 traced "cpu=" || fail "the walk does not come to the zone"
	echo 200000 > $pause
	wait_for 120 traced "cpu=[0-9]" || fail "no page on a CPU's lists there"
	echo 5000000 > $pause
	! answered 99$id || fail "the walk was over before"
	# The pause after the next batch is a long one.
	seen=$(batches)
	wait_for 60 more_batches || fail "the walk does not go on"
	seen=$(batches)
	# It waits until the walk has left that list, however long that is.
	( wait_for 60 more_batches; echo 0 > $pause ) &
	echo offline > $block/state || fail "$block stays"
	more_batches || fail "the zone went with a walk on its lists"
	wait $!
	wait_for 60 answered 99$id || fail "no report of that walk"
	[ -z "$(movable_blocks)" ] || fail "left: $(movable_blocks)"
	note "$nodes nodes, $grown pages more, $shrunk after offlining"
}

batches()
{
	grep -c "cpu=[0-9]" $trace_dir/trace
}

more_batches()
{
	[ "$(batches)" -gt $seen ]
}

# What can be taken off again.
movable_blocks()
{
	for block in /sys/devices/system/memory/memory*; do
		[ "$(cat $block/state)" = online ] &&
			[ "$(cat $block/valid_zones)" = Movable ] &&
			echo $block
	done | tr '\n' ' ' | sed 's/ $//'
}

# offline_in_walk BLOCK EVENT PAUSE_US: offline it when that batch was traced,
# with such pauses from then on.
offline_in_walk()
{
	trace batch
	echo 1000 > /sys/module/lacuna_balloon/parameters/pause_us
	echo 99$id > $params/request
	wait_for 60 traced "lacuna_batch: .*$2" || fail "no batch with $2"
	echo $3 > /sys/module/lacuna_balloon/parameters/pause_us
	! answered 99$id || fail "the walk was over before"
	offline_now $1
}

# offline_on_lists BLOCK NODE: offline it while a walk stands on the lists of
# one of that node's zones for long. Not on a CPU's: that is waited for.
offline_on_lists()
{
	echo "nid == $2" > $trace_dir/events/lacuna_balloon/lacuna_batch/filter ||
		fail "no filter"
	for attempt in 1 2 3 4 5; do
		trace batch
		echo 1000 > /sys/module/lacuna_balloon/parameters/pause_us
		echo 99$id > $params/request
		wait_for 120 traced "cpu=" || fail "the walk does not come to node $2"
		echo 5000000 > /sys/module/lacuna_balloon/parameters/pause_us
		# The pause after the next batch is a long one.
		seen=$(grep -c "cpu=" $trace_dir/trace)
		wait_for 60 goes_on_or_ends || fail "the walk does not go on"
		tail -n 1 $trace_dir/trace | grep -q "cpu=-1" && ! answered 99$id && break
		# This machine was too slow to look.
		echo 0 > /sys/module/lacuna_balloon/parameters/pause_us
		wait_for 60 answered 99$id || fail "no report of that walk"
		id=$((id + 1))
		[ $attempt -lt 5 ] || fail "the walk left the zones' lists each time"
	done
	offline_now $1
	echo 0 > $trace_dir/events/lacuna_balloon/lacuna_batch/filter
}

goes_on_or_ends()
{
	[ "$(grep -c "cpu=" $trace_dir/trace)" -gt $seen ] || answered 99$id
}

# offline_now BLOCK: in a walk that goes on without pauses afterwards. Sets
# $ended to whether it was over first.
offline_now()
{
	echo offline > $1/state || fail "$1 stays"
	ended=no
	! answered 99$id || ended=yes
	echo 0 > /sys/module/lacuna_balloon/parameters/pause_us
	wait_for 60 answered 99$id || fail "no report of that walk"
	report=$(cat $params/request)
	[ "$(value errors "$report")" = 0 ] || fail "$report"
}

memory_came()
{
	[ "$(grep -l online /sys/devices/system/memory/memory*/state | wc -l)" \
		-gt 0 ] && grep -q Movable /proc/zoneinfo &&
		[ "$(awk '/zone *Movable/ { m = 1 } m && /present/ { print $2; m = 0 }' \
			/proc/zoneinfo | sort -n | tail -n 1)" = 65536 ]
}
