// SPDX-License-Identifier: GPL-2.0-only
/*
 * The programs. Each says no to what is not DNS as cheaply as its hook allows,
 * then parses, then touches the table. They only watch: no verdict of theirs
 * ever changes what happens to a packet.
 *
 * Hooks (UDP)       kprobe set                    tracepoint set
 * socket send       kprobe ip_send_skb, ip6_…     cgroup_skb egress at the root
 * socket receive    kprobe skb_consume_udp        cgroup_skb ingress at the root
 * device            TC ingress and egress         the same
 * drop              raw tracepoint kfree_skb      the same
 *
 * Whom sockets are told to send to comes from cgroup_sock_addr programs, which
 * matter only where others balance services at the socket.
 *
 * TCP is watched by the tracepoint set's hooks in both: where the kernel sends
 * and takes segments, functions see neither packets nor who they belong to.
 */
#include "record.h"
#include "maps.h"
#include "packet.h"
#include "marks.h"
#include "branchless.h"
#include "upstream.h"
#include "transactions.h"
#include "latency.h"
#include "follow.h"
#include "segments.h"

static __always_inline u32 netns_of_sock(u64 sk)
{
	u64 net = 0;
	u32 inum = 0;

	READ_FIELD(net, sk, OFFSET_sock_net);
	READ_FIELD(inum, net, OFFSET_net_inum);
	return inum;
}

static __always_inline u64 sock_of_skb(u64 skb)
{
	u64 sk = 0;

	READ_FIELD(sk, skb, OFFSET_sk_buff_sk);
	return sk;
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
		if (ip[9] != PROTO_UDP && ip[9] != PROTO_TCP)
			return false;
		if (ip[0] != 0x45)
			return true;
		from = *(u16 *)(ip + 20);
		to = *(u16 *)(ip + 22);
	} else if (protocol == bpf_htons(ETHERTYPE_IPV6)) {
		if (ip + 48 > end)
			return true;
		if (ip[6] == PROTO_ICMPV6)
			return device && ip[40] == ICMPV6_DEST_UNREACH;
		if (ip[6] != PROTO_UDP && ip[6] != PROTO_TCP)
			return true;
		from = *(u16 *)(ip + 40);
		to = *(u16 *)(ip + 42);
	} else {
		return false;
	}
	return is_dns_port(to) || is_dns_port(from) || (device && is_tunnel_port(to));
}

#define PULLED_MAX (RESPONSE_LARGE + 128) /* with room for headers */

/*
 * Kprobes cannot read what a driver has put into pages. So a device, which all
 * that comes from outside passes first, has the kernel move it beside the rest.
 * The packet's bytes stay as they are; pointers to them do not.
 */
static __always_inline void pull(struct __sk_buff *skb)
{
	u32 len = skb->len, data_len = 0;

	READ_FIELD(data_len, skb, OFFSET_sk_buff_data_len);
	if (data_len)
		bpf_skb_pull_data(skb, len < PULLED_MAX ? len : PULLED_MAX);
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
	if (parsed == IS_DNS || parsed == IS_SEGMENT) {
		place.t_ns = bpf_ktime_get_ns();
		if (device) {
			place.ifindex = skb->ifindex;
			place.netns = patched(MARK_NETNS);
		} else if (hook == HOP_SEND || message->direction == QUERY ||
			   parsed == IS_SEGMENT) {
			place.socket = sock_of_skb((u64)skb);
			place.netns = netns_of_sock(place.socket);
		}
		if (!device && message->unreachable)
			;
		else if (parsed == IS_SEGMENT)
			segment_seen(&source, (u64)skb, scratch, message, &place);
		else if (patched(MARK_UDP))
			seen(&source, (u64)skb, scratch, &place);
	} else if (parsed == UNDECODABLE && !device) {
		count(COUNT_UNDECODABLE);
	}
	scratch_release(scratch);
	if (device && patched(MARK_PULL) && parsed == IS_DNS)
		pull(skb);
	return patched(MARK_VERDICT);
}

#ifdef OFFSET_sock_cookie
/* cgroup_sock_addr: connect and sendmsg, before they look at the address. */
int socket_address(struct bpf_sock_addr *context)
{
	__be16 port = context->user_port;
	struct meant meant = {}, *known;
	u64 cookie;

	if (!is_dns_port(port))
		return 1;
	if (patched(MARK_FAMILY) == 4) {
		map_ipv4(meant.addr, context->user_ip4);
	} else {
		u32 *words = (u32 *)meant.addr;

		words[0] = context->user_ip6[0];
		words[1] = context->user_ip6[1];
		words[2] = context->user_ip6[2];
		words[3] = context->user_ip6[3];
	}
	meant.port = port;
	cookie = bpf_get_socket_cookie(context);
	if (!patched(MARK_CONNECTS)) {
		cookie |= MEANT_ONCE;
		meant.task = bpf_get_current_task();
	}
	/* Most sockets send to one server, and finding costs less than writing. */
	known = meant_by_socket.lookup(&cookie);
	if (known && known->port == meant.port && same_address(known->addr, meant.addr))
		known->task = meant.task;
	else
		meant_by_socket.update(&cookie, &meant);
	return 1;
}
#endif

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

	if (read_kernel(window, sizeof(window), (void *)(skb + OFFSET_sk_buff_transport_header)))
		return false;
	transport = *(u16 *)members;
	network =
		*(u16 *)(members + OFFSET_sk_buff_network_header - OFFSET_sk_buff_transport_header);
	read_kernel(&head, sizeof(head), (void *)(skb + OFFSET_sk_buff_head));
	if (read_kernel(ports, sizeof(ports), (void *)(head + transport)))
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
		place.socket = hook == HOP_RECEIVE ? argument_0 : sock_of_skb(skb);
		place.netns = netns_of_sock(place.socket);
		seen(&source, skb, scratch, &place);
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
	enum parsed parsed;

	if (!open_skb(skb, &source))
		return 0;
	scratch = scratch_acquire();
	if (!scratch)
		return 0;
	parsed = parse(&source, scratch, &scratch->message, false);
	if (parsed != IS_DNS && parsed != IS_SEGMENT) {
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
	if (parsed == IS_SEGMENT)
		segment_seen(&source, skb, scratch, &scratch->message, &place);
	else
		seen(&source, skb, scratch, &place);
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
