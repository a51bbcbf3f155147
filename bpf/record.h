/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What crosses from the kernel to user space, defined once. tracer/record.py
 * holds the same layout as a NumPy dtype; tests/test_record.py compares the two.
 *
 * Integers are in host byte order unless they are called __be*. Addresses are
 * IPv6, or IPv4 mapped into IPv6 (::ffff:a.b.c.d, RFC 4291 section 2.5.5.2).
 */
#ifndef DNSTRACE_RECORD_H
#define DNSTRACE_RECORD_H

#define MAX_HOPS 20
#define MAX_FLOWS 4
/* DNS header, the longest name (RFC 1035 section 2.3.4), type and class, rounded up. */
#define QUERY_BYTES 272
/* Response bytes that a record carries: nearly all answers fit the small one. */
#define RESPONSE_SMALL 320
#define RESPONSE_LARGE 4096
#define FRAGMENT_CHUNK 256 /* fragments are copied that much at a time */

enum hop_kind { HOP_SEND = 1, HOP_INGRESS, HOP_EGRESS, HOP_RECEIVE, HOP_DROP };

enum direction { QUERY, RESPONSE };

enum status { STATUS_OPEN, STATUS_ANSWERED, STATUS_TIMEOUT, STATUS_REFUSED };

/* A UDP flow, always seen from the client, whichever way the packet went. */
struct flow {
	__be64 client_addr[2];
	__be64 server_addr[2];
	__be16 client_port;
	__be16 server_port;
	u32 pad;
};

struct hop {
	u64 t_ns; /* CLOCK_MONOTONIC */
	u32 ifindex; /* 0: a socket, not a device */
	u32 netns; /* inode number of the network namespace; 0: unknown */
	u32 drop_reason; /* enum skb_drop_reason; 0 unless kind is HOP_DROP */
	u8 kind;
	u8 direction;
	u8 flow; /* index into flows: the addresses that the packet had here */
	u8 pad;
};

/* One DNS query and what became of it: a slot of the table, and what a record starts with. */
struct transaction {
	u64 start_ns; /* CLOCK_MONOTONIC at the first hop */
	u64 end_ns; /* at the client's receive; 0: none seen */
	u64 cgroup_id; /* of the sending process; 0: unknown */
	u64 drop_location; /* kernel address of the last drop; 0: none */
	u32 netns; /* of the sending socket; 0: unknown */
	u32 pid; /* thread group id of the sender, in the initial pid namespace; 0: unknown */
	u32 question_hash;
	u32 generation; /* another one whenever the slot changes hands; see claim */
	u16 query_len; /* DNS message bytes on the wire */
	u16 query_captured;
	u16 response_len;
	u16 response_captured; /* set when the record leaves */
	__be16 dns_id;
	__be16 response_flags; /* second 16 bits of the last response's header; 0: none seen */
	u8 status;
	u8 attempt; /* 1: the first; sends of the same query over the same socket */
	u8 nhops;
	u8 nflows;
	u8 hops_lost; /* hops beyond MAX_HOPS, and flows beyond MAX_FLOWS */
	u8 variant; /* tells apart what shares client, port and id; see index_key */
	u8 family; /* 4 or 6 */
	u8 question_ok; /* 0: zero questions, or one that does not parse */
	u8 pad[4];
	char comm[16];
	struct flow flows[MAX_FLOWS];
	struct hop hops[MAX_HOPS];
	u8 query[QUERY_BYTES];
};

struct small_record {
	struct transaction transaction;
	u8 response[RESPONSE_SMALL];
};

struct large_record {
	struct transaction transaction;
	u8 response[RESPONSE_LARGE];
	u8 beyond[FRAGMENT_CHUNK]; /* where the last chunk may end */
};

/* Indexes into the table of counters. Each is a sum over CPUs since the start. */
enum counter {
	COUNT_STARTED, /* transactions that began, or would have, had there been room */
	COUNT_EMITTED, /* records that reached a ring */
	COUNT_RING_FULL, /* records that did not */
	COUNT_TABLE_FULL, /* transactions pushed out by newer ones, or never let in */
	COUNT_FILTERED, /* queries that the filter kept out */
	COUNT_UNDECODABLE, /* packets on a DNS port that are not DNS */
	COUNT_UNMATCHED_RESPONSES, /* responses that reached a socket and fit no query */
	COUNT_PREEMPTED, /* packets that found all scratch buffers of their CPU in use */
	COUNT_HOPS_LOST, /* hops without room in their transaction, or whose transaction had none */
	COUNTERS
};

/* What user space tells the programs. */
struct settings {
	u64 wanted; /* bits of enum wanted; 0: everything */
	u32 pid;
	u32 paused; /* 1: nothing begins, since not all hooks are in place */
};

enum wanted { WANT_CGROUP = 1, WANT_NETNS = 2, WANT_PID = 4, WANT_SERVER_SIDE = 8 };

#endif
