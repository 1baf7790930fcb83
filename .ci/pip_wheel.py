"""Download pip's newest wheel that suits this Python, check its hash, print its path. Standard library only.

    python pip_wheel.py DIRECTORY

Looks where pip itself is told to: PIP_FIND_LINKS and PIP_INDEX_URL, then the same settings in pip's configuration
files. Certificates: PIP_CERT or ``cert``, else the system's. A wheel from an index is used only if the index
states its SHA-256 and it matches.
"""

import base64
import configparser
import hashlib
import html.parser
import os
import pathlib
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

WHEEL = re.compile(r"pip-(\d+(?:\.\d+)*)-py3-none-any\.whl")
FILES = (
    "/etc/pip.conf",
    "/etc/xdg/pip/pip.conf",
    "~/.pip/pip.conf",
    "~/.config/pip/pip.conf",
)


def setting(name: str, default: str = "") -> str:
    """A setting of pip: the environment, else the last configuration file that states it, else ``default``."""
    value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if value:
        return value
    parser = configparser.RawConfigParser()
    files = [os.path.expanduser(each) for each in FILES]
    parser.read([*files, os.environ.get("PIP_CONFIG_FILE", os.devnull)])
    return parser.get("global", name, fallback=default)


def version(text: str) -> tuple[int, ...]:
    """``24.0`` as (24, 0)."""
    return tuple(int(part) for part in text.split("."))


class Links(html.parser.HTMLParser):
    """The wheels that an index page (PEP 503) offers to this Python: (version, href)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple[int, ...], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        href = given.get("href") or ""
        name = urllib.parse.unquote(urllib.parse.urlsplit(href).path.rpartition("/")[2])
        match = WHEEL.fullmatch(name)
        lowest = re.search(r">=\s*(\d+(?:\.\d+)*)", given.get("data-requires-python") or "")
        if tag == "a" and match and "data-yanked" not in given:
            if lowest is None or version(lowest[1]) <= sys.version_info[:3]:
                self.found.append((version(match[1]), href))


def fetch(url: str) -> bytes:
    """The content of a URL; a user and password in it become a basic authorisation. Three tries."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
    if parts.username:
        user = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    context = ssl.create_default_context(cafile=setting("cert") or None) if parts.scheme == "https" else None
    for wait in (2, 5, 0):
        try:
            with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                return bytes(answer.read())
        except OSError as error:  # URLError and timeouts are OSErrors
            definite = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if definite or not wait:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable: the last try raises")


def local_wheel() -> pathlib.Path | None:
    """The newest wheel in a directory that find-links names."""
    found = []
    for link in setting("find-links").split():
        directory = pathlib.Path(urllib.request.url2pathname(urllib.parse.urlsplit(link).path))
        if "://" not in link or link.startswith("file:"):
            found += [(version(m[1]), p) for p in directory.glob("pip-*.whl") if (m := WHEEL.fullmatch(p.name))]
    return max(found)[1] if found else None


def main(directory: str) -> int:
    """Print the path of a wheel that may be run; 1 with a line on stderr where there is none."""
    wheel = local_wheel()
    if wheel is not None:
        print(wheel)
        return 0
    index = setting("index-url")
    if not index:
        print("no package index is configured: set PIP_INDEX_URL to yours", file=sys.stderr)
        return 1
    page = index.split()[0].rstrip("/") + "/pip/"
    links = Links()
    try:
        links.feed(fetch(page).decode("utf-8", "replace"))
        if not links.found:
            print("the index offers no wheel of pip for this Python", file=sys.stderr)
            return 1
        href = urllib.parse.urljoin(page, max(links.found)[1])
        url, _, fragment = href.partition("#")
        data = fetch(url)
    except OSError as error:
        print(f"the package index cannot be read: {error}", file=sys.stderr)
        return 1
    if fragment != "sha256=" + hashlib.sha256(data).hexdigest():
        print("pip's wheel does not have the SHA-256 that the index states", file=sys.stderr)
        return 1
    target = pathlib.Path(directory) / urllib.parse.unquote(url.rpartition("/")[2])
    target.write_bytes(data)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
