"""Whether a Ray cluster answers at an address: Ray itself waits for one for half a minute, and at times for ever.

The question is the first one that Ray's own clients ask: the cluster's id, as a call of gRPC, which is HTTP/2. A server
that speaks another protocol, one of gRPC that knows no such call, and one that says nothing give themselves away.
"""

from __future__ import annotations

import os
import socket
import time

from moebench.cluster.settings import split_address
from moebench.errors import UsageError, first_line

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId"

# Frames of HTTP/2 (RFC 9113, section 6): their types, and two of their flags.
_DATA, _HEADERS, _RESET, _SETTINGS, _GO_AWAY, _LAST_TYPE = 0, 1, 3, 4, 7, 9
_END_STREAM, _END_HEADERS = 1, 4

# Header fields as they are packed (RFC 7541, appendix A), and how gRPC says that it knows no such call.
_POST_HTTP, _STATUS_200 = b"\x83\x86", b"\x88"
_UNIMPLEMENTED = b"grpc-status\x0212"


def refuse_silence(address: str, patience: float) -> None:
    """Says what Ray would find out late: that nobody is at HOST:PORT, or nobody who speaks its language.

    Args:
        address: HOST:PORT.
        patience: seconds to wait for an answer.

    Raises:
        UsageError: what is there does not answer as a cluster does.
    """
    host, port = split_address(address)
    try:
        with socket.create_connection((host, port), timeout=patience) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            known = _may_be_ray(connection, patience)
    except OSError as error:
        reason = error.strerror or first_line(error) or type(error).__name__
        raise UsageError(f"no Ray cluster answers at {address} ({reason}); is its address right?") from None
    if not known:
        raise UsageError(f"what answers at {address} is no Ray cluster; `ray status` on its head shows the address")


def _may_be_ray(connection: socket.socket, patience: float) -> bool:
    """Asks for the cluster's id; False if the answer is none that a cluster would give.

    Raises:
        TimeoutError: no answer came in time.
    """
    fields = ((":path", _CALL), (":authority", "ray"), ("te", "trailers"), ("content-type", "application/grpc"))
    headers = _POST_HTTP + b"".join(_literal(*field) for field in fields)
    connection.sendall(
        _PREFACE
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, 1, headers)
        + _frame(_DATA, _END_STREAM, 1, bytes(5))  # a message of length 0
    )
    deadline, seen = time.monotonic() + patience, b""
    while True:
        if len(seen) >= 4 and seen[3] > _LAST_TYPE:
            return False  # another protocol's bytes
        size = int.from_bytes(seen[:3], "big")
        if len(seen) >= 9 + size:
            kind, payload, seen = seen[3], seen[9 : 9 + size], seen[9 + size :]
            if kind == _HEADERS:
                # Also a call that is turned down for its missing token has status 200; a web server's answer has not.
                return _STATUS_200 in payload[:8] and _UNIMPLEMENTED not in payload
            if kind in (_RESET, _GO_AWAY):
                return False
            continue
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        more = connection.recv(4096)
        if not more:
            return False
        seen += more


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _literal(name: str, value: str) -> bytes:
    """A header field that is not indexed (RFC 7541, section 6.2.2), both strings without Huffman's code."""
    return b"\x00" + b"".join(bytes((len(text),)) + text.encode() for text in (name, value))
