"""Ports for servers that take a number before they bind it."""

import os
import random
import socket

# Below what systems give to outgoing connections (Linux from 32768 on) and above Ray's workers (10002 to 19999): of
# the ports between, nothing takes one by chance in the moment until the server has it.
_FIRST, _LAST = 20_000, 32_000


def free_ports(count: int) -> list[int]:
    """So many ports of this machine that nobody listens on."""
    found: list[int] = []
    candidates = random.Random(os.urandom(8)).sample(range(_FIRST, _LAST), _LAST - _FIRST)
    while len(found) < count:
        port = candidates.pop()
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    return found
