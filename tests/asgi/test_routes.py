"""Which value belongs to which path."""

import builtins

import pytest
from starlette.routing import Match, Route

from resilient.asgi.routes import Routes, check_paths, path_of

from .driver import scope_of

TABLE = {
    "/users/me": "me",
    "/users/{id:int}": "number",
    "/users/{name}": "name",
    "/files/{path:path}": "files",
    "/things/new": "any",
    "POST,PATCH /things/new": "make",
    "PATCH /things/new": "never",
    "GET,HEAD /things": "read",
    "POST,PUT /things": "write",
    "DELETE /things/{id}": "delete",
}


@pytest.mark.parametrize(
    ("method", "path", "value"),
    [
        ("GET", "/users/me", "me"),
        ("GET", "/users/7", "number"),
        ("GET", "/users/ada", "name"),
        ("GET", "/users/ada/", "else"),
        ("GET", "/users/a/b", "else"),
        ("GET", "/Users/me", "else"),
        ("GET", "//users/me", "else"),
        ("GET", "/files/a/b.txt", "files"),
        ("GET", "/things", "read"),
        ("HEAD", "/things", "read"),
        ("PUT", "/things", "write"),
        ("POST", "/things/new", "make"),
        ("PATCH", "/things/new", "make"),
        ("GET", "/things/new", "any"),
        ("GET", "/users/me\n", "me"),
        ("GET", "/users/7\n", "number"),
        ("GET", "/users/me\n\n", "name"),
        ("DELETE", "/things", "else"),
        ("DELETE", "/things/1", "delete"),
        ("GET", "/things/1", "else"),
    ],
)
def test_the_value_of_a_path(method, path, value):
    assert Routes("Owner", TABLE, "else").of(scope_of(path, method=method)) == value


@pytest.mark.parametrize("template", ["/users/me", "/users/{name}", "/files/{path:path}"])
@pytest.mark.parametrize(
    "path", [f"{path}{end}" for path in ("/users/me", "/files/a/b") for end in ("", "\n", "\n\n", "\r", " ")]
)
def test_what_gets_to_a_handler_of_starlette_gets_to_its_pipeline(template, path):
    scope = scope_of(path)
    handled = Route(template, print).matches(scope)[0] is Match.FULL
    assert Routes("Owner", {template: True}, otherwise=False).of(scope) == handled


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/api/users/me", "/api", "/users/me"),
        ("/api", "/api", "/"),
        ("/api/users/me", "/api/", "/users/me"),
        ("/users/me", "/", "/users/me"),
        ("/apiary", "/api", "/apiary"),
        ("/users/me", "/api", "/users/me"),
    ],
)
def test_a_mounted_application_has_paths_of_its_own(path, root, expected):
    scope = scope_of(path, root_path=root)
    assert path_of(scope) == expected
    assert Routes("Owner", {expected: 1}, 0).of(scope) == 1


def test_a_websocket_has_a_path_and_no_method():
    scope = scope_of("/users/me")
    del scope["method"]
    assert Routes("Owner", TABLE, "else").of(scope) == "me"


@pytest.mark.parametrize(
    ("route", "kind"),
    [
        (3, TypeError),
        ("", ValueError),
        ("users", ValueError),
        ("get /users", ValueError),
        (" /users", ValueError),
        ("GET  /users", ValueError),
        ("/a b", ValueError),
        ("/{id:nonsense}", ValueError),
        ("HEAD /users", ValueError),
        ("/{id}/{id}", ValueError),
    ],
)
def test_a_bad_route_is_refused(route, kind):
    with pytest.raises(kind, match="Owner: routes="):
        Routes("Owner", {route: 1}, 0)


@pytest.mark.parametrize(
    ("paths", "kind"),
    [("/a", TypeError), (3, TypeError), ([3], TypeError), (["a"], ValueError), (["/{a}"], ValueError)],
)
def test_bad_paths_are_refused(paths, kind):
    with pytest.raises(kind, match="Owner: exempt="):
        check_paths("Owner", "exempt", paths)


def test_templates_need_starlette(monkeypatch):
    def without(name, *args):
        if name.startswith("starlette"):
            raise ImportError(name)
        return real(name, *args)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    Routes("Owner", {"/a": 1}, 0)
    with pytest.raises(
        ImportError, match=r"Owner: the template '/\{a\}' .* pip install resilient-toolkit\[asgi\]"
    ):
        Routes("Owner", {"/{a}": 1}, 0)
