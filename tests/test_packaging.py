"""What ``pip install`` brings: extras that must fit the jax version are jax's own business."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

import tpjax
from tpjax.inspect import topology

ROOT = Path(tpjax.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# released for one version of jax or jaxlib each
BOUND_TO_JAX = re.compile(r"(jaxlib|libtpu|jax-(cuda|rocm)\w*-(plugin|pjrt))\b")


def of_jax(extra: str) -> list[str]:
    """What the installed jax asks for in one of its extras."""
    marker = re.compile(rf"""extra == ["']{extra}["']""")
    return [line for line in importlib.metadata.requires("jax") or () if marker.search(line)]


def test_what_is_bound_to_a_jax_is_asked_of_that_jax() -> None:
    """A pin of ours fits one version of jax; the extra of jax that is installed fits whichever that is."""
    ours = [line for lines in EXTRAS.values() for line in lines]
    assert [line for line in ours if BOUND_TO_JAX.match(line)] == []


@pytest.mark.parametrize(
    ("extra", "package"),
    (
        *(("tpu", "libtpu"), ("aot-tpu", "libtpu")),
        *(("cuda", "jax-cuda12-plugin"), ("aot-gpu", "jax-cuda12-plugin")),
    ),
)
def test_the_extra_pins_what_fits(extra: str, package: str) -> None:
    (named,) = [found for line in EXTRAS[extra] if (found := re.match(r"jax\[([\w-]+)\]>=", line))]
    (pin,) = [line for line in of_jax(named[1]) if line.startswith(package)]
    if package == "libtpu":
        expected = {"0.10": "0.0.42.", "0.12": "0.0.50."}.get(".".join(jax_version().split(".")[:2]), "")
        assert re.match(rf"libtpu=={re.escape(expected)}[\d.*]+;", pin)
    else:
        versions = re.findall(r"[<>=]=([\d.]+)", pin)
        assert versions and set(versions) == {jax_version()}


def test_compiling_ahead_of_time_needs_no_library_of_a_gpu() -> None:
    """``cuda12-local`` is the plugin alone: ``with-cuda`` would bring gigabytes."""
    assert EXTRAS["aot-gpu"][0].startswith("jax[cuda12-local]>=")
    assert all("with-cuda" not in line for line in of_jax("cuda12-local"))


def test_the_tested_versions_are_what_jax_asks_for() -> None:
    """constraints.txt beside an extra: pip would find no answer if the two differed."""
    wanted = topology._wanted_libtpu()
    assert wanted is not None
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
    marker = f'python_version {">=" if sys.version_info >= (3, 12) else "<"} "3.12"'
    pins = {
        name: version
        for line in lines
        if (found := re.fullmatch(rf"([\w-]+)==([\d.]+); {marker}", line))
        for name, version in (found.groups(),)
    }
    if pins["jax"] != jax_version():
        pytest.skip(f"constraints.txt is for jax {pins['jax']}, not {jax_version()}")
    assert pins["libtpu"].startswith(wanted.removesuffix("*"))
    assert pins["jax-cuda12-plugin"] == pins["jax-cuda12-pjrt"] == pins["jaxlib"] == pins["jax"]


def jax_version() -> str:
    return importlib.metadata.version("jax")


def test_the_package_says_that_it_is_typed() -> None:
    """Without the marker of PEP 561 all of it is ``Any`` to the type checker of a user's program."""
    assert (ROOT / "tpjax" / "py.typed").is_file()


def test_ci_installs_the_extras_themselves() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("not a checkout")
    text = script.read_text()
    assert "[aot-tpu,aot-gpu]" in text
    assert BOUND_TO_JAX.search(text) is None
