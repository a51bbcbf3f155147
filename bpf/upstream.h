/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * When servers wait for others, and whose time that is. Only where transactions
 * are counted; of what is shown one by one, user space nests the queries.
 */
#ifndef DNSTRACE_UPSTREAM_H
#define DNSTRACE_UPSTREAM_H

/* Of a server's own query: from when on it waits for an answer to that question. */
static __always_inline void open_span(struct transaction *slot)
{
	struct span_key key = { .cgroup_id = slot->cgroup_id,
				.question_hash = slot->question_hash };
	struct span fresh = { .start_ns = slot->start_ns, .last_ns = slot->start_ns, .waiting = 1 };
	struct span *span;

	/* Number 1 is the root, where everybody is on hosts with cgroup v1 alone. */
	if (slot->cgroup_id <= 1 || !serving_cgroups.lookup(&slot->cgroup_id))
		return;
	slot->by_server = 1;
	span = upstream_spans.lookup(&key);
	if (span && span->waiting && slot->start_ns - span->last_ns < SPAN_PATIENCE_NS) {
		span->last_ns = slot->start_ns; /* it asks again, or for somebody else */
		__sync_fetch_and_add(&span->waiting, 1);
		return;
	}
	if (span) {
		fresh.former_start_ns = span->start_ns;
		fresh.former_end_ns = span->end_ns;
	}
	upstream_spans.update(&key, &fresh);
}

/* The answer to a server's own query: until then it has waited. */
static __always_inline void close_span(struct transaction *slot)
{
	struct span_key key = { .cgroup_id = slot->cgroup_id,
				.question_hash = slot->question_hash };
	struct span *span;

	if (!slot->by_server || !slot->end_ns)
		return;
	span = upstream_spans.lookup(&key);
	if (!span)
		return;
	if (slot->start_ns < span->start_ns) {
		if (span->former_end_ns < slot->end_ns)
			span->former_end_ns = slot->end_ns;
		return;
	}
	if (span->end_ns < slot->end_ns)
		span->end_ns = slot->end_ns;
	if (span->waiting)
		__sync_fetch_and_add(&span->waiting, -1);
}

/* How much of the time from one moment to another lies between two more; 0 if none. */
static __always_inline u64 overlap(u64 from_ns, u64 to_ns, u64 start_ns, u64 end_ns)
{
	/* Without branches: see equal. Times are below 2^63. */
	u64 first_ns = either((start_ns - from_ns) >> 63, from_ns, start_ns);
	u64 last_ns = either((to_ns - end_ns) >> 63, to_ns, end_ns);

	return (last_ns - first_ns) * (1 - ((last_ns - first_ns) >> 63));
}

/*
 * Takes the time that the server itself waited for an answer out of the time that
 * it took: since the query came, if it waited for another client's sake already,
 * and until its own answer left, if none came. What it has asked since, or had
 * its answer to before, is not because of this one.
 */
static __always_inline void part_upstream(struct transaction *slot, struct tally *tally)
{
	struct span_key key = { .cgroup_id = slot->server_cgroup_id,
				.question_hash = slot->question_hash };
	u64 received_ns = tally->received_ns, sent_ns = tally->sent_ns;
	u64 unanswered, asked, end_ns, waited_us;
	struct span *span;

	if (!sent_ns)
		return;
	span = upstream_spans.lookup(&key);
	if (!span)
		return;
	/* Without an answer since the query came, it waited to the end, if it asked since. */
	unanswered = (span->end_ns - received_ns) >> 63;
	asked = 1 - ((span->last_ns - received_ns) >> 63);
	end_ns = either(unanswered & asked, sent_ns, span->end_ns);
	waited_us = overlap(received_ns, sent_ns, span->start_ns, end_ns);
	waited_us =
		either(some(waited_us), waited_us,
		       overlap(received_ns, sent_ns, span->former_start_ns, span->former_end_ns)) /
		1000;
	waited_us *= 1 - ((tally->stage_ns[STAGE_SERVER] - waited_us * 1000) >> 63);
	tally->stage_ns[STAGE_SERVER] -= waited_us * 1000;
	tally->stage_ns[STAGE_UPSTREAM] = waited_us * 1000;
	slot->upstream_us = waited_us;
}

#endif
