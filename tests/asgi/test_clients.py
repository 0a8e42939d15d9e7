"""Whom a request is counted by: what is believed of what a client or a proxy says, and what never is."""

import copy
import ipaddress
import itertools
import pickle
import re
import sys
import uuid

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from starlette.authentication import BaseUser, SimpleUser, UnauthenticatedUser
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from resilient import RateLimit
from resilient.asgi import clients
from resilient.asgi.clients import client_address, header, user

PEER = "203.0.113.7"


def scope(*lines, peer=PEER, name="x-forwarded-for", **more):
    """Return the scope of a request with these lines of a header."""
    fields = [(name.encode(), line if isinstance(line, bytes) else line.encode("latin-1")) for line in lines]
    return {
        "type": "http",
        "client": None if peer is None else (peer, 50000),
        "headers": [(b"host", b"shop.example"), *fields, (b"accept", b"*/*")],
        **more,
    }


def element(address):
    """Return an address as an element of `Forwarded`."""
    return f'for="[{address}]"' if ":" in address else f"for={address}"


# -- nobody is trusted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "key"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
        ("64:ff9b::192.0.2.1", "192.0.2.1"),
        ("64:ff9b:1::192.0.2.1", "64:ff9b:1::/64"),
        ("2001:db8:0:1:2:3:4:5", "2001:db8:0:1::/64"),
        ("2001:DB8:0:1::", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("testclient", "unknown"),
        ("192.0.2.1.5", "unknown"),
        ("192.0.2.01", "unknown"),
        ("garbage;", "unknown"),
        ("1" * 100_000, "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_peer(peer, key):
    assert client_address(scope(peer=peer)) == key
    assert client_address(ipv6_prefix=64)(scope(peer=peer)) == key
    assert client_address()(scope(peer=peer)) == key
    assert client_address(trusted_hops=1)(scope(peer=peer)) == key
    assert client_address(trusted_networks=["10.0.0.0/8"])(scope(peer=peer)) == key


@pytest.mark.parametrize("reader", [client_address, client_address(trusted_hops=1), client_address()])
def test_a_scope_may_say_nothing(reader):
    assert reader({"type": "http"}) == "unknown"
    assert reader({"type": "http", "client": None, "headers": []}) == "unknown"
    assert reader({"type": "http", "client": [PEER, 1], "headers": ()}) == PEER


@pytest.mark.parametrize(
    ("prefix", "key"),
    [(1, "::/1"), (48, "2001:db8:1::/48"), (56, "2001:db8:1:200::/56"), (128, "2001:db8:1:203:4::5/128")],
)
def test_how_much_of_an_ipv6_address_counts(prefix, key):
    assert client_address(ipv6_prefix=prefix)(scope(peer="2001:db8:1:203:4::5")) == key
    assert client_address(trusted_hops=1, ipv6_prefix=prefix)(scope("2001:db8:1:203:4::5")) == key


def test_one_client_can_not_use_all_its_addresses():
    assert len({client_address(scope(peer=f"2001:db8::{number:x}")) for number in range(100)}) == 1


FIELDS = ["x-forwarded-for", "forwarded", "x-real-ip", "cf-connecting-ip", "true-client-ip", "x_forwarded_for"]


@pytest.mark.parametrize("name", FIELDS)
def test_nothing_is_believed_of_anybody(name):
    for value in ("6.6.6.6", "for=6.6.6.6", "127.0.0.1", "6.6.6.6, 9.9.9.9"):
        told = scope(value, name=name)
        assert client_address(told) == PEER
        assert client_address(ipv6_prefix=48)(told) == PEER
        assert client_address(trusted_networks=["10.0.0.0/8", "unix"])(told) == PEER
        assert client_address(trusted_networks=["10.0.0.0/8"], header="forwarded")(told) == PEER


@pytest.mark.parametrize("name", FIELDS[1:])
def test_only_the_header_that_is_named_is_read(name):
    told = scope("for=6.6.6.6" if name == "forwarded" else "6.6.6.6", name=name)
    assert client_address(trusted_hops=1)(told) == PEER
    assert client_address(trusted_networks=[PEER])(told) == PEER
    if name != "forwarded":
        assert client_address(trusted_hops=1, header="forwarded")(told) == PEER


def test_forwarded_instead_of_the_other():
    told = scope("6.6.6.6")
    assert client_address(trusted_hops=1, header="forwarded")(told) == PEER
    assert client_address(trusted_networks=[PEER], header="forwarded")(told) == PEER


# -- a number of proxies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hops", "lines", "key"),
    [
        (1, [], PEER),
        (1, ["6.6.6.6"], "6.6.6.6"),
        (1, ["6.6.6.6, 9.9.9.9"], "9.9.9.9"),
        (1, ["6.6.6.6,9.9.9.9"], "9.9.9.9"),
        (1, ["6.6.6.6 ,\t9.9.9.9\t "], "9.9.9.9"),
        (1, ["6.6.6.6", "9.9.9.9"], "9.9.9.9"),
        (1, ["9.9.9.9", "6.6.6.6, 8.8.8.8"], "8.8.8.8"),
        (2, ["6.6.6.6, 9.9.9.9, 10.0.0.1"], "9.9.9.9"),
        (2, ["6.6.6.6, 9.9.9.9", "10.0.0.1"], "9.9.9.9"),
        (2, ["6.6.6.6", "9.9.9.9", "10.0.0.1"], "9.9.9.9"),
        (3, ["6.6.6.6, 9.9.9.9, 10.0.0.1"], "6.6.6.6"),
        # Fewer entries than proxies: the leftmost.
        (2, ["9.9.9.9"], "9.9.9.9"),
        (5, ["8.8.8.8, 9.9.9.9"], "8.8.8.8"),
        # What is no address ends the way.
        (1, [""], PEER),
        (1, ["garbage"], PEER),
        (1, ["garbage;, "], PEER),
        (1, ["6.6.6.6, unknown"], PEER),
        (1, ["6.6.6.6, _hidden"], PEER),
        (1, ["6.6.6.6,"], PEER),
        (1, [",9.9.9.9"], "9.9.9.9"),
        (2, [",9.9.9.9"], "9.9.9.9"),
        (2, ["6.6.6.6, , 9.9.9.9"], "9.9.9.9"),
        (2, ["6.6.6.6, unknown, 9.9.9.9"], "9.9.9.9"),
        (2, ["unknown, 9.9.9.9"], "9.9.9.9"),
        (3, ["6.6.6.6, unknown, 8.8.8.8, 9.9.9.9"], "8.8.8.8"),
        (1, ["for=9.9.9.9"], PEER),
        (1, ["9.9.9.9;"], PEER),
        (1, ['"9.9.9.9"'], PEER),
        (1, ["9.9.9.9 6.6.6.6"], PEER),
        (1, ["shop.example"], PEER),
        (1, ["9.9.9.9\n"], PEER),
        (1, ["9.9.9.9\x00"], PEER),
        (1, [b"\xff\xfe"], PEER),
        (1, ["\u00b9.1.1.1"], PEER),
        (1, ["9.9.9.9" + " " * 100_000], PEER),
        (1, ["9" * 100_000], PEER),
        (1, [" 9.9.9.9"], "9.9.9.9"),
        # All that an address may look like.
        (1, ["9.9.9.9:443"], "9.9.9.9"),
        (1, ["9.9.9.9:_secret"], "9.9.9.9"),
        (1, ["9.9.9.9:"], PEER),
        (1, ["9.9.9.9:123456"], PEER),
        (1, ["9.9.9.9:4x"], PEER),
        (1, ["9.9.9"], PEER),
        (1, ["9.9.9.256"], PEER),
        (1, ["9.9.9.09"], PEER),
        (1, ["151587081"], PEER),
        (1, ["0x09.9.9.9"], PEER),
        (1, ["9.9.9.9/32"], PEER),
        (1, ["2001:db8::1"], "2001:db8::/64"),
        (1, ["[2001:db8::1]"], "2001:db8::/64"),
        (1, ["[2001:db8::1]:443"], "2001:db8::/64"),
        (1, ["[fe80::1%eth0]:443"], "fe80::/64"),
        (1, ["fe80::1%eth0"], "fe80::/64"),
        (1, ["[fe80::1%]"], PEER),
        (1, ["[2001:db8::1"], PEER),
        (1, ["2001:db8::1]"], PEER),
        (1, ["[2001:db8::1]443"], PEER),
        (1, ["[9.9.9.9]"], PEER),
        (1, ["[]"], PEER),
        (1, ["2001:db8::/64"], PEER),
        (1, ["::ffff:9.9.9.9"], "9.9.9.9"),
        (1, ["[::ffff:9.9.9.9]:1"], "9.9.9.9"),
        (1, ["[64:ff9b::9.9.9.9]"], "9.9.9.9"),
    ],
)
def test_hops(hops, lines, key):
    assert client_address(trusted_hops=hops)(scope(*lines)) == key


@pytest.mark.parametrize("peer", [None, "", "testclient", "10.0.0.1"])
def test_the_last_proxy_may_be_on_a_unix_socket(peer):
    assert client_address(trusted_hops=1)(scope("6.6.6.6, 9.9.9.9", peer=peer)) == "9.9.9.9"


# -- networks of proxies ------------------------------------------------------------------------------------------

OURS = ["10.0.0.0/8", "192.0.2.5", "2001:db8:5::/48", "::ffff:172.16.0.0/108"]


@pytest.mark.parametrize(
    ("peer", "lines", "key"),
    [
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["9.9.9.9"], "9.9.9.9"),
        ("10.0.0.1", ["6.6.6.6, 9.9.9.9"], "9.9.9.9"),
        ("10.0.0.1", ["6.6.6.6, 9.9.9.9, 10.2.0.0"], "9.9.9.9"),
        ("10.0.0.1", ["6.6.6.6", "9.9.9.9", "10.2.0.0, 10.3.0.0"], "9.9.9.9"),
        ("10.0.0.1", ["10.6.6.6, 9.9.9.9, 10.2.0.0"], "9.9.9.9"),
        ("10.0.0.1", ["10.4.0.0, 10.3.0.0"], "10.4.0.0"),
        ("10.0.0.1", ["garbage"], "10.0.0.1"),
        ("10.0.0.1", ["6.6.6.6, garbage;, "], "10.0.0.1"),
        ("10.0.0.1", ["6.6.6.6, unknown, 10.2.0.0"], "10.2.0.0"),
        ("10.0.0.1", ["unknown, 9.9.9.9"], "9.9.9.9"),
        ("192.0.2.5", ["9.9.9.9"], "9.9.9.9"),
        ("192.0.2.6", ["9.9.9.9"], "192.0.2.6"),
        ("::ffff:10.0.0.1", ["9.9.9.9"], "9.9.9.9"),
        ("172.31.0.1", ["9.9.9.9"], "9.9.9.9"),
        ("172.32.0.1", ["9.9.9.9"], "172.32.0.1"),
        ("64:ff9b::10.0.0.1", ["9.9.9.9"], "10.0.0.1"),
        ("2001:db8:5::1", ["9.9.9.9, [2001:db8:5:ffff::]:80"], "9.9.9.9"),
        ("2001:db8:6::1", ["9.9.9.9"], "2001:db8:6::/64"),
        (PEER, ["10.0.0.2"], PEER),
        ("testclient", ["9.9.9.9"], "unknown"),
        ("", ["9.9.9.9"], "unknown"),
        (None, ["9.9.9.9"], "unknown"),
    ],
)
def test_networks(peer, lines, key):
    assert client_address(trusted_networks=OURS)(scope(*lines, peer=peer)) == key


@pytest.mark.parametrize(
    ("peer", "key"),
    [(None, "9.9.9.9"), ("", "9.9.9.9"), ("10.0.0.1", "9.9.9.9"), ("testclient", "unknown"), (PEER, PEER)],
)
def test_a_trusted_unix_socket(peer, key):
    reader = client_address(trusted_networks=["10.0.0.0/8", "unix"])
    assert reader(scope("6.6.6.6, 9.9.9.9, 10.1.1.1", peer=peer)) == key
    assert client_address(trusted_networks=["unix"])(scope(peer=None)) == "unknown"


@pytest.mark.parametrize(
    "network",
    [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_address("10.0.0.1"), "10.0.0.1", "10.0.0.1/255.255.255.255"],
)
def test_kinds_of_networks(network):
    for networks in ([network], {network}, iter([network])):
        assert client_address(trusted_networks=networks)(scope("9.9.9.9", peer="10.0.0.1")) == "9.9.9.9"


# -- Forwarded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hops", "lines", "key"),
    [
        (1, ["for=9.9.9.9"], "9.9.9.9"),
        (1, ["For=9.9.9.9"], "9.9.9.9"),
        (1, ["for=6.6.6.6, for=9.9.9.9"], "9.9.9.9"),
        (5, ["for=6.6.6.6, for=9.9.9.9"], "6.6.6.6"),
        (1, ["for=6.6.6.6", "for=9.9.9.9"], "9.9.9.9"),
        (2, ["for=6.6.6.6, for=9.9.9.9;proto=https, FOR=10.0.0.1"], "9.9.9.9"),
        (1, ["by=10.0.0.1;for=9.9.9.9;host=shop.example;proto=https"], "9.9.9.9"),
        (1, ["by=10.0.0.1 ; for=9.9.9.9 ; proto=https"], "9.9.9.9"),
        (1, [";for=9.9.9.9;;"], "9.9.9.9"),
        (1, ['for="9.9.9.9:443"'], "9.9.9.9"),
        (1, ['for="[2001:db8:cafe::17]:4711"'], "2001:db8:cafe::/64"),
        (1, ['for="[2001:db8:cafe::17]"'], "2001:db8:cafe::/64"),
        (1, ["for=[2001:db8:cafe::17]:80"], "2001:db8:cafe::/64"),
        (1, ['for="2001:db8:cafe::17"'], "2001:db8:cafe::/64"),
        (1, ['for="\\9.9.\\9.9"'], "9.9.9.9"),
        (1, ['for=9.9.9.9;ext="a,b;for=6.6.6.6"'], "9.9.9.9"),
        (1, ['for=9.9.9.9;ext="a\\", for=6.6.6.6"'], "9.9.9.9"),
        (1, ['for=9.9.9.9;ext="a\\\\"'], "9.9.9.9"),
        (1, ['ext="\\\\",for=9.9.9.9'], "9.9.9.9"),
        (2, ['for=8.8.8.8;ext=", for=6.6.6.6, ", for="9.9.9.9"'], "8.8.8.8"),
        (2, ["for=9.9.9.9;proto=https, for=10.0.0.1;proto=http"], "9.9.9.9"),
        # A quote that is never closed, or was never opened, does not hide what the proxy has written.
        (1, ['for="6.6.6.6, for=9.9.9.9'], "9.9.9.9"),
        (1, ['"', "for=9.9.9.9"], "9.9.9.9"),
        (1, ['for="', 'for="[2001:db8::1]:1"'], "2001:db8::/64"),
        (1, ['for="\\', "for=9.9.9.9"], "9.9.9.9"),
        (2, ['for="6.6.6.6, for=9.9.9.9'], "9.9.9.9"),
        (2, ['for=6.6.6.6", for=9.9.9.9'], "9.9.9.9"),
        (2, ['\\"', "for=9.9.9.9"], "9.9.9.9"),
        (1, ['"'], PEER),
        (1, ['\\""'], PEER),
        # Who stays hidden has the key of the one who says so.
        (1, ["for=unknown"], PEER),
        (1, ["for=_hidden"], PEER),
        (1, ['for="_gazonk"'], PEER),
        (2, ["for=unknown, for=9.9.9.9"], "9.9.9.9"),
        (1, ["for=6.6.6.6, proto=https"], PEER),
        (2, ["for=6.6.6.6, proto=https, for=9.9.9.9"], "9.9.9.9"),
        (1, ["for=6.6.6.6;for=9.9.9.9"], PEER),
        (1, ["for=6.6.6.6, for="], PEER),
        (1, ["for=6.6.6.6, "], PEER),
        (1, ["for"], PEER),
        (1, ["9.9.9.9"], PEER),
        (1, ["for =9.9.9.9"], PEER),
        (1, ["for= 9.9.9.9"], PEER),
        (1, ["for=9.9.9.9 proto=https"], PEER),
        (1, ["for=9.9.9.9;garbage"], PEER),
        (1, ['for="9.9.9.9"x'], PEER),
        (1, ["for=9.9.9.9\n"], PEER),
        (1, ["xfor=9.9.9.9"], PEER),
        (1, ["for=9.9.9.9;ext=" + "x" * 300], PEER),
        (1, [b"for=\xff"], PEER),
    ],
)
def test_forwarded(hops, lines, key):
    assert client_address(trusted_hops=hops, header="forwarded")(scope(*lines, name="forwarded")) == key


def test_forwarded_from_known_networks():
    reader = client_address(trusted_networks=OURS, header="forwarded")
    told = ["for=6.6.6.6", 'for=9.9.9.9, for="[2001:db8:5::1]:80"']
    assert reader(scope(*told, name="forwarded", peer="10.0.0.1")) == "9.9.9.9"
    assert reader(scope(*told, name="forwarded", peer="10.0.0.1;")) == "unknown"
    assert reader(scope(*told, name="forwarded")) == PEER
    assert reader(scope(name="forwarded", peer="10.0.0.1")) == "10.0.0.1"


# -- a server that replaces the peer ------------------------------------------------------------------------------


def replaced_by_uvicorn(told, trusted):
    """Return what uvicorn makes of a scope with `--proxy-headers --forwarded-allow-ips`."""
    given = []

    async def app(scope, receive, send):
        given.append(scope)

    with pytest.raises(StopIteration):
        ProxyHeadersMiddleware(app, trusted)(told, None, None).send(None)
    return given[0]


@pytest.mark.parametrize(
    ("trusted", "lines", "alone", "one_hop", "two_hops", "networks"),
    [
        ("127.0.0.1", [], "127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", ["6.6.6.6, 9.9.9.9"], "9.9.9.9", "9.9.9.9", "6.6.6.6", "9.9.9.9"),
        ("127.0.0.1", ["6.6.6.6, 9.9.9.9, 10.0.0.1"], "10.0.0.1", "10.0.0.1", "9.9.9.9", "9.9.9.9"),
        ("127.0.0.1,10.0.0.0/8", ["6.6.6.6, 9.9.9.9, 10.0.0.1"], "9.9.9.9", "10.0.0.1", "9.9.9.9", "9.9.9.9"),
        ("10.0.0.0/8", ["6.6.6.6, 9.9.9.9, 10.0.0.1"], "127.0.0.1", "10.0.0.1", "9.9.9.9", "9.9.9.9"),
        # As the docs warn: with `*` the peer is what the client has invented.
        ("*", ["6.6.6.6, 9.9.9.9, 10.0.0.1"], "6.6.6.6", "10.0.0.1", "9.9.9.9", "6.6.6.6"),
        ("*", ["garbage;, 9.9.9.9"], "unknown", "9.9.9.9", "9.9.9.9", "unknown"),
    ],
)
def test_after_uvicorn(*, trusted, lines, alone, one_hop, two_hops, networks):
    told = replaced_by_uvicorn(scope(*lines, peer="127.0.0.1"), trusted)
    assert client_address(told) == alone
    assert client_address(trusted_hops=1)(told) == one_hop
    assert client_address(trusted_hops=2)(told) == two_hops
    assert client_address(trusted_networks=["127.0.0.1", "10.0.0.0/8"])(told) == networks


# -- whatever a client sends --------------------------------------------------------------------------------------

addresses = st.ip_addresses().map(str)
texts = st.text(st.characters(max_codepoint=255), max_size=40) | st.text('",;=\\ []:.%for129_-', max_size=40)
entries = addresses | texts | addresses.map(element) | addresses.map("[{}]:1".format)
values = st.lists(st.lists(entries, max_size=4).map(", ".join), max_size=4)
peers = addresses | st.none() | st.just("testclient")


@given(values, peers)
def test_nobody_chooses_the_key_where_nobody_is_trusted(lines, peer):
    alone = client_address(scope(peer=peer))
    for name in FIELDS:
        assert client_address(scope(*lines, peer=peer, name=name)) == alone
    for name in clients._HEADERS:
        told = scope(*lines, peer=peer, name=name)
        reader = client_address(trusted_networks=["255.255.255.255"], header=name)
        assert alone == "255.255.255.255" or reader(told) == alone


@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded"])
@given(lines=values, seen=addresses, proxy=addresses, hops=st.integers(1, 3), note=texts, apart=st.booleans())
@example(lines=['"'], seen="9.9.9.9", proxy="10.0.0.1", hops=1, note='="', apart=True)
@example(lines=['for="\\'], seen="::1", proxy="10.0.0.1", hops=2, note="\\", apart=False)
def test_a_client_changes_nothing_of_what_proxies_append(name, *, lines, seen, proxy, hops, note, apart):
    appended = [seen] + [f"10.0.0.{number}" for number in range(1, hops)]
    if name == "forwarded":
        quoted = re.sub(r'(["\\])', r"\\\1", note)
        appended = [f'{element(each)};ext="{quoted}"' for each in appended]
    told = [*lines, *appended] if apart else [", ".join([*lines, *appended])]
    expected = client_address(scope(peer=seen))
    assert client_address(trusted_hops=hops, header=name)(scope(*told, peer=proxy, name=name)) == expected
    assume(ipaddress.ip_address(expected.partition("/")[0]) not in ipaddress.ip_network("10.0.0.0/8"))
    ours = client_address(trusted_networks=["10.0.0.0/8"], header=name)
    assert ours(scope(*told, peer="10.9.9.9", name=name)) == expected


@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded"])
@given(lines=st.lists(st.binary(max_size=60), max_size=3), peer=peers, hops=st.integers(1, 4))
def test_a_key_is_an_address_or_unknown(name, lines, peer, hops):
    readers = [
        client_address(trusted_hops=hops, header=name),
        client_address(trusted_networks=["128.0.0.0/1", "8000::/1", "unix"], header=name),
    ]
    for reader in readers:
        key = reader(scope(*lines, peer=peer, name=name))
        assert key == "unknown" or ipaddress.ip_network(key)


@pytest.mark.parametrize("line", [",", '"', '""', '","', '\\"', '"a', 'for="', "for=1.1.1.1;", "9.9.9.9,"])
@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded"])
def test_what_nobody_reads_of_a_long_header_costs_nothing(name, line):
    told = scope(
        line * (64_000 // len(line)), "9.9.9.9" if name == "x-forwarded-for" else "for=9.9.9.9", name=name
    )
    reader = client_address(trusted_hops=3, header=name)
    steps = 0

    def count(frame, event, arg):
        nonlocal steps
        steps += 1
        return count

    traced = sys.gettrace()
    sys.settrace(count)
    try:
        assert reader(told) == "9.9.9.9"
    finally:
        sys.settrace(traced)
    assert steps < 10_000  # lines of Python


@pytest.mark.parametrize("length", [300, 301])
def test_an_entry_may_be_long(length):
    for filling in ('for=8.8.8.8;ext="{}"', "for=8.8.8.8;ext={}"):
        long = filling.format("x" * (length - len(filling) + 2))
        assert len(long) == length
        for lines in (["for=6.6.6.6," + long + ",for=9.9.9.9"], ["for=6.6.6.6", long, "for=9.9.9.9"]):
            told = scope(*lines, name="forwarded")
            expected = "8.8.8.8" if length == 300 else "9.9.9.9"
            assert client_address(trusted_hops=2, header="forwarded")(told) == expected


def test_what_is_remembered_is_bounded():
    reader = client_address(trusted_hops=1, header="forwarded")
    for number in range(clients._REMEMBERED + 10):
        address = str(ipaddress.ip_address(number))
        assert reader(scope(element(address), name="forwarded", peer=address)) == address
        assert reader(scope(name="forwarded", peer=address)) == address
    assert reader._read.cache_info().currsize == clients._REMEMBERED
    assert reader._read_entry.cache_info().currsize == clients._REMEMBERED
    before = reader._read.cache_info(), reader._read_entry.cache_info()
    reader(scope("x" * 301, name="forwarded", peer="x" * 301))
    assert (reader._read.cache_info(), reader._read_entry.cache_info()) == before


# -- options of client_address ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TypeError, {"trusted_hops": "1"}, r"trusted_hops='1' is not allowed; give an int >= 1"),
        (TypeError, {"trusted_hops": True}, r"trusted_hops=True is not allowed; give an int >= 1"),
        (ValueError, {"trusted_hops": 0}, r"trusted_hops=0 is not allowed; give an int >= 1"),
        (
            ValueError,
            {"trusted_hops": 1, "trusted_networks": ["::1"]},
            "give either trusted_hops or trusted_networks",
        ),
        (
            TypeError,
            {"trusted_networks": "10.0.0.0/8"},
            r"trusted_networks='10.0.0.0/8' .* the networks of your prox",
        ),
        (TypeError, {"trusted_networks": b"10.0.0.0/8"}, r"trusted_networks=b'10.0.0.0/8' is not allowed"),
        (
            TypeError,
            {"trusted_networks": ipaddress.ip_network("::/8")},
            r"trusted_networks=IPv6Network.* is not all",
        ),
        (TypeError, {"trusted_networks": 1}, r"trusted_networks=1 is not allowed"),
        (TypeError, {"trusted_networks": [1]}, r"trusted_networks=1 is not allowed"),
        (TypeError, {"trusted_networks": [b"\x0a\x00\x00\x01"]}, r"trusted_networks=b'.*' is not allowed"),
        (ValueError, {"trusted_networks": []}, r"trusted_networks=\[\] is not allowed"),
        (ValueError, {"trusted_networks": ["10.0.0.1/8"]}, r"trusted_networks='10.0.0.1/8' .* has host bits set"),
        (ValueError, {"trusted_networks": ["*"]}, r"trusted_networks='\*' is not allowed"),
        (ValueError, {"trusted_networks": ["proxy.example"]}, r"trusted_networks='proxy.example' is not allowed"),
        (
            ValueError,
            {"trusted_networks": ["0.0.0.0/0"]},
            r"'0.0.0.0/0' .*: everybody's addresses are in this one",
        ),
        (ValueError, {"trusted_networks": ["::/0"]}, "'::/0' .*: everybody's addresses are in this one"),
        (ValueError, {"trusted_networks": ["::ffff:0:0/96"]}, "everybody's addresses are in this one"),
        (
            ValueError,
            {"header": "x-real-ip", "trusted_hops": 1},
            'header=\'x-real-ip\' .* "x-forwarded-for" or "forw',
        ),
        (ValueError, {"header": None, "trusted_hops": 1}, "header=None is not allowed"),
        (
            ValueError,
            {"header": "forwarded"},
            "header='forwarded' .* give trusted_hops or trusted_networks with it",
        ),
        (TypeError, {"ipv6_prefix": "64"}, "ipv6_prefix='64' is not allowed; give an int from 1 to 128"),
        (TypeError, {"ipv6_prefix": True}, "ipv6_prefix=True is not allowed"),
        (ValueError, {"ipv6_prefix": 0}, "ipv6_prefix=0 is not allowed"),
        (ValueError, {"ipv6_prefix": 129}, "ipv6_prefix=129 is not allowed"),
    ],
)
def test_bad_options(kind, options, message):
    with pytest.raises(kind, match=rf"^client_address: .*{message}"):
        client_address(**options)


def test_networks_that_are_nearly_everybody():
    for network in ("128.0.0.0/1", "::ffff:128.0.0.0/97", "8000::/1"):
        client_address(trusted_networks=[network])


@pytest.mark.parametrize(
    ("first", "options"),
    [
        (1, {}),
        (scope(), {"trusted_hops": 1}),
        (scope(), {"trusted_networks": ["10.0.0.0/8"]}),
        (scope(), {"header": "forwarded"}),
        (scope(), {"ipv6_prefix": 48}),
    ],
)
def test_options_go_by_keyword_and_without_a_scope(first, options):
    with pytest.raises(TypeError, match=r"client_address: scope=.* give options by keyword and nothing else"):
        client_address(first, **options)


# -- header -------------------------------------------------------------------------------------------------------


def keyed(*lines, **more):
    return header("X-API-Key")(scope(*lines, name="x-api-key", **more))


def test_a_header_is_a_key_of_bounded_size():
    for value in ("k", "k" * 1_000_000, "a:b\n\x00", b"\xff"):
        kind, digest = keyed(value)
        assert kind == "header"
        assert len(digest) == 16
        assert isinstance(digest, bytes)


def test_equal_headers_have_equal_keys():
    assert keyed("secret") == keyed("secret", peer="192.0.2.1") == keyed(" secret\t")
    one, *others = [
        keyed("secret"),
        keyed("Secret"),
        keyed("secret", ""),
        keyed("", "secret"),
        keyed("sec", "ret"),
        keyed("secre", "t"),
        keyed("sec, ret"),
        keyed("3:sec3:ret"),
        header("authorization")(scope("secret", name="authorization")),
    ]
    assert one not in others
    assert len(set(others)) == len(others)


@given(st.lists(st.binary(max_size=5), max_size=3), st.lists(st.binary(max_size=5), max_size=3))
def test_different_headers_have_different_keys(some, others):
    stripped = [[line.strip(b" \t") for line in lines] for lines in (some, others)]
    assume(all(map(any, stripped)))
    assert (keyed(*some) == keyed(*others)) == (stripped[0] == stripped[1])


def test_the_key_of_a_header_does_not_tell_it(monkeypatch):
    ours, long = keyed("secret"), user(lambda scope: "x" * 65)
    keys = {ours, long(scope())}
    assert "secret" not in repr(ours)
    assert len(clients._SECRET) == 32
    monkeypatch.setattr(clients, "_SECRET", bytes(32))  # as in another process: nobody can try values
    assert keys.isdisjoint({keyed("secret"), long(scope())})


@pytest.mark.parametrize("lines", [(), ("",), (" \t",), ("", " ")])
def test_without_the_header(lines):
    assert keyed(*lines) == PEER
    other = header("x-api-key", otherwise=client_address(trusted_hops=1))
    assert other(scope(*lines, name="x-api-key")) == PEER
    assert header("x-api-key", otherwise=header("cookie"))(scope("a=b", name="cookie"))[0] == "header"
    assert header("x-api-key")({"type": "http"}) == "unknown"


@pytest.mark.parametrize(
    ("kind", "arguments", "options", "message"),
    [
        (TypeError, [None], {}, r"name=None is not allowed; give the name of a header"),
        (TypeError, [b"x-api-key"], {}, r"name=b'x-api-key' is not allowed"),
        (ValueError, [""], {}, r"name='' is not allowed"),
        (ValueError, ["x api key"], {}, r"name='x api key' is not allowed"),
        (ValueError, ["x-api-key\n"], {}, r"name='x-api-key\\n' is not allowed"),
        (ValueError, ["x-äpi-key"], {}, r"name='x-äpi-key' is not allowed"),
        (TypeError, ["k"], {"otherwise": None}, "otherwise=None is not allowed; give a function"),
        (TypeError, ["k"], {"otherwise": str}, "otherwise=<class 'str'> is not allowed; give a function"),
    ],
)
def test_bad_options_of_header(kind, arguments, options, message):
    with pytest.raises(kind, match=f"^header: {message}"):
        header(*arguments, **options)


# -- user ---------------------------------------------------------------------------------------------------------


class Named(BaseUser):
    """A user as older versions of Starlette have them: without an identity."""

    is_authenticated = True
    display_name = "Ada"


class Nameless(BaseUser):
    is_authenticated = True


class Numbered(SimpleUser):
    identity = 7


@pytest.mark.parametrize(
    ("who", "key"),
    [
        (SimpleUser("ada"), ("user", "ada")),
        (SimpleUser(PEER), ("user", PEER)),
        (Named(), ("user", "Ada")),
        (Numbered("ada"), ("user", 7)),
        (Nameless(), PEER),
        (SimpleUser(""), PEER),
        (UnauthenticatedUser(), PEER),
        (None, PEER),
        ("ada", PEER),
    ],
)
def test_the_user_of_starlette(who, key):
    assert user()(scope(user=who)) == key
    assert user(None)(scope(user=who)) == key


def test_without_a_user():
    assert user()(scope()) == PEER
    assert user(otherwise=client_address(trusted_hops=1))(scope("9.9.9.9")) == "9.9.9.9"
    assert user(otherwise=header("x-api-key"))(scope("k", name="x-api-key"))[0] == "header"


NUMBER = uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")


@pytest.mark.parametrize(
    ("who", "key"),
    [
        ("ada", ("user", "ada")),
        ("1", ("user", "1")),
        (1, ("user", 1)),
        (0, ("user", 0)),
        (-1, ("user", -1)),
        (2**128 - 1, ("user", 2**128 - 1)),
        (NUMBER, ("user", str(NUMBER))),
        ("x" * 64, ("user", "x" * 64)),
        ("unknown", ("user", "unknown")),
        (None, PEER),
        ("", PEER),
    ],
)
def test_a_function_that_knows_the_user(who, key):
    assert user(lambda scope: scope["state"]["who"])(scope(state={"who": who})) == key
    assert user(get=lambda scope: who)(scope()) == key


LONG = ["x" * 65, "x" * 100_000, "\ud800" * 65, 2**128, -(2**128), 16**100_000, f"{2**128:x}".rjust(65, "0")]


def test_long_users_are_bounded():
    keys = [user(lambda scope, who=who: who)(scope()) for who in LONG]
    assert all(kind == "user" and isinstance(digest, bytes) and len(digest) == 16 for kind, digest in keys)
    assert len(set(keys)) == len(LONG)


@pytest.mark.parametrize("who", [True, 1.5, b"ada", ["ada"], object()])
def test_what_is_no_user(who):
    with pytest.raises(
        TypeError, match=r"^user\(get=.*\): the user is \w+; return a str, an int, a UUID, or None"
    ):
        user(lambda scope: who)(scope())


async def later(scope):
    """Return nothing."""


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["ada"], {}, "get='ada' is not allowed; give a function"),
        ([later], {}, "get=<function later.*> is not allowed; give a sync function"),
        ([], {"otherwise": "ada"}, "otherwise='ada' is not allowed; give a function"),
    ],
)
def test_bad_options_of_user(arguments, options, message):
    with pytest.raises(TypeError, match=f"^user: {message}"):
        user(*arguments, **options)


def test_keys_of_different_origin_are_different():
    def same(scope):
        return "192.0.2.1"

    told = scope("192.0.2.1", name="x-api-key", peer="192.0.2.1")
    keys = [client_address(told), header("x-api-key")(told), user(same)(told)]
    assert all(one != other for one, other in itertools.combinations(keys, 2))


# -- as options of policies ---------------------------------------------------------------------------------------

BEHIND = client_address(trusted_hops=1)
SHOWN = [
    (client_address, "client_address"),
    (client_address(), "client_address()"),
    (client_address(ipv6_prefix=48), "client_address(ipv6_prefix=48)"),
    (BEHIND, "client_address(trusted_hops=1)"),
    (
        client_address(trusted_networks=("10.0.0.0/8", "unix"), header="forwarded"),
        "client_address(trusted_networks=['10.0.0.0/8', 'unix'], header='forwarded')",
    ),
    (header("X-API-Key"), "header('x-api-key')"),
    (header("cookie", otherwise=BEHIND), "header('cookie', otherwise=client_address(trusted_hops=1))"),
    (user(), "user()"),
    (user(same := len), "user(get=len)"),
    (user(otherwise=header("k")), "user(otherwise=header('k'))"),
]


@pytest.mark.parametrize(("key", "shown"), SHOWN, ids=[shown for _key, shown in SHOWN])
def test_policies_show_and_copy_their_keys(key, shown):
    limit = RateLimit("1/minute", key=key)
    assert f", key={shown}, " in repr(limit)
    told = scope("9.9.9.9", user=None if same is None else "")
    for other in (pickle.loads(pickle.dumps(limit)), copy.copy(limit), copy.deepcopy(limit)):
        assert repr(other) == repr(limit)
        if "len" not in shown:
            assert other.key(told) == key(told)


@pytest.mark.parametrize(("maker", "right"), [(header, 'header("x-api-key")'), (user, "user()")])
def test_a_maker_of_keys_is_no_key_and_does_not_show_the_request(maker, right):
    scope = {"type": "http", "headers": [(b"authorization", b"s3cret")], "client": ("192.0.2.1", 1)}
    with pytest.raises(
        TypeError, match=f"write key={re.escape(right)} in place of key={maker.__name__}$"
    ) as caught:
        RateLimit("1/s", key=maker).call(lambda scope: None, scope)
    assert "s3cret" not in str(caught.value)
