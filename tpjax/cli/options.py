"""Options that several subcommands share, and what checks a value on the command line.

A group of options is a dataclass: its fields are the options. :func:`takes` puts a group's options into a
subcommand's signature and hands them over as one object.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tpjax.config import Dtype

if TYPE_CHECKING:
    from tpjax.sampling_params import SamplingParams

MODEL_HELP = "An alias, a directory, a .gguf file or a Hugging Face id (org/name): see `tpjax models`."


def takes(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a subcommand the options of groups.

    Args:
        **groups: the parameter that gets the group's object, and the dataclass.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name not in groups]
        hints = typing.get_type_hints(function, include_extras=True)
        names = {group: [field.name for field in dataclasses.fields(kind)] for group, kind in groups.items()}
        added = []
        for kind in groups.values():
            types = typing.get_type_hints(kind, include_extras=True)
            for field in dataclasses.fields(kind):
                default = field.default
                if field.default_factory is not dataclasses.MISSING:
                    default = field.default_factory()
                hints[field.name] = types[field.name]
                added.append(
                    inspect.Parameter(
                        field.name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
                    )
                )

        @functools.wraps(function)
        def run(**given: Any) -> None:
            for group, kind in groups.items():
                given[group] = kind(**{name: given.pop(name) for name in names[group]})
            function(**given)

        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters = [*keyword_only, *added]
        signature = inspect.Signature(
            [p.replace(annotation=hints[p.name]) for p in parameters], return_annotation=None
        )
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: hints[p.name] for p in parameters}
        return run

    return decorate


# --- values ------------------------------------------------------------------------------------------------


def whole(of_what: str) -> Callable[[str], int]:
    """A parser of whole numbers, 1 or more."""

    def parse(text: str | int) -> int:
        text = str(text)
        number = int(text) if text.isascii() and text.isdigit() else 0
        if number < 1:
            raise typer.BadParameter(f"{text!r} is not a whole number of {of_what}, 1 or more")
        return number

    return parse


def number(what: str, low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers from ``low`` to ``high``."""

    def parse(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise typer.BadParameter(f"{str(text)!r} is not {what}")
        return value

    return parse


def port(text: str | int) -> int:
    """A TCP port; 0 takes a free one."""
    text = str(text)
    value = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= value < 1 << 16:
        raise typer.BadParameter(f"{text!r} is not a port, 0 to 65535")
    return value


def token_bias(text: str) -> tuple[int, float]:
    """``ID:BIAS``."""
    token, _, bias = str(text).partition(":")
    if not (token.isascii() and token.isdigit()):
        raise typer.BadParameter(f"{text!r} is not ID:BIAS")
    return int(token), number("ID:BIAS, with a number", -3e38, 3e38)(bias)


# --- groups ------------------------------------------------------------------------------------------------


def option(*names: str, help: str, parser: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """An option; ``parser`` checks and converts its text."""
    return typer.Option(*names, help=help, parser=parser, **more)


Model = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="M", help="MODEL, as an option.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: .png, .svg or .pdf.")]


Rounds = Annotated[
    int | None,
    option(
        "--rounds",
        help="Times each figure is taken, of which the best counts; fewer are quicker, and noisier (15).",
        parser=whole("rounds"),
        metavar="N",
    ),
]


GenerationConfig = Annotated[
    str,
    typer.Option(
        "--generation-config",
        metavar="auto|none|PATH",
        help="The sampling defaults of the model's generation_config.json, of none, or of PATH.",
    ),
]


@dataclass
class Sharding:
    """How the model is laid out over devices."""

    tp: Annotated[
        int | None,
        option("--tp", help="Devices to shard over (all of them).", parser=whole("devices"), metavar="N"),
    ] = None
    dtype: Annotated[Dtype, option("--dtype", help="Of weights and cache; auto: float32 on a CPU.")] = "auto"
    max_model_len: Annotated[
        int | None,
        option(
            "--max-model-len",
            help="Most tokens of prompt and answer together.",
            parser=whole("tokens"),
            metavar="N",
        ),
    ] = None
    expert_parallel: Annotated[
        Literal["auto", "on", "off"],
        option(
            "--expert-parallel",
            help="on: whole experts a device; off: a part of each one's width; auto: on if tp divides them",
        ),
    ] = "auto"


@dataclass
class Sampling:
    """Sampling parameters, named as in ``SamplingParams``. What is not given is the model's own default."""

    max_tokens: Annotated[
        int | None, option("--max-tokens", help="Most tokens to generate (128; 1024 in a chat).", metavar="N")
    ] = None
    min_tokens: Annotated[
        int | None, option("--min-tokens", help="Neither end-of-text nor stop before so many.", metavar="N")
    ] = None
    temperature: Annotated[
        float | None, option("--temperature", help="0 takes the likeliest token.", metavar="T")
    ] = None
    top_k: Annotated[
        int | None, option("--top-k", help="Keep the K likeliest tokens; 0 keeps all.", metavar="K")
    ] = None
    top_p: Annotated[float | None, option("--top-p", help="Keep this much probability.", metavar="P")] = None
    min_p: Annotated[
        float | None, option("--min-p", help="Keep what is as likely as the likeliest times P.", metavar="P")
    ] = None
    seed: Annotated[
        int | None, option("--seed", help="The same seed samples the same tokens, at any tp.", metavar="S")
    ] = None
    stop: Annotated[
        list[str] | None, option("--stop", help="End before this text; may be repeated.", metavar="STR")
    ] = None
    stop_token_ids: Annotated[
        list[int] | None, option("--stop-token-ids", help="End at these tokens.", metavar="ID")
    ] = None
    ignore_eos: Annotated[bool, option("--ignore-eos", help="Go on past the end-of-text token.")] = False
    repetition_penalty: Annotated[
        float | None,
        option("--repetition-penalty", help="Divides logits of tokens seen before.", metavar="X"),
    ] = None
    presence_penalty: Annotated[
        float | None, option("--presence-penalty", help="Subtracted if a token was generated.", metavar="X")
    ] = None
    frequency_penalty: Annotated[
        float | None, option("--frequency-penalty", help="Subtracted each time it was.", metavar="X")
    ] = None
    logit_bias: Annotated[
        list[Any] | None,
        option("--logit-bias", help="Added to a token's logit.", parser=token_bias, metavar="ID:BIAS"),
    ] = None
    logprobs: Annotated[
        int | None,
        option("--logprobs", help="Log-probabilities of this many likeliest tokens, in JSON.", metavar="N"),
    ] = None

    def params(self, **defaults: Any) -> SamplingParams:
        """The sampling parameters.

        Args:
            **defaults: where an option was not given.
        """
        from tpjax.sampling_params import SamplingParams

        given = {
            name: dict(value) if name == "logit_bias" else value
            for name, value in vars(self).items()
            if value is not None
        }
        return SamplingParams(**{**defaults, **given})
