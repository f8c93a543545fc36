// SPDX-License-Identifier: Apache-2.0

let help = """
    lacuna - run a Linux guest on KVM and migrate it live without its free memory

    usage: lacuna COMMAND [OPTION]...

    Start a guest, and get a destination ready:
      run      --kernel FILE [--initramfs FILE] [--cmdline TEXT] [--memory SIZE] [--cpus N]
               [--control SOCKET] [--console WHERE] [--balloon FEATURES] [--dirty-tracker WAY]
               [--dirty-ring-size N] [--vsock-cid N]
      receive  --listen ADDRESS [--memory SIZE] [--cpus N] [--control SOCKET] [--console WHERE]
               [--dirty-tracker WAY] [--dirty-ring-size N] [--vsock-cid N]
      restore  FILE [--full] [--control SOCKET] [--console WHERE]

    Talk to a running guest through its control socket:
      migrate  --control SOCKET --to ADDRESS [--skip-free-pages] [--json FILE]
               [--downtime MS] [--hint-timeout MS] [--bandwidth BYTES] [--auto-converge]
               [--timeout MS [--timeout-action cancel|force]] [--max-rounds N]
               [--connections N] [--pause-before-switch-over] [--verify]
      migrate  --control SOCKET --status
      snapshot --control SOCKET FILE [OPTION of migrate]...
      switch-over  --control SOCKET
      cancel   --control SOCKET
      status   --control SOCKET
      balloon set     --control SOCKET --size SIZE [--wait MS] [--json]
      balloon stats   --control SOCKET [--interval MS] [--wait MS] [--json]
      balloon hint    --control SOCKET [--wait MS] [--json]
      balloon status  --control SOCKET [--json]
      pause    --control SOCKET
      resume   --control SOCKET
      type     --control SOCKET --text TEXT
      stop     --control SOCKET [--power-button]

    Between hosts, with ssh to encrypt and to authenticate:
      migrate  --control SOCKET --to 'exec:ssh HOST lacuna relay unix:PATH'
      relay    ADDRESS     joins its standard input and output with ADDRESS

    The balloon device for another VMM (vhost-user), and its hints:
      vhost-user  --socket PATH [--hint-socket PATH] [--target SIZE] [--balloon FEATURES] [--user NAME]
                  [--address-limit SIZE]
      hints status|poll|request|target  --hint-socket PATH [--timeout MS] [--size SIZE]

    Measure:
      bench    stream|zero-scan|mask [--memory SIZE] [--runs N] [--json FILE] [--check]
      bench    dirty dirty-log|first-dirty|harvest|ping-pong [--memory SIZE] [--json FILE] [--plain] [--check]; the
               reference describes these and their other options

      --kernel FILE        an unmodified x86-64 bzImage, such as /boot/vmlinuz-6.1.0-…-amd64
      --initramfs FILE     its initial RAM file system
      --cmdline TEXT       the kernel's command line (console=ttyS0)
      --memory SIZE        guest memory, as 512M or 4G (512M); for `receive`: refuse a guest of another size
      --cpus N             1 to 8 vCPUs (1); for `receive`: refuse a guest with another number
      --control SOCKET     where to listen for, or find, the guest's control socket
      --console WHERE      the serial console: stdio, none or file:PATH, appended to (stdio)
      --dirty-tracker WAY  how KVM says what the guest wrote: bitmap, manual or ring (bitmap)
      --dirty-ring-size N  entries of each vCPU's ring: a power of two, 1024 to 65536 (65536)
      --vsock-cid N        give the guest a vsock device with this address on the host, 3 or higher (none)
      --memory-backing X   what the guest's memory is made of: anonymous, memfd, or hugepages of 2 MiB (anonymous);
                           for `run` and `receive`
      --balloon FEATURES   what the balloon offers, separated by commas: must-tell-host, stats, deflate-on-oom,
                           free-page-hint, page-poison, page-reporting, free-page-bitmap; and of the rings indirect,
                           event-index, packed (all but deflate-on-oom, page-reporting, event-index and packed);
                           with plugin:PATH at the end, or alone, the balloon out of that liblacuna.so
      --listen ADDRESS     unix:PATH or tcp:HOST:PORT, neither encrypted nor authenticated; or fd:N, or file:PATH
      --to ADDRESS         where `lacuna receive` listens; or fd:N, exec:COMMAND, or file:PATH, which ends the guest
      --full               read and check all of the file before the guest starts, instead of each page when it is needed
      --skip-free-pages    leave out the pages that the guest has free; by lacuna_balloon's bitmap,
                           or else by the free page hints of its virtio_balloon
      --json FILE          write the migration's report there
      --downtime MS        how long the guest may stand still at the end (300)
      --hint-timeout MS    how long to wait for the guest's answer in each round, 30000 at most (200)
      --bandwidth BYTES    at most so many bytes a second, as 100M (no limit)
      --auto-converge      slow the vCPUs down, in steps, while the guest dirties memory faster than it is sent
      --timeout MS         the migration may take so long before the guest is stopped (no limit)
      --timeout-action X   then: cancel, and the guest stays here; or force, and it stands still for the rest (cancel)
      --max-rounds N       stop the guest after so many rounds, whatever is left (no limit)
      --connections N      send memory over so many connections, 1 to 16 (1)
      --pause-before-switch-over  wait, with the guest running, for `lacuna switch-over`
      --verify             compare a checksum of every page sent at the end; costs downtime
      --status             print where the migration stands, or how the last one ended, as JSON
      --text TEXT          typed at the guest's console; \\n ends a line
      --socket PATH        where the front end connects
      --hint-socket PATH   where to listen for, or find, the socket for hints (protocol/hint-socket.md)
      --target SIZE        memory the balloon is to take from the beginning
      --user NAME          the user to become once the sockets are there
      --address-limit SIZE the highest guest address a front end may use (1T)
      --timeout MS         how long to wait for the guest's answer (1000)
      --size SIZE          memory the balloon is to take
      --power-button       ask the guest to switch itself off instead of ending it at once

      --size SIZE          memory that the guest shall give to the balloon; 0 gives all of it back
      --interval MS        poll the statistics this often from now on; 0: no more
      --wait MS            how long the guest may take: to reach the size (0), to answer (5000)
      balloon … --json     print JSON instead of text

    Exit status: 0 done; 1 failed, with the reason in one line; 2 wrong usage. `run` and `receive` end with 0 when the
    guest switched itself off, was stopped, or runs elsewhere.
    """
