"""Bytes, paths and environments that are no configuration: one ConfigError each, and nothing else."""

import contextlib
import os
import socket
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sidecar import config_document
from sidecar.config import interpret, load, render
from sidecar.config_values import FIELDS, parse_bytes, parse_seconds
from sidecar.errors import ConfigError
from sidecar.settings import MIB, Settings
from tests.test_config import read, refusal

# --- files


def test_missing_directory_fifo_socket_device_and_large_file_are_refused(tmp_path):
    """Only a regular file of at most 1 MiB is read, and nothing makes the reader wait."""
    fifo, large, sock = tmp_path / "fifo", tmp_path / "large", tmp_path / "sock"
    os.mkfifo(fifo)
    large.write_bytes(b" " * (MIB + 1))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sock))
        for path in (tmp_path / "none", tmp_path, fifo, sock, Path("/dev/zero"), large, Path("a\0b")):
            with pytest.raises(ConfigError) as caught:
                load(str(path), {})
            assert caught.value.setting == str(path)


def test_file_of_just_the_limit_is_read(tmp_path):
    """1 MiB is still read."""
    path = tmp_path / "config.yaml"
    path.write_bytes(b"{}" + b" " * (MIB - 2))
    assert load(str(path), {}).settings == Settings()


# --- hostile documents


def bomb(levels: int) -> str:
    """Aliases of aliases: 9 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def test_alias_bomb_is_refused_while_it_is_counted():
    """Nested aliases that would expand to millions of values are refused, and so are many small ones."""
    assert "values" in refusal(bomb(6)).allowed
    assert "aliases" in refusal("a: &a 1\nb: [" + ", ".join(["*a"] * 65) + "]").allowed
    assert "values" in refusal("reads: {services: [" + "a, " * 10_001 + "]}").allowed


def test_a_few_aliases_are_read():
    """An anchor used once or twice is an honest way to write a value."""
    assert read("retry: {delay: &d 2s, probe_interval: *d}").settings.retry.probe_interval == 2.0


@pytest.mark.parametrize("loader", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"# only\n",
        b"---\n---\n",
        b"- a",
        b"text",
        b"a: 1\na: 2",
        b"<<: {a: 1}",
        b"? [a]\n: b",
        b"!x y",
        b"!!python/object/apply:os.system [id]",
        b"a: &a [*a]",
        b"a: *b",
        b"[" * 100_000,
        b"{" * 100_000,
        b"a:\t- b",
        b"\xff\xfe{\0}\0",
        b"\xfe\xff\0{",
        b"\x80",
        b"{",
        b"'",
        b'"\\ud800"',
        b'"\\U0011FFFF"',
        b"%YAML 1." + b"9" * 5000 + b"\n--- {}",
        b"\xed\xa0\x80",
        b"k: \x01",
        b"\xef\xbb\xbf",
        b'retry: {delay: "\\ud800"}',
        b'"\\ud800": 1',
        b"x" * 200 + b": 1",
    ],
)
def test_hostile_bytes_end_in_one_error(data, loader, monkeypatch):
    """With libyaml or without it, no document that is none gets further than a ConfigError."""
    monkeypatch.setattr(config_document, "_LOADER", loader)
    error = refusal(data)
    assert len(str(error)) < 2_000
    str(error).encode()  # printable everywhere: no half of a surrogate pair


_words = st.sampled_from(
    [*FIELDS, *(p.partition(".")[0] for p in FIELDS), "HybridLogging", "DynamoDB", "MigrationPhases", "CurrentPhase",
     "${A}", "${", "1s", "1GiB", "true", "null", "~", "&a", "*a", "<<", "!t", "'", '"', "[", "]", "{", "}", ":", "- ",
     ",", "\n", "\n  ", " ", "#", "|", ">", "%", "---", "\t", "\\", "9" * 30, "1e400", "\ud800", "\x85", "é"]
)  # fmt: skip


@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(_words, max_size=40).map(lambda w: "".join(w).encode("utf-8", "surrogatepass")),
    )
)
@example(b"{}")
@hypothesis_settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_end_in_settings_or_in_one_error(data):
    """Arbitrary bytes and arbitrary arrangements of our own words yield checked settings or a ConfigError."""
    try:
        loaded = interpret(data, "config.yaml", {"A": "a"})
    except ConfigError as error:
        str(error).encode()
    else:
        assert read(render(loaded.settings)).settings == loaded.settings or loaded.settings.postgres.password


@given(st.dictionaries(st.text(max_size=30).map("SIDECAR__".__add__), st.text(max_size=30), max_size=3))
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_environment_ends_in_settings_or_in_one_error(environ):
    """Overrides are as harmless as the file."""
    with contextlib.suppress(ConfigError):
        interpret(b"{}", "config.yaml", environ)


@given(st.text(alphabet="0123456789.:smhduKMGiB eE+-_", max_size=20))
@hypothesis_settings(max_examples=300, deadline=None)
def test_units_are_numbers_or_nothing(text):
    """No text makes the readers of units raise, or yield what is no finite number."""
    seconds, size = parse_seconds(text), parse_bytes(text)
    assert seconds is None or seconds < 1e9
    assert size is None or isinstance(size, int)
