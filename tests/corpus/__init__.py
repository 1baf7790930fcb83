"""Bad input as data: what must be refused, what must come through unchanged. Our own cases; see each loader.

``json_texts.jsonl``  JSON texts. ``text`` holds one byte per character (Latin-1), so that bytes that are not UTF-8 can
``json_texts.jsonl``  JSON texts. ``text`` holds one byte per character (Latin-1), so that any byte can
    ``surrogate`` (JSON by its grammar, but with a lone surrogate escape), ``deep`` (JSON, more than 63 levels).
``records.jsonl``  record texts. ``refused`` names the field that is at fault and ``rule`` the rule; otherwise
    ``stored`` gives fields as they are stored.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class JsonText:
    name: str
    verdict: str
    text: bytes


@dataclass(frozen=True)
class RecordText:
    name: str
    text: bytes
    refused: str | None
    rule: str | None
    stored: dict[str, Any]


def json_texts(*verdicts: str) -> list[JsonText]:
    """The texts of these verdicts."""
    out = []
    for line in (_HERE / "json_texts.jsonl").read_text().splitlines():
        case = json.loads(line)
        if "text" in case:
            text = case["text"].encode("latin-1")
        else:
            n = case["times"]
            text = (case["prefix"] * n + case["middle"] + case["suffix"] * n).encode()
        if case["verdict"] in verdicts:
            out.append(JsonText(case["name"], case["verdict"], text))
    return out


def record_texts() -> list[RecordText]:
    """All records of the corpus."""
    return [
        RecordText(case["name"], case["text"].encode(), case.get("refused"), case.get("rule"), case.get("stored", {}))
        for case in map(json.loads, (_HERE / "records.jsonl").read_text().splitlines())
    ]
