// SPDX-License-Identifier: GPL-2.0
/*
 * The guest's end of the test bed's channel: sends back whatever comes over a
 * vsock connection, changed in a way that only this program does. One process
 * for each connection.
 *
 *	vsock-agent PORT
 */
#include <linux/vm_sockets.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void converse(int peer)
{
	static uint8_t buffer[65536];
	ssize_t count, done, sent, i;

	for (;;) {
		count = read(peer, buffer, sizeof(buffer));
		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0)
			return;
		for (i = 0; i < count; i++)
			buffer[i] ^= 0x5a;
		for (done = 0; done < count; done += sent) {
			sent = write(peer, buffer + done, count - done);
			if (sent < 0 && errno == EINTR)
				sent = 0;
			if (sent < 0)
				return;
		}
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK,
		.svm_cid = VMADDR_CID_ANY,
	};
	int listener, peer;

	if (argc != 2) {
		fprintf(stderr, "usage: vsock-agent PORT\n");
		return 2;
	}
	address.svm_port = (unsigned int)strtoul(argv[1], NULL, 10);
	/* Ended children are not waited for. */
	signal(SIGCHLD, SIG_IGN);
	listener = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (listener < 0 ||
	    bind(listener, (struct sockaddr *)&address, sizeof(address)) ||
	    listen(listener, 8)) {
		perror("vsock-agent");
		return 1;
	}
	printf("GUEST-AGENT port=%s\n", argv[1]);
	fflush(stdout);
	for (;;) {
		peer = accept(listener, NULL, NULL);
		if (peer < 0) {
			if (errno == EINTR || errno == ECONNABORTED)
				continue;
			perror("vsock-agent: accept");
			return 1;
		}
		if (!fork()) {
			close(listener);
			converse(peer);
			_exit(0);
		}
		close(peer);
	}
}
