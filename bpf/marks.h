/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef DNSTRACE_MARKS_H
#define DNSTRACE_MARKS_H

/*
 * Constants that user space writes into each loaded copy of a program, so that
 * the verifier drops what that copy does not need.
 */
#define MARK_NETNS 0x646e737472616301ULL
#define MARK_L2_HLEN 0x646e737472616302ULL
#define MARK_HOOK 0x646e737472616303ULL /* enum hop_kind */
#define MARK_SKB_ARGUMENT 0x646e737472616305ULL /* 0 or 1 */
#define MARK_VERDICT 0x646e737472616304ULL /* whatever lets the packet pass at this hook */
#define MARK_PULL 0x646e737472616307ULL /* 1: kprobes will read this packet further on */
#define MARK_UDP 0x646e737472616308ULL /* 0: other hooks see to UDP */
#define MARK_FAMILY 0x646e737472616309ULL /* of socket addresses: 4 or 6 */
#define MARK_CONNECTS 0x646e73747261630aULL /* 1: an address for all that is sent from now on */
#define MARK_READ_TASK 0x646e737472616306ULL /* 1: no helper tells of the process here */

static __always_inline u64 patched(u64 mark)
{
	asm volatile("" : "+r"(mark));
	return mark;
}

#endif
