# SPDX-License-Identifier: Apache-2.0
"""Which members of kernel structs the programs read, as macros for bpf/."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

from tracer.kernel.btf import Btf, BtfError

_PARAMETERS_BEFORE_REASON = 3

# Macro name: where the member lies. Without these nothing can be traced.
_NEEDED = {
    "OFFSET_sk_buff_sk": ("sk_buff", "sk"),
    "OFFSET_sk_buff_dev": ("sk_buff", "dev"),
    "OFFSET_sk_buff_len": ("sk_buff", "len"),
    "OFFSET_sk_buff_data_len": ("sk_buff", "data_len"),
    "OFFSET_sk_buff_head": ("sk_buff", "head"),
    "OFFSET_sk_buff_end": ("sk_buff", "end"),
    "OFFSET_sk_buff_next": ("sk_buff", "next"),
    "OFFSET_skb_shared_info_frag_list": ("skb_shared_info", "frag_list"),
    "OFFSET_skb_shared_info_nr_frags": ("skb_shared_info", "nr_frags"),
    "OFFSET_sk_buff_data": ("sk_buff", "data"),
    "OFFSET_sk_buff_transport_header": ("sk_buff", "transport_header"),
    "OFFSET_sk_buff_network_header": ("sk_buff", "network_header"),
    "OFFSET_sock_net": ("sock", "__sk_common.skc_net.net"),
    "OFFSET_net_device_ifindex": ("net_device", "ifindex"),
    "OFFSET_net_device_net": ("net_device", "nd_net.net"),
    "OFFSET_net_inum": ("net", "ns.inum"),
    "OFFSET_task_group_leader": ("task_struct", "group_leader"),
    "OFFSET_task_comm": ("task_struct", "comm"),
    "OFFSET_task_tgid": ("task_struct", "tgid"),
    "OFFSET_task_cgroups": ("task_struct", "cgroups"),
    "OFFSET_css_set_dfl_cgrp": ("css_set", "dfl_cgrp"),
    "OFFSET_cgroup_kn": ("cgroup", "kn"),
    "OFFSET_kernfs_node_id": ("kernfs_node", "id"),
}


# The registers that carry a function's first arguments, as members of struct pt_regs.
ARGUMENTS = {
    "x86_64": ("di", "si", "dx"),
    "aarch64": ("regs", "regs", "regs"),  # an array: x0, x1, x2
}


class UnknownMachine(BtfError):
    """What must be known of a machine to trace on it is not. The message says what."""


def kernel_offsets(btf: Btf, *, kprobes: bool, machine: str | None = None) -> dict[str, int]:
    """Macro name to byte offset. Raises BtfError when a member that must be there is not.

    `machine` is what uname calls that kernel's; None: this one.
    """
    offsets = {macro: btf.offset(*where) for macro, where in _NEEDED.items()}
    offsets.update(_conntrack_offsets(btf))
    with suppress(BtfError):
        offsets["OFFSET_sock_cookie"] = btf.offset("sock", "__sk_common.skc_cookie.counter")
    with suppress(BtfError):  # only with CONFIG_SOCK_CGROUP_DATA
        offsets["OFFSET_sock_cgrp_data"] = btf.offset("sock", "sk_cgrp_data")
    if kprobes:
        offsets.update(_argument_offsets(btf, machine or platform.machine()))
    # kfree_skb(void *, skb, location, reason): the reason came with 5.17 (c504e5c2f964).
    if btf.parameter_count("btf_trace_kfree_skb") > _PARAMETERS_BEFORE_REASON:
        offsets["HAVE_DROP_REASON"] = 1
    return offsets


def _argument_offsets(btf: Btf, machine: str) -> dict[str, int]:
    names = ARGUMENTS.get(machine)
    if names is None:
        raise UnknownMachine(
            f"how functions of {machine} get their arguments is not known; use --hooks tracepoint"
        )
    step = 8 if len(set(names)) == 1 else 0
    return {
        f"OFFSET_argument_{i}": btf.offset("pt_regs", name) + i * step
        for i, name in enumerate(names)
    }


def _conntrack_offsets(btf: Btf) -> dict[str, int]:
    """Offsets for reading NAT; none where the kernel, or its loaded modules, lack conntrack."""
    try:
        nfct = btf.offset("sk_buff", "_nfct")
    except BtfError:
        return {}
    module = Path("/sys/kernel/btf/nf_conntrack")
    for types in (btf, module):
        try:
            source = types if isinstance(types, Btf) else Btf.load(types, base=btf)
            # tuplehash[IP_CT_DIR_ORIGINAL] is the first element.
            original = source.offset("nf_conn", "tuplehash") + source.offset(
                "nf_conntrack_tuple_hash", "tuple"
            )
        except BtfError:
            continue
        return {"OFFSET_sk_buff_nfct": nfct, "OFFSET_nf_conn_original": original}
    return {}
