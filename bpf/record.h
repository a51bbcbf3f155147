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

/* The last one is no status of a slot: it is told by the last hop. */
enum status { STATUS_OPEN, STATUS_ANSWERED, STATUS_TIMEOUT, STATUS_REFUSED, STATUS_DROPPED };

/* A UDP or TCP flow, always seen from the client, whichever way the packet went. */
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
	u64 server_cgroup_id; /* of the socket that received the query; 0: none seen */
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
	u8 protocol; /* IPPROTO_UDP; user space puts IPPROTO_TCP in for what it puts together */
	u8 balanced; /* 1: the first flow is what the socket was told, and no packet ever had it */
	u16 type; /* of the question, in host byte order; 0: there is none */
	u8 by_server; /* 1: its sender had been asked itself by then, where that is counted */
	u8 pad[7];
	u32 weight; /* how many transactions this one stands for, where not all leave; else 0 */
	u32 upstream_us; /* microseconds of the server's time that are upstream, where that is counted */
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

#define SEGMENT_BYTES 256

/*
 * A TCP segment at one hop, or 256 bytes of one: what user space puts messages
 * together from. Hops tell when, sockets also what; see carries.
 */
struct segment {
	u64 t_ns; /* CLOCK_MONOTONIC */
	u64 connection; /* the same for all segments of one, whatever NAT does to it */
	u64 cgroup_id; /* of the process that connected, else of its socket; 0: unknown */
	u64 socket_cgroup_id; /* of the socket at this hop; 0: a device, or unknown */
	u64 drop_location;
	u32 client_netns; /* of the socket that connected; 0: unknown */
	u32 pid; /* of the process that connected; 0: unknown */
	u32 ifindex;
	u32 netns;
	u32 drop_reason;
	u32 seq; /* of the first byte; where there is none, of the next one */
	u32 len; /* bytes that this record stands for */
	u16 captured; /* of them, in payload */
	u8 kind;
	u8 direction;
	u8 tcp_flags;
	u8 family;
	u8 unreachable; /* 1: not a segment, but an ICMP error about one */
	u8 pad[5];
	char comm[16];
	struct flow asked; /* as the client addressed it */
	struct flow flow; /* as it is here */
};

struct segment_record {
	struct segment segment;
	u8 payload[SEGMENT_BYTES];
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
	COUNT_SEGMENTS_LOST, /* pieces of TCP segments that found the ring full */
	COUNT_CONNECTIONS_FULL, /* TCP connections that found no room */
	COUNT_NOT_KEPT, /* transactions in the histograms alone, being ordinary and not in the sample */
	COUNT_SKIPPED, /* the same, though slow or failed: there were too many */
	COUNT_SERIES_FULL, /* countings without who was asked, or even who asked, for lack of room */
	COUNT_BUCKETS_FULL, /* times that are missing in the histograms for lack of room */
	COUNTERS
};

/* What user space tells the programs. */
struct settings {
	u64 wanted; /* bits of enum wanted; 0: everything */
	u32 pid;
	u32 paused; /* 1: nothing begins, since not all hooks are in place */
	/* What leaves, where transactions are counted in the kernel; see is_kept. */
	u64 slower_ns; /* a transaction that takes as long is slow; 0: none is */
	u32 share; /* one of so many ordinary transactions; 0: none */
	u32 notable_share; /* the same of those that are slow or failed */
};

/*
 * Stages of a transaction's way, in order; see latency.h. On a real node, what
 * lies beyond its uplink is remote: the network and a server elsewhere.
 */
enum stage {
	STAGE_APPLICATION_SEND, /* from the client's socket to the first device */
	STAGE_NODE, /* between devices of one network namespace, NAT included */
	STAGE_NETWORK, /* between devices of different ones */
	STAGE_SERVER_QUEUE, /* from the last device to the server's taking it */
	STAGE_SERVER, /* until it has sent the answer, less what is upstream */
	STAGE_UPSTREAM, /* while it waited for an answer to the same question itself */
	STAGE_RETURN, /* until the last device before the client */
	STAGE_WAKE_UP, /* until the client has the answer */
	STAGE_REMOTE, /* where nothing was seen between query and answer */
	STAGE_TOTAL, /* all of it, as the client sees it */
	STAGES
};

enum series_kind { SERIES_OF_QUESTIONS, SERIES_OF_STAGES };

/* What is known of who answered. As asked: just the address that the client sent to. */
enum backend { BACKEND_UNKNOWN, BACKEND_KNOWN, BACKEND_AS_ASKED, BACKEND_OVERFLOW };

/*
 * What transactions are told apart by, in histograms. Of stages, who asked and
 * who answered matter alone. A client on another machine is all 0, lest there be
 * as many series as there are pods in the cluster. Overflow stands for all that
 * found no room: of its client, or of everybody where that is all 0.
 */
struct series_key {
	u64 cgroup_id; /* of the client; 0: unknown */
	u64 server_cgroup_id; /* 0: unknown */
	__be64 client_addr[2]; /* as the client itself knows it; 0 where netns is */
	__be64 server_addr[2];
	__be64 backend_addr[2];
	u32 netns; /* of the client; 0: unknown */
	__be16 server_port;
	__be16 backend_port;
	u8 kind;
	u8 type; /* of the question; 0: one of the rare ones */
	u8 rcode; /* 255: no response */
	u8 status;
	u8 backend;
	u8 protocol; /* IPPROTO_UDP; user space counts TCP itself, in the same form */
	u8 by_server; /* 1: the client answers queries itself, so it may ask for others' sake */
	u8 pad;
};

struct series {
	u64 id; /* what stands for it in buckets */
	u64 last_ns; /* CLOCK_MONOTONIC at the end of the last transaction */
	u64 count;
	u64 sum_ns[STAGES];
	u64 max_ns[STAGES];
};

struct bucket_key {
	u64 id;
	u16 stage;
	u16 bucket; /* see bucket_of */
	u32 pad;
};

enum wanted { WANT_PODS = 1, WANT_PID = 4, WANT_SERVER_SIDE = 8 };

/* Whether the queries of a cgroup or a network namespace are wanted. */
enum verdict { VERDICT_UNKNOWN, VERDICT_WANTED, VERDICT_UNWANTED };

#endif
