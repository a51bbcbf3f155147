/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * DNS over TCP: which connection a segment belongs to, and what of it user
 * space is sent, which puts the messages together.
 */
#ifndef DNSTRACE_SEGMENTS_H
#define DNSTRACE_SEGMENTS_H

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16
#define SEGMENT_PIECES 256 /* 64 KiB, as much as the kernel lets one packet be as a rule */
#define SEQ_WINDOW (1 << 24) /* how far ahead or behind a segment of the same connection may be */

static __always_inline struct connection *connection_of(struct flow *flow, u64 *id)
{
	u64 *known = connection_ids.lookup(flow);

	if (!known)
		return NULL;
	*id = *known;
	return connections.lookup(id);
}

/* What stands for a client's last connection among the flows. */
static __always_inline void client_alone(struct flow *client, struct flow *flow)
{
	client->client_addr[0] = flow->client_addr[0];
	client->client_addr[1] = flow->client_addr[1];
	client->client_port = flow->client_port;
}

/* The last connection of the client, where conntrack does not say what NAT did. */
static __always_inline struct connection *connection_by_client(struct scratch *scratch,
							       struct flow *flow, u32 seq, u64 *id)
{
	struct connection *connection;

	client_alone(&scratch->client, flow);
	connection = connection_of(&scratch->client, id);
	if (!connection || seq - connection->next_seq + SEQ_WINDOW >= 2 * SEQ_WINDOW)
		return NULL;
	return connection;
}

/*
 * A connection not seen before, filled in but for its flow as it was asked for.
 * NULL: there is no room, which is counted.
 */
static __always_inline struct connection *add_connection(struct scratch *scratch, struct flow *flow,
							 u64 *id)
{
	struct connection *fresh = &scratch->fresh;

	if (connections.insert(id, fresh)) {
		count(COUNT_CONNECTIONS_FULL);
		return NULL;
	}
	if (connection_ids.update(&fresh->asked, id)) {
		connections.delete(id);
		count(COUNT_CONNECTIONS_FULL);
		return NULL;
	}
	if (!same_flow(flow, &fresh->asked))
		connection_ids.update(flow, id);
	client_alone(&scratch->client, &fresh->asked);
	connection_ids.update(&scratch->client, id);
	return connections.lookup(id);
}

/*
 * Whether the bytes of a segment are to be sent along here. Each byte passes
 * many hops and is needed once: from the client's socket where it is on this
 * machine, else from the server's, else from the devices.
 */
static __always_inline bool carries(struct connection *connection, struct message *message,
				    struct place *place)
{
	bool query = message->direction == QUERY;
	u8 rank = CARRIER_DEVICE;

	if (place->kind == HOP_SEND)
		rank = query ? CARRIER_CLIENT : CARRIER_SERVER;
	else if (place->kind == HOP_RECEIVE)
		rank = query ? CARRIER_SERVER : CARRIER_CLIENT;
	else if (place->kind == HOP_DROP)
		return false;
	if (rank > connection->carrier)
		connection->carrier = rank;
	return rank >= connection->carrier;
}

/* Sends a segment to user space, in pieces where its bytes go along. */
static __always_inline void emit_segment(struct source *source, struct scratch *scratch, u32 offset,
					 bool carried)
{
	volatile struct pieces *pieces = &scratch->pieces;
	struct segment_record *record;
	u32 i;

	pieces->left = scratch->segment.len;
	pieces->seq = scratch->segment.seq;
	pieces->offset = offset;
	pieces->carried = carried;
#pragma nounroll
	for (i = 0; i < SEGMENT_PIECES; i++) {
		u32 piece = pieces->left;

		if (pieces->carried && piece > SEGMENT_BYTES)
			piece = SEGMENT_BYTES;
		record = segment_ring.ringbuf_reserve(sizeof(*record));
		if (!record) {
			count(COUNT_SEGMENTS_LOST);
			return;
		}
		read_kernel(&record->segment, sizeof(record->segment), &scratch->segment);
		record->segment.seq = pieces->seq;
		record->segment.len = piece;
		record->segment.captured = 0;
		if (pieces->carried && piece)
			record->segment.captured =
				source_read(source, pieces->offset, record->payload, SEGMENT_BYTES);
		segment_ring.ringbuf_submit(record, NO_WAKEUP);
		pieces->left -= piece;
		if (!pieces->left)
			return;
		pieces->seq += piece;
		pieces->offset += piece;
	}
	count(COUNT_SEGMENTS_LOST);
}

/* What one segment, seen at one hook, means: a connection begun, and a record. */
static __always_inline void segment_seen(struct source *source, u64 skb, struct scratch *scratch,
					 struct message *message, struct place *place)
{
	u32 offset = message->offset, header = (u8_at(scratch, offset + 12) >> 4) * 4, seq, end;
	u8 flags = message->unreachable ? 0 : u8_at(scratch, offset + 13);
	bool sent = place->kind == HOP_SEND && message->direction == QUERY;
	bool begins = (flags & (TCP_SYN | TCP_ACK)) == TCP_SYN && message->direction == QUERY;
	bool carried;
	struct segment *segment = &scratch->segment;
	struct connection *connection, *fresh = &scratch->fresh;
	u64 id = 0;

	/* An error that nobody takes, or that was taken, is given up like any other packet. */
	if (message->unreachable && place->kind == HOP_DROP)
		return;
	/* The length that IP gives is 0 where a segment is larger than 64 KiB. */
	end = message->end > offset && message->end <= source->len ? message->end : source->len;
	if (!message->unreachable) {
		if (header < TCP_HLEN)
			return;
		/* What comes after it, such as an Ethernet frame's padding, is not its own. */
		source->len = end;
		if (source->linear > end)
			source->linear = end;
	}
	offset += header;
	segment->len = !message->unreachable && end > offset ? end - offset : 0;
	if (!segment->len && !message->unreachable && !(flags & (TCP_SYN | TCP_FIN | TCP_RST)))
		return;
	seq = bpf_ntohl(u32_at(scratch, message->offset + 4)) + !!(flags & TCP_SYN);

	connection = connection_of(&message->flow, &id);
	if (connection && begins && connection->first_seq != seq)
		connection = NULL; /* the last one that had these addresses */
	fresh->asked = message->flow;
	if (!connection && message->direction == QUERY) {
		if (original_flow(skb, message->family, PROTO_TCP, &fresh->asked))
			connection = connection_of(&fresh->asked, &id);
		if (!connection && !sent && !message->unreachable)
			connection = connection_by_client(scratch, &fresh->asked, seq, &id);
		if (connection && begins && connection->first_seq != seq)
			connection = NULL;
		if (connection)
			connection_ids.update(&message->flow, &id);
	}
	if (!connection) {
		struct sender sender = {};

		/* Of an answer alone nobody can tell what NAT did to it. */
		if (message->direction == RESPONSE || place->kind == HOP_DROP || is_paused())
			return;
		if (sent) {
			/* Only a SYN is certain to leave in the context of its process. */
			sender.netns = place->netns;
			if (begins) {
				meant_flow(place->socket, &fresh->asked);
				identify(&sender);
				process_name(sender.comm);
			} else {
				sender.cgroup_id = cgroup_of_sock(place->socket);
			}
			if (!is_wanted(&sender)) {
				if (begins)
					count(COUNT_FILTERED);
				return;
			}
		} else if (!is_unfiltered()) {
			return;
		}
		id = place->t_ns;
		fresh->cgroup_id = sender.cgroup_id;
		fresh->netns = sender.netns;
		fresh->pid = sender.pid;
		fresh->first_seq = begins ? seq : 0;
		fresh->next_seq = seq;
		fresh->carrier = CARRIER_DEVICE;
		__builtin_memcpy(fresh->comm, sender.comm, sizeof(fresh->comm));
		connection = add_connection(scratch, &message->flow, &id);
		if (!connection)
			return;
	}
	if (sent) {
		connection->next_seq = seq + segment->len;
		if (!connection->netns) {
			connection->netns = place->netns;
			connection->cgroup_id = cgroup_of_sock(place->socket);
		}
	}
	carried = carries(connection, message, place);
	/* That one ends must be known, but not where that passes. */
	if (!segment->len && flags & TCP_FIN && !(flags & TCP_RST) && !carried)
		return;
	segment->t_ns = place->t_ns;
	segment->connection = id;
	segment->cgroup_id = connection->cgroup_id;
	segment->socket_cgroup_id = cgroup_of_sock(place->socket);
	segment->drop_location = place->drop_location;
	segment->client_netns = connection->netns;
	segment->pid = connection->pid;
	segment->ifindex = place->ifindex;
	segment->netns = place->netns;
	segment->drop_reason = place->drop_reason;
	segment->seq = seq;
	segment->kind = place->kind;
	segment->direction = message->direction;
	segment->tcp_flags = flags;
	segment->family = message->family;
	segment->unreachable = message->unreachable;
	__builtin_memcpy(segment->comm, connection->comm, sizeof(segment->comm));
	segment->asked = connection->asked;
	segment->flow = message->flow;
	if (place->kind == HOP_RECEIVE && message->direction == QUERY && segment->len)
		serves(segment->socket_cgroup_id);
	emit_segment(source, scratch, offset, carried);
}

#endif
