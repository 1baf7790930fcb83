"""The section ``mappings``: what may be written, that errors name the path, that it is printed as it was read."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.config import interpret, render
from sidecar.config_mappings import __doc__ as explained
from sidecar.errors import ConfigError
from sidecar.mapping import READY_MADE
from sidecar.settings import LIVE


def read(mappings: object, environ: dict[str, str] | None = None):
    """The mappings that a configuration with this section has."""
    data = yaml.safe_dump({"mappings": mappings}).encode()
    return interpret(data, "config.yaml", environ or {}).settings.mappings


def example() -> dict:
    """The example of the module's docstring, which is that of the documentation."""
    lines = (explained or "").split("::\n", 1)[1].split("\nFAILURE", 1)[0]
    return yaml.safe_load(lines)["mappings"]


def test_the_documented_example_is_read_and_printed_as_it_was_read():
    """What print-config shows is read back to the same mappings, variables and all."""
    loaded = interpret(yaml.safe_dump({"mappings": example()}).encode(), "config.yaml", {})
    assert set(loaded.settings.mappings) == {"billing"}
    assert interpret(render(loaded.settings).encode(), "config.yaml", {}).settings == loaded.settings
    assert "mappings" in LIVE


def test_variables_are_expanded_in_values():
    """As everywhere else in the file."""
    (found,) = read({"pino": {"service_name": {"value": "${APP}"}}}, {"APP": "billing"}).values()
    assert dict(found.fields)["service_name"].default == "billing"


def test_an_empty_section_is_none():
    """A section whose lines are all comments."""
    assert read(None) == {}


@pytest.mark.parametrize(
    ("mappings", "setting", "said"),
    [
        ([], "mappings", "mappings by name"),
        ({"a/b": {}}, "mappings.a/b", "a-z"),
        ({"m": []}, "mappings.m", "fields"),
        ({"m": {"user": "/u"}}, "mappings.m.user", "user_id"),
        ({"m": {"request_data": "/u"}}, "mappings.m.request_data", "takes what no field takes"),
        ({"m": {"user_id": "u"}}, "mappings.m.user_id.from", "JSON Pointer"),
        ({"m": {"user_id": {"from": "/a~2"}}}, "mappings.m.user_id.from", "JSON Pointer"),
        ({"m": {"user_id": {"path": "/a"}}}, "mappings.m.user_id.path", "from, value"),
        ({"m": {"user_id": {"default": "a"}}}, "mappings.m.user_id", "from"),
        ({"m": {"user_id": {"value": "a", "from": "/a"}}}, "mappings.m.user_id", "value alone"),
        ({"m": {"user_id": {"value": "x" * 101}}}, "mappings.m.user_id", "constant"),
        ({"m": {"application_id": {"value": "seven"}}}, "mappings.m.application_id", "constant"),
        ({"m": {"log_id": {"value": "3f2b8c1e-5a4d-4e6f-9a8b-7c6d5e4f3a2b"}}}, "mappings.m.log_id.value", "a path"),
        ({"m": {"user_id": {"from": "/a", "when": "always"}}}, "mappings.m.user_id.when", "failure"),
        ({"m": {"log_timestamp": {"from": "/t", "format": "unix"}}}, "mappings.m.log_timestamp.format", "epoch_ms"),
        (
            {"m": {"log_timestamp": {"from": "/t", "format": ["epoch_s", "epoch_ms"]}}},
            "mappings.m.log_timestamp.format",
            "at most one",
        ),
        ({"m": {"log_timestamp": {"from": "/t", "offset": "1h"}}}, "mappings.m.log_timestamp.offset", "+01:00"),
        ({"m": {"extends": "log4j"}}, "mappings.m.extends", "serilog"),
        ({"m": {"identity": "hash"}}, "mappings.m.identity", "content"),
        ({"m": {"level": "/l"}}, "mappings.m.level", "from, names, failure"),
        ({"m": {"level": {"to": "x"}}}, "mappings.m.level.to", "from, names, failure"),
        ({"m": {"level": {"from": "l"}}}, "mappings.m.level.from", "JSON Pointer"),
        ({"m": {"level": {"names": {"9-1": "X"}}}}, "mappings.m.level.names.9-1", "rising"),
        ({"m": {"level": {"names": {"0-99999": "X"}}}}, "mappings.m.level.names.0-99999", "rising"),
        ({"m": {"level": {"names": {"a": "x" * 51}}}}, "mappings.m.level.names.a", "log_type"),
        ({"m": {"level": {"names": {str(i): "X" for i in range(65)}}}}, "mappings.m.level.names", "at most 64"),
        ({"m": {"events": [{"a": 1}]}}, "mappings.m.events", "text"),
        ({"m": {"user_id": ["/a"] * 65}}, "mappings.m.user_id", "at most 64"),
        ({f"m{i}": {} for i in range(65)}, "mappings", "at most 64"),
    ],
)
def test_an_error_names_the_path_and_what_is_allowed(mappings, setting, said):
    """So that it can be mended without looking at the code."""
    with pytest.raises(ConfigError) as caught:
        read(mappings)
    assert caught.value.setting == setting
    assert said in str(caught.value)


def test_the_environment_does_not_hold_a_section():
    """SIDECAR__MAPPINGS is refused with where to write it."""
    with pytest.raises(ConfigError, match="a section of the file"):
        interpret(b"{}", "config.yaml", {"SIDECAR__MAPPINGS": "{}"})


trees = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text("/ab~-0123 isoepoch_s", max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    *READY_MADE,
                    "user_id",
                    "log_timestamp",
                    "level",
                    "from",
                    "names",
                    "failure",
                    "value",
                    "format",
                    "events",
                ]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@given(trees)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_any_tree_is_read_or_refused(tree):
    """Nothing but ConfigError, which names a setting of the section; what is read is printed and read back."""
    try:
        loaded = interpret(yaml.safe_dump({"mappings": tree}).encode(), "config.yaml", {})
        named, again = "mappings", interpret(render(loaded.settings).encode(), "config.yaml", {})
    except ConfigError as error:
        loaded = again = None
        named = error.setting
    assert named.startswith("mappings")
    assert again is None or again.settings == loaded.settings


def documented() -> list[str]:
    """Every YAML block of the clients' pages that states mappings."""
    pages = sorted((Path(__file__).parents[1] / "docs" / "clients").glob("*.md"))
    blocks = [block for page in pages for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)]
    return [block for block in blocks if "mappings:" in block]


@pytest.mark.parametrize("block", documented())
def test_what_the_pages_show_is_a_configuration(block):
    """Each example of docs/clients is read as it stands."""
    assert interpret(block.encode(), "config.yaml", {}).settings.mappings


def test_the_page_and_the_module_show_the_same_example():
    """The mapping language is explained twice, with one example."""
    assert example() in [yaml.safe_load(block)["mappings"] for block in documented()]
