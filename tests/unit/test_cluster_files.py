"""The descriptions of clusters: what Ray, AWS and KubeRay take, and what keeps them safe."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.reporter import reporter_head

import raysal
from raysal.cli import app
from raysal.config import load
from raysal.environment import JOB_CPUS
from raysal.jobs.submission import VERBS
from raysal.plan import ACTOR_BYTES, FORWARD_BYTES, FORWARD_PIXELS, SHARED_BYTES, STORE_SHARE

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = [ROOT / "cluster.yaml", ROOT / "deploy/cluster-local.yaml"]
RAY_OBJECTS = sorted((ROOT / "deploy").glob("ray*.yaml"))
PROMETHEUS = sorted((ROOT / "deploy/prometheus").iterdir())
MONITOR = ROOT / "deploy/podmonitor.yaml"
RAY_VERSION = "2.60.0"


def read(file: Path) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def clusters(file: Path) -> dict:
    """The cluster inside a KubeRay object."""
    spec = read(file)["spec"]
    spec = spec.get("jobTemplate", spec)
    return spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def job(file: Path) -> dict:
    spec = read(file)["spec"]
    return spec.get("jobTemplate", spec)


JOBS = [file for file in RAY_OBJECTS if "entrypoint" in job(file)]


@pytest.mark.parametrize("file", LAUNCHED, ids=lambda file: file.name)
def test_ray_up_takes_it(file: Path) -> None:
    whole = prepare_config(copy.deepcopy(read(file)))
    validate_config(whole)
    head = whole["available_node_types"][whole["head_node_type"]]
    start = " ".join(whole["head_start_ray_commands"])
    assert "--num-cpus=0" in start and head["resources"].get("CPU", 0) == 0
    assert "--dashboard-host=127.0.0.1" in start
    assert whole["idle_timeout_minutes"] > 0
    assert any("RAY_AUTH_MODE=token" in option for option in whole["docker"]["run_options"])
    assert whole["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_ray_up_refuses_a_knob_that_it_does_not_know() -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(read(LAUNCHED[0]) | {"idle_timeout": 3}))


def test_each_spot_worker_has_a_fallback_of_its_size_that_comes_second() -> None:
    kinds = read(LAUNCHED[0])["available_node_types"]
    spot = {n for n, kind in kinds.items() if kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"}
    assert spot == {"cpu_spot", "gpu_spot"}
    for name in spot:
        other = kinds[name.replace("spot", "on_demand")]
        assert other["resources"] == kinds[name]["resources"] and other["priority"] < kinds[name]["priority"]
        assert "InstanceMarketOptions" not in other["node_config"]
    assert {"GPU" in kinds[n]["resources"] for n in spot} == {True, False}


def test_aws_takes_each_kind_of_node() -> None:
    """By the description of EC2's interface that its own client goes by."""
    loaders = pytest.importorskip("botocore.loaders", reason="no botocore; pip install -e '.[s3]'")
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    run = ServiceModel(loaders.Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances").input_shape
    for name, kind in read(LAUNCHED[0])["available_node_types"].items():
        asked = kind["node_config"] | {"MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(asked, run).has_errors(), name
        assert asked["MetadataOptions"]["HttpTokens"] == "required"  # or any job could take the node's keys by a redirect
        assert all(disk["Ebs"]["Encrypted"] for disk in asked["BlockDeviceMappings"])


def closed(schema: Any) -> Any:
    """A CRD's schema that, as kubectl does, takes no field that it does not name."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items() if key != "format"}
    if isinstance(schema.get("properties"), dict) and "type" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture
def schema(file: Path) -> dict:
    """An operator's own definition of an object: ray.io_*.yaml of KubeRay's ray-operator/config/crd/bases, 1.6 or newer;
    monitoring.coreos.com_podmonitors.yaml of the Prometheus operator's example/prometheus-operator-crd."""
    folder = Path(os.environ.get("RAYSAL_CRDS", ROOT.parent / "shared/kuberay-crds"))
    content = read(file)
    definition = folder / f"{content['apiVersion'].partition('/')[0]}_{content['kind'].lower()}s.yaml"
    if not definition.is_file():
        pytest.skip(f"no definition: {definition} is not there; set RAYSAL_CRDS to a folder that holds it")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte of YAML: seconds instead of most of a minute
    versions = yaml.load(definition.read_text(encoding="utf-8"), Loader=loader)["spec"]["versions"]
    [stored] = [version for version in versions if version["storage"]]
    return closed(stored["schema"]["openAPIV3Schema"])


@pytest.mark.parametrize("file", [*RAY_OBJECTS, MONITOR], ids=lambda file: file.name)
def test_its_operator_takes_it(schema: dict, file: Path) -> None:
    content = read(file)
    schema["properties"]["metadata"] = {"type": "object"}
    taken = jsonschema.Draft7Validator(schema)
    taken.validate(content)
    with pytest.raises(jsonschema.ValidationError, match="nonsense"):
        taken.validate(content | {"spec": content["spec"] | {"nonsense": 1}})


@pytest.mark.parametrize("file", RAY_OBJECTS, ids=lambda file: file.name)
def test_kubernetes_takes_the_pods(file: Path) -> None:
    """Kubernetes' own schemas, by which most of an object of KubeRay goes: its pods."""
    cluster = clusters(file)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod"} | group["template"]
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        pod["spec"]["containers"][0]["nonsense"] = 1
        with pytest.raises(kubernetes_validate.ValidationError, match="nonsense"):
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_takes_the_network_policies() -> None:
    for policy in yaml.safe_load_all((ROOT / "deploy/networkpolicy.yaml").read_text(encoding="utf-8")):
        kubernetes_validate.validate(policy, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("file", RAY_OBJECTS, ids=lambda file: file.name)
def test_a_cluster_on_kubernetes_asks_for_a_token_and_keeps_work_off_its_head(file: Path) -> None:
    cluster = clusters(file)
    assert cluster["rayVersion"] == RAY_VERSION
    assert cluster["authOptions"] == {"mode": "token", "secretName": "raysal-ray-token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert not cluster["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"]
    for group in groups:
        pod = group["template"]
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["metadata"]["labels"]["app"] == "raysal"  # what the network policy goes by
        for container in pod["spec"]["containers"]:
            careful = container["securityContext"]
            assert careful["runAsNonRoot"] and not careful["allowPrivilegeEscalation"]
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]) and "memory" in container["resources"]["limits"]
    assert all(not group["template"]["spec"]["automountServiceAccountToken"] for group in cluster["workerGroupSpecs"])


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.name)
def test_what_a_job_on_kubernetes_runs_are_verbs_with_arguments_that_they_take(file: Path) -> None:
    words = shlex.split(job(file)["entrypoint"])
    commands = shlex.split(words[2]) if words[:2] == ["sh", "-c"] else words
    lines = [line.split(" ") for line in " ".join(commands).split(" && ")]
    verbs = typer.main.get_group(app).commands
    for line in lines:
        assert line[:3] == ["python", "-m", "raysal"] and line[3] in VERBS
        values = verbs[line[3]].make_context(line[3], line[4:]).params
        config = values.get("config")
        load(None if config is None else ROOT / "configs" / Path(config).name, values.get("set_", ()))
    spec = job(file)
    assert spec["entrypointNumCpus"] == float(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"][JOB_CPUS]) > 0
    assert spec["shutdownAfterJobFinishes"] and (spec["backoffLimit"] > 0 or "schedule" in read(file)["spec"])  # the next tick goes on


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.name)
def test_a_jobs_own_process_is_on_no_spot_node(file: Path) -> None:
    spot = [group for group in clusters(file)["workerGroupSpecs"] if group["template"]["spec"].get("tolerations")]
    [mark] = json.loads(job(file).get("entrypointResources", '{"": 0}'))
    assert all(mark and mark not in group.get("resources", {}) for group in spot)
    kept = [group for group in clusters(file)["workerGroupSpecs"] if mark in group.get("resources", {})]
    assert not spot or [group["minReplicas"] for group in kept] == [1]
    assert "compute.grow_s=" in job(file)["entrypoint"]  # it may be up before its workers are


@pytest.mark.parametrize("file", [file for file in JOBS if "score_actors" in job(file)["entrypoint"]], ids=lambda file: file.name)
def test_a_nodes_actors_fit_into_its_memory(file: Path) -> None:
    """As raysal plan reckons them: Ray would start as many as there are CPUs for."""
    [cpus] = re.findall(r"compute.cpus_per_actor=(\d+)", job(file)["entrypoint"])
    each = ACTOR_BYTES + FORWARD_BYTES * FORWARD_PIXELS
    for group in clusters(file)["workerGroupSpecs"]:
        has = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        ray_cpus = int(group.get("resources", {}).get("CPU", has["cpu"]))
        room = int(has["memory"].removesuffix("Gi")) * 2**30 * (1 - STORE_SHARE) - SHARED_BYTES
        assert ray_cpus // int(cpus) * each <= room


def test_only_the_nodes_the_operator_and_prometheus_reach_rays_ports() -> None:
    policies = list(yaml.safe_load_all((ROOT / "deploy/networkpolicy.yaml").read_text(encoding="utf-8")))
    nodes, endpoint = policies
    assert nodes["spec"]["podSelector"] == {"matchLabels": {"app": "raysal"}} and nodes["spec"]["policyTypes"] == ["Ingress"]
    others = [rule for rule in nodes["spec"]["ingress"] if "podSelector" not in rule["from"][0]]
    assert [port["port"] for rule in others for port in rule["ports"]] == [8265, 8080]
    assert [port["port"] for rule in endpoint["spec"]["ingress"] for port in rule["ports"]] == [8000]


@pytest.mark.parametrize("file", PROMETHEUS, ids=lambda file: file.name)
def test_prometheus_takes_it(file: Path) -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("no promtool; it comes with Prometheus")
    checked = subprocess.run([promtool, "check", "config", "--syntax-only", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_prometheus_looks_for_the_nodes_where_ray_lists_them() -> None:
    by_http, on_the_head = (read(file) for file in PROMETHEUS)
    [place] = on_the_head["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert place == f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"
    [asked] = by_http["scrape_configs"][0]["http_sd_configs"]
    path = asked["url"].removeprefix("http://127.0.0.1:8265")
    assert f'@routes.get("{path}")' in inspect.getsource(reporter_head)
    assert asked["authorization"] == {"type": "Bearer", "credentials_file": "/etc/prometheus/ray-token"}


def test_numbers_are_read_more_often_than_ray_forgets_them() -> None:
    forgotten_s = 2 * 10  # twice the pause between two exports, see OpenTelemetryMetricRecorder of Ray
    pauses = [read(file)["global"]["scrape_interval"] for file in PROMETHEUS]
    pauses += [endpoint["interval"] for endpoint in read(MONITOR)["spec"]["podMetricsEndpoints"]]
    assert len(pauses) == 3 and all(2 * int(pause.removesuffix("s")) <= forgotten_s for pause in pauses)


def test_the_pod_monitor_selects_every_pod_and_a_port_that_the_policy_opens() -> None:
    monitor = read(MONITOR)["spec"]
    for file in RAY_OBJECTS:
        for group in [clusters(file)["headGroupSpec"], *clusters(file)["workerGroupSpecs"]]:
            assert monitor["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
            assert "ports" not in group["template"]["spec"]["containers"][0]  # KubeRay adds `metrics` on 8080 where it is not named
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ["metrics"]
    nodes = next(yaml.safe_load_all((ROOT / "deploy/networkpolicy.yaml").read_text(encoding="utf-8")))
    assert 8080 in [port["port"] for rule in nodes["spec"]["ingress"] for port in rule.get("ports", [])]


def test_versions_are_the_same_everywhere() -> None:
    texts = {file: file.read_text(encoding="utf-8") for file in [*LAUNCHED, *RAY_OBJECTS, ROOT / "deploy/Containerfile"]}
    images = {found for text in texts.values() for found in re.findall(r"REGISTRY/raysal:(\S+)", text)}
    assert images == {raysal.__version__}
    assert set(re.findall(r"rayproject/ray:([0-9.]+)|\]==([0-9.]+)", texts[ROOT / "deploy/Containerfile"])) == {
        (RAY_VERSION, ""),
        ("", RAY_VERSION),
    }


def test_no_secret_stands_in_any_description() -> None:
    deployed = (file for file in sorted((ROOT / "deploy").rglob("*")) if file.is_file())
    files = [*LAUNCHED, *deployed, *sorted((ROOT / "serve").glob("*.yaml"))]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"(auth_token|password|secret_access_key)\s*[:=]\s*['\"]?[0-9a-fA-F]{8}|AKIA", text), file
        assert not re.search(r"kind:\s*Secret", text), file
