/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Where time goes, counted in the kernel: histograms of whole transactions by
 * who asked whom for what, and of each stage of their way by who asked and who
 * answered. Compiled in where user space asks for it (SERIES, BUCKETS); then only
 * transactions that are slow, that failed, or that are in the sample leave.
 *
 * A stage is the time between two hops that follow each other, so the stages of
 * a transaction add up to the time from its first hop to its last.
 * tracer/stages.py says the same of records; tests compare the two.
 */
#ifndef DNSTRACE_LATENCY_H
#define DNSTRACE_LATENCY_H

#define OTHER_TYPE 0
#define NO_RCODE 255

static __always_inline u64 stage_between(struct hop *from, struct hop *to)
{
	u64 asking = equal(to->direction, QUERY), asked = equal(from->direction, QUERY);
	u64 taken = equal(to->kind, HOP_RECEIVE), there = equal(from->kind, HOP_RECEIVE);
	u64 here = equal(from->netns, to->netns), sent = equal(from->kind, HOP_SEND);

	return either(asking,
		      either(taken, STAGE_SERVER_QUEUE,
			     either(sent, STAGE_APPLICATION_SEND,
				    either(here, STAGE_NODE, STAGE_NETWORK))),
		      either(asked, either(there, STAGE_SERVER, STAGE_REMOTE),
			     either(taken, STAGE_WAKE_UP, STAGE_RETURN)));
}

/* Types with a class of their own; of others there may be as many as a client likes. */
static __always_inline u8 type_class(u16 type)
{
	switch (type) {
	case 1: /* A */
	case 2: /* NS */
	case 5: /* CNAME */
	case 6: /* SOA */
	case 12: /* PTR */
	case 15: /* MX */
	case 16: /* TXT */
	case 28: /* AAAA */
	case 33: /* SRV */
	case 64: /* SVCB */
	case 65: /* HTTPS */
		return type;
	default:
		return OTHER_TYPE;
	}
}

/* Log-linear: each power of two in 16 parts, so a part's middle is within 3.1 % of all in it. */
static __always_inline u32 bucket_of(u64 ns)
{
	u64 rest = ns >> 4, exponent = 0, part;

#pragma unroll
	for (part = 32; part; part >>= 1) {
		u64 shift = some(rest >> part) * part;

		rest >>= shift;
		exponent += shift;
	}
	/* Of 0 to 15, each has a bucket of its own. */
	exponent += some(rest);
	return exponent * 16 + ((ns >> (exponent - some(exponent))) & 15);
}

/* Stands for the pod, or at least for the container, that asks. */
static __always_inline u64 client_number(struct series_key *key)
{
	return key->cgroup_id ^ (u64)key->netns << 32;
}

/* Whether a client may begin one more: it chooses whom it asks for what, at the cost of others. */
static __always_inline bool may_begin(struct series_key *key)
{
	u64 client = client_number(key);
	u32 *begun = series_begun.lookup(&client), one = 1;

	if (!begun) {
		series_begun.update(&client, &one);
		return true;
	}
	if (*begun >= SERIES_PER_CLIENT)
		return false;
	__sync_fetch_and_add(begun, 1);
	return true;
}

static __always_inline struct series *begin_series(struct series_key *key, struct tally *tally)
{
	/* Nothing else begins at the same nanosecond on the same CPU. */
	tally->fresh.id = (tally->last_ns << 8 | (bpf_get_smp_processor_id() & 255)) << 2 |
			  (key != &tally->key) << 1 | key->kind;
	all_series.insert(key, &tally->fresh);
	return all_series.lookup(key);
}

/*
 * A series, which is there from now on: that of the key, or where there is no
 * room, its client's for all that found none, or that of all clients. NULL: not
 * even that.
 */
static __always_inline struct series *series_for(struct tally *tally)
{
	struct series_key *key = &tally->key, *other = &tally->other;
	struct series *series = all_series.lookup(key);

	if (!series && may_begin(key))
		series = begin_series(key, tally);
	if (series)
		return series;
	count(COUNT_SERIES_FULL);
	other->kind = key->kind;
	other->status = key->status;
	other->backend = BACKEND_OVERFLOW;
	other->cgroup_id = key->cgroup_id;
	other->netns = key->netns;
	series = all_series.lookup(other);
	if (!series)
		series = begin_series(other, tally);
	if (series)
		return series;
	other->cgroup_id = other->netns = 0;
	return all_series.lookup(other);
}

static __always_inline void add_time(struct series *series, struct bucket_key *key, u32 stage,
				     u64 ns)
{
	u64 *number, one = 1;

	if (stage >= STAGES)
		return;
	key->id = series->id;
	key->stage = stage;
	key->bucket = bucket_of(ns);
	number = buckets.lookup(key);
	if (!number && buckets.insert(key, &one)) {
		number = buckets.lookup(key); /* another CPU was first */
		if (!number) {
			count(COUNT_BUCKETS_FULL);
			return;
		}
	}
	if (number)
		__sync_fetch_and_add(number, 1);
	__sync_fetch_and_add(&series->sum_ns[stage], ns);
	if (series->max_ns[stage] < ns)
		series->max_ns[stage] = ns;
}

/*
 * How long each stage took, and who answered, as far as packets tell: the server's
 * address where its own packets were seen (as backends in tracer/slots.py).
 */
static __always_inline void look_along(struct transaction *slot, struct tally *tally)
{
	struct series_key *key = &tally->key;
	u64 last_ns = slot->hops[0].t_ns;
	bool arrived, telling, at_socket;
	u32 flow, i;

	for (i = 0; i < TALLIED; i++)
		tally->stage_ns[i] = 0;
	tally->received_ns = tally->sent_ns = 0;
	tally->query_kind = tally->last_kind = slot->hops[0].kind;
	tally->query_flow = slot->hops[0].flow;
	tally->response_kind = tally->response_flow = 0;
#pragma nounroll
	for (i = 1; i < MAX_HOPS; i++) {
		struct hop *from = &slot->hops[i - 1], *to = &slot->hops[i];
		u64 stage, asking, first, served, took_ns;

		if (i >= slot->nhops)
			break;
		stage = stage_between(from, to);
		served = equal(stage, STAGE_SERVER) & equal(to->kind, HOP_SEND);
		tally->received_ns = either(served, from->t_ns, tally->received_ns);
		tally->sent_ns = either(served, to->t_ns, tally->sent_ns);
		asking = equal(to->direction, QUERY);
		first = equal(to->direction, RESPONSE) & equal(tally->response_kind, 0);
		tally->last_kind = to->kind;
		tally->query_kind = either(asking, to->kind, tally->query_kind);
		tally->query_flow = either(asking, to->flow, tally->query_flow);
		tally->response_kind = either(first, to->kind, tally->response_kind);
		tally->response_flow = either(first, to->flow, tally->response_flow);
		/* Hops of two CPUs may come in the wrong order: then no time has passed. */
		took_ns = to->t_ns - last_ns;
		took_ns *= 1 - (took_ns >> 63);
		tally->stage_ns[stage & (TALLIED - 1)] += took_ns;
		last_ns += took_ns;
	}
	tally->last_ns = last_ns;

	flow = tally->query_flow & (MAX_FLOWS - 1);
	at_socket = tally->query_kind == HOP_RECEIVE;
	arrived = tally->query_kind == HOP_EGRESS || at_socket || flow;
	if (tally->response_kind && tally->response_kind != HOP_RECEIVE && !at_socket) {
		u32 answered = tally->response_flow & (MAX_FLOWS - 1);

		telling = tally->response_kind == HOP_SEND ||
			  slot->flows[answered].server_port != slot->flows[0].server_port ||
			  !same_address(slot->flows[answered].server_addr,
					slot->flows[0].server_addr);
		if (telling || !arrived) {
			flow = answered;
			at_socket = tally->response_kind == HOP_SEND;
			arrived = true;
		}
	}
	key->backend = BACKEND_UNKNOWN;
	key->backend_port = 0;
	key->backend_addr[0] = key->backend_addr[1] = 0;
	if (!arrived)
		return;
	key->backend_addr[0] = slot->flows[flow].server_addr[0];
	key->backend_addr[1] = slot->flows[flow].server_addr[1];
	key->backend_port = slot->flows[flow].server_port;
	key->backend = BACKEND_KNOWN;
	if (!at_socket && key->backend_port == slot->flows[0].server_port &&
	    same_address(key->backend_addr, slot->flows[0].server_addr))
		key->backend = BACKEND_AS_ASKED;
}

/* Counts a transaction that has ended. */
static __always_inline void tally_up(struct transaction *slot, struct tally *tally)
{
	struct series_key *key = &tally->key;
	bool answered = slot->status == STATUS_ANSWERED;
	struct series *series;
	u32 i;

	look_along(slot, tally);
	close_span(slot);
	part_upstream(slot, tally);
	key->kind = SERIES_OF_QUESTIONS;
	key->cgroup_id = slot->cgroup_id;
	key->server_cgroup_id = slot->server_cgroup_id;
	key->netns = slot->netns;
	key->client_addr[0] = key->client_addr[1] = 0;
	if (slot->netns) {
		key->client_addr[0] = slot->flows[0].client_addr[0];
		key->client_addr[1] = slot->flows[0].client_addr[1];
	}
	key->server_addr[0] = slot->flows[0].server_addr[0];
	key->server_addr[1] = slot->flows[0].server_addr[1];
	key->server_port = slot->flows[0].server_port;
	key->type = type_class(slot->type);
	key->rcode = slot->response_flags ? bpf_ntohs(slot->response_flags) & 15 : NO_RCODE;
	key->status = slot->status;
	if (!answered && tally->last_kind == HOP_DROP)
		key->status = STATUS_DROPPED;
	key->protocol = slot->protocol;
	key->by_server = slot->by_server;
	key->pad = 0;
	series = series_for(tally);
	if (!series)
		return;
	__sync_fetch_and_add(&series->count, 1);
	series->last_ns = tally->last_ns;
	if (!answered)
		return;
	if (slot->end_ns && slot->hops[0].kind == HOP_SEND)
		add_time(series, &tally->bucket, STAGE_TOTAL, slot->end_ns - slot->start_ns);

	key->kind = SERIES_OF_STAGES;
	key->server_addr[0] = key->server_addr[1] = 0;
	key->server_port = 0;
	key->type = key->rcode = 0;
	series = series_for(tally);
	if (!series)
		return;
	__sync_fetch_and_add(&series->count, 1);
	series->last_ns = tally->last_ns;
#pragma nounroll
	for (i = 0; i < STAGE_TOTAL; i++) {
		u64 ns = tally->stage_ns[i & (TALLIED - 1)];

		if (ns)
			add_time(series, &tally->bucket, i, ns);
	}
}

/* Whether a transaction is to leave the kernel. Says how many it then stands for. */
static __always_inline bool is_kept(struct transaction *slot)
{
	u8 rcode = bpf_ntohs(slot->response_flags) & 15;
	u32 zero = 0, share;
	struct settings *set = settings.lookup(&zero);
	bool notable;

	if (!set)
		return false;
	notable =
		slot->status != STATUS_ANSWERED || (rcode != 0 && rcode != 3) ||
		(slot->end_ns && set->slower_ns && slot->end_ns - slot->start_ns >= set->slower_ns);
	share = notable ? set->notable_share : set->share;
	if (share && (share == 1 || bpf_get_prandom_u32() % share == 0)) {
		slot->weight = share;
		return true;
	}
	count(notable ? COUNT_SKIPPED : COUNT_NOT_KEPT);
	return false;
}

#endif
