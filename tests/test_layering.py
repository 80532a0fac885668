"""Who may import whom (DESIGN section 2), and what the package shows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tpjax

PACKAGE = Path(tpjax.__file__).parent

# Lowest first. A module imports only from ranks below its own, or from its own sub-package.
RANKS: tuple[tuple[str, ...], ...] = (
    ("errors", "_version", "old_spellings"),
    ("distributed",),
    ("mesh", "config", "sandbox"),
    ("interconnect", "mosaic_gpu"),
    ("sharding", "sampling_params", "hardware", "windows", "cache_quantization"),
    ("cache", "activations", "step_time"),
    ("attention",),
    ("layers",),
    ("model", "sampling"),
    ("families",),
    ("checkpoints",),
    ("text",),
    ("runtime",),
    ("engine",),
    ("planning",),
    ("inspect",),
    ("llm",),
    ("server",),
    ("cli", "deploy"),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}

# (importer, imported): the package's public names. It names what it exports lazily, hence from below nobody.
ALLOWED = {
    ("__init__", "_version"),
    ("__init__", "distributed"),
    ("__init__", "errors"),
    ("__init__", "mesh"),
    ("__init__", "sampling_params"),
    ("__init__", "llm"),  # lazily, in __getattr__
}

# Plain Python, so that they are tested by themselves and read in one go.
WITHOUT_JAX = (
    "errors",
    "config",
    "sampling_params",
    "interconnect",
    "hardware",
    "step_time",
    "windows",
    "engine.block_manager",
    "engine.page_groups",
    "engine.request",
    "engine.scheduler",
)
HEAVY = {"jax", "jaxlib", "flax", "numpy"}


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


MODULES = modules()


def imported(tree: ast.Module) -> Iterator[str]:
    """Absolute names of everything imported anywhere in the module, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def imported_modules(tree: ast.Module) -> set[str]:
    """The modules of tpjax among them, without the leading ``tpjax.``; ``""`` is the package itself."""
    found = set()
    for name in imported(tree):
        if name.split(".")[0] != "tpjax":
            continue
        parts = name.split(".")[1:]
        while parts and ".".join(parts) not in MODULES and f"{'.'.join(parts)}.__init__" not in MODULES:
            parts.pop()  # a name inside the module
        found.add(".".join(parts))
    return found


def test_every_module_has_a_rank() -> None:
    tops = {name.split(".")[0] for name in MODULES} - {"__init__"}
    assert tops <= set(RANK), f"give a rank to {sorted(tops - set(RANK))}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_lower_ranks(module: str) -> None:
    top = module.split(".")[0]
    for other in imported_modules(MODULES[module]):
        if (module, other) in ALLOWED:
            continue
        # the package exports what modules of every rank define: inside of it they are imported from there
        assert other != "", f"{module} imports from the package itself"
        below = other.split(".")[0]
        if below == top and "." in module:
            continue  # within a sub-package
        assert RANK[below] < RANK[top], f"{module} (rank {RANK[top]}) imports {other} (rank {RANK[below]})"


@pytest.mark.parametrize("pair", sorted(ALLOWED))
def test_exceptions_are_in_use(pair: tuple[str, str]) -> None:
    module, other = pair
    assert other in imported_modules(MODULES[module])


def test_lazy_imports_stay_lazy() -> None:
    """At module level only what starts nothing; ``if TYPE_CHECKING`` does not run."""
    top_level = ast.Module([node for node in MODULES["__init__"].body if not isinstance(node, ast.If)], [])
    for node in list(top_level.body):
        if isinstance(node, ast.FunctionDef):
            top_level.body.remove(node)
    assert imported_modules(top_level) == {"_version", "distributed", "errors", "mesh", "sampling_params"}
    llm = [node for node in MODULES["llm"].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "inspect.explain" not in imported_modules(ast.Module(llm, []))  # type: ignore[arg-type]


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_plain_python(module: str) -> None:
    tops = {name.split(".")[0] for name in imported(MODULES[module])}
    assert not tops & HEAVY
    for other in imported_modules(MODULES[module]):
        assert other in WITHOUT_JAX, f"{module} reaches JAX through {other}"


MAY_COMPILE = {
    "runtime.programs",
    "runtime.state",
    "runtime.device_speed",
    "attention.selftest",
    "layers.selftest",
    "cache.paged_cache",
    "model",  # within a program that is traced: equal layers once
    "planning.measure",
    "inspect.chip_benchmark",
}


def test_only_the_programs_compile_for_serving() -> None:
    """Besides, the cache allocates zeros, and four modules time the machine."""
    users = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in (("jax", "jit"), ("nnx", "jit"), ("nnx", "split"))
    }
    assert users <= MAY_COMPILE


# Sub-packages that are used under one name: layouts, the cache, and attention whatever computes it.
FACADES = ("attention.__init__", "cache.__init__", "sharding.__init__")


@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith(".__init__")])
def test_sub_packages_are_empty(name: str) -> None:
    if name in FACADES:  # a docstring, and what it takes from its own modules
        own = f"tpjax.{name.removesuffix('.__init__')}."
        assert all(one.startswith(own) for one in imported(MODULES[name]))
        assert all(isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign) for node in MODULES[name].body)
        return
    assert all(isinstance(node, ast.Expr) for node in MODULES[name].body)  # at most a docstring


def test_exports() -> None:
    assert sorted(tpjax.__all__) == [
        "Completion",
        "Delta",
        "LLM",
        "SamplingParams",
        "TpjaxError",
        "__version__",
        "fake_devices",
        "initialize_distributed",
        "make_mesh",
    ]
    for name in tpjax.__all__:
        assert getattr(tpjax, name) is not None
    assert set(tpjax.__all__) <= set(dir(tpjax))  # the lazy ones too
    from tpjax import errors, llm, mesh, sampling_params

    assert tpjax.LLM is llm.LLM and tpjax.Completion is llm.Completion and tpjax.Delta is llm.Delta
    assert tpjax.SamplingParams is sampling_params.SamplingParams
    assert tpjax.TpjaxError is errors.TpjaxError
    assert tpjax.make_mesh is mesh.make_mesh and tpjax.fake_devices is mesh.fake_devices
    starred: dict[str, object] = {}
    exec("from tpjax import *", starred)
    assert set(tpjax.__all__) <= set(starred)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'tpjax' has no attribute 'Llm'"):
        tpjax.Llm  # noqa: B018


def test_every_error_is_a_tpjax_error() -> None:
    from tpjax import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {kind.__name__ for kind in kinds} == {
        "TpjaxError",
        "ConfigError",
        "CheckpointError",
        "DeviceError",
        "DistributedError",
        "LostProcessError",
        "DownloadError",
        "EngineError",
        "RequestError",
        "ContextLengthError",
    }
    assert all(issubclass(kind, tpjax.TpjaxError) for kind in kinds)
