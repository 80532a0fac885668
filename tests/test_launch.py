"""The recipes of scripts/launch as what reads them sees them; tests/test_processes.py runs two of them."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from serving import WAIT_S

from tpjax.cli import app

LAUNCH = Path(__file__).parents[1] / "scripts" / "launch"
SCRIPTS, MANIFESTS = sorted(LAUNCH.glob("*.sh")), sorted(LAUNCH.glob("*.yaml"))

# No package has the schemas of custom resources. Their pods and jobs are of Kubernetes' own kinds, which
# are checked as such; around them, these fields of JobSet v1alpha2 and KubeRay v1 are used.
JOB_SET = {
    "failurePolicy": {
        "maxRestarts": int,
        "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
    },
    "replicatedJobs": [{"name": str, "replicas": int, "template": "Job"}],
}
HEAD = {"rayStartParams": dict, "template": "PodTemplate"}
WORKERS = {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int} | HEAD
RAY_SERVICE = {
    "serveConfigV2": str,
    "rayClusterConfig": {
        "rayVersion": str,
        "enableInTreeAutoscaling": bool,
        "headGroupSpec": HEAD,
        "workerGroupSpecs": [WORKERS],
    },
}
CUSTOM = {"jobset.x-k8s.io/v1alpha2": ("JobSet", JOB_SET), "ray.io/v1": ("RayService", RAY_SERVICE)}


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_scripts_are_sound_and_say_what_they_need(script: Path) -> None:
    """Without arguments each prints its usage; shellcheck, of the test extra, finds nothing."""
    done = subprocess.run([script], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and "MODEL" in done.stderr
    shellcheck = shutil.which("shellcheck", path=os.fspath(Path(sys.executable).parent))
    if shellcheck is not None:
        checked = subprocess.run([shellcheck, script], capture_output=True, text=True, timeout=WAIT_S)
        assert checked.stdout == ""


def run_with_stand_ins(
    tmp_path: Path, script: str, arguments: list[str], stand_ins: dict[str, str]
) -> tuple[int, list[list[str]]]:
    """Runs a script with commands that only write down what they were given, and then do as told.

    Returns:
        Its exit status, and the words of each call, the command's name first.
    """
    for name, then in stand_ins.items():
        file = tmp_path / name
        file.write_text(
            f'#!/bin/bash\n(printf "%s\\x1f" {name} "$@"; printf "\\x1e\\n") >>"$CALLS"\n{then}\n'
        )
        file.chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "HOME": str(tmp_path)}
    done = subprocess.run([LAUNCH / script, *arguments], env=environment, timeout=WAIT_S)
    return done.returncode, [call.split("\x1f")[:-1] for call in calls.read_text().split("\x1e\n")[:-1]]


FAILS_ONCE = '[[ $(grep -c ^tpjax "$CALLS") -gt 1 ]]'


@pytest.mark.parametrize(("then", "status", "runs"), [(FAILS_ONCE, 0, 2), ("exit 2", 2, 1)])
def test_hosts_of_a_tpu_slice_start_again_but_not_with_bad_input(
    then: str, status: int, runs: int, tmp_path: Path
) -> None:
    """``gcloud`` runs on this machine what it would run on each host."""
    stand_ins = {"gcloud": 'bash -c "${@: -1}"', "tpjax": then, "pgrep": "exit 1", "rm": "", "sleep": ""}
    odd = ["--served-model-name", "it's $5"]  # has to survive two shells
    ended, calls = run_with_stand_ins(tmp_path, "tpu_vm.sh", ["slice", "us-east5-a", "/m", *odd], stand_ins)
    assert ended == status
    gcloud, *others = calls
    assert gcloud[1:8] == ["compute", "tpus", "tpu-vm", "ssh", "slice", "--zone", "us-east5-a"]
    assert [one[1:] for one in others if one[0] == "tpjax"] == [["serve", "/m", *odd, "--distributed"]] * runs
    assert [one[1:] for one in others if one[0] == "rm"] == [["-f", "/tmp/libtpu_lockfile"]] * runs


@pytest.mark.slow
def test_ray_s_own_command_line_takes_what_its_script_gives_it(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    from ray.scripts.scripts import cli as ray
    from ray.serve.scripts import cli as serve
    from test_ray import as_serve_run

    stand_ins = {"ray": "", "serve": ""}
    given = ["tp=4", "accelerator=GPU", "max_replicas=8"]
    _, calls = run_with_stand_ins(tmp_path, "ray.sh", ["head", "/m", *given], stand_ins)
    assert [one[:2] for one in calls] == [["ray", "start"], ["serve", "start"], ["serve", "run"]]
    (tmp_path / "calls").unlink()
    _, joined = run_with_stand_ins(tmp_path, "ray.sh", ["join", "10.0.0.1:6379"], stand_ins)
    for name, subcommand, *words in [*calls, *joined]:
        {"ray": ray, "serve": serve}[name].commands[subcommand].make_context(subcommand, list(words))
    application, *arguments = calls[-1][2:]
    assert application == "tpjax.deploy.ray:build_app"
    (made,) = as_serve_run(dict(one.split("=") for one in arguments))._bound_deployment.init_args
    assert made.max_replicas == 8


def documents(manifest: Path) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="pip install -e '.[test]'")
    return list(yaml.safe_load_all(manifest.read_text()))


def parts(value: Any, fields: Any) -> Iterator[tuple[str, Any]]:
    """Compares a custom resource with the fields it may have; yields what is of Kubernetes' own kinds."""
    if isinstance(fields, str):
        yield fields, value
    elif isinstance(fields, type):
        assert type(value) is fields, value
    elif isinstance(fields, list):
        for one in value:
            yield from parts(one, fields[0])
    else:
        assert value.keys() <= fields.keys()
        for name, one in value.items():
            yield from parts(one, fields[name])


@pytest.mark.parametrize("manifest", MANIFESTS, ids=[manifest.name for manifest in MANIFESTS])
def test_manifests_are_of_kubernetes_schemas(manifest: Path) -> None:
    """Every field is known, and of its type."""
    schemas = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[test]'")
    own = []
    for document in documents(manifest):
        if document["apiVersion"] not in CUSTOM:
            own.append(document)
            continue
        kind, fields = CUSTOM[document["apiVersion"]]
        assert document.keys() == {"apiVersion", "kind", "metadata", "spec"} and document["kind"] == kind
        for part, value in parts(document["spec"], fields):
            group = {"Job": "batch/v1", "PodTemplate": "v1"}[part]
            body = value if part == "Job" else {"template": value}
            own.append({"apiVersion": group, "kind": part, "metadata": {"name": "part"}} | body)
    assert len(own) == 2
    for one in own:
        schemas.validate(one, schemas.latest_version(), strict=True)


def job_set(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The service, the job and its container of a manifest."""
    service, jobs = documents(LAUNCH / name)
    (job,) = (one["template"]["spec"] for one in jobs["spec"]["replicatedJobs"])
    (container,) = job["template"]["spec"]["containers"]
    return service, job, container


@pytest.mark.parametrize("name", ["gke_tpu.yaml", "kubernetes_gpu.yaml"])
def test_pods_run_a_command_that_there_is(name: str) -> None:
    service, job, container = job_set(name)
    tpjax, subcommand, *words = [*container["command"], *container["args"]]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in words]
    assert (tpjax, subcommand) == ("tpjax", "serve")
    command = typer.main.get_command(app.app).commands["serve"]
    given = command.make_context("serve", words).params  # an option that is wrong raises
    assert given["host"] == "0.0.0.0" and given["start_timeout_s"] == 1800
    grace = job["template"]["spec"]["terminationGracePeriodSeconds"]
    assert given["drain_s"] < grace
    assert service["spec"]["ports"] == [{"port": given["port"]}] == [{"port": 8000}]
    assert job["parallelism"] == job["completions"] == (given["num_processes"] or job["completions"])


def test_the_slice_has_as_many_chips_as_its_hosts() -> None:
    _, job, container = job_set("gke_tpu.yaml")
    topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert math.prod(map(int, topology.split("x"))) == chips


def test_the_address_of_process_0_is_that_of_its_pod() -> None:
    """JobSet names pods by set, job and two numbers, in a network that is called as the set."""
    _, jobs = documents(LAUNCH / "kubernetes_gpu.yaml")
    _, _, container = job_set("kubernetes_gpu.yaml")
    name, (job,) = jobs["metadata"]["name"], jobs["spec"]["replicatedJobs"]
    assert f"--coordinator={name}-{job['name']}-0-0.{name}:29500" in container["args"]


@pytest.mark.parametrize(("process", "status", "sound"), [("0", 200, 0), ("0", 503, 1), ("1", 503, 0)])
def test_probes_ask_the_process_that_has_the_server(process: str, status: int, sound: int) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    _, _, container = job_set("gke_tpu.yaml")
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shell, option, script = container["startupProbe"]["exec"]["command"]
        script = script.replace("python ", f"{sys.executable} ").replace("8000", str(server.server_port))
        environment = os.environ | {"JOB_COMPLETION_INDEX": process}
        done = subprocess.run([shell, option, script], env=environment, capture_output=True, timeout=WAIT_S)
        server.shutdown()
    assert done.returncode == sound, done.stderr
    assert paths == ["/ready"] * (process == "0")


@pytest.mark.slow
def test_kuberay_s_application_takes_its_arguments() -> None:
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    import yaml
    from ray.serve.schema import ServeDeploySchema
    from test_ray import as_serve_run

    from tpjax.deploy import ray as deploy

    (document,) = documents(LAUNCH / "kuberay.yaml")
    (application,) = ServeDeploySchema(**yaml.safe_load(document["spec"]["serveConfigV2"])).applications
    module, function = application.import_path.split(":")
    assert (module, getattr(deploy, function)) == (deploy.__name__, deploy.build_app)
    (arguments,) = as_serve_run(application.args)._bound_deployment.init_args
    (workers,) = document["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == arguments.tp * arguments.pp
    assert workers["maxReplicas"] == arguments.max_replicas
