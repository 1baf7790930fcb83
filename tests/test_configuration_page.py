"""docs/CONFIGURATION.md says what the code does."""

from sidecar.config_checks import CHECKS
from sidecar.config_values import FIELDS
from sidecar.settings import LIVE
from tests.parts.configuration_page import PAGE, comments, page


def test_page_is_what_the_settings_say():
    """The page on disk is the one that the declarations yield; if not: python -m tests.parts.configuration_page."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_setting_has_a_row_with_its_meaning():
    """No setting is without a line of meaning, and each says live or restart."""
    rows = [line for line in page().splitlines() if line.startswith("| `") and line.endswith(("live |", "restart |"))]
    assert len(rows) == len(FIELDS)
    for row in rows:
        assert row.split(" | ")[-2].strip(), row
    assert sum(row.endswith("live |") for row in rows) == sum(path.partition(".")[0] in LIVE for path in FIELDS)


def test_every_rule_between_settings_is_listed():
    """Each check has its sentence on the page."""
    assert all(rule.__doc__ and rule.__doc__ in page() for rule in CHECKS)


def test_comments_are_found_beside_and_above():
    """The reader of comments sees both places, and nothing where there is nothing."""
    source = "class A:\n    # two\n    # lines\n    a: int = 1\n    b: str = '#'  # beside\n    c: int = 2\n"
    assert comments(source) == {"A": {"a": "two lines", "b": "beside", "c": ""}}
