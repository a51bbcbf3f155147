/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The tables. Sizes that user space chooses come as macros:
 * SLOTS (transactions in flight), SMALL_PAGES, LARGE_PAGES and
 * SEGMENT_PAGES (the rings).
 */
#ifndef DNSTRACE_MAPS_H
#define DNSTRACE_MAPS_H

#define SCRATCHES 4
#ifndef VERDICTS
#define VERDICTS 262144 /* more containers than a node can have, their cgroups included */
#endif
/*
 * Of the tables that forget what was used least lately: before 6.17 (d4adf1c9ee77),
 * each CPU keeps 128 entries to itself, however few there are.
 */
#ifndef LRU_ENTRIES
#define LRU_ENTRIES 1024
#endif
#define DNS_PORT_WORDS 1024 /* 65,536 bits */

/*
 * What every hop of one query shares. Question and server are compared after
 * the look-up, so that a response without a question finds its query, and no
 * entry is needed for each address that NAT gives the server. Queries that
 * agree in all this but differ in question or server are told apart by variant.
 */
struct index_key {
	__be64 client_addr[2];
	__be16 client_port;
	__be16 dns_id;
	u32 variant;
};

#define MAX_VARIANTS 4
#define VARIANT_MEMORY_NS 120000000000ULL /* longer than any time-out */

/*
 * A slot belongs to whoever popped it from free_slots or deleted its key from
 * index: both are atomic, so every transaction ends exactly once, whether a
 * packet, an eviction or user space ends it. A client that SNAT renames has a
 * second key, found through flows.
 */
BPF_TABLE("hash", struct index_key, u32, slot_index, SLOTS * 2);
BPF_STACK(free_slots, u32, SLOTS);
BPF_ARRAY(slots_freed, u32, 1); /* how far the first filling of free_slots is */
BPF_ARRAY(slots, struct transaction, SLOTS);
/* start_ns of each slot in use, else 0: what user space scans for time-outs. */
BPF_F_TABLE("array", u32, u64, slot_start, SLOTS, BPF_F_MMAPABLE);

/* When a variant above 0 last began: unless lately, nobody needs to look for them. */
BPF_ARRAY(variant_last_ns, u64, 1);

/*
 * When there last was no room for a query. For a while, a packet that fits no
 * transaction may belong to that one, so none begins on its way.
 */
BPF_ARRAY(crowded_last_ns, u64, 1);
#define CROWDED_MEMORY_NS 1000000000ULL

BPF_RINGBUF_OUTPUT(small_ring, SMALL_PAGES);
BPF_RINGBUF_OUTPUT(large_ring, LARGE_PAGES);

/*
 * TCP connections, by a number, and the number by each flow that one has: NAT
 * gives it several. Without the server, a flow stands for its client's last
 * connection. User space takes away what has ended.
 */
#ifndef CONNECTIONS
#define CONNECTIONS 8192
#endif

struct connection {
	u64 cgroup_id;
	u32 netns;
	u32 pid;
	u32 first_seq; /* of the first byte that the client sends; 0: its SYN was not seen */
	u32 next_seq; /* of the byte that the client sends next */
	u8 carrier; /* enum carrier: whose bytes are kept */
	u8 pad[7];
	char comm[16];
	struct flow asked;
};

enum carrier { CARRIER_DEVICE, CARRIER_SERVER, CARRIER_CLIENT };

BPF_TABLE("hash", struct flow, u64, connection_ids, CONNECTIONS * 4);
BPF_TABLE("hash", u64, struct connection, connections, CONNECTIONS);
/*
 * Whom a socket was told to send to, before programs of others (which balance
 * services at the socket, as Cilium's) put another address in its place. By the
 * socket's cookie: when it was connected. With MEANT_ONCE: for one message, of
 * which a socket that is connected may send some, too.
 */
#define MEANT_ONCE (1ULL << 63)

struct meant {
	__be64 addr[2];
	u64 task; /* for one message: who sends it, struct task_struct; 0: it is sent */
	__be16 port;
	u16 pad[3];
};

BPF_TABLE("lru_hash", u64, struct meant, meant_by_socket, CONNECTIONS + LRU_ENTRIES);
BPF_RINGBUF_OUTPUT(segment_ring, SEGMENT_PAGES);

BPF_PERCPU_ARRAY(counters, u64, COUNTERS);
BPF_ARRAY(settings, struct settings, 1);
BPF_ARRAY(dns_ports, u64, DNS_PORT_WORDS);
/* enum verdict; who is in neither is not known yet, and let in. */
BPF_F_TABLE("hash", u64, u8, cgroup_verdicts, VERDICTS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", u32, u8, netns_verdicts, VERDICTS / 4, BPF_F_NO_PREALLOC);
/* Cgroups that were asked a query of ours: what they ask themselves may be because of it. */
BPF_TABLE("lru_hash", u64, u8, serving_cgroups, LRU_ENTRIES);

/* Without them, every transaction leaves. */
#ifdef SERIES
#define AGGREGATES
#else
#define SERIES 1
#define BUCKETS 1
#endif
#define SERIES_PER_CLIENT (SERIES / 8)

/*
 * Not per CPU: with many of them that would be far more memory than the counts
 * need, and DNS is too rare for CPUs to meet at one bucket.
 */
BPF_TABLE("hash", struct series_key, struct series, all_series, SERIES);
/* How many series each client has, by client_number; user space corrects it when it makes room. */
BPF_TABLE("lru_hash", u64, u32, series_begun, LRU_ENTRIES);
BPF_TABLE("hash", struct bucket_key, u64, buckets, BUCKETS);

/* When a server has last waited for an answer of others, by the question. */
struct span_key {
	u64 cgroup_id;
	u32 question_hash;
	u32 pad;
};

struct span {
	u64 start_ns; /* at its first query, since when it has always waited for at least one */
	u64 last_ns; /* at its last query */
	u64 end_ns; /* at the last answer; 0: none yet */
	u64 waiting; /* queries without an answer so far */
	/* The one before: who waited then may not have its own answer yet. */
	u64 former_start_ns;
	u64 former_end_ns;
};

#define SPAN_PATIENCE_NS 3000000000ULL /* longer than a server waits until it asks again */

BPF_TABLE("lru_hash", struct span_key, struct span, upstream_spans, LRU_ENTRIES);

/* Tunnel headers, an IPv6 header with options, UDP, and the longest question. */
#define SCRATCH_BYTES 512
#define TALLIED 16 /* stages, rounded up */
#define PACKET_BYTES (SCRATCH_BYTES - 16)

/* A slot, as it was when it was found. */
struct found {
	u32 number; /* NO_SLOT: none */
	u32 generation;
};

/* A DNS message over UDP, and where it lies; or a TCP segment. */
struct message {
	struct flow flow;
	u32 question_hash;
	u32 captured; /* bytes of the packet in the scratch buffer, from the network header on */
	u32 offset; /* of the DNS header from the network header; of a segment, the TCP header */
	u32 end; /* of the IP packet that it is in */
	u16 len; /* of the DNS message, by the UDP header: the packet may hold less */
	u16 question_len; /* 0: none, or not parsable */
	u16 type; /* of the question, in host byte order */
	__be16 id;
	__be16 flags;
	u8 direction;
	u8 family;
	u8 protocol;
	u8 unreachable; /* an ICMP error that carries the query back */
	/* What it belongs to. Here because the verifier then does not follow it; see forgotten. */
	volatile struct found found;
};

/* What is left of a segment to send; see forgotten. */
struct pieces {
	u32 left;
	u32 seq;
	u32 offset;
	u32 carried;
};

/* What is being counted. */
struct tally {
	u64 stage_ns[TALLIED];
	u64 received_ns; /* by the server; 0: not seen */
	u64 sent_ns; /* by the server; 0: not seen */
	u64 last_ns;
	/* Of the query's last hop, and of the response's first; kind 0: none. */
	volatile u64 query_kind, query_flow, response_kind, response_flow;
	volatile u64 last_kind;
	struct series_key key;
	struct series_key other; /* what stands for it where there is no room */
	struct bucket_key bucket;
	struct series fresh; /* all 0 but its id */
};

struct scratch {
	u64 in_use;
	struct message message;
	struct segment segment;
	struct connection fresh;
	struct flow client;
	volatile struct pieces pieces;
#ifdef AGGREGATES
	struct tally tally;
#endif
	u8 bytes[SCRATCH_BYTES + 16]; /* reads of up to 16 bytes at a masked offset stay inside */
};

/*
 * Where packets are parsed. A CPU needs more than one: a program in process
 * context can be interrupted by one in a softirq, and preempted by one of
 * another task.
 */
BPF_PERCPU_ARRAY(scratches, struct scratch, SCRATCHES);
/* See forgotten. Only for programs in softirq context. */
BPF_PERCPU_ARRAY(forgetful, u32, 1);

#endif
