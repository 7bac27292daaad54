"""Allowed Host headers: the defence against DNS rebinding.

A browser lets a page ask the address that the page came from. The owner of a name can let it point to 127.0.0.1 once
the page is loaded, and then that page reads what a local server answers. The Host header still has the foreign name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from telechat_twins.core.errors import UserError

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{0,5})?")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


class Hosts:
    """``None`` in place of it: any name. ``names`` beside this machine's own for itself."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = {_plain(name) for name in names}

    def allows(self, header: str | None) -> bool:
        """Whether a Host header names this server; its port may be any, as behind a forwarded one."""
        match = _HOST.fullmatch(header or "")
        return match is not None and (_plain(match[1]) in self._names or is_local(match[1]))


def is_local(host: str) -> bool:
    """Whether a name or an address means the machine itself, wherever it is asked."""
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
    """What ``--allowed-host`` and the address that is listened at come to; None: every name.

    Bound to this machine only, its own names and ``host`` (the value of --host) are allowed without being given.
    Bound to more, names are unknown here and all are allowed until some are given. "*" allows all. UserError for a
    value that is not a name.
    """
    for name in given:
        if name != "*" and not _NAME.fullmatch(name) and _address(name) is None:
            raise UserError(f"--allowed-host: expected a name or an address without a port, found {name!r}")
    if "*" in given or not (given or is_local(listening)):
        return None
    return Hosts([*given, host] if is_local(listening) else given)


def _plain(host: str) -> str:
    return host.strip("[]").lower().removesuffix(".")
