"""``sidecar adopt`` on the command line: what it refuses before it asks a database, and how a plan is shown."""

from pathlib import Path

import pytest

from sidecar import __main__ as cli
from sidecar.operator.adopt import _shown
from sidecar.stores.base import Check
from sidecar.stores.postgres_plan import Plan, Step

COLUMN = Step("ALTER TABLE t ADD COLUMN c uuid", "ids", "ACCESS EXCLUSIVE on t", "for a moment", True, True)
INDEX = Step("CREATE INDEX CONCURRENTLY i ON t (c)", "reads", "SHARE UPDATE EXCLUSIVE on t", "a second", False, False)


@pytest.mark.parametrize(
    ("configuration", "arguments", "setting"),
    [
        ("{}", ["--plan"], "postgres.adopt.enabled"),
        ("postgres: {pgbouncer: true, adopt: {enabled: true}}", ["--apply"], "postgres.pgbouncer"),
        ("postgres: {adopt: {enabled: true, key: SidecarLogId}}", [], "postgres.adopt.log_id"),
    ],
)
def test_a_configuration_that_cannot_adopt_is_an_error_of_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], configuration: str, arguments: list[str], setting: str
) -> None:
    """Exit code 2 and one line that names the setting; no database is asked."""
    path = tmp_path / "config.yaml"
    path.write_text(configuration)
    assert cli.main(["adopt", *arguments, "--config", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"sidecar: {setting}: seen ")
    assert said.err.count("\n") == 1


def test_a_database_that_is_not_there_is_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of every verb that needs a store."""
    path = tmp_path / "config.yaml"
    path.write_text("postgres: {port: 1, connect_timeout: 1s, adopt: {enabled: true}}")
    assert cli.main(["adopt", "--plan", "--config", str(path)]) == 5
    assert "nothing listens there" in capsys.readouterr().err


def test_everything_but_the_statements_is_a_comment() -> None:
    """So psql takes it: a bound on the lock before what makes writers wait, none before what does not."""
    text = _shown(Plan("public.t", 1_234_567, 3 * 2**30, 2, (COLUMN, INDEX), ()))
    assert "about 1,234,567 rows, 3.0 GiB without indexes, 2 partitions" in text
    statements = [line for line in text.splitlines() if line and not line.startswith("--")]
    assert statements == ["SET lock_timeout = '2s';", f"{COLUMN.sql};", "SET lock_timeout = 0;", f"{INDEX.sql};"]
    assert "-- required: ids\n-- lock: ACCESS EXCLUSIVE on t, for a moment\n" in text


def test_a_problem_is_named_with_what_is_required() -> None:
    """And it is said that nothing can be applied."""
    problem = Check("postgres.column.request_data", ok=False, observed="RequestData: jsonb: no", required="text")
    text = _shown(Plan("public.t", None, 0, 0, (), (problem,)))
    assert "rows unknown (never analysed), 0 bytes" in text
    assert "-- PROBLEM postgres.column.request_data: RequestData: jsonb: no\n--   required: text\n" in text
    assert "nothing can be applied" in text
    assert "nothing to do" not in text
