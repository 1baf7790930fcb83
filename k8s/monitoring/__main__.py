"""``python -m k8s.monitoring`` writes the committed rule file and dashboard; ``--check`` fails where they are stale."""

import argparse
import sys
from pathlib import Path
from typing import Final

import yaml

from k8s.monitoring.alerts import RUNBOOK, groups
from k8s.monitoring.dashboard import build
from k8s.monitoring.promql import JOB, Scale

TARGET: Final = Path(__file__).resolve().parent.parent / "components" / "monitoring"
_HEAD: Final = "# Written by `python -m k8s.monitoring`; change k8s/monitoring/alerts.py instead.\n"


def prometheus_rule(runbook: str) -> str:
    """The alerts as a PrometheusRule of the Prometheus operator."""
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": JOB, "labels": {"app.kubernetes.io/name": JOB}},
        "spec": groups(Scale(), runbook),
    }
    return _HEAD + yaml.safe_dump(manifest, sort_keys=False, width=1000)


def rule_file(scale: Scale, runbook: str = RUNBOOK) -> str:
    """The alerts as a rule file for a Prometheus without the operator."""
    return _HEAD + yaml.safe_dump(groups(scale, runbook), sort_keys=False, width=1000)


def main() -> int:
    """Write, check, or print; 1 where a committed file is stale."""
    parser = argparse.ArgumentParser(prog="python -m k8s.monitoring", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a committed file is stale")
    parser.add_argument("--rules", action="store_true", help="print a plain rule file instead")
    parser.add_argument("--duration-scale", type=float, default=1.0, help="multiply every duration of --rules")
    parser.add_argument("--runbook", default=RUNBOOK, help="where docs/RUNBOOK.md can be read")
    args = parser.parse_args()
    if args.rules:
        sys.stdout.write(rule_file(Scale(args.duration_scale), args.runbook))
        return 0
    stale = []
    for name, text in (("prometheusrule.yaml", prometheus_rule(args.runbook)), ("dashboard.json", build())):
        path = TARGET / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not args.check:
                path.write_text(text)
    if args.check and stale:
        sys.stderr.write(f"stale: {', '.join(stale)}; run `python -m k8s.monitoring`\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
