/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What one packet, seen at one hook, means for the transactions in flight.
 */
#ifndef DNSTRACE_FOLLOW_H
#define DNSTRACE_FOLLOW_H

/*
 * Which process sends, and its cgroup. Cgroup programs have no helpers for that
 * on older kernels; there, the task itself is read.
 */
static __always_inline void identify(struct sender *sender)
{
	u64 at;

	if (!patched(MARK_READ_TASK)) {
		sender->pid = bpf_get_current_pid_tgid() >> 32;
		sender->cgroup_id = bpf_get_current_cgroup_id();
		return;
	}
	at = bpf_get_current_task();
	READ_FIELD(sender->pid, at, OFFSET_task_tgid);
	READ_FIELD(at, at, OFFSET_task_cgroups);
	READ_FIELD(at, at, OFFSET_css_set_dfl_cgrp);
	READ_FIELD(at, at, OFFSET_cgroup_kn);
	READ_FIELD(sender->cgroup_id, at, OFFSET_kernfs_node_id);
}

/* The name of the process, not of the thread that happens to send. */
static __always_inline void process_name(char *comm)
{
	u64 leader = 0;

	READ_FIELD(leader, bpf_get_current_task(), OFFSET_task_group_leader);
	read_kernel(comm, 16, (void *)(leader + OFFSET_task_comm));
}

/* struct nf_conntrack_tuple: the part that names addresses and ports. */
struct conntrack_tuple {
	__be32 src_addr[4];
	__be16 src_port;
	u16 l3num;
	__be32 dst_addr[4];
	__be16 dst_port;
	u8 protonum;
	u8 dir;
};

static __always_inline void copy_tuple_address(__be64 *to, const __be32 *from, u8 family)
{
	u32 *words = (u32 *)to;

	if (family == 4) {
		map_ipv4(to, from[0]);
		return;
	}
	words[0] = from[0];
	words[1] = from[1];
	words[2] = from[2];
	words[3] = from[3];
}

/*
 * The flow as its client addressed it: conntrack's ORIGINAL tuple. False where
 * the packet has no conntrack entry, so that its own addresses are the truth.
 */
static __always_inline bool original_flow(u64 skb, u8 family, u8 protocol, struct flow *flow)
{
#ifdef OFFSET_sk_buff_nfct
	struct conntrack_tuple tuple;
	u64 nfct = 0;

	READ_FIELD(nfct, skb, OFFSET_sk_buff_nfct);
	nfct &= ~7ULL;
	if (!nfct)
		return false;
	if (READ_FIELD(tuple, nfct, OFFSET_nf_conn_original))
		return false;
	if (tuple.protonum != protocol)
		return false;
	copy_tuple_address(flow->client_addr, tuple.src_addr, family);
	copy_tuple_address(flow->server_addr, tuple.dst_addr, family);
	flow->client_port = tuple.src_port;
	flow->server_port = tuple.dst_port;
	flow->pad = 0;
	return true;
#else
	return false;
#endif
}

/*
 * Whether a query is let in. Who is not known yet is: a pod's first query comes
 * before user space has heard of the pod, and is judged there.
 */
static __always_inline bool is_wanted(struct sender *sender)
{
	u32 zero = 0;
	struct settings *set = settings.lookup(&zero);
	u8 *verdict, by_netns, by_cgroup;

	if (!set)
		return false;
	if (!(set->wanted & (WANT_PODS | WANT_PID)) || serving_cgroups.lookup(&sender->cgroup_id))
		return true;
	if (set->wanted & WANT_PID && set->pid != sender->pid)
		return false;
	if (!(set->wanted & WANT_PODS))
		return true;
	verdict = netns_verdicts.lookup(&sender->netns);
	by_netns = verdict ? *verdict : VERDICT_UNKNOWN;
	if (by_netns == VERDICT_WANTED)
		return true;
	verdict = cgroup_verdicts.lookup(&sender->cgroup_id);
	by_cgroup = verdict ? *verdict : VERDICT_UNKNOWN;
	if (by_cgroup != VERDICT_UNKNOWN)
		return by_cgroup == VERDICT_WANTED;
	return by_netns == VERDICT_UNKNOWN;
}

/*
 * Puts the address that a socket was told to send to into the flow, where it is
 * another than its packets have, which no NAT explains. Whether it did.
 */
static __always_inline bool meant_flow(u64 socket, struct flow *flow)
{
#ifdef OFFSET_sock_cookie
	struct meant *meant;
	u64 cookie = 0, once;

	READ_FIELD(cookie, socket, OFFSET_sock_cookie);
	if (!cookie)
		return false;
	once = cookie | MEANT_ONCE;
	meant = meant_by_socket.lookup(&once);
	if (meant && meant->task == bpf_get_current_task())
		meant->task = 0;
	else
		meant = meant_by_socket.lookup(&cookie);
	if (!meant)
		return false;
	if (meant->port == flow->server_port && same_address(meant->addr, flow->server_addr))
		return false;
	flow->server_port = meant->port;
	flow->server_addr[0] = meant->addr[0];
	flow->server_addr[1] = meant->addr[1];
	return true;
#else
	return false;
#endif
}

static __always_inline bool is_paused(void)
{
	u32 zero = 0;
	struct settings *set = settings.lookup(&zero);

	return !set || set->paused;
}

/* Whether everything is traced, so that a query may begin at any hook. */
static __always_inline bool is_unfiltered(void)
{
	u32 zero = 0;
	struct settings *set = settings.lookup(&zero);

	return set && (!set->wanted || set->wanted & WANT_SERVER_SIDE);
}

/* A process of that cgroup is asked. What it asks then may be because of it, so it is let in. */
static __always_inline void serves(u64 cgroup_id)
{
	u8 yes = 1;

	/* Number 1 is the root, where everybody is on hosts with cgroup v1 alone. */
	if (cgroup_id > 1 && !serving_cgroups.lookup(&cgroup_id))
		serving_cgroups.update(&cgroup_id, &yes);
}

/*
 * Whether a response that passes here has gone back all the way that we saw the
 * query come. An ICMP error has when it names the flow as the client knows it:
 * no hook of ours sees it reach the socket.
 */
static __always_inline bool is_last_hop(struct transaction *slot, struct message *message,
					struct place *place)
{
	struct hop *first = &slot->hops[0];

	if (place->kind == HOP_DROP)
		return false;
	if (message->unreachable)
		return place->kind == HOP_EGRESS && same_flow(&slot->flows[0], &message->flow);
	/* A client does not take an answer from somebody whom it did not ask. */
	if (place->kind == HOP_RECEIVE)
		return first->kind != HOP_SEND || slot->balanced ||
		       (slot->flows[0].server_port == message->flow.server_port &&
			same_address(slot->flows[0].server_addr, message->flow.server_addr));
	switch (first->kind) {
	case HOP_RECEIVE:
		return place->kind == HOP_SEND;
	case HOP_INGRESS:
		return place->kind == HOP_EGRESS && place->ifindex == first->ifindex &&
		       place->netns == first->netns;
	case HOP_EGRESS:
		return place->kind == HOP_INGRESS && place->ifindex == first->ifindex &&
		       place->netns == first->netns;
	default:
		return false;
	}
}

#define DOUBLED_NS 1000000 /* a packet that comes again within this was doubled on its way */

/*
 * Whether a query comes by where it was first seen: then it is not the same
 * packet further on, but its client asks again, or asks another server.
 */
static __always_inline bool is_again(struct transaction *slot, struct message *message,
				     struct place *place)
{
	struct hop *first = &slot->hops[0];

	if (message->direction == RESPONSE || place->kind != first->kind ||
	    place->ifindex != first->ifindex || place->netns != first->netns)
		return false;
	/* The network may double a packet; nobody asks the same again that soon. */
	return place->t_ns > first->t_ns + DOUBLED_NS ||
	       !same_flow(&slot->flows[0], &message->flow);
}

/*
 * What one packet does to the table: a hop more, a transaction ended, a
 * transaction begun. One flow of control, so that the compiler sees each of the
 * large steps once.
 */
static __always_inline void seen(struct source *source, u64 skb, struct scratch *scratch,
				 struct place *place)
{
	struct message *message = &scratch->message;
	bool sent = place->kind == HOP_SEND && message->direction == QUERY;
	bool refused = message->unreachable;
	struct flow asked = message->flow;
	struct sender sender = {};
	struct transaction *slot;
	u32 variant = 0, number;
	u8 attempt = 1, status = refused ? STATUS_REFUSED : STATUS_ANSWERED;
	bool several, original = false, kept = true;

	message->found.number = NO_SLOT;
	if (sent) {
		sender.netns = place->netns;
		identify(&sender);
		if (is_paused())
			return;
		if (!is_wanted(&sender)) {
			count(COUNT_FILTERED);
			return;
		}
		process_name(sender.comm);
		original_flow(skb, message->family, PROTO_UDP, &asked);
		sender.balanced = meant_flow(place->socket, &asked);
	} else {
		several = variants_lately(place->t_ns);
		original = several && message->direction == QUERY &&
			   original_flow(skb, message->family, PROTO_UDP, &asked);
		find_slot(message, &asked, several);
		if (message->found.number == NO_SLOT && !original && message->direction == QUERY &&
		    original_flow(skb, message->family, PROTO_UDP, &asked))
			find_slot(message, &asked, several);
	}
	number = message->found.number;
	slot = slots.lookup(&number);
	if (slot && is_again(slot, message, place)) {
		slot = NULL;
		message->found.number = NO_SLOT;
		if (!original)
			original_flow(skb, message->family, PROTO_UDP, &asked);
	}
	if (slot) {
		if (place->kind == HOP_RECEIVE && message->direction == RESPONSE)
			place->netns = slot->netns;
		add_alias(number, slot, &message->flow);
		add_hop(slot, message, place);
		if (place->kind == HOP_RECEIVE && message->direction == QUERY)
			serves(slot->server_cgroup_id);
		if (refused)
			slot->status = status;
		if (message->direction == QUERY || !is_last_hop(slot, message, place))
			return;
	} else if (message->direction == RESPONSE || place->kind == HOP_DROP) {
		if (place->kind == HOP_RECEIVE && is_unfiltered())
			count(COUNT_UNMATCHED_RESPONSES);
		return;
	} else {
		if (!sent) {
			if (is_paused() || !is_unfiltered())
				return;
			if (crowded_lately(place->t_ns)) {
				count(COUNT_HOPS_LOST);
				return;
			}
		}
		count(COUNT_STARTED);
		variant = free_variant(message, &asked);
		if (variant == MAX_VARIANTS) {
			crowded(place->t_ns);
			return;
		}
		/* The client asks again: the earlier attempt has had its time. */
		status = STATUS_TIMEOUT;
		number = message->found.number;
		slot = slots.lookup(&number);
	}
	if (slot && claim(slot, message->found.generation)) {
		slot->status = status;
		if (status == STATUS_REFUSED ||
		    (status == STATUS_ANSWERED && place->kind == HOP_RECEIVE))
			slot->end_ns = place->t_ns;
		attempt = slot->attempt + 1;
#ifdef AGGREGATES
		/* What its client gave up is rare, and all of it leaves: user space counts that. */
		if (status != STATUS_TIMEOUT) {
			tally_up(slot, &scratch->tally);
			kept = is_kept(slot);
		}
#endif
		if (kept)
			emit(slot, status == STATUS_ANSWERED ? source : NULL, message);
		if (status != STATUS_TIMEOUT) {
			release(number);
			return;
		}
	} else if (status == STATUS_TIMEOUT) {
		number = take_slot(place->t_ns);
	} else {
		return;
	}
	begin(number, source, message, &sender, place, &asked, attempt, variant);
}

#endif
