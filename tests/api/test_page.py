"""GET / and its files over HTTP: types, policy, caching, what is not there. A real browser looks in ci-integration."""

import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sidecar.api import page
from tests.api.door import Door, open_door

FILES = sorted(page.assets())
FOLDER = Path(page.__file__).parent / "page"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    """A running door."""
    async with open_door(tmp_path / "spool") as opened:
        yield opened


def path_of(name: str) -> str:
    """Where a file is served."""
    return "/" if name == page.INDEX else f"/page/{name}"


async def fetch(door: Door, path: str, method: str = "GET", **headers: str):
    """Status, body, headers."""
    async with door.client.request(method, door.listener.url + path, headers=headers, allow_redirects=False) as answer:
        return answer.status, await answer.read(), answer.headers


class Seen(HTMLParser):
    """Elements, addresses and attributes of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.attributes: list[str] = []
        self.ids: list[str] = []
        self.labelled: list[str] = []
        self.inline: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self._inside = tag
        self.attributes += given
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        for name in ("for", "aria-labelledby", "aria-describedby"):
            self.labelled += given.get(name, "").split()

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.mark.parametrize("name", FILES)
async def test_every_file_comes_with_its_type_and_the_strict_policy(door: Door, name: str) -> None:
    """No file without the policy, nosniff, and a type that a browser takes for what it is."""
    status, body, headers = await fetch(door, path_of(name))
    assert (status, body) == (200, (FOLDER / name).read_bytes())
    assert headers["Content-Type"] == page.TYPES[Path(name).suffix]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Referrer-Policy"] == "no-referrer"
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert {policy[kind] for kind in ("base-uri", "form-action", "frame-ancestors", "trusted-types")} == {"'none'"}
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in headers["Content-Security-Policy"]


@pytest.mark.parametrize("name", FILES)
async def test_head_says_what_get_would_and_a_known_version_is_304(door: Door, name: str) -> None:
    """HEAD has the headers without the body; If-None-Match with the ETag is 304, with another one 200."""
    path = path_of(name)
    _, body, headers = await fetch(door, path)
    status, nothing, head = await fetch(door, path, "HEAD")
    assert (status, nothing) == (200, b"")
    for field in ("Content-Type", "Content-Length", "ETag", "Cache-Control", "Content-Security-Policy"):
        assert head[field] == headers[field]
    assert int(head["Content-Length"]) == len(body)
    assert headers["Cache-Control"] == "no-cache"
    for known in (headers["ETag"], f'"other", {headers["ETag"]}', f"W/{headers['ETag']}", "*"):
        status, nothing, again = await fetch(door, path, **{"If-None-Match": known})
        assert (status, nothing, again["ETag"]) == (304, b"", headers["ETag"])
    for unknown in ('"other"', "garbage", '"'):
        assert (await fetch(door, path, **{"If-None-Match": unknown}))[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/page",
        "/page/",
        "/page/x.js",
        "/page/index.html",
        "/page/page.py",
        "/page/..%2fpage.py",
        "/page/%2e%2e/page.py",
    ],
)
async def test_nothing_else_lies_there(door: Door, path: str) -> None:
    """Only the named files: no listing, no way up, one address for the page."""
    status, body, headers = await fetch(door, path)
    assert (status, headers["Content-Type"]) == (404, "application/json")
    assert b"not_found" in body


async def test_the_page_is_read_only_and_for_the_hosts_of_this_machine(door: Door) -> None:
    """POST is 405; a foreign Host, as after DNS rebinding, is 403."""
    assert (await fetch(door, "/", "POST"))[0] == 405
    assert (await fetch(door, "/", Host="attacker.example"))[0] == 403
    assert (await fetch(door, "/page/main.js", Host="attacker.example"))[0] == 403


def test_two_contents_have_two_etags() -> None:
    """The ETag is of the bytes."""
    assert page.Asset.of("a.js", b"1").etag != page.Asset.of("a.js", b"2").etag == page.Asset.of("b.js", b"2").etag


def test_the_page_names_only_its_own_files_and_has_nothing_inline() -> None:
    """Every address is relative and served; no inline script, style or handler, which the policy would not run."""
    seen = Seen()
    seen.feed((FOLDER / page.INDEX).read_text())
    files = {address for address in seen.addresses if not address.startswith("#")}
    assert files == {"page/icon.svg", "page/status.css", "page/main.js", "status", "openapi.json"}
    assert seen.inline == []
    assert [name for name in seen.attributes if name == "style" or name.startswith("on")] == []
    assert len(seen.ids) == len(set(seen.ids))
    assert set(seen.labelled) <= set(seen.ids)
    for text in (path.read_text() for path in FOLDER.iterdir() if path.suffix in (".js", ".css")):
        assert re.findall(r"//(?!www\.w3\.org/2000/svg)[a-z]+\.|url\(|@import", text) == []


def test_scripts_write_values_as_text_and_find_what_they_look_for() -> None:
    """No way to parse markup is even named; each id that a script asks for stands in the page; imports are served."""
    seen = Seen()
    seen.feed((FOLDER / page.INDEX).read_text())
    for path in FOLDER.glob("*.js"):
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc", text)
        assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", text)
        assert set(re.findall(r'byId\("([^"]+)"\)', text)) <= set(seen.ids)
        assert {name.removeprefix("./") for name in re.findall(r'from "([^"]+)"', text)} <= set(FILES)


def test_the_scripts_never_ask_for_payloads() -> None:
    """Neither a payload, nor an export, nor a record's route."""
    text = "".join(path.read_text() for path in FOLDER.glob("*.js"))
    assert not re.search(r"payload=|/export|[\"'`]/?logs", text)
