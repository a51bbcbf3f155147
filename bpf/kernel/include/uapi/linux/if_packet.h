/* SPDX-License-Identifier: GPL-2.0-only */
/* BCC includes this, and needs nothing of it. */
