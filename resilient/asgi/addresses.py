"""Addresses of clients, as servers and proxies write them: read, and made into short keys.

Pure functions of texts that anybody may have written. What is no address is None, and nothing raises.
"""

import re
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, NamedTuple, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

LONGEST: Final = 300
"""The characters of an address with all that may stand around it, at most."""

_NODE = re.compile(  # RFC 7239 6, but for what is no address, and an IPv6 address on its own
    r"(?: \[ (?P<six> [0-9A-Fa-f:.]+ (?: %[^\]\s]+ )? ) \] | (?P<four> [0-9.]+ ) )"
    r"(?: : (?: [0-9]{1,5} | _[\w.-]+ ) )?",
    re.ASCII | re.VERBOSE,
)
_PAIR = re.compile(  # RFC 7239 4; without quotes, more is accepted than tokens
    r"[ \t]* (?: (?P<name> [!#$%&'*+.^_`|~0-9A-Za-z-]+ ) ="
    r""" (?P<value> "(?:[^"\\]|\\.)*" | [^\s",;]* ) [ \t]* )? (?: ; | \Z )""",
    re.VERBOSE,
)
_NAT64 = IPv6Network("64:ff9b::/96")


class Hop(NamedTuple):
    """An address: the key that it stands for, and whether it is one of our proxies."""

    key: str
    trusted: bool


def read(prefix: int, networks: tuple[Network, ...], text: str) -> Hop | None:
    """Read an address, or return None if it is none."""
    address = address_of(text)
    if address is None:
        return None
    return Hop(_shown(address, prefix), any(address in network for network in networks))


def address_of(text: str) -> Address | None:
    """Read an address; it may be in brackets (IPv6), have a port, or an obfuscated one (RFC 7239 6)."""
    text = text.strip(" \t")
    match = _NODE.fullmatch(text)
    try:
        if match is None:
            address = ip_address(text)
        else:
            address = IPv4Address(match["four"]) if match["six"] is None else IPv6Address(match["six"])
    except ValueError:
        return None
    return (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address


def _shown(address: Address, prefix: int) -> str:
    if isinstance(address, IPv4Address):
        return str(address)
    if address in _NAT64:
        return str(IPv4Address(int(address) & 0xFFFF_FFFF))
    return str(IPv6Network((int(address), prefix), strict=False))


def entries(text: str) -> Iterator[str]:
    """Give what is between commas, from the right."""
    end = len(text)
    while end >= 0:
        comma = text.rfind(",", 0, end)
        yield text[comma + 1 : end]
        end = comma


def elements(text: str) -> Iterator[str]:
    """Give the elements of `Forwarded`, from the right.

    To read a list with quoted strings from the left is no way: a client that sends a single quote would hide what
    the proxies have appended to it. From the right the quotes of the proxies come first, and theirs are in pairs.
    """
    end = len(text)
    while end >= 0:
        comma = _comma(text, end)
        yield text[comma + 1 : end]
        end = comma


def _comma(text: str, end: int) -> int:
    """Return where the last comma outside of quotes is; -1 if it is not near enough for an entry that is read."""
    nearest = max(end - LONGEST - 1, 0)  # else a client could have us go through thousands of quotes
    comma = text.rfind(",", nearest, end)
    while (quote := text.rfind('"', max(comma + 1, nearest), end)) >= 0:
        end = text.rfind('="', nearest, quote)  # within quotes there would be a backslash between the two
        if end < 0:
            return -1
        if end < comma:
            comma = text.rfind(",", nearest, end)
    return comma


def node_of(element: str) -> str:
    """Return the `for=` of one element, without its quotes; `""` if there is none, or anything is malformed."""
    found: str | None = None
    at = 0
    while at < len(element):
        pair = _PAIR.match(element, at)
        if pair is None:
            return ""
        if pair["name"] and pair["name"].lower() == "for":
            if found is not None:
                return ""
            found = pair["value"]
        at = pair.end()
    if found is None:
        return ""
    return re.sub(r"\\(.)", r"\1", found[1:-1]) if found.startswith('"') else found
