/* SPDX-License-Identifier: GPL-2.0-only */
/* Classic BPF opcodes (Documentation/networking/filter.rst), which BCC's own bpf.h builds on. */
#ifndef DNSTRACE_BPF_COMMON_H
#define DNSTRACE_BPF_COMMON_H

#define BPF_CLASS(code) (7 & (code))
#define BPF_LD 0
#define BPF_LDX 1
#define BPF_ST 2
#define BPF_STX 3
#define BPF_ALU 4
#define BPF_JMP 5
#define BPF_RET 6
#define BPF_MISC 7

#define BPF_SIZE(code) (0x18 & (code))
#define BPF_W 0
#define BPF_H 8
#define BPF_B 0x10

#define BPF_MODE(code) (0xe0 & (code))
#define BPF_IMM 0
#define BPF_ABS 0x20
#define BPF_IND 0x40
#define BPF_MEM 0x60
#define BPF_LEN 0x80
#define BPF_MSH 0xa0

#define BPF_OP(code) (0xf0 & (code))
#define BPF_ADD 0
#define BPF_SUB 0x10
#define BPF_MUL 0x20
#define BPF_DIV 0x30
#define BPF_OR 0x40
#define BPF_AND 0x50
#define BPF_LSH 0x60
#define BPF_RSH 0x70
#define BPF_NEG 0x80
#define BPF_MOD 0x90
#define BPF_XOR 0xa0
#define BPF_JA 0
#define BPF_JEQ 0x10
#define BPF_JGT 0x20
#define BPF_JGE 0x30
#define BPF_JSET 0x40

#define BPF_SRC(code) (8 & (code))
#define BPF_K 0
#define BPF_X 8

#endif
