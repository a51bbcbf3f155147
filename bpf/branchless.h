/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Choices without branches. In a loop, older verifiers follow both sides of each
 * branch, in every round anew.
 */
#ifndef DNSTRACE_BRANCHLESS_H
#define DNSTRACE_BRANCHLESS_H

/* 1 where two numbers are equal, else 0. */
static __always_inline u64 equal(u64 a, u64 b)
{
	u64 differ = a ^ b;

	asm volatile("" : "+r"(differ));
	/* Numbers here have at most 32 bits. */
	return (differ - 1) >> 63;
}

/* One of two, by a bit. Clang would make a branch of it if it saw that it is one. */
static __always_inline u64 either(u64 bit, u64 where_1, u64 where_0)
{
	asm volatile("" : "+r"(bit));
	return where_0 + bit * (where_1 - where_0);
}

/* 1 where a number is not 0. Clang would make a branch of it if it saw what is meant. */
static __always_inline u64 some(u64 number)
{
	u64 negative = -number;

	asm volatile("" : "+r"(negative));
	return (number | negative) >> 63;
}

#endif
