"""Faking devices, and what `import tpjax` may touch: each in a process of its own, since JAX starts once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import pytest

import tpjax
from tpjax.errors import DeviceError

COUNT_FLAG = "--xla_force_host_platform_device_count"
THREADS_PER_DEVICE = 2  # fewer deadlock jax 0.10.2: measured, see tpjax/mesh.py


def run(program: str, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "NPROC", "JAX_PLATFORMS")
    }
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"} | dict(variables or {})
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )


def result(program: str, variables: Mapping[str, str] | None = None) -> Any:
    """What the program prints last, as JSON."""
    done = run(program, variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


VARIABLES = """
import os, json
import tpjax
{before}
print(json.dumps([os.environ.get("XLA_FLAGS", ""), int(os.environ.get("NPROC", 0))]))
"""


def variables_after(before: str, variables: Mapping[str, str] | None = None) -> tuple[str, int]:
    flags, threads = result(VARIABLES.format(before=before), variables)
    return flags, threads


def needed(count: int) -> int:
    """NPROC that tpjax has to set: none where the machine has the cores anyway."""
    cores = os.cpu_count() or 1
    return THREADS_PER_DEVICE * count if cores < THREADS_PER_DEVICE * count else 0


def test_fake_devices_before_jax() -> None:
    program = """
import json, tpjax
tpjax.fake_devices(5)
import jax
mesh = tpjax.make_mesh()
part = tpjax.make_mesh(3)
print(json.dumps([jax.device_count(), dict(mesh.shape), dict(part.shape),
                  [d.id for d in part.devices.flat], [str(t) for t in mesh.axis_types]]))
"""
    count, mesh, part, ids, kinds = result(program)
    assert count == 5
    assert mesh == {"tp": 5}
    assert part == {"tp": 3}
    assert ids == [0, 1, 2]  # the first three
    assert kinds == ["AxisType.Auto"]


def test_fake_devices_sets_both_variables() -> None:
    assert variables_after("tpjax.fake_devices(64)") == (f"{COUNT_FLAG}=64", needed(64))


def test_fake_devices_keeps_other_flags() -> None:
    flags, _ = variables_after("tpjax.fake_devices(4)", {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"})
    assert sorted(flags.split()) == sorted(["--xla_cpu_enable_fast_math=false", f"{COUNT_FLAG}=4"])


def test_xla_flags_alone_are_guarded_by_the_import() -> None:
    flags, threads = variables_after("", {"XLA_FLAGS": f"{COUNT_FLAG}=64"})
    assert flags == f"{COUNT_FLAG}=64"
    assert threads == needed(64)


def test_import_sets_nothing_without_faked_devices() -> None:
    assert variables_after("") == ("", 0)


def test_last_of_repeated_flags_counts() -> None:
    """XLA takes the last; appending to XLA_FLAGS is how scripts override it."""
    _, threads = variables_after("", {"XLA_FLAGS": f"{COUNT_FLAG}=2 {COUNT_FLAG}=64"})
    assert threads == needed(64)


def test_fake_devices_with_repeated_flags() -> None:
    program = """
import json, tpjax
tpjax.fake_devices(4)
import jax
print(json.dumps(jax.device_count()))
"""
    assert result(program, {"XLA_FLAGS": f"{COUNT_FLAG}=8 {COUNT_FLAG}=2"}) >= 4


@pytest.mark.parametrize(("present", "asked", "expected"), ((40, 6, 40), (2, 40, 40), (6, 6, 6)))
def test_a_larger_count_is_kept_and_a_smaller_raised(present: int, asked: int, expected: int) -> None:
    flags, threads = variables_after(
        f"tpjax.fake_devices({asked})", {"XLA_FLAGS": f"--xla_dump_to= {COUNT_FLAG}={present}"}
    )
    assert flags == f"--xla_dump_to= {COUNT_FLAG}={expected}"
    assert threads == needed(expected)


def test_a_larger_pool_is_kept_and_a_smaller_raised() -> None:
    assert variables_after("tpjax.fake_devices(8)", {"NPROC": "500"})[1] == 500
    assert variables_after("tpjax.fake_devices(8)", {"NPROC": "3"})[1] == 16


def test_too_late_to_fake() -> None:
    program = """
import json, tpjax, jax
jax.devices()
from tpjax.errors import DeviceError
from tpjax.mesh import ensure_devices
messages = []
for call in (lambda: tpjax.fake_devices(7), lambda: ensure_devices(6), lambda: tpjax.make_mesh(5)):
    try:
        call()
    except DeviceError as error:
        messages.append(str(error))
tpjax.fake_devices(1)  # enough are there
ensure_devices(1)
print(json.dumps(messages))
"""
    messages = result(program)
    assert len(messages) == 3
    for wanted, message in zip((7, 6, 5), messages, strict=True):
        assert f"tp={wanted} needs {wanted} devices, but JAX sees 1 (CPU)" in message
        assert "already started" in message
        assert f"tpjax.fake_devices({wanted})" in message
        assert "\n" not in message


def test_make_mesh_too_many() -> None:
    with pytest.raises(
        DeviceError, match=r"tp=17 needs 17 devices, but JAX sees 16 \(CPU\).*fake_devices\(17\)"
    ):
        tpjax.make_mesh(17)


@pytest.mark.parametrize("tp", (0, -1, True, 1.5, "2"))
def test_tp_that_is_no_count(tp: Any) -> None:
    from tpjax.mesh import ensure_devices

    for call in (tpjax.make_mesh, tpjax.fake_devices, ensure_devices):
        with pytest.raises(DeviceError) as error:
            call(tp)
        assert str(error.value) == f"tp={tp!r} is not a whole number of devices, 1 or more"


def test_make_mesh_takes_all_by_default() -> None:
    mesh = tpjax.make_mesh()
    assert mesh.axis_names == ("tp",)
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
    assert list(mesh.devices) == jax.devices()


def test_ensure_devices_says_so_in_one_line() -> None:
    program = """
import json
from tpjax.mesh import ensure_devices
ensure_devices(3)
import jax
ensure_devices(2)  # they are there already: silent
print(json.dumps(jax.device_count()))
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n"
    assert done.stderr.count("\n") == 1
    assert "CPU" in done.stderr and "3 devices" in done.stderr


def test_ensure_one_device_is_silent() -> None:
    done = run("from tpjax.mesh import ensure_devices; ensure_devices(1)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_is_light() -> None:
    """No JAX, no NumPy, under 0.3 s of a processor; listing what is exported lazily loads none of it."""
    program = """
import time
start = time.process_time()
import tpjax
seconds = time.process_time() - start
import json, sys
dir(tpjax), tpjax.__all__, tpjax.SamplingParams(), tpjax.TpjaxError
heavy = [name for name in ("jax", "jaxlib", "flax", "numpy", "transformers", "rich") if name in sys.modules]
print(json.dumps([seconds, heavy]))
"""
    runs = [result(program) for _ in range(3)]
    assert [heavy for _, heavy in runs] == [[], [], []]
    assert min(seconds for seconds, _ in runs) < 0.3


def test_import_starts_no_backend() -> None:
    program = """
import json, jax, tpjax
from jax._src import xla_bridge
tpjax.LLM, tpjax.Completion, tpjax.Delta  # importing all of it starts none either
print(json.dumps(xla_bridge.backends_are_initialized()))
"""
    assert result(program) is False


@pytest.mark.parametrize(("setting", "share"), ((None, "0.9"), ("XLA_PYTHON_CLIENT_MEM_FRACTION", None)))
def test_jax_may_have_most_of_a_gpu(
    setting: str | None, share: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it starts, unless told otherwise; nothing is left in the environment, where two would be refused."""
    name, seen = "XLA_CLIENT_MEM_FRACTION", list[str | None]()
    if setting is not None:
        monkeypatch.setenv(setting, "0.5")
    monkeypatch.setattr("tpjax.mesh._backend_started", lambda: False)
    monkeypatch.setattr(jax, "devices", lambda: seen.append(os.environ.get(name)))
    tpjax.mesh.start_jax()
    assert seen == [share] and name not in os.environ
    monkeypatch.setattr("tpjax.mesh._backend_started", lambda: True)
    tpjax.mesh.start_jax()
    assert seen[1] is None
