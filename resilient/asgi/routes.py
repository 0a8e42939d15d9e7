"""Which pipeline guards which path.

Paths are compared as they are in the scope, below `root_path`: as routers do it, so that no spelling of a path
gets to a handler without getting to its pipeline. Templates are those of Starlette and FastAPI, by Starlette
itself.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

from resilient import options
from resilient.asgi.exchange import Scope

T = TypeVar("T")

_METHODS = re.compile(r"[A-Z]+(?:,[A-Z]+)*")


class Routes(Generic[T]):
    """A value for each path.

    Paths without parameters win over templates, and one with methods over one without. Of the templates the first
    that fits wins.

    Args:
        owner: Whose option it is, for errors.
        table: The values by path: `"/search"`, `"/users/{id}"`, `"/files/{path:path}"`, with methods before it if
            need be: `"POST /login"`, `"PUT,PATCH /users/{id}"`. HEAD goes with GET.
        otherwise: The value of all other paths.
        option: What the option is called. Default "routes".

    Raises:
        TypeError: A key that is not a str.
        ValueError: A key of another form, or a template that Starlette does not understand.
    """

    def __init__(self, owner: str, table: Mapping[str, T], otherwise: T, *, option: str = "routes") -> None:
        self._exact: dict[str, list[tuple[frozenset[str] | None, T]]] = {}
        self._templates: list[tuple[Callable[[str], object], frozenset[str] | None, T]] = []
        self._otherwise = otherwise
        for route, value in table.items():
            methods, path = _parse(owner, option, route)
            if "{" in path:
                self._templates.append((_matcher(owner, option, route, path), methods, value))
            else:
                self._exact.setdefault(path, []).append((methods, value))
        for values in self._exact.values():
            values.sort(key=lambda each: each[0] is None)

    def of(self, scope: Scope) -> T:
        """Return the value for the path of a request."""
        path: str = path_of(scope) if scope.get("root_path") else scope["path"]
        found = self._exact.get(path)
        if found is None and path[-1:] == "\n":  # Starlette's patterns end with "$", which fits before it
            found = self._exact.get(path[:-1])
        if found is not None:
            for methods, value in found:
                if methods is None or _method(scope) in methods:
                    return value
        for matches, methods, value in self._templates:
            if (methods is None or _method(scope) in methods) and matches(path):
                return value
        return self._otherwise


def _method(scope: Scope) -> str:
    method: str = scope.get("method", "GET")
    return "GET" if method == "HEAD" else method


def path_of(scope: Scope) -> str:
    """Return the path of a request below the place where the application is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in {"", "/"}:
        return path[len(root) :] or "/"
    return path


def check_paths(owner: str, option: str, paths: Iterable[str]) -> frozenset[str]:
    """Return a set of paths without parameters."""
    allowed = "a collection of paths such as {'/livez'}"
    if isinstance(paths, str) or not isinstance(paths, Iterable):
        raise options.refuse(owner, option, paths, allowed, TypeError)
    checked = frozenset(paths)
    for path in checked:
        if not isinstance(path, str):
            raise options.refuse(owner, option, paths, allowed, TypeError)
        if not path.startswith("/") or "{" in path:
            raise options.refuse(
                owner, option, paths, f"{allowed}, each beginning with '/' and without parameters"
            )
    return checked


def _parse(owner: str, option: str, route: object) -> tuple[frozenset[str] | None, str]:
    allowed = "paths such as '/search', '/users/{id}' or 'POST /login' as keys"
    if not isinstance(route, str):
        raise options.refuse(owner, option, route, allowed, TypeError)
    methods, space, path = route.partition(" ")
    if not space:
        methods, path = "", route
    if not path.startswith("/") or " " in path or (space and not _METHODS.fullmatch(methods)):
        raise options.refuse(owner, option, route, allowed)
    named = frozenset(methods.split(","))
    if "HEAD" in named and "GET" not in named:
        raise options.refuse(owner, option, route, "GET as the method of HEAD requests too")
    return named if methods else None, path


def _matcher(owner: str, option: str, route: str, path: str) -> Callable[[str], object]:
    try:
        from starlette.routing import compile_path
    except ImportError as error:
        raise ImportError(
            f"{owner}: the template {route!r} is read by Starlette; pip install resilient-toolkit[asgi]"
        ) from error
    try:
        pattern, _format, _convertors = compile_path(path)
    except (AssertionError, ValueError, re.error) as error:
        raise options.refuse(owner, option, route, f"templates that Starlette understands ({error})") from error
    return pattern.match
