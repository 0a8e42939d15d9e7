"""Which request bodies can be sent a second time, byte for byte.

Sending a body twice that can be read only once is the most dangerous mistake of a retry: an iterator that is used
up gives nothing, raises nothing, and the server stores an empty upload and answers 200. So a body is taken to be
one-shot unless it is known to start over:

* bytes, and everything that was made of them (`content=b"..."`, `data=`, `json=`, no body at all);
* a file that can seek: it goes back to where it stood before the first attempt, which need not be its beginning;
* a multipart form, if each file in it can seek (the clients themselves send those from the beginning);
* a list or tuple of chunks.
"""

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

from resilient.http.family import Family


class Body:
    """What is known about the body of a request before it is sent for the first time.

    Args:
        replayable: Whether it can be sent again, byte for byte.
        rewind: Brings it back to where it begins, called before each attempt; None if there is nothing to do.
    """

    __slots__ = ("replayable", "rewind")

    def __init__(self, *, replayable: bool, rewind: Callable[[], object] | None = None) -> None:
        self.replayable = replayable
        self.rewind = rewind


IN_MEMORY: Final = Body(replayable=True)
ONE_SHOT: Final = Body(replayable=False)


def guard(family: Family, request: Any, *, asynchronous: bool) -> None:
    """Have an error raised when a one-shot body is read a second time, instead of sending it empty.

    We never send it twice, but httpcore does by itself, when an HTTP/2 server goes away before it has looked at a
    request. Undone by `unguard`.
    """
    if not isinstance(request.stream, _Once):
        request.stream = _once(family, asynchronous)(family, request.stream)


def unguard(request: Any) -> None:
    """Give a request its own body back; transports may have replaced it by one that they have read."""
    if isinstance(request.stream, _Once):
        request.stream = request.stream.stream


class _Once:
    """A body that can be read once."""

    def __init__(self, family: Family, stream: Any) -> None:
        self.stream = stream
        self._family = family
        self._begun = False

    def _begin(self) -> None:
        if self._begun:
            raise self._family.module.RemoteProtocolError(
                "the request has to be sent again, but its body can be read only once"
            )
        self._begun = True


class _SyncOnce(_Once):
    def __iter__(self) -> Iterator[bytes]:
        self._begin()
        return iter(self.stream)


class _AsyncOnce(_Once):
    def __aiter__(self) -> AsyncIterator[bytes]:
        self._begin()
        chunks: AsyncIterator[bytes] = self.stream.__aiter__()
        return chunks


@functools.cache
def _once(family: Family, asynchronous: bool) -> Any:  # noqa: FBT001 - functools.cache wants it so
    """Return the class that the transports of this family accept: they insist on their own base class."""
    kind: Any = _AsyncOnce if asynchronous else _SyncOnce
    base = family.module.AsyncByteStream if asynchronous else family.module.SyncByteStream
    return type(kind.__name__, (kind, base), {"__module__": __name__})


def examine(family: Family, request: Any) -> Body:
    """Look at the body of a request, without reading from it.

    Args:
        family: The family of the request.
        request: The request, before its first attempt.
    """
    stream = request.stream
    if stream.__class__ is family.ByteStream:
        return IN_MEMORY
    if type(stream).__module__.partition(".")[0] != family.package:
        return ONE_SHOT  # nobody knows what it does with its attributes, whatever they are called
    fields = getattr(stream, "fields", None)
    if isinstance(fields, list):
        return IN_MEMORY if all(_field_starts_over(field) for field in fields) else ONE_SHOT
    source: Any = getattr(stream, "_stream", None)  # a private name, but without it every file would be one-shot
    if isinstance(source, list | tuple):
        return IN_MEMORY
    if not isinstance(stream, family.module.SyncByteStream) or not _can_seek(source):
        return ONE_SHOT  # to seek in an async file would have to be awaited
    try:
        start = source.tell()
    except OSError:
        return ONE_SHOT
    return Body(replayable=True, rewind=lambda: source.seek(start))


def _field_starts_over(field: Any) -> bool:
    file = getattr(field, "file", b"")  # a field without a file is text
    return isinstance(file, str | bytes) or _can_seek(file)


def _can_seek(file: Any) -> bool:
    try:
        return bool(file.seekable())
    except (AttributeError, ValueError):  # no file after all, or one that is closed
        return False
