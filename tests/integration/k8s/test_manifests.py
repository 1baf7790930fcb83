"""Every overlay as kubectl renders it: valid, hardened, and a phase change is a changed file and nothing else."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import validate

from sidecar.__main__ import VERBS, build_parser
from sidecar.config import load
from sidecar.operator.validate import COULD_NOT, EXITS
from sidecar.phase import Phase
from tests.integration.k8s.tools import JOBS, OVERLAYS, ROOT, TOOLS, of_kind, render, run, tool

TARGETS = [f"overlays/{name}" for name in OVERLAYS] + [f"jobs/{name}" for name in JOBS]
CUSTOM = {"PodMonitor", "PrometheusRule", "PodIdentityAssociation"}
VERSIONS = ("1.29", "1.37")

EXCEPTIONS = {
    "CKV_K8S_11": "a CPU limit throttles the event loop in bursts, and every answer waits for it; the request is set",
    "CKV_K8S_15": "tags are immutable; Always makes a pod's start depend on the registry during an incident",
    "CKV_K8S_43": "the digest is the release's to set, by `images:` in the team's own kustomization",
}


def workload(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The one Deployment or StatefulSet."""
    (found,) = of_kind(manifests, "Deployment", "StatefulSet")
    return found


def sidecar_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The sidecar's container, native or plain."""
    pod = workload(manifests)["spec"]["template"]["spec"]
    (found,) = (c for c in [*pod.get("initContainers", []), *pod["containers"]] if c["name"] == "sidecar")
    return found


def config_of(manifests: list[dict[str, Any]]) -> str:
    """The mounted config.yaml."""
    (text,) = (
        m["data"]["config.yaml"] for m in of_kind(manifests, "ConfigMap") if m["metadata"]["name"] == "sidecar-config"
    )
    return text


@pytest.mark.parametrize("target", TARGETS)
def test_every_manifest_is_valid_strictly_in_the_oldest_and_the_newest_version(target):
    """No unknown field, no wrong type, in any Kubernetes that the overlay is for."""
    versions = ("1.25", "1.28", "1.37") if target.endswith("pre-1.29") else VERSIONS
    for manifest in render(target):
        if manifest["kind"] not in CUSTOM:
            for version in versions:
                validate(manifest, version, strict=True)


def test_the_documented_kustomization_adds_the_sidecar_to_somebodys_deployment(tmp_path: Path):
    """docs/KUBERNETES.md as it stands, on a Deployment that has nothing of the example's but the label."""
    text = (ROOT / "docs" / "KUBERNETES.md").read_text()
    files = re.findall(r"```yaml\n# (\S+)\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in files] == ["base/kustomization.yaml", "production/kustomization.yaml"]
    for name, content in files:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    ours = (ROOT / "k8s" / "components" / "sidecar" / "config.yaml").read_text()
    own = ours.replace("cap_bytes: 1GiB", "cap_bytes: 512MiB")
    (tmp_path / "production" / "config.yaml").write_text(own.replace("sql_only", "dynamo_only"))
    shutil.copytree(ROOT / "k8s", tmp_path / "hybrid-log-sidecar" / "k8s")
    pod = {"containers": [{"name": "shop", "image": "shop:1"}]}
    labels = {"app.kubernetes.io/name": "shop"}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "shop", "labels": {"hybrid-log-sidecar": "enabled"}},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }
    (tmp_path / "base" / "deployment.yaml").write_text(yaml.safe_dump(deployment))
    manifests = list(yaml.safe_load_all(run([tool("kubectl"), "kustomize", str(tmp_path / "production")])))
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            validate(manifest, VERSIONS[0], strict=True)
    assert sidecar_of(manifests)["image"] == "registry.example.com/hybrid-log-sidecar:0.1.0"
    assert workload(manifests)["spec"]["template"]["metadata"]["labels"]["hybrid-log-sidecar"] == "enabled"
    assert config_of(manifests) == own
    assert {m["metadata"].get("namespace") for m in manifests} == {"shop"}


def test_an_unknown_field_is_found_by_the_strict_validation():
    """The check above can fail."""
    deployment = workload(render("overlays/example"))
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(Exception, match="terminationGracePeriod"):
        validate(deployment, "1.37", strict=True)


# In the tools' own environment: the models' package brings a pytest plugin that breaks other runs. It takes seconds to
# import, so one process parses them all.
PARSE = """
import json, sys
from cloudcoil.models.prometheus_operator import v1
for manifest in json.load(sys.stdin):
    try:
        parsed = getattr(v1, manifest["kind"]).model_validate(manifest)
        print(parsed.model_dump_json(by_alias=True, exclude_none=True, exclude_unset=True))
    except ValueError as error:
        print(json.dumps({"spec": str(error)}))
"""


def test_the_operators_resources_have_the_operators_types():
    """PodMonitor and PrometheusRule parse into the operator's own models and lose nothing; a wrong type is found."""
    manifests = of_kind(render("overlays/example"), "PodMonitor", "PrometheusRule")
    assert {m["kind"] for m in manifests} == {"PodMonitor", "PrometheusRule"}
    (wrong, *_) = of_kind(render("overlays/example"), "PodMonitor")
    wrong["spec"]["podMetricsEndpoints"][0]["relabelings"][0]["sourceLabels"] = "pod"
    told = run([str(TOOLS / "bin" / "python"), "-c", PARSE], input=json.dumps([*manifests, wrong]))
    *parsed, error = (json.loads(line)["spec"] for line in told.splitlines() if line.startswith("{"))
    assert parsed == [m["spec"] for m in manifests]
    assert "sourceLabels" in error


def test_whatever_exports_metrics_is_scraped_by_one_podmonitor_and_let_in_for_it():
    """Sidecars and Jobs alike, by label, port and namespace; under job names of their own."""
    monitors = of_kind(render("overlays/example"), "PodMonitor")
    jobs = {}
    exporting = 0
    for target in ("overlays/example", *(f"jobs/{name}" for name in JOBS)):
        manifests = render(target)
        policies = of_kind(manifests, "NetworkPolicy")
        for template in filter(None, map(template_of, manifests)):
            containers = [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
            ports = {port["name"] for each in containers for port in each.get("ports", [])}
            labels = template["metadata"]["labels"]
            found = [each for each in monitors if each["spec"]["selector"]["matchLabels"].items() <= labels.items()]
            if "ops" not in ports:
                assert found == [], target
                continue
            exporting += 1
            (monitor,) = found
            assert {each["metadata"].get("namespace") for each in (monitor, *manifests)} == {"example"}
            (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
            assert endpoint["port"] == "ops"
            jobs[monitor["metadata"]["name"]] = endpoint["relabelings"][0]["replacement"]
            assert any(each["spec"]["podSelector"]["matchLabels"].items() <= labels.items() for each in policies)
    assert exporting == 3  # a sidecar, the backfill, the copy back
    assert jobs == {"hybrid-log-sidecar": "hybrid-log-sidecar", "hybrid-log-backfill": "hybrid-log-backfill"}


def test_checkov_finds_nothing_but_what_is_argued(tmp_path: Path):
    """Every remaining finding stands in EXCEPTIONS with its reason, and every reason is still needed."""
    rendered = (manifest for target in TARGETS for manifest in render(target))
    different = {json.dumps(manifest, sort_keys=True): manifest for manifest in rendered}  # most overlays differ in one
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(different.values()))
    how = ("--framework", "kubernetes", "--compact", "-o", "json", "--soft-fail", "--skip-download")
    done = run([tool("checkov"), "-d", str(tmp_path), *how])
    report = json.loads(done[done.index("{") :])
    assert report["summary"]["passed"] > 100
    assert report["summary"]["parsing_errors"] == 0
    failed = {check["check_id"] for check in report["results"]["failed_checks"]}
    assert failed == set(EXCEPTIONS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_mounted_configuration_is_one_that_the_sidecar_accepts(overlay, tmp_path: Path):
    """config.yaml as it comes out of kustomize loads, with its spool and secrets where the volumes are mounted."""
    manifests = render(f"overlays/{overlay}")
    path = tmp_path / "config.yaml"
    path.write_text(config_of(manifests))
    settings = load(str(path), {}).settings
    mounts = {m["name"]: m["mountPath"] for m in sidecar_of(manifests)["volumeMounts"]}
    assert settings.spool.directory.startswith(mounts["sidecar-spool"])
    assert settings.control.token_file
    assert settings.control.token_file.startswith(mounts["sidecar-secrets"])
    assert settings.postgres.password_file
    assert settings.postgres.password_file.startswith(mounts["sidecar-secrets"])
    assert settings.listen.ops.endswith(f":{sidecar_of(manifests)['ports'][0]['containerPort']}")
    assert mounts["sidecar-config"] == "/etc/sidecar"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_grace_period_holds_the_drain_and_the_applications_own_stop(overlay, tmp_path: Path):
    """Its seconds are above the sidecar's drain by the 30 s of an ordinary application."""
    manifests = render(f"overlays/{overlay}")
    (tmp_path / "config.yaml").write_text(config_of(manifests))
    drain = load(str(tmp_path / "config.yaml"), {}).settings.drain.timeout
    assert workload(manifests)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 30 + drain


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_spools_volume_is_larger_than_all_that_the_spool_may_hold(overlay, tmp_path: Path):
    """Going over an emptyDir's sizeLimit evicts the pod and deletes the spool: cap + ballast + log + reserve fit."""
    manifests = render(f"overlays/{overlay}")
    (tmp_path / "config.yaml").write_text(config_of(manifests))
    spool = load(str(tmp_path / "config.yaml"), {}).settings.spool
    needed = spool.cap_bytes * (1 + spool.dead_letter_share) + spool.ballast_bytes + 8 * spool.checkpoint_bytes
    units = {"Mi": 1024**2, "Gi": 1024**3}
    pod = workload(manifests)
    if pod["kind"] == "StatefulSet":
        (claim,) = pod["spec"]["volumeClaimTemplates"]
        size = claim["spec"]["resources"]["requests"]["storage"]
    else:
        (volume,) = (v for v in pod["spec"]["template"]["spec"]["volumes"] if v["name"] == "sidecar-spool")
        size = volume["emptyDir"]["sizeLimit"]
    assert int(size[:-2]) * units[size[-2:]] >= needed


@pytest.mark.parametrize("phase", list(Phase))
def test_a_phase_overlay_changes_one_line_of_one_configmap(phase: Phase):
    """The whole difference between two phases' manifests is the first line of config.yaml: no rollout follows."""
    label = phase.label.replace("_", "-")
    plain, moved = render("overlays/example"), render(f"overlays/phase-{int(phase)}-{label}")
    before, after = config_of(plain).splitlines(), config_of(moved).splitlines()
    assert after[0] == f"phase: {phase.label}"
    assert after[1:] == before[1:]
    for manifests in (plain, moved):
        for m in of_kind(manifests, "ConfigMap"):
            m["data"].pop("config.yaml", None)
    assert plain == moved


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configuration_is_mounted_as_a_directory_under_a_stable_name(overlay):
    """No subPath, which is never updated, and no content hash in the name, which would restart every pod."""
    manifests = render(f"overlays/{overlay}")
    assert not any("subPath" in m or "subPathExpr" in m for m in sidecar_of(manifests)["volumeMounts"])
    (volume,) = (v for v in workload(manifests)["spec"]["template"]["spec"]["volumes"] if v["name"] == "sidecar-config")
    assert volume["configMap"]["name"] == "sidecar-config"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_sidecar_starts_first_and_runs_without_any_privilege(overlay):
    """Native: an init container that restarts; before 1.29: the first container. Restricted in both."""
    manifests = render(f"overlays/{overlay}")
    pod = workload(manifests)["spec"]["template"]["spec"]
    container = sidecar_of(manifests)
    if overlay == "pre-1.29":
        assert pod["containers"][0] is container
        assert "restartPolicy" not in container
        assert not pod.get("initContainers")
        *shell, script = container["lifecycle"]["preStop"]["exec"]["command"]
        assert shell == ["sh", "-c"]
        held = re.fullmatch(r"sleep (\d+) && exec sidecar wait --timeout (\d+)", script)
        assert held, script
        drain = 25  # seconds; of the configuration that is deployed with it
        assert sum(map(int, held.groups())) + drain < pod["terminationGracePeriodSeconds"]
    else:
        assert pod["initContainers"][0] is container
        assert container["restartPolicy"] == "Always"
    security = container["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == 10001
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert {p["httpGet"]["path"] for p in (container["startupProbe"], container["readinessProbe"])} == {"/readyz"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"


def template_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a workload makes pods from; empty for anything else."""
    spec = manifest.get("spec", {})
    return spec.get("jobTemplate", {"spec": spec})["spec"].get("template", {})


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The pod that a workload makes; empty for anything else."""
    return template_of(manifest).get("spec", {})


@pytest.mark.parametrize("target", TARGETS)
def test_every_command_line_of_a_manifest_is_understood(target):
    """No pod ends with `invalid choice` or `unrecognized arguments`."""
    called = set()
    for manifest in render(target):
        pod = pod_of(manifest)
        for container in [*pod.get("initContainers", []), *pod.get("containers", [])]:
            if container["image"].startswith("hybrid-log-sidecar"):
                build_parser(VERBS).parse_args(container["args"])
                called.add(container["args"][0])
            hooks = [h["exec"]["command"] for h in container.get("lifecycle", {}).values()]
            called |= set(re.findall(r"\bsidecar ([a-z-]+)", "\n".join(" ".join(words) for words in hooks)))
    assert called
    assert called <= {verb.name for verb in VERBS}


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("jobs/")])
def test_what_runs_once_has_no_privilege_either_and_mounts_what_the_pods_mount(target):
    """Not root, nothing writable but /tmp, no capability; the ConfigMap and the Secret by the names of the pods'."""
    pods = [pod for pod in map(pod_of, render(target)) if pod]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        (volume,) = (v for v in pod["volumes"] if v["name"] == "sidecar-config")
        assert volume["configMap"]["name"] == "sidecar-config"
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}


def test_the_nightly_validation_tells_a_difference_apart_from_a_failure():
    """Exit 1 ends the Job at once, anything else is tried again; two never run at a time."""
    (job,) = of_kind(render("jobs/validate"), "CronJob")
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    spec = job["spec"]["jobTemplate"]["spec"]
    (rule,) = (r for r in spec["podFailurePolicy"]["rules"] if r["action"] == "FailJob")
    assert rule["onExitCodes"]["values"] == [EXITS["divergent"]]
    assert COULD_NOT not in rule["onExitCodes"]["values"]
    assert spec["backoffLimit"] > 0
    assert rule["onExitCodes"]["containerName"] == spec["template"]["spec"]["containers"][0]["name"]


def test_a_claim_and_not_an_emptydir_holds_the_spool_in_the_pvc_overlay():
    """The volume of the template is gone and the claim has its name."""
    pod = workload(render("overlays/pvc"))
    assert "sidecar-spool" not in {v["name"] for v in pod["spec"]["template"]["spec"]["volumes"]}
    assert pod["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] == "sidecar-spool"
    assert pod["spec"]["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}


def test_the_network_policy_closes_the_ops_port_and_no_other():
    """Every TCP port but 9464 stays open to all; 9464 is the monitoring namespace's."""
    (policy,) = of_kind(render("overlays/example"), "NetworkPolicy")
    ops, others = policy["spec"]["ingress"]
    assert ops["ports"] == [{"protocol": "TCP", "port": 9464}]
    assert ops["from"]
    assert "from" not in others
    opened = {
        port
        for p in others["ports"]
        if p["protocol"] == "TCP"
        for port in range(p["port"], p.get("endPort", p["port"]) + 1)
    }
    assert set(range(1, 65536)) - opened == {9464}


def statements(name: str) -> list[dict[str, Any]]:
    """The statements of an IAM policy file."""
    return json.loads((ROOT / "k8s" / "iam" / name).read_text())["Statement"]


def test_the_steady_states_role_deletes_nothing_but_canary_and_heartbeats_and_creates_nothing():
    """No wildcard, no table management; Scan of one index; DeleteItem under the keys of canary and heartbeats alone."""
    deletable = {}
    scanned = []
    for statement in statements("sidecar-policy.json"):
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert statement["Effect"] == "Allow"
        assert not [a for a in actions if "*" in a]
        assert not {"dynamodb:DeleteTable", "dynamodb:CreateTable", "dynamodb:UpdateTable"} & set(actions)
        if "dynamodb:Scan" in actions:
            scanned.append(statement["Resource"].partition("/")[2])
        if "dynamodb:DeleteItem" in actions:
            # ForAllValues alone is true where the key is absent.
            assert statement["Condition"].pop("Null") == {"dynamodb:LeadingKeys": "false"}
            deletable[statement["Resource"].partition("/")[2]] = statement["Condition"]
    assert scanned == ["integration_logs/index/service"]
    assert deletable == {
        "integration_logs": {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": ["canary#*"]}},
        "integration_logs_fleet": {"ForAllValues:StringEquals": {"dynamodb:LeadingKeys": ["heartbeats"]}},
    }


def test_nobody_may_delete_a_table():
    """Neither policy names DeleteTable or a wildcard."""
    for path in (ROOT / "k8s" / "iam").glob("*-policy.json"):
        for statement in statements(path.name):
            assert not {a for a in statement["Action"] if "DeleteTable" in a or "*" in a}


def test_the_grants_hold_no_right_to_change_a_record():
    """SELECT and INSERT on log rows; never UPDATE, DELETE or TRUNCATE there, never ALL."""
    sql = [
        line.split("--")[0].strip().upper() for line in (ROOT / "k8s" / "sql" / "grants.sql").read_text().splitlines()
    ]
    grants = " ".join(sql).split(";")
    on_records = [g for g in grants if "GRANT" in g and "INTEGRATION_LOGS " in g + " "]
    assert any("SELECT, INSERT" in g for g in on_records)
    assert not [g for g in grants if "GRANT ALL" in g]
    assert not [g for g in on_records if {"UPDATE", "DELETE", "TRUNCATE"} & set(g.replace(",", " ").split())]
    deleting = [g.replace(",", " ").split() for g in grants if "DELETE" in g or "TRUNCATE" in g]
    assert [g[g.index("ON") + 1 : g.index("TO")] for g in deleting] == [["INTEGRATION_LOGS_HEARTBEATS"]]
