/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * From a packet to the DNS question in it. Packets come from strangers: every
 * length is checked against what was really read.
 *
 * The bytes from the network header on are first copied into a scratch buffer,
 * which makes one parser serve all hooks (some have an skb to ask, some only a
 * kernel address) and packets that are not linear.
 */
#ifndef DNSTRACE_PACKET_H
#define DNSTRACE_PACKET_H

#define ETH_HLEN 14
#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define ETHERTYPE_VLAN 0x8100
#define ETHERTYPE_QINQ 0x88a8
#define PROTO_ICMP 1
#define PROTO_IPIP 4
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_ICMPV6 58
#define ICMP_DEST_UNREACH 3
#define ICMP_FRAG_NEEDED 4
#define ICMPV6_DEST_UNREACH 1
#define ICMP_HLEN 8
#define UDP_HLEN 8
#define TCP_HLEN 20
#define DNS_HLEN 12
#define DNS_QR 0x80 /* in the first byte of the flags */

#define MAX_VLAN_TAGS 2
#define MAX_FRAGMENTS 8
#define MAX_EXTENSION_HEADERS 4
#define MAX_LABELS 128 /* 255 bytes of one-byte labels, and the root */
#define QUESTION_WORDS 33 /* 8 bytes each: the longest name, type and class */

/* Where a packet can be read from. skb: BPF's context; else address and len. */
struct source {
	struct __sk_buff *skb;
	u64 address; /* of the network header */
	u32 offset; /* of the network header from skb's data */
	u32 len; /* bytes from the network header on */
	u32 linear; /* of these, readable at address */
	u64 packet; /* struct sk_buff, where there is an address: what is not linear hangs on it */
};

/*
 * The helper by its number: by its name, BCC takes an older one instead where
 * the kernel's symbols are hidden from it.
 */
static long (*const read_kernel)(void *to, u32 size, const void *from) = (void *)113;

#define READ_FIELD(to, base, offset) \
	read_kernel(&(to), sizeof(to), (void *)((u64)(base) + (offset)))

/*
 * A number by way of memory, which the verifier does not follow: whatever the
 * path here was, what comes next is checked once and not once per path.
 */
static __always_inline u32 forgotten(u32 *memory, u32 number)
{
	*(volatile u32 *)memory = number;
	return *(volatile u32 *)memory;
}

static __always_inline u8 u8_at(struct scratch *scratch, u32 offset)
{
	return scratch->bytes[offset & (SCRATCH_BYTES - 1)];
}

static __always_inline u16 u16_at(struct scratch *scratch, u32 offset)
{
	return *(u16 *)&scratch->bytes[offset & (SCRATCH_BYTES - 1)];
}

static __always_inline u32 u32_at(struct scratch *scratch, u32 offset)
{
	return *(u32 *)&scratch->bytes[offset & (SCRATCH_BYTES - 1)];
}

static __always_inline u64 u64_at(struct scratch *scratch, u32 offset)
{
	return *(u64 *)&scratch->bytes[offset & (SCRATCH_BYTES - 1)];
}

/* Copies up to size bytes of the packet, from offset on. Returns how many. */
static __always_inline u32 source_read(struct source *source, u32 offset, void *to, u32 size)
{
	u64 limit = source->skb ? source->len : source->linear;

	if (offset >= limit)
		return 0;
	limit -= offset;
	if (limit > size)
		limit = size;
	/*
	 * Clang would merge the checks into one that the verifier cannot follow;
	 * and before 6.8 it learns nothing from comparing with 0 for equality.
	 */
	limit--;
	asm volatile("" : "+r"(limit));
	if (limit >= size)
		return 0;
	asm volatile("" : "+r"(limit));
	limit++;
	if (source->skb) {
		if (bpf_skb_load_bytes(source->skb, source->offset + offset, to, limit))
			return 0;
	} else if (read_kernel(to, limit, (void *)(source->address + offset))) {
		return 0;
	}
	return limit;
}

/*
 * Goes on where source_read ended, at *filled of len bytes: IP fragments hang on
 * the first one's packet. Copies whole chunks, so there must be room for one
 * more than size. What lies in pages cannot be read, so it ends there.
 */
static __always_inline void read_fragments(struct source *source, u8 *to, u32 size, u32 len,
					   u32 *memory, volatile u32 *filled)
{
	u64 packet = 0, head = 0, at = 0, offset;
	u32 end = 0, data_len, left = 0, i;
	u8 pages = 0;

	if (!source->address || source->linear == source->len || !*filled)
		return;
	read_kernel(&head, sizeof(head), (void *)(source->packet + OFFSET_sk_buff_head));
	read_kernel(&end, sizeof(end), (void *)(source->packet + OFFSET_sk_buff_end));
	head += end;
	READ_FIELD(pages, head, OFFSET_skb_shared_info_nr_frags);
	READ_FIELD(packet, head, OFFSET_skb_shared_info_frag_list);
	if (pages)
		return;
#pragma nounroll
	for (i = 0; i < RESPONSE_LARGE / FRAGMENT_CHUNK + MAX_FRAGMENTS; i++) {
		offset = *filled;
		if (offset >= size)
			break;
		if (!left) {
			if (!packet)
				break;
			data_len = 0;
			READ_FIELD(at, packet, OFFSET_sk_buff_data);
			READ_FIELD(left, packet, OFFSET_sk_buff_len);
			READ_FIELD(data_len, packet, OFFSET_sk_buff_data_len);
			READ_FIELD(packet, packet, OFFSET_sk_buff_next);
			if (data_len || !left)
				break;
		}
		/* Or clang would see that the mask does nothing, and the verifier would not. */
		asm volatile("" : "+r"(offset));
		if (read_kernel(to + (offset & (size - 1)), FRAGMENT_CHUNK, (void *)at))
			break;
		end = left < FRAGMENT_CHUNK ? left : FRAGMENT_CHUNK;
		*filled += end;
		at += end;
		left = forgotten(memory, left - end);
	}
	if (*filled > size)
		*filled = size;
	if (*filled > len)
		*filled = len;
}

static __always_inline void map_ipv4(__be64 *to, __be32 address)
{
	to[0] = 0;
	*(u32 *)&to[1] = bpf_htonl(0xffff);
	*((u32 *)&to[1] + 1) = address;
}

static __always_inline void copy_ipv6(__be64 *to, struct scratch *scratch, u32 offset)
{
	to[0] = u64_at(scratch, offset);
	to[1] = u64_at(scratch, offset + 8);
}

/*
 * Hashes type, class and name of the first question without regard to case
 * (servers may change it, RFC 4343). Sets question_len to 0 where there is none.
 */
static __always_inline void hash_question(struct scratch *scratch, struct message *message)
{
	u32 captured = message->captured;
	u32 start = message->offset + DNS_HLEN, end = start, label = 0, len, i;
	u64 hash = 0, word;

	message->question_len = 0;
	message->question_hash = 0;
	message->type = 0;
	if (u16_at(scratch, message->offset + 4) == 0)
		return;
#pragma nounroll
	for (i = 0; i < MAX_LABELS; i++) {
		if (end >= captured)
			return;
		label = u8_at(scratch, end);
		end += label + 1;
		if (label == 0)
			break;
		/* 255 bytes (RFC 1035 section 2.3.4), of which the root takes one. */
		if (label > 63 || end - start > 254)
			return;
	}
	end += 4;
	if (label || end > captured || end > message->offset + message->len)
		return;
	/* By way of memory: see forgotten. */
	*(volatile u16 *)&message->question_len = end - start;
	len = *(volatile u16 *)&message->question_len;
#pragma nounroll
	for (i = 0; i < QUESTION_WORDS; i++) {
		u32 left = len - i * 8;

		word = u64_at(scratch, start + i * 8) | 0x2020202020202020ULL;
		if (left < 8)
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
			word &= (1ULL << (left * 8 & 63)) - 1;
#else
			word &= ~(~0ULL >> (left * 8 & 63));
#endif
		hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
		hash ^= hash >> 29;
		if (left <= 8)
			break;
	}
	message->type = bpf_ntohs(u16_at(scratch, start + len - 4));
	/* Type and class once more, as they are: the bit of letters' cases tells A from SRV. */
	hash = (hash ^ u32_at(scratch, start + len - 4)) * 0x9e3779b97f4a7c15ULL;
	message->question_hash = hash ^ hash >> 32;
}

/* The bit of a port in the table of DNS ports; ports in network byte order. */
static __always_inline bool is_dns_port(__be16 port)
{
	u32 word = bpf_ntohs(port) >> 6;
	u64 *bits = dns_ports.lookup(&word);

	return bits && *bits >> (bpf_ntohs(port) & 63) & 1;
}

static __always_inline bool is_tunnel_port(__be16 port)
{
	return port == bpf_htons(4789) || port == bpf_htons(8472) || port == bpf_htons(6081);
}

/*
 * Finds the UDP or TCP header from the IP header at offset on, and fills the
 * addresses as source and destination. Returns its offset, or 0: neither is in
 * here, a later fragment, or cut off. IP in IP goes one level deep; of an ICMP
 * error, the packet that it complains about is looked at.
 */
static __always_inline u32 find_transport(struct scratch *scratch, u32 captured, u32 offset,
					  struct message *message)
{
	u8 version = u8_at(scratch, offset) >> 4, protocol;
	u32 i;

	if (version == 4 && u8_at(scratch, offset + 9) == PROTO_IPIP) {
		offset += (u8_at(scratch, offset) & 15) * 4;
		version = u8_at(scratch, offset) >> 4;
	}
	if (version == 4 && u8_at(scratch, offset + 9) == PROTO_ICMP) {
		offset += (u8_at(scratch, offset) & 15) * 4;
		if (u8_at(scratch, offset) != ICMP_DEST_UNREACH ||
		    u8_at(scratch, offset + 1) == ICMP_FRAG_NEEDED)
			return 0;
		offset += ICMP_HLEN;
		message->unreachable = 1;
	} else if (version == 6 && u8_at(scratch, offset + 6) == PROTO_ICMPV6) {
		offset += 40;
		if (u8_at(scratch, offset) != ICMPV6_DEST_UNREACH)
			return 0;
		offset += ICMP_HLEN;
		message->unreachable = 1;
	}
	if (message->unreachable)
		version = u8_at(scratch, offset) >> 4;
	message->family = version;
	if (version == 4) {
		u32 header = (u8_at(scratch, offset) & 15) * 4;

		protocol = u8_at(scratch, offset + 9);
		if (header < 20)
			return 0;
		if (u16_at(scratch, offset + 6) & bpf_htons(0x1fff))
			return 0;
		message->end = offset + bpf_ntohs(u16_at(scratch, offset + 2));
		map_ipv4(message->flow.client_addr, u32_at(scratch, offset + 12));
		map_ipv4(message->flow.server_addr, u32_at(scratch, offset + 16));
		offset += header;
	} else if (version == 6) {
		protocol = u8_at(scratch, offset + 6);
		message->end = offset + 40 + bpf_ntohs(u16_at(scratch, offset + 4));
		copy_ipv6(message->flow.client_addr, scratch, offset + 8);
		copy_ipv6(message->flow.server_addr, scratch, offset + 24);
		offset += 40;
#pragma nounroll
		for (i = 0; i < MAX_EXTENSION_HEADERS; i++) {
			/* Hop-by-hop, routing, destination options; fragment. */
			if (protocol == 0 || protocol == 43 || protocol == 60) {
				protocol = u8_at(scratch, offset);
				offset += (u8_at(scratch, offset + 1) + 1) * 8;
			} else if (protocol == 44) {
				if (u16_at(scratch, offset + 2) & bpf_htons(0xfff8))
					return 0;
				protocol = u8_at(scratch, offset);
				offset += 8;
			} else {
				break;
			}
		}
	} else {
		return 0;
	}
	if (protocol != PROTO_UDP && protocol != PROTO_TCP)
		return 0;
	message->protocol = protocol;
	return offset + UDP_HLEN <= captured ? offset : 0;
}

static __always_inline void count(u32 which)
{
	u64 *value = counters.lookup(&which);

	if (value)
		__sync_fetch_and_add(value, 1);
}

/* A scratch buffer for as long as one program runs, or NULL, which is counted. */
static __always_inline struct scratch *scratch_acquire(void)
{
	struct scratch *scratch;
	u32 i, which;

#pragma nounroll
	for (i = 0; i < SCRATCHES; i++) {
		which = i;
		scratch = scratches.lookup(&which);
		if (scratch && !*(volatile u64 *)&scratch->in_use) {
			*(volatile u64 *)&scratch->in_use = 1;
			return scratch;
		}
	}
	count(COUNT_PREEMPTED);
	return NULL;
}

static __always_inline void scratch_release(struct scratch *scratch)
{
	*(volatile u64 *)&scratch->in_use = 0;
}

enum parsed { NOT_DNS, UNDECODABLE, IS_DNS, IS_SEGMENT };

/* Swaps client and server, which stand as source and destination so far. */
static __always_inline void turn_round(struct flow *flow)
{
	u32 i;

#pragma unroll
	for (i = 0; i < 2; i++) {
		__be64 address = flow->client_addr[i];

		flow->client_addr[i] = flow->server_addr[i];
		flow->server_addr[i] = address;
	}
}

/* The TCP segment at message->offset, of the client's where its destination is a DNS port. */
static __always_inline enum parsed parse_segment(struct scratch *scratch, struct message *message)
{
	__be16 from = u16_at(scratch, message->offset), to = u16_at(scratch, message->offset + 2);

	if (is_dns_port(to)) {
		message->direction = QUERY;
		message->flow.client_port = from;
		message->flow.server_port = to;
	} else if (is_dns_port(from)) {
		message->direction = RESPONSE;
		turn_round(&message->flow);
		message->flow.client_port = to;
		message->flow.server_port = from;
	} else {
		return NOT_DNS;
	}
	if (message->unreachable)
		return message->direction == QUERY ? IS_SEGMENT : NOT_DNS;
	return message->offset + TCP_HLEN <= message->captured ? IS_SEGMENT : NOT_DNS;
}

/* Reads the DNS message of a packet, through VXLAN or Geneve where tunnels is set. */
static __always_inline enum parsed parse(struct source *source, struct scratch *scratch,
					 struct message *message, bool tunnels)
{
	u32 captured = source_read(source, 0, scratch->bytes, PACKET_BYTES), udp, udp_len;
	__be16 from, to;

	if (captured < 20 + UDP_HLEN)
		return NOT_DNS;
	message->captured = captured;
	message->unreachable = 0;
	udp = find_transport(scratch, captured, 0, message);
	if (!udp)
		return NOT_DNS;
	udp = forgotten(&message->offset, udp);
	if (tunnels && message->protocol == PROTO_UDP && is_tunnel_port(u16_at(scratch, udp + 2))) {
		u32 inner = udp + UDP_HLEN + 8;

		if (u16_at(scratch, udp + 2) == bpf_htons(6081))
			inner += (u8_at(scratch, udp + UDP_HLEN) & 63) * 4;
		if (inner + ETH_HLEN + 20 > captured)
			return NOT_DNS;
		udp = find_transport(scratch, captured,
				     forgotten(&message->offset, inner + ETH_HLEN), message);
		if (!udp)
			return NOT_DNS;
	}
	udp = forgotten(&message->offset, udp);
	if (message->protocol == PROTO_TCP)
		return parse_segment(scratch, message);
	from = u16_at(scratch, udp);
	to = u16_at(scratch, udp + 2);
	message->offset = udp + UDP_HLEN;
	captured = message->captured;
	udp_len = bpf_ntohs(u16_at(scratch, udp + 4));
	if (udp_len < UDP_HLEN + DNS_HLEN || message->offset + DNS_HLEN > captured)
		return is_dns_port(to) || is_dns_port(from) ? UNDECODABLE : NOT_DNS;
	message->direction = u8_at(scratch, message->offset + 2) & DNS_QR ? RESPONSE : QUERY;
	if (!is_dns_port(message->direction == QUERY ? to : from))
		return is_dns_port(to) || is_dns_port(from) ? UNDECODABLE : NOT_DNS;
	message->len = udp_len - UDP_HLEN;
	/* What comes after it, such as an Ethernet frame's padding, is not the message's. */
	if (source->len > message->offset + message->len)
		source->len = message->offset + message->len;
	if (source->linear > source->len)
		source->linear = source->len;
	message->id = u16_at(scratch, message->offset);
	message->flags = u16_at(scratch, message->offset + 2);
	if (message->direction == QUERY) {
		message->flow.client_port = from;
		message->flow.server_port = to;
	} else {
		turn_round(&message->flow);
		message->flow.client_port = to;
		message->flow.server_port = from;
	}
	hash_question(scratch, message);
	if (message->unreachable) {
		/* The query, on its way back: its addresses are as the client's were. */
		if (message->direction == RESPONSE)
			return NOT_DNS;
		message->direction = RESPONSE;
		message->flags = 0;
	}
	return IS_DNS;
}

#endif
