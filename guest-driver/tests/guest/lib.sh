# SPDX-License-Identifier: GPL-2.0
#
# What the cases share. A case is a function case_NAME, run in a shell of its
# own with both modules unloaded before and after. It fails by calling fail, when
# the kernel's log holds a warning that it did not announce by expect_log or
# may_log, or when it lacks one that expect_log announced.

params=/sys/module/lacuna_test_device/parameters
expected=/tmp/expected
allowed=/tmp/allowed
trace_dir=/sys/kernel/tracing

# How much slower than others this kernel is: limits are that much longer.
patience=$(tr ' ' '\n' < /proc/cmdline | sed -n 's/^driver.patience=//p')
patience=${patience:-1}
kmemleak=/sys/kernel/debug/kmemleak

fail()
{
	echo "$*" > /tmp/reason
	exit 1
}

note()
{
	echo "$*" >> /tmp/notes
}

# expect_log REGEX: such a message is what this case is about, and has to come.
expect_log()
{
	echo "$1" >> "$expected"
	may_log "$1"
}

# may_log REGEX: such a message may come or not.
may_log()
{
	echo "$1" >> "$allowed"
}

# wait_for SECONDS COMMAND...: until COMMAND succeeds.
wait_for()
{
	limit=$(($(uptime_s) + $1 * patience))
	shift
	until "$@"; do
		[ "$(uptime_s)" -lt "$limit" ] || return 1
		usleep 20000
	done
}

uptime_s()
{
	cut -d . -f 1 /proc/uptime
}

# within SECONDS COMMAND...: fails the case if it takes longer.
within()
{
	seconds=$1
	shift
	before=$(uptime_s)
	"$@" || fail "$* failed"
	took=$(($(uptime_s) - before))
	[ $took -le $((seconds * patience)) ] || fail "$* took $took s"
}

# value NAME TEXT: of NAME=VALUE among words.
value()
{
	echo "$2" | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1
}

meminfo()
{
	sed -n "s/^$1: *\([0-9]*\) kB$/\1/p" /proc/meminfo
}

vmstat()
{
	sed -n "s/^$1 //p" /proc/vmstat
}

# trace EVENT...: of the driver's tracepoints, from now on only those.
trace()
{
	# With the names of tasks the scheduler's own tracepoints are switched on
	# and off, which not every emulated machine of eight CPUs survives.
	echo 0 > $trace_dir/options/record-cmd
	echo 0 > $trace_dir/events/lacuna_balloon/enable
	echo > $trace_dir/trace
	for event; do
		echo 1 > $trace_dir/events/lacuna_balloon/lacuna_$event/enable ||
			fail "no tracepoint $event"
	done
}

# traced REGEX: was that seen since?
traced()
{
	grep -q -e "$1" $trace_dir/trace
}

# keeps QUEUE COUNT: does the device have so many buffers that it leaves alone?
keeps()
{
	[ "$(value "$1" "$(cat $params/kept)")" -ge "$2" ]
}

# figure_is NAME COUNT: at least.
figure_is()
{
	[ "$(figure "$1")" -ge "$2" ]
}

# What is free once all that is freed late is freed, in KiB: what the CPUs hold
# back comes and goes, and is free as well.
settled_free()
{
	most=0
	for sample in 1 2 3 4 5 6 7 8 9 10; do
		usleep 200000
		free=$(awk '$1 == "nr_free_pages" || $1 == "count:" { n += $2 }
			END { print n * 4 }' /proc/zoneinfo)
		[ "$free" -le $most ] || most=$free
	done
	echo $most
}

# figure NAME: from debugfs, of the test device's driver.
figure()
{
	cat /sys/kernel/debug/lacuna_balloon/* | sed -n "s/^$1 //p" | tail -n 1
}

# How many free pages the kernel counts.
free_pages()
{
	awk '/nr_free_pages/ { free = $2 } END { print free }' /proc/vmstat
}

# How many free pages the CPUs hold back, which that count leaves out. Newer
# kernels let them hold tens of megabytes while much is being freed.
held_back()
{
	awk '$1 == "count:" { held += $2 } END { print held + 0 }' /proc/zoneinfo
}

# fill_and_free MIB: in pieces that are large again when they are free.
fill_and_free()
{
	dd if=/dev/zero of=/tmp/fill bs=1M count="$1" 2>/dev/null
	rm -f /tmp/fill
}

# use_memory MIB: in a file, until give_memory_back. The root, half of memory at
# most, may have no room for it.
use_memory()
{
	mkdir -p /fill
	mount -t tmpfs -o size=100% fill /fill || fail "no tmpfs"
	dd if=/dev/zero of=/fill/file bs=1M count="$1" 2> /tmp/dd || {
		umount /fill
		fail "dd: $(cat /tmp/dd), oom_kill $(vmstat oom_kill)"
	}
}

give_memory_back()
{
	umount /fill
}

load_driver()
{
	insmod "/modules/lacuna_balloon.ko" "$@" || fail "insmod lacuna_balloon"
}

# With what only tests need: the slow walk, and pauses between holds.
load_test_driver()
{
	insmod "/modules/lacuna_balloon_test.ko" "$@" ||
		fail "insmod of the test build"
}

load_device()
{
	insmod /modules/lacuna_test_device.ko "$@" || fail "insmod device"
}

unload()
{
	for name in lacuna_balloon virtio_balloon lacuna_test_device; do
		grep -q "^$name " /proc/modules || continue
		before=$(uptime_s)
		rmmod $name || fail "rmmod $name"
		took=$(($(uptime_s) - before))
		[ $took -le $((20 * patience)) ] || fail "rmmod $name took $took s"
	done
}

answered()
{
	grep -q "^id=$1 " $params/request
}

# ask ID [SECONDS]: request a report, wait for it, and check it. Chains of a
# request before it may still come where the device is slow ($late_chains).
ask()
{
	held=$(held_back)
	echo "$1" > $params/request
	wait_for "${2:-30}" answered "$1" ||
		fail "no report $1: $(cat $params/request)"
	report=$(cat $params/request)
	for name in errors wrong held_hit outside ${late_chains-stale}; do
		[ "$(value $name "$report")" = 0 ] || fail "report: $report"
	done
}

# What the kernel's page reporting may have taken off the free lists for the
# moment: 32 blocks of 4 MiB.
reporting_holds=32768

# check_complete [PERCENT [PAGES]]: the report in $report holds about what is
# free, at least PERCENT. What the CPUs hold back is in it and not in the count;
# nor is what went or came while it was made, of which so many PAGES may be.
check_complete()
{
	pages=$(value pages "$report")
	echo "$held" >> /tmp/held
	least=$(value free_before "$report")
	after=$(value free_after "$report")
	moved=$((after - least))
	[ "$after" -lt "$least" ] && least=$after && moved=$((-moved))
	[ $moved -le "${2:-0}" ] || moved=${2:-0}
	[ "$pages" -ge $((least * ${1:-97} / 100)) ] ||
		fail "only $pages of $least free pages: $report"
	[ "$pages" -le $((least + least / 20 + held + moved + 1024)) ] ||
		fail "$pages of $least free pages and $held held back: $report"
}

target_is()
{
	[ "$(value actual "$(cat $params/target)")" = "$1" ] &&
		[ "$(value inside "$(cat $params/target)")" = "$1" ]
}

# inflate PAGES: to that size, and check both sides' books.
inflate()
{
	echo "$1" > $params/target
	wait_for "${2:-60}" target_is "$1" ||
		fail "balloon: $(cat $params/target), not $1"
	[ "$(value wrong "$(cat $params/target)")" = 0 ] ||
		fail "balloon: $(cat $params/target)"
}

# Part of its greeting may have been echoed before that was off; a byte of all
# ones makes it forget what it was in the middle of.
monitor_ready()
{
	printf '\377\n{"execute": "qmp_capabilities"}\n' > /dev/ttyS1
	usleep 200000
	grep -q -e '"return": {}' -e 'Capabilities negotiation is already' \
		/tmp/monitor
}

# monitor COMMAND REGEX: to the machine's monitor, until it answers so. The
# control protocol, since it has no prompt that could answer an echo.
monitor()
{
	: > /tmp/monitor
	echo "{\"execute\": \"human-monitor-command\", \"arguments\": {\"command-line\": \"$1\"}}" \
		> /dev/ttyS1
	wait_for 20 grep -q -E "\"return\": \".*$2" /tmp/monitor ||
		fail "monitor: $1: $(tail -c 200 /tmp/monitor)"
}

# The kernel's log above the level of notices, without what was announced.
bad_log()
{
	dmesg -r | grep '^<[0-4]>' |
		grep -v -e 'taints kernel' -e 'module verification failed' \
			-e 'hrtimer: interrupt took' |
		grep -v -E -f "$allowed"
}

# What was announced and never said.
lacking_log()
{
	while read -r regex; do
		dmesg -r | grep '^<[0-4]>' | grep -q -E -e "$regex" ||
			echo "$regex"
	done < "$expected" | grep .
}

# A leak that the kernel finds itself. It wants to have looked twice.
leaks_found()
{
	[ -f $kmemleak ] || return 1
	for scan in 1 2; do
		echo scan > $kmemleak || return 1
		usleep 5500000
	done
	[ -s $kmemleak ]
}

# Half a minute before the machine is stopped from outside: what hangs, and where.
watch_for_hangs()
{
	limit=$(tr ' ' '\n' < /proc/cmdline | sed -n 's/^driver.limit=//p')
	sleep $((limit - 30))
	echo "MACHINE hangs in $(cat /tmp/case), $(($(uptime_s) - $(cat /tmp/began))) s"
	dmesg | tail -n 20
	ps -o pid,stat,time,args | grep -v ' \['
	cat $params/request; tail -n 5 $trace_dir/trace
	dmesg -c > /dev/null
	# Tasks that wait without end, and what each CPU does.
	echo w > /proc/sysrq-trigger
	echo l > /proc/sysrq-trigger
	dmesg
}

run_case()
{
	rm -f /tmp/reason /tmp/notes /tmp/held
	: > /tmp/notes
	: > "$expected"
	echo '^$' > "$allowed"
	dmesg -c > /dev/null
	started=$(uptime_s)
	echo "$1" > /tmp/case
	echo $started > /tmp/began
	( "case_$1" && unload )
	status=$?
	# Whatever was left by a case that failed.
	( unload ) > /dev/null 2>&1
	umount /fill 2> /dev/null
	took="$(($(uptime_s) - started)) s"
	# What check_complete allowed for.
	[ ! -f /tmp/held ] || note "CPUs held back $(sort -n /tmp/held |
		sed -n '1p;$p' | uniq | tr '\n' ' ')pages"
	if [ $status -ne 0 ]; then
		echo "CASE not ok $1 ($(cat /tmp/reason 2>/dev/null)$(sed 's/^/; /' \
			/tmp/notes | tr -d '\n'))"
		dmesg | tail -n 30
	elif leaks_found; then
		echo "CASE not ok $1 (memory leaks)"
		head -n 60 $kmemleak
		echo clear > $kmemleak
	elif bad_log > /tmp/bad; then
		echo "CASE not ok $1 (kernel log: $(head -n 3 /tmp/bad))"
		dmesg | tail -n 60
	elif lacking_log > /tmp/bad; then
		echo "CASE not ok $1 (kernel log lacks: $(head -n 3 /tmp/bad))"
		dmesg | tail -n 30
	else
		echo "CASE ok $1 ($took$(sed 's/^/; /' /tmp/notes |
			tr -d '\n'))"
	fi
}
