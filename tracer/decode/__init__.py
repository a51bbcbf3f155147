# SPDX-License-Identifier: Apache-2.0
"""Wire bytes to names, types, rcodes and records, in DNS's own words.

Whatever the bytes are, a value comes back: what is malformed or cut carries a `problem`. Names are
absolute, in presentation format with their case kept, and so is all data: printable ASCII only.
The words of an extended error are in whatever language the server speaks, and printable as well.

The same questions come again and again, so both questions and responses are remembered, in tables
that are emptied when they are full.
"""

from tracer.decode.edns import Edns, ExtendedError, Option
from tracer.decode.questions import Question, flags, opcode, question
from tracer.decode.responses import Response, query_edns, rcode, response
from tracer.decode.words import rcode_named, type_named

__all__ = [
    "Edns",
    "ExtendedError",
    "Option",
    "Question",
    "Response",
    "flags",
    "opcode",
    "query_edns",
    "question",
    "rcode",
    "rcode_named",
    "response",
    "type_named",
]
