"""The Ray Serve application on a cluster of this machine: two replicas, streams, and the loss of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import WAIT_S, load_tiny, tiny_checkpoint

pytest.importorskip("ray", reason="pip install -e '.[ray]'")

from tpjax.deploy.ray import build_app
from tpjax.errors import TpjaxError
from tpjax.server.run import listen

pytestmark = pytest.mark.slow  # a cluster is half a dozen processes

STREAMS, TOKENS = 8, 900
# Ray sends nothing to a replica that takes longer to say how much it has to do, as one may on busy cores.
PATIENT = ("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S")
RAY = dict.fromkeys(PATIENT, "20") | {"JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}
# A line on stdin kills one of the replicas that there are, whose number it prints.
CLUSTER = """
import json, sys
import ray
from ray import serve
from tpjax.deploy.ray import build_app

def replicas():
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["name"].startswith("SERVE_REPLICA::")]

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
serve.start(http_options={"port": int(sys.argv[1])})
serve.run(build_app(json.loads(sys.argv[2])))
print("replicas:", len(replicas()), flush=True)
for _ in sys.stdin:
    before = replicas()
    ray.kill(ray.get_actor(before[0], namespace="serve"))
    print("replicas:", len(before), flush=True)
serve.shutdown()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ray"))


class Cluster:
    """A cluster in processes of its own.

    Attributes:
        client: the official client; it tries again by itself only where a test says so.
    """

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self._process = process
        self.client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=2 * WAIT_S)

    def replicas(self) -> int:
        """Reads a number that the driver prints, among what others do."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("replicas:"):
                return int(line.split()[1])
        raise AssertionError("the driver has ended")

    def kill(self) -> int:
        """Kills a replica; returns how many there were."""
        assert self._process.stdin
        self._process.stdin.write("kill\n")
        self._process.stdin.flush()
        return self.replicas()


@pytest.fixture(scope="module")
def cluster(directory: Path) -> Iterator[Cluster]:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    arguments = {
        "model": os.fspath(directory), "served_model_name": "tiny", "min_replicas": 2, "max_replicas": 2,
        "max_slots": STREAMS, "api_keys": ["secret"], "options": {"max_model_len": 1024},
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(port), json.dumps(arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | RAY,
    )
    cluster = Cluster(process, f"http://127.0.0.1:{port}/v1")
    try:
        assert cluster.replicas() == 2
        yield cluster
    finally:
        assert process.stdin and process.stdout
        process.stdin.close()
        try:
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
            process.stdout.close()
            cluster.client.close()


def test_answers_and_streams_and_the_loss_of_a_replica(cluster: Cluster, directory: Path) -> None:
    ask: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}
    prompts = [f"the quick brown fox {number}" for number in range(STREAMS)]
    with load_tiny(directory, tp=1) as alone:
        wanted = [c.text for c in alone.generate(prompts, max_tokens=TOKENS, temperature=0, ignore_eos=True)]
    answer = cluster.client.completions.create(prompt=prompts[0], max_tokens=20, **ask)
    assert (
        answer.usage and answer.usage.completion_tokens == 20 and wanted[0].startswith(answer.choices[0].text)
    )
    assert [model.id for model in cluster.client.models.list()] == ["tiny"]
    with pytest.raises(openai.AuthenticationError):
        cluster.client.with_options(api_key="wrong").models.list()

    texts, failed = [""] * STREAMS, [False] * STREAMS
    all_begun = threading.Barrier(STREAMS + 1)
    killed = threading.Event()

    def stream(number: int) -> None:
        parts = cluster.client.completions.create(
            prompt=prompts[number], max_tokens=TOKENS, stream=True, **ask
        )
        try:
            for count, part in enumerate(parts):
                texts[number] += part.choices[0].text if part.choices else ""
                if count == 0:
                    all_begun.wait(2 * WAIT_S)
                    killed.wait(WAIT_S)
        except Exception:
            failed[number] = True

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(STREAMS)]
    for thread in threads:
        thread.start()
    all_begun.wait(2 * WAIT_S)  # each has its first text: they stream
    assert cluster.kill() == 2
    killed.set()
    for thread in threads:
        thread.join(5 * WAIT_S)
    assert 0 < sum(failed) < STREAMS  # those of the other replica go on to their end
    for text, lost, expected in zip(texts, failed, wanted, strict=True):
        assert expected.startswith(text) if lost else text == expected
    again = cluster.client.with_options(max_retries=5)
    for prompt, expected in zip(prompts, wanted, strict=True):
        answer = again.completions.create(prompt=prompt, max_tokens=20, **ask)
        assert expected.startswith(answer.choices[0].text)


def test_what_a_deployment_asks_ray_for() -> None:
    texts = {
        "model": "m",
        "tp": "3,1",
        "pp": "2",
        "accelerator": "TPU",
        "max_slots": "64",
        "max_queue": "100",
    }
    deployment = as_serve_run(texts | {"min_replicas": "2", "max_replicas": "6"})._bound_deployment
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (164, 100)
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 600
    assert deployment.ray_actor_options["resources"] == {"TPU": 4}
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.get_target_ongoing_requests()) == (2, 6, 64)


def as_serve_run(texts: dict[str, Any]) -> Any:
    """What ``serve run`` and KubeRay make of their arguments."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    return call_user_app_builder_with_args_if_necessary(build_app, texts)


def test_arguments_are_those_of_a_command_line(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("two\nthree\n")
    texts = {"model": "m", "api_keys": "zero,one", "options": '{"dtype": "float32"}', "drain_s": "5"}
    application = as_serve_run(texts | {"api_key_file": str(tmp_path / "keys")})
    (arguments,) = application._bound_deployment.init_args
    assert arguments.api_keys == ("zero", "one", "two", "three") and arguments.options == {"dtype": "float32"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_replicas": 2}, "min_replicas=2 is over max_replicas=1"),
        ({"max_slot": "3"}, "max_slot='3': Extra inputs"),
        ({"tp": "x"}, "tp='x': Input should be a valid integer"),
        ({"tp": "3,1"}, "tp=3,1 is of 2 stages, but pp=1"),
        ({"options": '{"max_len": 3}'}, "'max_len' is none of attention, dtype, "),
        ({"options": {"tp": 3}}, "'tp' is none of attention"),
        ({"options": "{"}, "options='{': Expecting property name"),
        ({"api_keys": [""]}, "an API key is empty"),
        ({"api_keys": "one, two"}, "an API key has white space at an end"),
        ({"api_key_file": "nowhere"}, "api_key_file=nowhere: .*No such file"),
        ({"model": None}, "model=None: Input should be a valid string"),
    ],
)
def test_a_wrong_argument_is_named_before_a_replica_starts(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TpjaxError, match=message):
        as_serve_run({"model": "m"} | given)
