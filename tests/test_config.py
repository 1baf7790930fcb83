"""Loading the configuration: what is read, what is refused, and that nothing else can happen."""

import re
from pathlib import Path

import msgspec
import pytest

from sidecar import config
from sidecar.config import Loaded, interpret, load, render
from sidecar.config_checks import CHECKS
from sidecar.config_values import FIELDS
from sidecar.errors import ConfigError
from sidecar.phase import TABLE, Phase
from sidecar.settings import GIB, KIB, LIVE, MIB, Secret, Settings

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "config.yaml"
CANARY = "canary-5ecret"

APPSETTINGS = """
{
  "HybridLogging": {
    "WritesToSql": true,
    "WritesToDynamoDb": false,
    "RequireBothWrites": false,
    "ReadsFromDynamoDb": false,
    "CurrentPhase": "SqlOnly",
    "ContinueOnWriteFailure": true,
    "RetryAttempts": 3,
    "RetryDelay": "00:00:01"
  },
  "DynamoDB": {
    "TableName": "LoanApp-IntegrationLogs-dev",
    "Region": "us-east-1"
  }
}
"""


def read(text: str | bytes, **environ: str) -> Loaded:
    """The configuration that a file with this text would be."""
    data = text.encode() if isinstance(text, str) else text
    return interpret(data, "config.yaml", environ)


def refusal(text: str | bytes, **environ: str) -> ConfigError:
    """The error that a file with this text ends in."""
    with pytest.raises(ConfigError) as caught:
        read(text, **environ)
    return caught.value


# --- what is read


def test_empty_mapping_is_all_defaults():
    """``{}`` states nothing and yields the defaults of the settings module."""
    assert read("{}").settings == Settings()


def test_shipped_example_is_valid_without_any_variable():
    """config.yaml at the top of the repository loads in an empty environment."""
    loaded = load(str(EXAMPLE), {})
    assert loaded.settings.phase is Phase.SQL_ONLY
    assert loaded.warnings == ()


def test_shipped_example_takes_its_endpoints_from_the_environment():
    """The variables that the example names end up in the settings."""
    settings = load(
        str(EXAMPLE), {"POSTGRES_HOST": "db", "POSTGRES_PORT": "6432", "DYNAMODB_ENDPOINT_URL": "http://127.0.0.1:8000"}
    ).settings
    assert (settings.postgres.host, settings.postgres.port) == ("db", 6432)
    assert settings.dynamodb.endpoint_url == "http://127.0.0.1:8000"


def test_digest_is_the_sha256_of_the_bytes():
    """``Loaded.digest`` names the content, comments included."""
    assert read("{}").digest == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert read("{} # c").digest != read("{}").digest


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1", 1.0),
        ("0.25", 0.25),
        ("500ms", 0.5),
        ("100ms", 0.1),
        ("1s", 1.0),
        ("15m", 900.0),
        ("24h", 86400.0),
        ("2d", 172800.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("00:00:01", 1.0),
        ("00:00:00.2500000", 0.25),
        ("1.02:03:04", 93784.0),
    ],
)
def test_duration_spellings(written, seconds):
    """A duration is a number of seconds, has units, or is .NET's TimeSpan."""
    assert read(f'retry: {{fk_grace: "{written}"}}').settings.retry.fk_grace == seconds


@pytest.mark.parametrize(
    "written", ["1:30", "24:00:00", "-1s", "1 fortnight", "inf", "nan", "1e9", "", "1s2", "s", "٣s", "4000d", "0x10"]
)
def test_what_is_no_duration_is_refused(written):
    """Nothing is guessed: sexagesimal, signs, infinities and foreign digits are no durations."""
    assert refusal(f'retry: {{fk_grace: "{written}"}}').setting == "retry.fk_grace"


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("67108864", 64 * MIB),
        ("64MiB", 64 * MIB),
        ("64Mi", 64 * MIB),
        ("1GiB", GIB),
        ("0.5GiB", GIB // 2),
        ("64MB", 64 * 10**6),
    ],
)
def test_size_spellings(written, size):
    """A size is a number of bytes or has a binary or decimal unit."""
    assert read(f"spool: {{cap_bytes: {written}}}").settings.spool.cap_bytes == size


@pytest.mark.parametrize("written", ["64 mib", "1.0000001KiB", "-1", "64mB", "1e9", "0x4000000"])
def test_what_is_no_size_is_refused(written):
    """Fractions of a byte, lower-case m (milli) and foreign notations are no sizes."""
    assert refusal(f"spool: {{cap_bytes: {written}}}").setting == "spool.cap_bytes"


@pytest.mark.parametrize("written", ["dual_write", "DualWrite", "1", '"1"'])
def test_phase_spellings(written):
    """Our name, the specification's name and the number mean the same phase."""
    assert read(f"phase: {written}").settings.phase is Phase.DUAL_WRITE


@pytest.mark.parametrize("written", ["4", "true", "yes", "dual", "1.0", "01", "[1]", "{}", "null", ""])
def test_unknown_phase_is_refused(written):
    """Anything else is no phase, a bool and an empty value above all."""
    error = refusal(f"phase: {written}")
    assert error.setting == "phase"
    assert "sql_only, dual_write" in error.allowed


def test_no_implicit_yaml_types():
    """A text setting keeps what was written: ``no``, ``010`` and ``1.0`` are texts where a text is wanted."""
    postgres = read("postgres: {host: no, database: 010, user: 1.0}").settings.postgres
    assert (postgres.host, postgres.database, postgres.user) == ("no", "010", "1.0")


def test_null_leaves_optional_settings_unset_and_empty_sections_default():
    """``~`` and an empty value mean unset; a section with all its lines commented out is empty."""
    settings = read("postgres:\n  password: ~\n  sslmode:\nretry:\n# delay: 1s\n").settings
    assert (settings.postgres.password, settings.postgres.sslmode) == (None, None)
    assert settings.retry == Settings().retry


def test_null_is_refused_where_a_value_is_needed():
    """A setting that cannot be unset says so instead of silently falling back."""
    assert refusal("postgres: {host: }").setting == "postgres.host"


def test_lists():
    """A list is a sequence, or a text with commas."""
    assert read("reads: {services: [a, 'b c']}").settings.reads.services == ("a", "b c")
    assert read("{}", SIDECAR__READS__SERVICES="a, b").settings.reads.services == ("a", "b")
    assert read("listen: {hosts: []}").settings.listen.hosts == ()
    assert refusal("reads: {services: [a, {b: c}]}").setting == "reads.services"


# --- the environment


def test_variable_and_default():
    """``${VAR}`` takes the variable, ``${VAR:-d}`` the default where it is unset or empty, inside longer texts too."""
    text = "postgres: {host: '${H}.example', database: '${D:-logs}', user: '${U:-u}'}"
    postgres = read(text, H="db", U="").settings.postgres
    assert (postgres.host, postgres.database, postgres.user) == ("db.example", "logs", "u")


def test_undefined_variable_is_named():
    """Without a default the error names the setting and the variable."""
    error = refusal("postgres:\n  host: ${PG_HOST}")
    assert error.setting == "postgres.host"
    assert "PG_HOST" in str(error)
    assert "line 2" in str(error)


@pytest.mark.parametrize("written", ["${", "${}", "${1A}", "${A", "${A-b}", "${A:-${B}}x${"])
def test_malformed_reference_is_refused(written):
    """A ``${`` that is no reference is an error, not a text."""
    assert refusal(f'postgres: {{host: "{written}"}}', A="a").setting == "postgres.host"


def test_escaped_reference_is_literal():
    """``$${A}`` is the text ``${A}``."""
    assert read("postgres: {user: '$${A}'}").settings.postgres.user == "${A}"


def test_expanded_text_is_data():
    """What a variable holds is never structure, never expanded again, never null."""
    value = 'a": {b: c}'
    assert read("postgres: {user: '${A}'}", A=value).settings.postgres.user == value
    assert read("postgres: {user: '${A}'}", A="${B}").settings.postgres.user == "${B}"
    assert read("postgres: {password: '${A}'}", A="null").settings.postgres.password == Secret("null")


def test_expansion_is_bounded():
    """Many references to a long variable are refused instead of filling the memory."""
    assert refusal("postgres: {user: '" + "${A}" * 100 + "'}", A="x" * 100_000).setting == "postgres.user"


def test_environment_overrides_the_file():
    """SIDECAR__SECTION__KEY wins over the file, with the same types."""
    loaded = read(
        "retry: {attempts: 3}",
        SIDECAR__RETRY__ATTEMPTS="7",
        SIDECAR__PHASE="DualWrite",
        SIDECAR__SPOOL__CAP_BYTES="2GiB",
    )
    assert loaded.settings.retry.attempts == 7
    assert loaded.settings.spool.cap_bytes == 2 * GIB
    assert loaded.settings.phase is Phase.DUAL_WRITE
    assert any("SIDECAR__PHASE" in warning for warning in loaded.warnings)


@pytest.mark.parametrize(
    "name", ["SIDECAR__NOPE", "SIDECAR__RETRY__ATTEMPT", "SIDECAR__RETRY", "SIDECAR__", "SIDECAR__é"]
)
def test_unknown_override_is_refused(name):
    """A misspelt override is an error that names the variable."""
    assert name in str(refusal("{}", **{name: "1"}))


# --- the specification's spelling


def test_appsettings_of_the_specification():
    """The specification's own file (L424-442) loads as it stands and means the same."""
    settings = read(APPSETTINGS).settings
    assert settings.phase is Phase.SQL_ONLY
    assert (settings.retry.attempts, settings.retry.delay) == (3, 1.0)
    assert settings.continue_on_write_failure is True
    assert settings.flags.writes_to_sql is True
    assert (settings.dynamodb.table, settings.dynamodb.region) == ("LoanApp-IntegrationLogs-dev", "us-east-1")


def test_appsettings_with_a_byte_order_mark_tabs_and_other_case():
    """What Windows editors and .NET let pass: a BOM, tabs, names in any case."""
    text = '\ufeff{\r\n\t"hybridLogging": {\r\n\t\t"currentphase": "DualWrite"\r\n\t}\r\n}\r\n'
    assert read(text).settings.phase is Phase.DUAL_WRITE


def test_both_spellings_must_agree():
    """The same setting stated in both spellings is refused where the values differ, and fine where they agree."""
    both = "phase: {}\nHybridLogging: {{CurrentPhase: DualWrite}}"
    assert read(both.format("dual_write")).settings.phase is Phase.DUAL_WRITE
    assert refusal(both.format("sql_only")).setting == "phase"


def test_phase_rows_must_be_the_table():
    """MigrationPhases (L524-556) is accepted where it says what the phases mean, refused where it does not."""
    row = "MigrationPhases: {{Phase1_DualWrite: {{WritesToSql: true, RequireBothWrites: {}, Description: x}}}}"
    assert read(row.format("false")).settings == Settings()
    assert refusal(row.format("true")).setting == "MigrationPhases.Phase1_DualWrite.RequireBothWrites"
    assert refusal("MigrationPhases: {Phase1_SqlOnly: {}}").setting == "MigrationPhases.Phase1_SqlOnly"


@pytest.mark.parametrize(
    "text",
    ["HybridLogging: 1", "HybridLogging: {Foo: 1}", "HybridLogging: {RetryDelay: soon}", "DynamoDB: {Table: x}",
     "HybridLogging: {CurrentPhase: 1, currentPhase: 1}", "MigrationPhases: {Phase1_DualWrite: {Foo: 1}}"],
)  # fmt: skip
def test_wrong_specification_sections_are_refused(text):
    """Unknown names, values and repetitions in the specification's sections are errors too."""
    refusal(text)


# --- what is refused, and how it is said


def test_unknown_key_suggests_the_nearest():
    """A misspelt name is answered with the name that was probably meant, and where it stands."""
    error = refusal("retry:\n  attemps: 3")
    assert (error.setting, error.hint) == ("retry.attemps", "did you mean retry.attempts? (line 2)")
    assert "attempts" in error.allowed


def test_known_key_in_the_wrong_place_is_pointed_home():
    """A setting one level too high is answered with its full name."""
    assert "did you mean spool.cap_bytes?" in refusal("cap_bytes: 1GiB").hint


def test_errors_name_setting_value_bounds_and_line():
    """An error says which setting, what was seen, what is allowed, and what to do."""
    text = str(refusal("phase: 1\npostgres:\n  port: 70000"))
    for part in ("postgres.port", "70000", "at least 1, at most 65535", "correct the value", "line 3"):
        assert part in text


CONTRADICTIONS = {
    "flags.writes_to_sql": "flags: {writes_to_sql: false}",
    "flags.require_both_writes": "phase: 2\nflags: {require_both_writes: false}",
    "phase_force": f"phase_force: {'x' * 501}",
    "spool.low_watermark": "spool: {low_watermark: 0.9}",
    "spool.ballast_bytes": "spool: {ballast_bytes: 2GiB}",
    "spool.dead_letter_share": "spool: {dead_letter_share: 0.4}",
    "spool.checkpoint_bytes": "spool: {checkpoint_bytes: 512MiB}",
    "ingest.max_body_bytes": "ingest: {max_body_bytes: 1KiB}",
    "ingest.max_body_bytes ": "ingest: {max_body_bytes: 1GiB}",
    "retry.delay": "retry: {delay: 1m}",
    "retry.delay ": "retry: {delay: 0}",
    "drain.stop_accepting_before": "drain: {stop_accepting_before: 26s}",
    "fleet.fence_after": "fleet: {fence_after: 29s}",
    "listen.app": "listen: {app: '8080'}",
    "listen.app ": "listen: {app: 'localhost:65536'}",
    "listen.app  ": "listen: {app: '::1:80'}",
    "listen.app   ": "listen: {app: 'localhost:" + "9" * 5000 + "'}",
    "listen.ops": "listen: {ops: '127.0.0.1:8080'}",
    "postgres.table": "postgres: {table: 'logs; drop table x'}",
    "postgres.schema": "postgres: {schema: 1st}",
    "postgres.adopt.key": "postgres: {adopt: {key: 'LogId\"; drop table x; --'}}",
    "postgres.adopt.log_id": "postgres: {adopt: {log_id: LogId}}",
    "postgres.adopt.columns.user_id": "postgres: {adopt: {columns: {user_id: ServiceName}}}",
    "postgres.adopt.columns.log_type": "postgres: {adopt: {columns: {log_type: t.LogType}}}",
    "postgres.adopt.assume_zone": "postgres: {adopt: {assume_zone: Europe/Berlin}}",
    "postgres.password": f"postgres: {{password: {CANARY}, password_file: /x}}",
    "dynamodb.table": "dynamodb: {table: a b}",
    "dynamodb.fleet_table": "dynamodb: {fleet_table: integration_logs}",
    "dynamodb.region": "dynamodb: {region: US East}",
    "dynamodb.endpoint_url": f"dynamodb: {{endpoint_url: 'http://u:{CANARY}@h'}}",
    "dynamodb.endpoint_url ": "dynamodb: {endpoint_url: 'http://[::1'}",
}


@pytest.mark.parametrize("setting", CONTRADICTIONS)
def test_contradictions_are_refused(setting):
    """Every rule between settings is broken by one line, and the error names the setting to change."""
    error = refusal(CONTRADICTIONS[setting])
    assert error.setting == setting.strip()
    assert error.hint
    assert CANARY not in str(error)


def test_every_rule_is_broken_by_a_case():
    """No rule of the table goes untested: each one raises for some case above."""
    broken = set()
    for text in CONTRADICTIONS.values():
        frame = refusal(text).__traceback__
        while frame is not None:
            broken.add(frame.tb_frame.f_code.co_name)
            frame = frame.tb_next
    assert {rule.__name__ for rule in CHECKS} <= broken


@pytest.mark.parametrize("phase", Phase)
def test_flags_of_the_specification_assert_the_phase(phase):
    """Each phase accepts exactly its own row of flags and refuses each flag turned round."""
    row = TABLE[phase].flags
    lines = "".join(f"\n  {name}: {str(value).lower()}" for name, value in row.items())
    assert read(f"phase: {phase.label}\nflags:{lines}").settings.phase is phase
    for name, value in row.items():
        assert refusal(f"phase: {phase.label}\nflags: {{{name}: {str(not value).lower()}}}").setting == f"flags.{name}"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("listen: {app: '0.0.0.0:80'}", "listen.app"),
        ("postgres: {host: db, sslmode: disable}", "postgres.sslmode"),
        ("phase: 1", "dynamodb.region"),
        ("dynamodb: {endpoint_url: 'http://db:1'}", "dynamodb.endpoint_url"),
        ("spool: {ballast_bytes: 0}", "spool.ballast_bytes"),
        ("spool: {allow_volatile: true}", "spool.allow_volatile"),
        ("phase_force: because", "phase_force"),
    ],
)
def test_warnings_name_what_wants_attention(text, word):
    """What is allowed and dangerous is said once, with the setting's name."""
    assert [w.partition(":")[0] for w in read(text).warnings] == [word]
    assert read("{}").warnings == ()


# --- secrets


def test_no_error_or_print_shows_a_secret():
    """A password stays out of the printed configuration, repr, and errors of every kind about it."""
    settings = read(f"postgres: {{password: {CANARY}}}").settings
    assert settings.postgres.password is not None
    assert settings.postgres.password.reveal() == CANARY
    assert CANARY not in render(settings) + repr(settings)
    for text in (
        f"postgres: {{password: [{CANARY}]}}",
        f"postgres: {{password: {{a: {CANARY}}}}}",
        f"postgres: {{passwrd: {CANARY}}}",
        f"postgres: {CANARY}",
        f"postgres:\n  password: '{CANARY}",
        f"postgres:\n  password: %{CANARY}",
        f"postgres:\n  password: !{CANARY}",
        f"postgres:\n  password: *{CANARY}",
        f"postgres:\n  password: {CANARY}: x",
        f'postgres: {{password: "{CANARY}\\0"}}',
    ):
        assert CANARY not in str(refusal(text)), text
    assert CANARY not in str(refusal("{}", SIDECAR__POSTGRES__PASSWRD=CANARY))


# --- printing


def test_printed_configuration_reads_back():
    """What print-config shows is a configuration with the same meaning."""
    text = "phase: 3\npostgres: {user: \"o'neil ${A}\", host: '${A}'}\nreads: {services: [a, 'b, c']}"
    text += "\nretry: {delay: 1.2345678}"
    settings = read(text, A="b").settings
    assert read(render(settings)).settings == settings
    assert set(re.findall(r"^ *(\w+):", render(Settings()), re.MULTILINE)) >= {p.rpartition(".")[2] for p in FIELDS}


# --- the settings themselves


def test_defaults_obey_their_own_rules():
    """The default of every setting lies within its bounds: what is printed by default is read back."""
    assert read(render(Settings())).settings == Settings()
    msgspec.convert(msgspec.to_builtins(Settings()), Settings)


def test_live_names_are_settings():
    """Every name in LIVE is a top-level key."""
    assert set(Settings.__struct_fields__) >= LIVE


def test_changed_names_the_settings_that_differ():
    """``changed`` compares value by value."""
    new = read("phase: 1\ningest: {max_record_bytes: 200KiB}").settings
    assert new.ingest.max_record_bytes == 200 * KIB
    assert config.changed(Settings(), new) == ("phase", "ingest.max_record_bytes")
