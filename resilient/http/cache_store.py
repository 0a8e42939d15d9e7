"""What an HTTP cache keeps, and how it finds it again.

An answer has a place of its own: the *primary* key (URL and who asked), the fields that its `Vary` names, and what
the request said in them. So one URL can have many answers side by side, and of those that fit a request the one
that was asked for last counts.

Every request gets a number when it is sent. A write to a URL gets one too, and an answer to a request with a lower
number is not kept: it may describe what was there before the write. For the same reason an answer never replaces
one that was asked for later, whichever of them arrives first.

Nothing here takes a lock, reads a clock or knows a client.
"""

from collections.abc import Hashable, Iterable
from itertools import count
from operator import attrgetter
from typing import Any, Final, TypeAlias

from cachetools import LRUCache

from resilient.http.headers import Headers
from resilient.http.rfc9111 import Fields, Lifetime, age, vary_key

TOTAL_BYTES: Final = 64 * 1024 * 1024
"""How many bytes all answers together may take, their fields included."""

BODY_BYTES: Final = 1024 * 1024
"""How many bytes the body of an answer may have, as it came over the network."""

_OVERHEAD = 1024  # what an answer takes besides its bytes, roughly

Place: TypeAlias = tuple[Hashable, str, str]
Variant: TypeAlias = tuple[tuple[str, str], ...]


class Entry:
    """An answer. Once it is stored nobody changes it.

    Args:
        primary: The key of its URL and of who asked.
        names: What it goes by when a write comes: one of these is enough to make it obsolete.
        number: The number of its request.
        vary: The text of its `Vary`.
        variant: What its request said in the fields that `vary` names, from `vary_key`.
        status: Its status code.
        fields: Its fields, as they are stored.
        extensions: What else is needed to hand it out again.
        lifetime: For how long it may be used.
        delay: How many seconds it took to come.
        received: When it came, in seconds of the monotonic clock.
        length: How many bytes its body has to have, None if that is not known.

    Attributes:
        body: Its body as it came over the network, None until it is there.
        shown: Its fields without `Age`.
    """

    __slots__ = (
        "_age",
        "_received",
        "body",
        "extensions",
        "fields",
        "length",
        "lifetime",
        "names",
        "number",
        "primary",
        "shown",
        "status",
        "variant",
        "vary",
    )

    def __init__(
        self,
        *,
        primary: Hashable,
        names: tuple[Hashable, ...],
        number: int,
        vary: str,
        variant: str,
        status: int,
        fields: Fields,
        extensions: dict[str, Any],
        lifetime: Lifetime,
        delay: float,
        received: float,
        length: int | None,
    ) -> None:
        self.primary = primary
        self.names = names
        self.number = number
        self.vary = vary
        self.variant = variant
        self.status = status
        self.fields = fields
        self.extensions = extensions
        self.lifetime = lifetime
        self.length = length
        self.body: bytes | None = None
        self.shown = [(name, value) for name, value in fields if name.lower() != b"age"]
        self._age = age(fields, delay, 0.0)
        self._received = received

    @property
    def place(self) -> Place:
        """Where it is kept."""
        return self.primary, self.vary, self.variant

    @property
    def size(self) -> int:
        """How many bytes it takes, roughly."""
        return len(self.body or b"") + sum(len(name) + len(value) for name, value in self.fields) + _OVERHEAD

    def age(self, now: float) -> float:
        """Return its age in seconds (RFC 9111 4.2.3)."""
        return self._age + max(now - self._received, 0.0)

    def over(self, now: float) -> bool:
        """Tell whether it is of no use any more, to anybody who does not ask for old answers."""
        windows = self.lifetime.stale_if_error, self.lifetime.stale_while_revalidate
        return self.age(now) - self.lifetime.fresh >= max(*windows, 0.0)

    @property
    def whole(self) -> bool:
        """Whether all of its body is there, and is not too much."""
        return self.body is not None and len(self.body) <= BODY_BYTES and self.length in {None, len(self.body)}

    def fits(self, request_headers: Headers) -> bool:
        """Tell whether the request says the same as the one that was answered, in the fields that matter."""
        return said(self.vary, request_headers) == self.variant


class Store:
    """The answers of a cache, the least recently used of which go when there is no room left.

    Args:
        max_entries: How many answers there is room for.

    Attributes:
        numbers: Where requests get their numbers from.
    """

    def __init__(self, max_entries: int) -> None:
        self.numbers = count(1)
        self._max_entries = max_entries
        self._entries: LRUCache[Place, Entry] = LRUCache(TOTAL_BYTES, getsizeof=_size)
        self._varies: dict[Hashable, dict[str, int]] = {}  # how many answers there are under each `Vary`
        self._places: dict[Hashable, set[Place]] = {}  # by name
        self._writes: LRUCache[Hashable, int] = LRUCache(max_entries)  # by name, the number of the last write
        self._forgotten = 0  # the highest number among the writes that there was no room for

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all answers. What is known of writes stays."""
        self._entries.clear()
        self._varies.clear()
        self._places.clear()

    def find(self, primary: Hashable, request_headers: Headers) -> tuple[Entry | None, Variant]:
        """Return the answer that fits a request, and what tells this request from others to the same URL."""
        variant = self._variant_of(primary, request_headers)
        found = self._at(primary, variant)
        return max(found, key=_number, default=None), variant

    def add(self, entry: Entry) -> bool:
        """Keep an answer; return False if it is obsolete, or too big."""
        if self.outdated(entry.names, entry.number) or entry.size > TOTAL_BYTES:
            return False
        place = entry.place
        known = self._entries.get(place)
        if known is not None:
            if known.number > entry.number:
                return False
            self.remove(known)
        while len(self._entries) >= self._max_entries or self._entries.currsize + entry.size > TOTAL_BYTES:
            self._unlink(*self._entries.popitem())
        self._entries[place] = entry
        varies = self._varies.setdefault(entry.primary, {})
        varies[entry.vary] = varies.get(entry.vary, 0) + 1
        for name in entry.names:
            self._places.setdefault(name, set()).add(place)
        return True

    def remove(self, entry: Entry) -> None:
        """Forget an answer, if it is still there."""
        if self._entries.get(entry.place) is entry:
            del self._entries[entry.place]
            self._unlink(entry.place, entry)

    def drop(self, primary: Hashable, request_headers: Headers) -> None:
        """Forget all answers that fit a request."""
        for entry in self._at(primary, self._variant_of(primary, request_headers)):
            self.remove(entry)

    def wrote(self, names: Iterable[Hashable]) -> None:
        """Forget all answers that go by one of these names, and those that are under way."""
        number = next(self.numbers)
        for name in names:
            for place in list(self._places.get(name, ())):
                self.remove(self._entries[place])
            if name not in self._writes and len(self._writes) >= self._max_entries:
                self._forgotten = max(self._forgotten, self._writes.popitem()[1])
            self._writes[name] = number

    def outdated(self, names: Iterable[Hashable], number: int) -> bool:
        """Tell whether there was a write after the request with this number."""
        return number < self._forgotten or any(number < self._writes.get(name, 0) for name in names)

    def _variant_of(self, primary: Hashable, request_headers: Headers) -> Variant:
        return tuple((vary, said(vary, request_headers)) for vary in sorted(self._varies.get(primary, ())))

    def _at(self, primary: Hashable, variant: Variant) -> list[Entry]:
        places = ((primary, vary, said) for vary, said in variant)
        return [entry for place in places if (entry := self._entries.get(place)) is not None]

    def _unlink(self, place: Place, entry: Entry) -> None:
        varies = self._varies[entry.primary]
        varies[entry.vary] -= 1
        if not varies[entry.vary]:
            del varies[entry.vary]
        if not varies:
            del self._varies[entry.primary]
        for name in entry.names:
            self._places[name].discard(place)
            if not self._places[name]:
                del self._places[name]


def said(vary: str, request_headers: Headers) -> str:
    """Return a digest of what a request says in the fields that a `Vary` names."""
    return (vary_key([("vary", vary)], request_headers) or "") if vary else ""


_number = attrgetter("number")
_size = attrgetter("size")
