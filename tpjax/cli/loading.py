"""Loads the model that a subcommand names, onto the devices that it asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpjax.cli.console import note
from tpjax.cli.following import attend
from tpjax.distributed import num_processes
from tpjax.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from tpjax.cli.options import Sharding
    from tpjax.llm import LLM


def chosen_model(positional: str | None, option: str | None) -> str:
    """Returns the model given as an argument or as ``--model``.

    Raises:
        RequestError: neither was given, or both.
    """
    if positional and option and positional != option:
        raise RequestError(f"two models are given: {positional!r} and --model {option!r}")
    model = positional or option
    if not model:
        raise RequestError("no model is given: name one, such as smollm2-135m (`tpjax models` lists them)")
    return model


def load(model: str, sharding: Sharding, **options: Any) -> LLM:
    """Checks the name of the model and the number of devices, then loads the model.

    Of several processes only process 0 returns: the others follow it, and then end the subcommand.
    """
    llm = load_everywhere(model, sharding, **options)
    attend(llm)
    return llm


def load_everywhere(model: str, sharding: Sharding, **options: Any) -> LLM:
    """Loads a model as :func:`load` does, but returns in all processes."""
    ensure(model, sharding.tp, sharding.dp, sharding.pp)
    from tpjax.llm import LLM

    _check_compilation_cache()
    return LLM(model, **asdict(sharding), **options)


def _check_compilation_cache() -> None:
    """Turns the compilation cache off if its folder cannot be written: JAX would warn of each program."""
    import jax

    from tpjax.checkpoints.hub import cache_dir

    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_dir() / "xla")
    if "://" in str(folder):
        return  # not on this machine
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "no permission to write"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        note(f"compiled programs are not cached: {folder}: {reason}")
        jax.config.update("jax_enable_compilation_cache", False)


def note_defaults(llm: LLM) -> None:
    """Notes the sampling parameters that the model itself sets."""
    if llm.sampling_defaults:
        note(f"where no option says otherwise, {llm.describe_defaults()}")


def ensure(
    model: str,
    tp: int | Sequence[int] | None,
    dp: int = 1,
    pp: int = 1,
    *,
    configuration: bool = False,
) -> None:
    """Checks that the model exists, then that there are the devices.

    A misspelt name is reported at once, before JAX starts.

    Args:
        model: name of the model.
        tp: number of devices of a mesh, or of each pipeline stage; ``None``: all there are.
        dp: number of replicas.
        pp: number of pipeline stages of a replica.
        configuration: whether its configuration is enough, without weights.

    Raises:
        CheckpointError: there is no such model.
        DeviceError: there are fewer devices.
    """
    from tpjax.checkpoints import hub
    from tpjax.mesh import devices_of_stages, ensure_devices
    from tpjax.planning.published import check_name, hub_id, is_published, resolve_configuration

    if num_processes() > 1:  # JAX starts in all of them at once, before one that has no model yet fetches it
        ensure_devices(tp or 1, dp, pp)

    if configuration:
        check_name(model)
    if is_published(model):
        if not configuration:
            raise CheckpointError(
                f"{model!r} names a published model, whose weights are at Hugging Face: use {hub_id(model)}"
            )
    else:
        (resolve_configuration if configuration else hub.resolve)(model)
    if sum(devices_of_stages(tp or 1, pp)) * dp > 1:
        ensure_devices(tp or 1, dp, pp)
