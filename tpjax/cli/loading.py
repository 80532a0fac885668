"""From the options of a subcommand to devices and a loaded model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tpjax.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from tpjax.cli.options import Sharding
    from tpjax.llm import LLM


def chosen_model(positional: str | None, option: str | None) -> str:
    """The model, given as an argument or as ``--model``.

    Raises:
        RequestError: neither or both were given.
    """
    if positional and option and positional != option:
        raise RequestError(f"two models are given: {positional!r} and --model {option!r}")
    model = positional or option
    if not model:
        raise RequestError("no model is given: name one, such as smollm2-135m (`tpjax models` lists them)")
    return model


def load(model: str, sharding: Sharding, **options: Any) -> LLM:
    """Finds the model, sees to the devices, and loads the one onto the others."""
    ensure(model, sharding.tp)
    from tpjax.llm import LLM

    return LLM(model, **asdict(sharding), **options)


def ensure(model: str, tp: int | None, *, configuration: bool = False) -> None:
    """Resolves the model's name, then sees to it that there are ``tp`` devices.

    A misspelt name is reported at once, before JAX starts.

    Args:
        model: its name.
        tp: devices; ``None``: those there are.
        configuration: weights are not needed.

    Raises:
        CheckpointError: there is no such model.
        DeviceError: there are fewer devices.
    """
    from tpjax.checkpoints import hub
    from tpjax.planning.published import hub_id, is_published

    if is_published(model):
        if not configuration:
            raise CheckpointError(
                f"{model!r} names a published model, whose weights are at Hugging Face: use {hub_id(model)}"
            )
    else:
        hub.resolve(model, configuration=configuration)
    if tp is not None and tp > 1:
        from tpjax.mesh import ensure_devices

        ensure_devices(tp)
