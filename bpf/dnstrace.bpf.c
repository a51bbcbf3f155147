// SPDX-License-Identifier: GPL-2.0-only
/*
 * The programs. Each says no to what is not DNS as cheaply as its hook allows,
 * then parses, then touches the table. They only watch: no verdict of theirs
 * ever changes what happens to a packet.
 *
 * Hooks             kprobe set                    tracepoint set
 * socket send       kprobe ip_send_skb, ip6_…     cgroup_skb egress at the root
 * socket receive    kprobe skb_consume_udp        cgroup_skb ingress at the root
 * device            TC ingress and egress         the same
 * drop              raw tracepoint kfree_skb      the same
 */
#include "record.h"
#include "maps.h"
#include "packet.h"
#include "transactions.h"

/*
 * Constants that user space writes into each loaded copy of a program, so that
 * the verifier drops what that copy does not need.
 */
#define MARK_NETNS 0x646e737472616301ULL
#define MARK_L2_HLEN 0x646e737472616302ULL
#define MARK_HOOK 0x646e737472616303ULL /* enum hop_kind */
#define MARK_SKB_ARGUMENT 0x646e737472616305ULL /* 0 or 1 */
#define MARK_VERDICT 0x646e737472616304ULL /* whatever lets the packet pass at this hook */
#define MARK_READ_TASK 0x646e737472616306ULL /* 1: no helper tells of the process here */

static __always_inline u64 patched(u64 mark)
{
	asm volatile("" : "+r"(mark));
	return mark;
}

static __always_inline u32 netns_of_sock(u64 sk)
{
	u64 net = 0;
	u32 inum = 0;

	READ_FIELD(net, sk, OFFSET_sock_net);
	READ_FIELD(inum, net, OFFSET_net_inum);
	return inum;
}

static __always_inline u32 netns_of_skb_sock(u64 skb)
{
	u64 sk = 0;

	READ_FIELD(sk, skb, OFFSET_sk_buff_sk);
	return sk ? netns_of_sock(sk) : 0;
}

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
	bpf_probe_read_kernel(comm, 16, (void *)(leader + OFFSET_task_comm));
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
static __always_inline bool original_flow(u64 skb, u8 family, struct flow *flow)
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
	if (tuple.protonum != PROTO_UDP)
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

/* False: certainly not DNS. Decided on the packet as it lies, where it is linear. */
static __always_inline bool maybe_dns(struct __sk_buff *skb, u32 l3, u16 protocol, bool device)
{
	u8 *ip = (u8 *)(long)skb->data + l3, *end = (u8 *)(long)skb->data_end;
	__be16 from, to;

	if (protocol == bpf_htons(ETHERTYPE_IPV4)) {
		if (ip + 28 > end)
			return true;
		if (ip[9] == PROTO_IPIP)
			return device;
		if (ip[9] == PROTO_ICMP)
			return device && ip[20] == ICMP_DEST_UNREACH && ip[21] != ICMP_FRAG_NEEDED;
		if (ip[9] != PROTO_UDP)
			return false;
		if (ip[0] != 0x45)
			return true;
		from = *(u16 *)(ip + 20);
		to = *(u16 *)(ip + 22);
	} else if (protocol == bpf_htons(ETHERTYPE_IPV6)) {
		if (ip + 48 > end)
			return true;
		if (ip[6] == PROTO_TCP)
			return false;
		if (ip[6] == PROTO_ICMPV6)
			return device && ip[40] == ICMPV6_DEST_UNREACH;
		if (ip[6] != PROTO_UDP)
			return true;
		from = *(u16 *)(ip + 40);
		to = *(u16 *)(ip + 42);
	} else {
		return false;
	}
	return is_dns_port(to) || is_dns_port(from) || (device && is_tunnel_port(to));
}

static __always_inline bool is_wanted(struct sender *sender)
{
	u32 zero = 0;
	struct settings *set = settings.lookup(&zero);

	if (!set)
		return false;
	if (!(set->wanted & (WANT_CGROUP | WANT_NETNS | WANT_PID)))
		return true;
	if (set->wanted & WANT_PID && set->pid != sender->pid)
		return false;
	if (!(set->wanted & (WANT_CGROUP | WANT_NETNS)))
		return true;
	if (set->wanted & WANT_NETNS && wanted_netns.lookup(&sender->netns))
		return true;
	if (set->wanted & WANT_CGROUP)
		return wanted_cgroups.lookup(&sender->cgroup_id);
	return false;
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
		return first->kind != HOP_SEND ||
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
static __always_inline void seen(struct source *source, u64 skb, struct message *message,
				 struct place *place)
{
	bool sent = place->kind == HOP_SEND && message->direction == QUERY;
	bool refused = message->unreachable;
	struct flow asked = message->flow;
	struct sender sender = {};
	struct transaction *slot;
	u32 variant = 0, number;
	u8 attempt = 1, status = refused ? STATUS_REFUSED : STATUS_ANSWERED;
	bool several, original = false;

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
		original_flow(skb, message->family, &asked);
	} else {
		several = variants_lately(place->t_ns);
		original = several && message->direction == QUERY &&
			   original_flow(skb, message->family, &asked);
		find_slot(message, &asked, several);
		if (message->found.number == NO_SLOT && !original && message->direction == QUERY &&
		    original_flow(skb, message->family, &asked))
			find_slot(message, &asked, several);
	}
	number = message->found.number;
	slot = slots.lookup(&number);
	if (slot && is_again(slot, message, place)) {
		slot = NULL;
		message->found.number = NO_SLOT;
		if (!original)
			original_flow(skb, message->family, &asked);
	}
	if (slot) {
		if (place->kind == HOP_RECEIVE && message->direction == RESPONSE)
			place->netns = slot->netns;
		add_alias(number, slot, &message->flow);
		add_hop(slot, message, place);
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

/* TC programs on devices, and cgroup_skb programs at the root of the cgroup tree. */
int packet(struct __sk_buff *skb)
{
	u32 hook = patched(MARK_HOOK), l3 = patched(MARK_L2_HLEN), key = 0, i;
	struct source source = { .skb = skb };
	struct place place = { .kind = hook };
	bool device = hook == HOP_INGRESS || hook == HOP_EGRESS;
	struct message *message;
	u16 protocol = skb->protocol;
	struct scratch *scratch;
	enum parsed parsed;
	u32 *memory;

	if (device) {
		for (i = 0; i < MAX_VLAN_TAGS; i++) {
			u8 *tag = (u8 *)(long)skb->data + ETH_HLEN + i * 4;

			if (protocol != bpf_htons(ETHERTYPE_VLAN) &&
			    protocol != bpf_htons(ETHERTYPE_QINQ))
				break;
			if (tag + 4 > (u8 *)(long)skb->data_end)
				return patched(MARK_VERDICT);
			protocol = *(u16 *)(tag + 2);
			l3 += 4;
		}
		if (i) {
			memory = forgetful.lookup(&key);
			if (!memory)
				return patched(MARK_VERDICT);
			l3 = forgotten(memory, l3) & 63;
		}
	}
	if (!maybe_dns(skb, l3, protocol, device) || skb->len <= l3)
		return patched(MARK_VERDICT);
	source.offset = l3;
	source.len = skb->len - l3;

	scratch = scratch_acquire();
	if (!scratch)
		return patched(MARK_VERDICT);
	message = &scratch->message;
	parsed = parse(&source, scratch, message, device);
	if (parsed == IS_DNS && (device || !message->unreachable)) {
		place.t_ns = bpf_ktime_get_ns();
		if (device) {
			place.ifindex = skb->ifindex;
			place.netns = patched(MARK_NETNS);
		} else if (hook == HOP_SEND || message->direction == QUERY) {
			place.netns = netns_of_skb_sock((u64)skb);
		}
		seen(&source, (u64)skb, message, &place);
	} else if (parsed == UNDECODABLE && !device) {
		count(COUNT_UNDECODABLE);
	}
	scratch_release(scratch);
	return patched(MARK_VERDICT);
}

/*
 * Opens a packet that a hook shows as the kernel's own struct sk_buff. False: its
 * ports are not DNS's. The members lie close together, so one read gets them all.
 */
static __always_inline bool open_skb(u64 skb, struct source *source)
{
	u64 window[6], head, data;
	u8 *members = (u8 *)window;
	u16 network, transport;
	u32 len = 0, data_len = 0;
	__be16 ports[2];

	if (bpf_probe_read_kernel(window, sizeof(window),
				  (void *)(skb + OFFSET_sk_buff_transport_header)))
		return false;
	transport = *(u16 *)members;
	network =
		*(u16 *)(members + OFFSET_sk_buff_network_header - OFFSET_sk_buff_transport_header);
	bpf_probe_read_kernel(&head, sizeof(head), (void *)(skb + OFFSET_sk_buff_head));
	if (bpf_probe_read_kernel(ports, sizeof(ports), (void *)(head + transport)))
		return false;
	/* Before IP has looked at a packet, both headers start at the same place. */
	if (transport != network && !is_dns_port(ports[0]) && !is_dns_port(ports[1]))
		return false;
	READ_FIELD(data, skb, OFFSET_sk_buff_data);
	READ_FIELD(len, skb, OFFSET_sk_buff_len);
	READ_FIELD(data_len, skb, OFFSET_sk_buff_data_len);
	source->address = head + network;
	/* len counts from data, which may lie before or behind the network header. */
	source->len = len + (u32)(data - source->address);
	if (source->len > 0xffff || data_len > source->len)
		return false;
	source->linear = source->len - data_len;
	source->packet = skb;
	return true;
}

#ifdef OFFSET_argument_0
/* kprobe: ip_send_skb(net, skb), ip6_send_skb(skb), skb_consume_udp(sk, skb, len). */
int kprobe_packet(void *ctx)
{
	u64 argument_0 = *(u64 *)((u64)ctx + OFFSET_argument_0);
	u64 argument_1 = *(u64 *)((u64)ctx + OFFSET_argument_1);
	u64 argument_2 = *(u64 *)((u64)ctx + OFFSET_argument_2);
	u64 skb = patched(MARK_SKB_ARGUMENT) ? argument_1 : argument_0;
	u32 hook = patched(MARK_HOOK);
	struct place place = { .kind = hook };
	struct source source = {};
	struct scratch *scratch;
	enum parsed parsed;

	/* A negative length: the application only peeks, and will come again. */
	if (hook == HOP_RECEIVE && (s32)argument_2 < 0)
		return 0;
	if (!open_skb(skb, &source))
		return 0;
	scratch = scratch_acquire();
	if (!scratch)
		return 0;
	parsed = parse(&source, scratch, &scratch->message, false);
	if (parsed == IS_DNS && !scratch->message.unreachable) {
		place.t_ns = bpf_ktime_get_ns();
		if (hook == HOP_RECEIVE)
			place.netns = netns_of_sock(argument_0);
		else
			place.netns = netns_of_skb_sock(skb);
		seen(&source, skb, &scratch->message, &place);
	} else if (parsed == UNDECODABLE) {
		count(COUNT_UNDECODABLE);
	}
	scratch_release(scratch);
	return 0;
}
#endif

/* Raw tracepoint kfree_skb(skb, location, reason, …): the kernel gives a packet up. */
int packet_dropped(struct bpf_raw_tracepoint_args *ctx)
{
	u64 skb = ctx->args[0], device = 0, net = 0;
	struct place place = { .kind = HOP_DROP };
	struct source source = {};
	struct scratch *scratch;
	u32 ifindex = 0, netns = 0;

	if (!open_skb(skb, &source))
		return 0;
	scratch = scratch_acquire();
	if (!scratch)
		return 0;
	if (parse(&source, scratch, &scratch->message, false) != IS_DNS) {
		scratch_release(scratch);
		return 0;
	}
	place.t_ns = bpf_ktime_get_ns();
	place.drop_location = ctx->args[1];
#ifdef HAVE_DROP_REASON
	place.drop_reason = ctx->args[2];
#endif
	READ_FIELD(device, skb, OFFSET_sk_buff_dev);
	READ_FIELD(ifindex, device, OFFSET_net_device_ifindex);
	READ_FIELD(net, device, OFFSET_net_device_net);
	READ_FIELD(netns, net, OFFSET_net_inum);
	place.ifindex = ifindex;
	place.netns = netns;
	seen(&source, skb, &scratch->message, &place);
	scratch_release(scratch);
	return 0;
}

/* Run once per slot before anything is attached: puts every slot among the free ones. */
int free_one_slot(struct __sk_buff *skb)
{
	u32 zero = 0, *next = slots_freed.lookup(&zero), number;

	if (!next || *next >= SLOTS)
		return 0;
	number = *next;
	*next = number + 1;
	free_slots.push(&number, 0);
	return 0;
}
