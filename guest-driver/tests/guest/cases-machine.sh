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

# To RAM and back, with a balloon that is full and a report before and after.
case_sleep()
{
	load_driver
	add_balloon deflate-on-oom=on,free-page-reporting=on
	size=$(($(tr ' ' '\n' < /proc/cmdline | sed -n 's/^driver.mib=//p')))
	monitor "balloon $((size - 100))" ''
	wait_for 60 actual_is $((size - 100)) || fail "$(tail -c 200 /tmp/monitor)"
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
	# And off again, between and during reports.
	id=4
	for block in /sys/devices/system/memory/memory*; do
		[ "$(cat $block/valid_zones)" = Movable ] || continue
		( echo offline > $block/state ) 2>/dev/null
		ask $id
		id=$((id + 1))
	done
	[ $id -gt 4 ] || fail "nothing was taken off"
	shrunk=$(($(value pages "$report") - before))
	[ $shrunk -lt 8192 ] || fail "$shrunk pages of what was taken off"
	note "$nodes nodes, $grown pages more, $shrunk after offlining"
}

memory_came()
{
	[ "$(grep -l online /sys/devices/system/memory/memory*/state | wc -l)" \
		-gt 0 ] && grep -q Movable /proc/zoneinfo &&
		[ "$(awk '/zone *Movable/ { m = 1 } m && /present/ { print $2; m = 0 }' \
			/proc/zoneinfo | sort -n | tail -n 1)" = 65536 ]
}
