/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The tables. Sizes that user space chooses come as macros:
 * SLOTS (transactions in flight), SMALL_PAGES and LARGE_PAGES (the rings).
 */
#ifndef DNSTRACE_MAPS_H
#define DNSTRACE_MAPS_H

#define SCRATCHES 4
#define WANTED_MAX 262144 /* more containers than a node can have, their cgroups included */
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

BPF_PERCPU_ARRAY(counters, u64, COUNTERS);
BPF_ARRAY(settings, struct settings, 1);
BPF_ARRAY(dns_ports, u64, DNS_PORT_WORDS);
BPF_F_TABLE("hash", u64, u8, wanted_cgroups, WANTED_MAX, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", u32, u8, wanted_netns, WANTED_MAX, BPF_F_NO_PREALLOC);

/* Tunnel headers, an IPv6 header with options, UDP, and the longest question. */
#define SCRATCH_BYTES 512
#define PACKET_BYTES (SCRATCH_BYTES - 16)

/* A slot, as it was when it was found. */
struct found {
	u32 number; /* NO_SLOT: none */
	u32 generation;
};

/* A DNS message over UDP, and where it lies. */
struct message {
	struct flow flow;
	u32 question_hash;
	u32 captured; /* bytes of the packet in the scratch buffer, from the network header on */
	u32 offset; /* of the DNS header from the network header */
	u16 len; /* of the DNS message, by the UDP header: the packet may hold less */
	u16 question_len; /* 0: none, or not parsable */
	__be16 id;
	__be16 flags;
	u8 direction;
	u8 family;
	u8 unreachable; /* an ICMP error that carries the query back */
	/* What it belongs to. Here because the verifier then does not follow it; see forgotten. */
	volatile struct found found;
};

struct scratch {
	u64 in_use;
	struct message message;
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
