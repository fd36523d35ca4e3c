"""NBD: numbers and fixed layouts (the NBD protocol document, sections "Values" and the message layouts).

All integers on the wire are big-endian.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import Final

# -- handshake -----------------------------------------------------------------------------------

GREETING: Final = b"NBDMAGICIHAVEOPT"
INIT_MAGIC: Final = 0x4E42444D41474943
"""``NBDMAGIC``, the first thing any server says."""
OLDSTYLE_MAGIC: Final = 0x00420281861253
"""What follows it where nothing is negotiated."""
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
OPTION_MAGIC: Final = 0x49484156454F5054
"""``IHAVEOPT``, before every option."""

FIXED_NEWSTYLE: Final = 1 << 0
NO_ZEROES: Final = 1 << 1

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERROR: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_ERROR + 1
REP_ERR_POLICY: Final = REP_ERROR + 2
REP_ERR_INVALID: Final = REP_ERROR + 3
REP_ERR_PLATFORM: Final = REP_ERROR + 4
REP_ERR_TLS_REQD: Final = REP_ERROR + 5
REP_ERR_UNKNOWN: Final = REP_ERROR + 6
REP_ERR_SHUTDOWN: Final = REP_ERROR + 7
REP_ERR_BLOCK_SIZE_REQD: Final = REP_ERROR + 8
REP_ERR_TOO_BIG: Final = REP_ERROR + 9

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

OPTION: Final = Struct(">QII")  # IHAVEOPT, option, length of its data
OPTION_REPLY: Final = Struct(">QIII")  # magic, option, reply type, length of its data

MAX_OPTIONS: Final = 64
"""Options one client may send: a dozen suffice for any real one."""
MAX_OPTION_DATA: Final = 64 << 10
"""Longest data of one option: sixteen names of the longest length."""
MAX_STRING: Final = 4096
"""Longest name the protocol allows, in bytes."""

# -- transmission --------------------------------------------------------------------------------

FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_CACHE: Final = 1 << 10
FLAG_SEND_FAST_ZERO: Final = 1 << 11

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF

CHUNK_DONE: Final = 1 << 0
CHUNK_NONE: Final = 0
CHUNK_OFFSET_DATA: Final = 1
CHUNK_OFFSET_HOLE: Final = 2
CHUNK_BLOCK_STATUS: Final = 5
CHUNK_ERROR: Final = (1 << 15) + 1

REQUEST: Final = Struct(">IHHQQI")  # magic, command flags, type, cookie, offset, length
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, error, cookie
CHUNK: Final = Struct(">IHHQI")  # magic, flags, type, cookie, length of what follows
DATA_CHUNK: Final = Struct(">IHHQIQ")  # a chunk header, then the offset of the data that follows
HOLE_CHUNK: Final = Struct(">IHHQIQI")  # a chunk header, then offset and length of the hole
ERROR_CHUNK: Final = Struct(">IHHQIIH")  # a chunk header, then error and length of a message
STATUS_CHUNK: Final = Struct(">IHHQII")  # a chunk header, then the context's id; descriptors follow
DESCRIPTOR: Final = Struct(">II")  # length, flags

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
"""Before a bitmap's name. These two contexts are described with QEMU (docs/interop/nbd), not with the protocol."""
BASE_ALLOCATION_ID: Final = 1
"""A context's id is its place among those of its export, counted from 1."""
STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1
STATE_DIRTY: Final = 1 << 0

_WIRE_ERRORS: Final = {
    errno.EPERM: 1,
    errno.EROFS: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
    errno.EOVERFLOW: 75,
    errno.ENOTSUP: 95,
    errno.ESHUTDOWN: 108,
}


def wire_error(number: int) -> int:
    """The protocol's number for an errno; EIO for those it has none for."""
    return _WIRE_ERRORS.get(number, 5)
