"""Refuse connections to other machines in every Python process that the tests start."""

import socket

_connect = socket.socket.connect


def _only_here(self: socket.socket, address: object) -> None:
    if self.family != socket.AF_UNIX and isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
        raise OSError(f"a test tried to reach {address}")
    _connect(self, address)  # type: ignore[arg-type]


socket.socket.connect = _only_here  # type: ignore[method-assign]
