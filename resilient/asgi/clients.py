"""Whom a request is counted by: functions of the scope, for `key=` of `RateLimit`, `Keyed` and others.

Only what a trusted party has written says who the client is. The server tells the address of the *peer*, whoever
has opened the connection. Behind proxies that is the last proxy, and the address of the client stands in a header,
to which each proxy appends the address that it has seen:

    client --> proxy 1 --> proxy 2 --> application        peer: proxy 2
                                                          X-Forwarded-For: (anything), client, proxy 1

What the client has sent itself stands on the left. So the header is read from the right, and no further than our
own proxies have written it. Each entry is believed because the one to its right is; so at the first entry that is
no address we stop, and count by the last good one. Everybody who cannot be told apart shares one key: nobody is
without a limit.

Servers may do the same. uvicorn's `--proxy-headers`, which is on by default for proxies on 127.0.0.1, replaces the
peer by what it has read. Then `client_address` alone is right, if `--forwarded-allow-ips` names the proxies. With
`*` there, uvicorn takes the leftmost entry, which is the client's own invention.

Keys are short. Texts that a client has chosen become a hash with a secret of this process, so that keys neither
fill the memory nor tell an API key.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from functools import lru_cache, partial
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import islice
from secrets import token_bytes
from typing import Any, TypeAlias, overload
from uuid import UUID

from resilient import options
from resilient.asgi.addresses import LONGEST, Address, Hop, Network, elements, entries, node_of, read
from resilient.asgi.exchange import Scope
from resilient.component import _show

Key: TypeAlias = Callable[[Scope], Hashable]

UNKNOWN = "unknown"
"""The key of all who have no address: on a Unix socket, or in a test client."""

_HEADERS = ("x-forwarded-for", "forwarded")
_OPTIONS = ("trusted_hops", "trusted_networks", "header", "ipv6_prefix")
_DEFAULTS = (None, None, "x-forwarded-for", 64)
_UNIX = "unix"
_REMEMBERED = 4096  # addresses that need not be parsed again
_SECRET = token_bytes(32)
_DIGEST = 16
_SHORT = 64  # characters of a user's name that are kept as they are
_SHORT_BITS = 128


class _Clients:
    """Tells clients apart by the address of the peer.

    Args:
        recipe: The options that it was made with, without defaults.
        prefix: How many bits of an IPv6 address count.
        networks: Our proxies.
    """

    def __init__(self, recipe: dict[str, Any], prefix: int, networks: Iterable[Network] = ()) -> None:
        self._recipe = recipe
        self._hop = partial(read, prefix, tuple(networks))
        self._read = lru_cache(_REMEMBERED)(self._hop)

    def __call__(self, scope: Scope) -> str:
        """Return the key of the peer."""
        client = scope.get("client")  # _peer(), in place, as this is asked for every request
        host = client[0] if client else None
        return ((self._read(host) if host and len(host) <= LONGEST else None) or _NOBODY).key

    def _peer(self, scope: Scope) -> Hop:
        host = _host(scope)
        # What the server calls the peer may have come from a header, and then it may be any text.
        return (self._read(host) if host and len(host) <= LONGEST else None) or _NOBODY

    def __repr__(self) -> str:
        return _shown(client_address, (), self._recipe)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(client_address, **self._recipe), ()


class _BehindProxies(_Clients):
    """What is the same for a number of proxies and for networks of them.

    Args:
        header: The header that they write.
    """

    def __init__(self, recipe: dict[str, Any], prefix: int, header: str, networks: Iterable[Network] = ()) -> None:
        super().__init__(recipe, prefix, networks)
        self._name = header.encode("ascii")
        self._split, self._read_entry = entries, self._read
        if header == "forwarded":
            self._split, self._read_entry = elements, lru_cache(_REMEMBERED)(self._hop_of_element)

    def _hop_of_element(self, element: str) -> Hop | None:
        return self._hop(node_of(element))

    def _hops(self, scope: Scope) -> Iterator[Hop]:
        """Give what the header says, from the right, up to the first entry that is no address."""
        name = self._name
        lines = [value for field, value in scope.get("headers", ()) if field == name]
        if not lines:
            return
        read = self._read_entry
        for entry in self._split(b",".join(lines).decode("latin-1")):
            hop = read(entry) if len(entry) <= LONGEST else None
            if hop is None:
                return
            yield hop


class _BehindHops(_BehindProxies):
    """Believes the last entries of a header, however the peer is called."""

    def __init__(self, recipe: dict[str, Any], prefix: int, header: str, hops: int) -> None:
        super().__init__(recipe, prefix, header)
        self._number = hops

    def __call__(self, scope: Scope) -> str:
        found = None
        for hop in islice(self._hops(scope), self._number):
            found = hop
        return self._peer(scope).key if found is None else found.key


class _BehindNetworks(_BehindProxies):
    """Believes what proxies from known networks have written."""

    def __init__(
        self, recipe: dict[str, Any], prefix: int, header: str, networks: Iterable[Network], *, unix: bool
    ) -> None:
        super().__init__(recipe, prefix, header, networks)
        self._unix = unix

    def __call__(self, scope: Scope) -> str:
        found = self._peer(scope)
        if found.trusted or (self._unix and not _host(scope)):
            for found in self._hops(scope):
                if not found.trusted:
                    break
        return found.key


@overload
def client_address(scope: Scope, /) -> str: ...


@overload
def client_address(
    *,
    trusted_hops: int | None = None,
    trusted_networks: Iterable[str | Network | Address] | None = None,
    header: str = "x-forwarded-for",
    ipv6_prefix: int = 64,
) -> Callable[[Scope], str]: ...


def client_address(
    scope: Scope | None = None,
    /,
    *,
    trusted_hops: int | None = None,
    trusted_networks: Iterable[str | Network | Address] | None = None,
    header: str = "x-forwarded-for",
    ipv6_prefix: int = 64,
) -> str | Callable[[Scope], str]:
    """Count by the address of the client.

        RateLimit("100/minute", key=client_address)                      # no proxy, or one that the server knows
        RateLimit("100/minute", key=client_address(trusted_hops=1))      # behind one proxy
        RateLimit("100/minute", key=client_address(trusted_networks=["10.0.0.0/8"]))

    Without options nobody is trusted, and the address is that of the peer. The server may have replaced the peer
    by what it has read from a header, as uvicorn does with `--proxy-headers`: it must not trust more than is
    trusted here, so best leave all of it to one of the two.

    IPv4 addresses inside IPv6 (`::ffff:192.0.2.1`, and `64:ff9b::` of NAT64) count as IPv4. Ports and zones do not
    count. A peer without an address, on a Unix socket or in a test client, is `"unknown"`, and all such share that
    key.

    Args:
        scope: The scope of a request; policies give it. Not together with options.
        trusted_hops: How many proxies of ours every request comes through, each of which appends the address that
            it has seen: the client is the entry with this number from the right. With fewer entries it is the
            leftmost, without the header the peer. The peer itself is not looked at, so it may be a Unix socket;
            the application must not be reachable but through all the proxies, as who goes round one chooses the
            address. Default None.
        trusted_networks: The networks of our proxies, and only theirs, such as `["10.0.0.0/8", "2001:db8::/48"]`;
            `"unix"` stands for a peer on a Unix socket. If the peer is in them, the client is the first entry from
            the right that is not, or the leftmost if all are. Default None.
        header: What the proxies write: `"x-forwarded-for"` (default) or `"forwarded"` (RFC 7239). The other one is
            never read, as a client can send it.
        ipv6_prefix: How many bits of an IPv6 address count, 1 to 128. Default 64: that is what one client has
            at least, and it can use all of the addresses.

    Returns:
        For a scope the key, such as `"192.0.2.1"` or `"2001:db8::/64"`; else a function of the scope.

    Raises:
        TypeError: An option of the wrong type, or options together with a scope.
        ValueError: A bad option, or both kinds of trust.
    """
    given = (trusted_hops, trusted_networks, header, ipv6_prefix)
    if scope is None:
        return _configured(*given)
    if given != _DEFAULTS or not hasattr(scope, "get"):
        allowed = "options by keyword and nothing else, or only the scope of a request"
        raise options.refuse("client_address", "scope", scope, allowed, TypeError)
    return _of_peer(scope)


class _Header:
    """Tells clients apart by a header."""

    def __init__(self, name: str, otherwise: Key) -> None:
        self.name = name
        self.otherwise = otherwise
        self._name = name.encode("ascii")
        self._start = _hash(b"header", self._name)

    def __call__(self, scope: Scope) -> Hashable:
        """Return the key of a request."""
        own = self._name
        values = [value.strip(b" \t") for name, value in scope.get("headers", ()) if name == own]
        if not any(values):
            return self.otherwise(scope)
        digest = self._start.copy()
        for value in values:
            digest.update(b"%d:%b" % (len(value), value))
        return "header", digest.digest()

    def __repr__(self) -> str:
        return _shown(header, (self.name,), self._recipe())

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(header, self.name, **self._recipe()), ()

    def _recipe(self) -> dict[str, Any]:
        return {} if self.otherwise is client_address else {"otherwise": self.otherwise}


def header(name: str, *, otherwise: Key = client_address) -> Key:
    """Count by the value of a header, such as an API key.

    A client can send any value. So this limits honest clients; where the value is not checked before, limit by the
    address as well, or each made-up value has a limit of its own.

    Args:
        name: The name of the header, in any case.
        otherwise: By what to count a request that does not have it, or only an empty one: another function of the
            scope. Default `client_address`.

    Returns:
        A function of the scope. Its keys are `("header", digest)`: 16 bytes, made with a secret of this process,
        so that neither keys nor whatever shows them tell the value. Several lines are different from one.

    Raises:
        TypeError: An option of the wrong type.
        ValueError: The name is not the name of a header.
    """
    _refuse_scope(name, 'header("x-api-key")', "header")
    name = options.header_name("header", "name", name)
    return _Header(name, options.function("header", "otherwise", otherwise))


class _User:
    """Tells clients apart by who they have proved to be."""

    def __init__(self, get: Callable[[Scope], Any], otherwise: Key) -> None:
        self.get = get
        self.otherwise = otherwise

    def __call__(self, scope: Scope) -> Hashable:
        """Return the key of a request."""
        who = self.get(scope)
        if who is None or who == "":
            return self.otherwise(scope)
        if isinstance(who, UUID):
            who = str(who)
        if isinstance(who, str):
            return "user", who if len(who) <= _SHORT else _hash(
                b"str", who.encode("utf-8", "surrogatepass")
            ).digest()
        if isinstance(who, int) and not isinstance(who, bool):
            return "user", who if who.bit_length() <= _SHORT_BITS else _hash(b"int", b"%x" % who).digest()
        raise TypeError(f"{self!r}: the user is {type(who).__name__}; return a str, an int, a UUID, or None")

    def __repr__(self) -> str:
        return _shown(user, (), self._recipe())

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(user, **self._recipe()), ()

    def _recipe(self) -> dict[str, Any]:
        recipe: dict[str, Any] = {} if self.get is _identity else {"get": self.get}
        return recipe if self.otherwise is client_address else {**recipe, "otherwise": self.otherwise}


def user(get: Callable[[Scope], Any] | None = None, *, otherwise: Key = client_address) -> Key:
    """Count by the user who has been authenticated, further out than the policy.

    Args:
        get: A function of the scope that returns who it is: a str, an int or a UUID; None or `""` for nobody.
            Default None: the `identity` of `scope["user"]`, as Starlette's `AuthenticationMiddleware` sets it, or
            its `display_name` if it has no identity; nobody unless the user `is_authenticated`.
        otherwise: By what to count requests of nobody: another function of the scope. Default `client_address`.

    Returns:
        A function of the scope. Its keys are `("user", who)`; more than 64 characters or 128 bits become a hash.

    Raises:
        TypeError: An option of the wrong type. From the function: `get` returned something else.
    """
    _refuse_scope(get, "user()", "user")
    return _User(
        _identity if get is None else options.function("user", "get", get),
        options.function("user", "otherwise", otherwise),
    )


# -- addresses ----------------------------------------------------------------------------------------------------


def _host(scope: Scope) -> str | None:
    """Return what the server calls the peer; on a Unix socket that is nothing."""
    client = scope.get("client")
    return client[0] if client else None


# -- the rest -----------------------------------------------------------------------------------------------------


def _refuse_scope(option: Any, right: str, wrong: str) -> None:
    """Refuse what a request calls `key=header` with, without showing it: credentials are in it."""
    if isinstance(option, MutableMapping):
        raise TypeError(f"{wrong} makes a key of a scope, and is none; write key={right} in place of key={wrong}")


def _configured(hops: Any, networks: Any, header: Any, prefix: Any) -> Callable[[Scope], str]:
    owner = "client_address"
    if networks is not None:
        networks = _members(networks)
    given = zip(_OPTIONS, (hops, networks, header, prefix), _DEFAULTS, strict=True)
    recipe = {option: value for option, value, default in given if value != default}
    if isinstance(prefix, bool) or not isinstance(prefix, int):
        raise options.refuse(owner, "ipv6_prefix", prefix, "an int from 1 to 128", TypeError)
    if not 1 <= prefix <= 128:  # noqa: PLR2004 - as the message says
        raise options.refuse(owner, "ipv6_prefix", prefix, "an int from 1 to 128")
    if header not in _HEADERS:
        raise options.refuse(owner, "header", header, '"x-forwarded-for" or "forwarded"')
    if hops is not None and networks is not None:
        raise options.refuse(owner, "trusted_networks", networks, "either trusted_hops or trusted_networks")
    if hops is not None:
        return _BehindHops(recipe, prefix, header, options.whole(owner, "trusted_hops", hops))
    if networks is not None:
        trusted = [_network(each) for each in networks if each != _UNIX]
        return _BehindNetworks(recipe, prefix, header, trusted, unix=_UNIX in networks)
    if header != _HEADERS[0]:
        raise options.refuse(
            owner, "header", header, "trusted_hops or trusted_networks with it: whose header is it?"
        )
    return _Clients(recipe, prefix)


_ALLOWED_NETWORKS = 'the networks of your proxies, such as ["10.0.0.0/8", "2001:db8::1", "unix"]'


def _members(networks: Any) -> list[Any]:
    if isinstance(networks, str | bytes | Network) or not isinstance(networks, Iterable):
        raise options.refuse("client_address", "trusted_networks", networks, _ALLOWED_NETWORKS, TypeError)
    members = list(networks)
    for each in members:
        if not isinstance(each, str | Network | Address):
            raise options.refuse("client_address", "trusted_networks", each, _ALLOWED_NETWORKS, TypeError)
    if not members:
        raise options.refuse("client_address", "trusted_networks", networks, _ALLOWED_NETWORKS)
    return members


def _network(member: str | Network | Address) -> Network:
    try:
        network = ip_network(member)
    except ValueError as error:
        allowed = f"{_ALLOWED_NETWORKS} ({error})"
        raise options.refuse("client_address", "trusted_networks", member, allowed) from None
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:  # noqa: PLR2004 - 128 - 32
        mapped = network.network_address.ipv4_mapped
        network = network if mapped is None else IPv4Network((mapped, network.prefixlen - 96))
    if network.prefixlen == 0:
        allowed = f"{_ALLOWED_NETWORKS}: everybody's addresses are in this one"
        raise options.refuse("client_address", "trusted_networks", member, allowed)
    return network


def _identity(scope: Scope) -> Any:
    """Return the identity of Starlette's user."""
    who = scope.get("user")
    if not getattr(who, "is_authenticated", False):
        return None
    for attribute in ("identity", "display_name"):
        try:
            return getattr(who, attribute)
        except NotImplementedError:
            pass
    return None


def _hash(kind: bytes, text: bytes) -> Any:
    digest = blake2b(key=_SECRET, digest_size=_DIGEST, person=kind)
    digest.update(b"%d:%b" % (len(text), text))
    return digest


def _shown(factory: Callable[..., Any], positional: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    shown = [_show(value) for value in positional] + [f"{name}={_show(value)}" for name, value in keywords.items()]
    return f"{factory.__name__}({', '.join(shown)})"


_NOBODY = Hop(UNKNOWN, trusted=False)
_of_peer = _Clients({}, 64)
