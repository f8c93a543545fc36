# SPDX-License-Identifier: GPL-2.0
# The figures. Each is a ratio, or a time on an emulated processor; times are
# the least of several runs, since others use the same machine.

least_of()
{
	sort -n | head -n 1
}

# walk_ns FIRST_ID COUNT: the shortest walk of so many.
walks()
{
	id=$1
	while [ $id -lt $(($1 + $2)) ]; do
		ask $id
		value "$3" "$report"
		id=$((id + 1))
	done > /tmp/values
	[ -s /tmp/values ] || fail "no figures"
	least_of < /tmp/values
}

# The walk of an idle machine's memory.
case_idle()
{
	load_device
	load_driver
	ask 2
	check_complete
	walk=$(walks 10 8 walk_ns)
	note "memory $(($(meminfo MemTotal) >> 10)) MiB, $(value blocks "$report") blocks, $walk ns"
	[ "$walk" -lt 2000000 ] || fail "the walk takes $walk ns"
}

# Block by block against bit by bit, over the same lists.
case_walk()
{
	load_device
	load_test_driver
	ask 2
	check_complete
	fast=$(walks 10 4 walk_ns)
	echo 1 > /sys/module/lacuna_balloon/parameters/bitwise
	slow=$(walks 20 4 walk_ns)
	note "memory $(($(meminfo MemTotal) >> 10)) MiB"
	note "by block $fast ns, by bit $slow ns, ratio $((slow / fast))"
	[ $slow -ge $((fast * 10)) ] || fail "by block $fast, by bit $slow ns"
}

# The longest hold, with the memory idle and all of it in single pages.
case_hold()
{
	load_device
	load_driver batch=64
	idle=$(walks 10 4 lock_ns)
	echo 98 > $params/fragment
	fragmented=$(walks 40 4 lock_ns)
	blocks=$(value blocks "$report")
	ask 50
	[ "$(value blocks "$report")" -gt $(($(value pages "$report") * 6 / 10)) ] ||
		fail "not fragmented: $report"
	note "batch 64: idle $idle ns, fragmented $fragmented ns, $(value blocks "$report") blocks"
	[ $fragmented -le $((idle * 2)) ] ||
		fail "idle $idle ns, fragmented $fragmented ns"
	echo 0 > $params/fragment
}

# 70 % of what is free, in a file system that may have so much.
dirty_and_free()
{
	mkdir -p /tmp/dirty
	mount -t tmpfs -o size=100% dirty /tmp/dirty || fail "no tmpfs"
	# Random bytes, so that clearing a page changes it.
	dd if=/dev/urandom of=/tmp/seed bs=64k count=16 2>/dev/null
	mib=$(($(meminfo MemFree) / 1024 * 7 / 10))
	while [ $mib -gt 0 ]; do
		cat /tmp/seed || fail "cannot dirty $mib MiB more"
		mib=$((mib - 1))
	done > /tmp/dirty/fill
	rm /tmp/seed
	umount /tmp/dirty || fail "umount"
}

stop_noise()
{
	usleep 300000
	sync
}

# One round of the kernel's own driver: adds its time and what it dirtied.
stock_round()
{
	dirty_and_free
	stop_noise
	echo 1 > $params/sums
	echo $1 > $params/hint
	wait_for 120 hints_stopped || fail "no end: $(cat $params/hint)"
	echo 2 > $params/sums
	value last_ns "$(cat $params/hint)" >> /tmp/stock
	cat $params/sums >> /tmp/stock.dirty
	stock_pages=$(value pages "$(cat $params/hint)")
	# Done: it gives the pages back.
	free=$(free_pages)
	echo 1 > $params/hint
	wait_for 30 more_free_than $((free + stock_pages / 2)) ||
		fail "the stock driver keeps the pages"
}

more_free_than()
{
	[ "$(free_pages)" -gt "$1" ]
}

# The same of ours.
our_round()
{
	dirty_and_free
	stop_noise
	echo 1 > $params/sums
	ask $1
	echo 2 > $params/sums
	check_complete
	value total_ns "$report" >> /tmp/ours
	cat $params/sums >> /tmp/ours.dirty
	our_pages=$(value pages "$report")
}

# Against the kernel's own driver and its hints: time from the request to the
# last hint, and pages whose contents changed meanwhile. Both do the same three
# times, and of each the least counts.
case_stock()
{
	load_device features=0x8
	insmod /modules/virtio_balloon.ko || fail "insmod virtio_balloon"
	rm -f /tmp/stock* /tmp/ours*
	for id in 2 3 4; do stock_round $id; done
	rmmod virtio_balloon
	load_driver
	for id in 2 3 4; do our_round $id; done
	stock_ns=$(least_of < /tmp/stock)
	stock_dirty=$(least_of < /tmp/stock.dirty)
	our_ns=$(least_of < /tmp/ours)
	our_dirty=$(least_of < /tmp/ours.dirty)
	note "stock: $stock_pages pages hinted in $stock_ns ns, $stock_dirty dirtied"
	note "bitmap: $our_pages pages in $our_ns ns, $our_dirty dirtied"
	note "$((stock_ns / our_ns)) x shorter"
	[ "$our_pages" -ge "$stock_pages" ] || fail "fewer pages"
	[ "$stock_ns" -ge $((our_ns * 50)) ] ||
		fail "stock $stock_ns ns, bitmap $our_ns ns"
	[ $((our_dirty * 100)) -le "$stock_dirty" ] ||
		fail "stock dirtied $stock_dirty pages, bitmap $our_dirty"
}
