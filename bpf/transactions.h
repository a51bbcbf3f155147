/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The table of transactions in flight: begun by a query's first hop, grown by
 * each further hop, ended by the client's receive (then one record leaves), by
 * a repeat of the query, by a newer query that needs the slot, or by user
 * space when time is up.
 */
#ifndef DNSTRACE_TRANSACTIONS_H
#define DNSTRACE_TRANSACTIONS_H

#define NO_SLOT 0xffffffff
#define EVICTION_CANDIDATES 8
#define NO_WAKEUP 1 /* BPF_RB_NO_WAKEUP: user space polls; waking it costs more than the rest */

/* Where and when a packet was seen. */
struct place {
	u64 t_ns;
	u32 ifindex;
	u32 netns;
	u32 drop_reason;
	u64 drop_location;
	u64 socket; /* struct sock; 0: a device, or unknown */
	u8 kind;
};

/* Who sent a query. All 0 at hooks that do not know. */
struct sender {
	u64 cgroup_id;
	u32 netns;
	u32 pid;
	u8 balanced; /* see struct transaction */
	char comm[16];
};

/* The cgroup that a socket was made in; 0: unknown. */
static __always_inline u64 cgroup_of_sock(u64 sk)
{
	u64 at = 0, id = 0;

#ifdef OFFSET_sock_cgrp_data
	if (!sk || READ_FIELD(at, sk, OFFSET_sock_cgrp_data))
		return 0;
	/* Before 5.15 (8520e224f547), bit 0 says that it is something else, and bit 1 a detail. */
	at = at & 1 ? 0 : at & ~3ULL;
	if (!at || READ_FIELD(at, at, OFFSET_cgroup_kn))
		return 0;
	READ_FIELD(id, at, OFFSET_kernfs_node_id);
#endif
	return id;
}

static __always_inline bool same_address(const __be64 *a, const __be64 *b)
{
	return a[1] == b[1] && a[0] == b[0];
}

static __always_inline bool same_flow(const struct flow *a, const struct flow *b)
{
	return a->client_port == b->client_port && a->server_port == b->server_port &&
	       same_address(a->client_addr, b->client_addr) &&
	       same_address(a->server_addr, b->server_addr);
}

static __always_inline void make_key(struct index_key *key, const struct flow *flow, __be16 dns_id,
				     u32 variant)
{
	key->client_addr[0] = flow->client_addr[0];
	key->client_addr[1] = flow->client_addr[1];
	key->client_port = flow->client_port;
	key->dns_id = dns_id;
	key->variant = variant;
}

/* Whether a message belongs to what a slot holds; a response may lack its question. */
static __always_inline bool is_about(struct transaction *slot, struct message *message)
{
	if (slot->dns_id != message->id)
		return false;
	return slot->question_hash == message->question_hash ||
	       (message->direction == RESPONSE && !message->question_len);
}

/* Whether the query was seen on its way to the server of flow. */
static __always_inline bool knows_server(struct transaction *slot, struct flow *flow)
{
	u32 i;

#pragma unroll
	for (i = 0; i < MAX_FLOWS; i++) {
		if (i < slot->nflows && slot->flows[i].server_port == flow->server_port &&
		    same_address(slot->flows[i].server_addr, flow->server_addr))
			return true;
	}
	return false;
}

/* Whether there may be queries in flight that share client, port and id. */
static __always_inline bool variants_lately(u64 now_ns)
{
	u32 zero = 0;
	u64 *last_ns = variant_last_ns.lookup(&zero);

	return last_ns && *last_ns && now_ns < *last_ns + VARIANT_MEMORY_NS;
}

/*
 * Finds the transaction of a message whose addresses are flow. several: it may
 * be one of some that share client, port and id, as musl sends one query to all
 * servers; then the server decides, if it is known.
 */
static __always_inline void find_slot(struct message *message, struct flow *flow, bool several)
{
	volatile struct found *found = &message->found;
	u32 variant, *number, generation;
	struct transaction *slot;
	struct index_key key;

	found->number = NO_SLOT;
#pragma nounroll
	for (variant = 0; variant < MAX_VARIANTS; variant++) {
		make_key(&key, flow, message->id, variant);
		number = slot_index.lookup(&key);
		if (number) {
			u32 candidate = *number;

			slot = slots.lookup(&candidate);
			generation = slot ? slot->generation : 0;
			if (slot && is_about(slot, message)) {
				bool certain = !several || knows_server(slot, flow);

				if (certain || found->number == NO_SLOT) {
					found->number = candidate;
					found->generation = generation;
				}
				if (certain)
					return;
			}
		}
		if (!several)
			break;
	}
}

static __always_inline void lose_hop(struct transaction *slot)
{
	if (slot->hops_lost < 255)
		slot->hops_lost++;
	count(COUNT_HOPS_LOST);
}

/* The index of flow among a slot's, added if it is new. */
static __always_inline u32 flow_number(struct transaction *slot, struct flow *flow)
{
	u32 n = slot->nflows, i;

#pragma unroll
	for (i = 0; i < MAX_FLOWS; i++) {
		if (i >= n)
			break;
		if (same_flow(&slot->flows[i], flow))
			return i;
	}
	if (n >= MAX_FLOWS) {
		lose_hop(slot);
		return MAX_FLOWS - 1;
	}
	/* Clang knows by now that n is below, and would leave out what tells the verifier. */
	asm volatile("" : "+r"(n));
	slot->flows[n & (MAX_FLOWS - 1)] = *flow;
	slot->nflows = n + 1;
	return n;
}

static __always_inline void add_hop(struct transaction *slot, struct message *message,
				    struct place *place)
{
	u32 n = slot->nhops;
	struct hop *hop;

	if (message->direction == RESPONSE)
		slot->response_flags = message->flags;
	if (n >= MAX_HOPS) {
		lose_hop(slot);
		return;
	}
	hop = &slot->hops[n];
	hop->t_ns = place->t_ns;
	hop->ifindex = place->ifindex;
	hop->netns = place->netns;
	hop->drop_reason = place->drop_reason;
	hop->kind = place->kind;
	hop->direction = message->direction;
	hop->flow = flow_number(slot, &message->flow);
	slot->nhops = n + 1;
	if (place->kind == HOP_DROP)
		slot->drop_location = place->drop_location;
	if (place->kind == HOP_RECEIVE && message->direction == QUERY)
		slot->server_cgroup_id = cgroup_of_sock(place->socket);
}

/*
 * Takes the key of a transaction out of the index. True: the caller now owns the
 * slot. Since it was found, another CPU may have ended it and begun another in
 * the same slot; the generation tells. Should that happen between the first look
 * and the last, the other one loses its key, and user space counts it as lost.
 */
static __always_inline bool claim(struct transaction *slot, u32 generation)
{
	volatile u32 *current = &slot->generation;
	struct index_key key;
	u32 i;

	if (*current != generation)
		return false;
	make_key(&key, &slot->flows[0], slot->dns_id, slot->variant);
	if (slot_index.delete(&key) || *current != generation)
		return false;
	*current = generation + 1;
	if (slot->nflows < 2)
		return true;
#pragma unroll
	for (i = 1; i < MAX_FLOWS; i++) {
		if (i >= slot->nflows)
			break;
		if (slot->flows[i].client_port == slot->flows[0].client_port &&
		    same_address(slot->flows[i].client_addr, slot->flows[0].client_addr))
			continue;
		make_key(&key, &slot->flows[i], slot->dns_id, slot->variant);
		slot_index.delete(&key);
	}
	return true;
}

/* There was no room for a query, which is counted as lost. */
static __always_inline void crowded(u64 now_ns)
{
	u32 zero = 0;
	u64 *last_ns = crowded_last_ns.lookup(&zero);

	if (last_ns)
		*last_ns = now_ns;
	count(COUNT_TABLE_FULL);
}

static __always_inline bool crowded_lately(u64 now_ns)
{
	u32 zero = 0;
	u64 *last_ns = crowded_last_ns.lookup(&zero);

	return last_ns && *last_ns && now_ns < *last_ns + CROWDED_MEMORY_NS;
}

static __always_inline void release(u32 number)
{
	u64 *start = slot_start.lookup(&number);

	if (start)
		*start = 0;
	free_slots.push(&number, 0);
}

/* Sends the record of an ended transaction on its way; source: the response, or NULL. */
static __always_inline void emit(struct transaction *slot, struct source *source,
				 struct message *message)
{
	struct small_record *small;
	struct large_record *large;

	if (source && message->len > RESPONSE_SMALL) {
		large = large_ring.ringbuf_reserve(sizeof(*large));
		if (large) {
			read_kernel(&large->transaction, sizeof(*slot), slot);
			large->transaction.response_len = message->len;
			message->captured = source_read(source, message->offset, large->response,
							RESPONSE_LARGE);
			/* The message has been used by now: its numbers are at hand. */
			read_fragments(source, large->response, RESPONSE_LARGE, message->len,
				       &message->offset, &message->captured);
			large->transaction.response_captured = message->captured;
			large_ring.ringbuf_submit(large, NO_WAKEUP);
			count(COUNT_EMITTED);
			return;
		}
	} else {
		small = small_ring.ringbuf_reserve(sizeof(*small));
		if (small) {
			read_kernel(&small->transaction, sizeof(*slot), slot);
			small->transaction.response_captured = 0;
			if (source) {
				small->transaction.response_len = message->len;
				small->transaction.response_captured = source_read(
					source, message->offset, small->response, RESPONSE_SMALL);
			}
			small_ring.ringbuf_submit(small, NO_WAKEUP);
			count(COUNT_EMITTED);
			return;
		}
	}
	count(COUNT_RING_FULL);
}

/* A slot for a new transaction: a free one, else that of the oldest of a few. */
static __always_inline u32 take_slot(u64 now_ns)
{
	u32 number = NO_SLOT, start = bpf_get_prandom_u32(), generation, i;
	u64 oldest_ns = ~0ULL, *start_ns;
	struct transaction *slot;

	if (free_slots.pop(&number) == 0)
		return number;
#pragma nounroll
	for (i = 0; i < EVICTION_CANDIDATES; i++) {
		u32 candidate = (start + i) & (SLOTS - 1);

		start_ns = slot_start.lookup(&candidate);
		if (start_ns && *start_ns && *start_ns < oldest_ns) {
			oldest_ns = *start_ns;
			number = candidate;
		}
	}
	crowded(now_ns);
	slot = slots.lookup(&number);
	if (!slot)
		return NO_SLOT;
	generation = slot->generation;
	if (slot->start_ns != oldest_ns || !claim(slot, generation))
		return NO_SLOT;
	return number;
}

static __always_inline void fill(struct transaction *slot, struct source *source,
				 struct message *message, struct sender *sender,
				 struct place *place, struct flow *asked, u8 attempt, u32 variant)
{
	slot->start_ns = place->t_ns;
	slot->end_ns = 0;
	slot->cgroup_id = sender->cgroup_id;
	slot->server_cgroup_id = 0;
	slot->drop_location = 0;
	slot->netns = sender->netns;
	slot->pid = sender->pid;
	slot->question_hash = message->question_hash;
	slot->query_len = message->len;
	slot->response_len = 0;
	slot->response_captured = 0;
	slot->dns_id = message->id;
	slot->response_flags = 0;
	slot->status = STATUS_OPEN;
	slot->attempt = attempt;
	slot->nhops = 0;
	slot->nflows = 1;
	slot->hops_lost = 0;
	slot->variant = variant;
	slot->family = message->family;
	slot->question_ok = message->question_len != 0;
	slot->protocol = PROTO_UDP;
	slot->balanced = sender->balanced;
	slot->type = message->type;
	slot->by_server = 0;
	slot->weight = slot->upstream_us = 0;
	__builtin_memcpy(slot->comm, sender->comm, sizeof(slot->comm));
	slot->flows[0] = *asked;
	slot->query_captured = source_read(source, message->offset, slot->query, QUERY_BYTES);
	add_hop(slot, message, place);
}

/*
 * Also finds a transaction by the addresses that SNAT gave its client. Comes
 * before its hop: a flow that finds no room there could not be taken out again.
 */
static __always_inline void add_alias(u32 number, struct transaction *slot, struct flow *flow)
{
	struct index_key key;

	if (slot->nflows >= MAX_FLOWS || slot->nhops >= MAX_HOPS)
		return;
	if (flow->client_port == slot->flows[0].client_port &&
	    same_address(flow->client_addr, slot->flows[0].client_addr))
		return;
	make_key(&key, flow, slot->dns_id, slot->variant);
	slot_index.update(&key, &number);
}

/*
 * Looks for the variant that a new query can have. Returns MAX_VARIANTS when all
 * are taken. Found is then the slot of an earlier attempt, whose variant is reused.
 */
static __always_inline u32 free_variant(struct message *message, struct flow *asked)
{
	volatile struct found *earlier = &message->found;
	struct transaction *slot;
	struct index_key key;
	u32 variant, number, *known;

#pragma nounroll
	for (variant = 0; variant < MAX_VARIANTS; variant++) {
		make_key(&key, asked, message->id, variant);
		known = slot_index.lookup(&key);
		if (!known)
			break;
		number = *known;
		slot = slots.lookup(&number);
		earlier->number = number;
		earlier->generation = slot ? slot->generation : 0;
		if (slot && slot->question_hash == message->question_hash &&
		    same_flow(&slot->flows[0], asked))
			break;
		earlier->number = NO_SLOT;
	}
	return variant;
}

/*
 * Gives a query the slot that the caller owns, and its place in the index.
 * asked: the flow as the client addressed it, which is not message->flow where
 * NAT came before this hook.
 */
static __always_inline void begin(u32 number, struct source *source, struct message *message,
				  struct sender *sender, struct place *place, struct flow *asked,
				  u8 attempt, u32 variant)
{
	struct transaction *slot = slots.lookup(&number);
	struct index_key key;
	u64 *start_ns;
	u32 zero = 0;

	if (!slot)
		return;
	fill(slot, source, message, sender, place, asked, attempt, variant);
	start_ns = slot_start.lookup(&number);
	if (start_ns)
		*start_ns = place->t_ns;
	make_key(&key, asked, message->id, variant);
	if (slot_index.insert(&key, &number)) {
		release(number);
		crowded(place->t_ns);
		return;
	}
	add_alias(number, slot, &message->flow);
#ifdef AGGREGATES
	open_span(slot);
#endif
	if (variant)
		variant_last_ns.update(&zero, &place->t_ns);
}

#endif
