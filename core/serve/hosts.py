"""Allowed Host headers: defence against DNS rebinding.

A browser lets a page read from the host name that it was loaded from. The owner of that name can point its DNS entry to
127.0.0.1 after the page has been loaded, and the page then reads the answers of a server on the user's machine. Such
requests are recognised by their Host header, which still has the foreign name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from telechat_twins.core.errors import UserError

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{0,5})?")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


class Hosts:
    """Set of allowed host names: names of the machine for itself (``is_local``), and ``names``."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = {_plain(name) for name in names}

    def allows(self, header: str | None) -> bool:
        """Whether a Host header has an allowed name. Any port is accepted, since ports may be forwarded."""
        match = _HOST.fullmatch(header or "")
        return match is not None and (_plain(match[1]) in self._names or is_local(match[1]))


def is_local(host: str) -> bool:
    """Whether a name or an address means the machine itself on every machine: localhost and loopback addresses."""
    name = _plain(host)
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761
        return True
    address = _address(name)
    if address is None:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(_plain(name))
    except ValueError:
        return None


def allowed_hosts(listening: str, host: str, given: Sequence[str]) -> Hosts | None:
    """The allowed host names of a server that listens on the address ``listening``; None: any name.

    ``host``: the value of --host; ``given``: those of --allowed-host, of which "*" allows any name. A server on a
    loopback address allows local names, ``host`` and the given ones. A server on another address, whose names are not
    known here, allows any name unless some are given. UserError for a value that is not a name.
    """
    for name in given:
        if name != "*" and not _NAME.fullmatch(name) and _address(name) is None:
            raise UserError(f"--allowed-host: expected a name or an address without a port, found {name!r}")
    if "*" in given or not (given or is_local(listening)):
        return None
    return Hosts([*given, host] if is_local(listening) else given)


def _plain(host: str) -> str:
    return host.strip("[]").lower().removesuffix(".")
