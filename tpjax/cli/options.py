"""Options that several subcommands share, and parsers that check values on the command line.

A group of options is a dataclass whose fields are the options. :func:`takes` adds them to the signature of a
subcommand, which gets one object.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpjax.config import AttentionBackend, Dtype, ExpertParallel, KVDtype, Quantize
from tpjax.errors import RequestError

if TYPE_CHECKING:
    from tpjax.sampling_params import SamplingParams

MODEL_HELP = (
    "An alias, a directory, a .gguf file (the first, where there are parts) or a Hugging Face id (org/name): "
    "see `tpjax models`."
)


def takes(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the options of groups to a subcommand.

    Args:
        **groups: the dataclass of a group, by the parameter that gets its object.
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


_MOST_DIGITS = 15  # of a number of anything: a float holds it exactly
MOST = 10**_MOST_DIGITS - 1
MOST_REQUESTS = 10**6  # each has a place in a list
MOST_TOKENS = 10**7  # of a prompt that is written out


def digits(text: str) -> int | None:
    """Returns the number that up to 15 decimal digits are; ``None``: it is none of these."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else None


def positive_int(unit: str, most: int = MOST) -> Callable[[str], int]:
    """Makes a parser of integers from 1 to ``most``; ``unit`` is what an error calls them."""

    def parse(text: str | int) -> int:
        text = str(text)
        number = digits(text)
        if not number or number > most:
            limit = f"{most} at most" if number or len(text) > _MOST_DIGITS else "1 or more"
            raise typer.BadParameter(f"{text[:40]!r} is not a whole number of {unit}, {limit}")
        return number

    return parse


def mesh_devices(text: str | int) -> int | tuple[int, ...]:
    """Parses a number of devices, or one for each pipeline stage: ``3,1``."""
    parse = positive_int("devices")
    each = tuple(parse(one) for one in str(text).split(","))
    return each[0] if len(each) == 1 else each


def number(what: str, low: float, high: float) -> Callable[[str], float]:
    """Makes a parser of numbers from ``low`` to ``high``; ``what`` describes them in an error."""

    def parse(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise typer.BadParameter(f"{str(text)!r} is not {what}")
        return value

    return parse


def any_number(text: str | float) -> float:
    """Parses a number, whose range is checked where it is used."""
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{str(text)!r} is not a number") from error


def any_int(text: str | int) -> int:
    """Parses a whole number, whose range is checked where it is used."""
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{str(text)!r} is not a whole number") from error


def port(text: str | int) -> int:
    """Parses a TCP port; 0 takes a free one."""
    text = str(text)
    value = digits(text)
    if value is None or value >= 1 << 16:
        raise typer.BadParameter(f"{text[:40]!r} is not a port, 0 to 65535")
    return value


def process_number(text: str | int) -> int:
    """Parses the number of a process."""
    text = str(text)
    if (value := digits(text)) is None:
        raise typer.BadParameter(f"{text[:40]!r} is not the number of a process, 0 or more")
    return value


def token_bias(text: str) -> tuple[int, float]:
    """Parses ``ID:BIAS``."""
    token, _, bias = str(text).partition(":")
    try:
        if token.isascii() and token.isdigit() and abs(float(bias)) <= 3e38:
            return int(token), float(bias)
    except ValueError:
        pass
    raise typer.BadParameter(f"{text!r} is not ID:BIAS, a token id and a number")


def goal(text: str) -> tuple[str, float]:
    """Parses ``NAME:MS``, a bound on a latency."""
    name, _, ms = str(text).partition(":")
    try:
        if name in ("ttft", "tpot", "e2el") and 0 <= float(ms) <= 1e9:
            return name, float(ms)
    except ValueError:
        pass
    raise typer.BadParameter(f"{text!r} is not ttft:MS, tpot:MS or e2el:MS, with a number of milliseconds")


def refuse(given: Mapping[str, bool], why: str) -> None:
    """Refuses options that would change nothing.

    Args:
        given: by the option's name, whether it was given.
        why: what an error says after the name.

    Raises:
        RequestError: about the first that was given.
    """
    for name, was_given in given.items():
        if was_given:
            raise RequestError(f"{name} {why}")


# --- groups ------------------------------------------------------------------------------------------------


def option(*names: str, help: str, parser: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """Declares an option; ``parser`` checks and converts its text."""
    return typer.Option(*names, help=help, parser=parser, **more)


Model = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="M", help="MODEL, as an option.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: .png, .svg or .pdf.")]


NumPrompts = Annotated[
    int,
    option("--num-prompts", help="Requests.", parser=positive_int("requests", MOST_REQUESTS), metavar="N"),
]
RangeRatio = Annotated[
    float,
    option(
        "--range-ratio",
        help="Lengths vary by this fraction.",
        parser=number("a fraction, 0 to 1", 0.0, 1.0),
        metavar="R",
    ),
]
MaxConcurrency = Annotated[
    int | None,
    option("--max-concurrency", help="Requests at once (any).", parser=positive_int("requests"), metavar="N"),
]
Goodput = Annotated[
    list[str] | None,
    option(
        "--goodput",
        help="Count requests within these bounds on ttft, tpot and e2el, in milliseconds.",
        parser=goal,
        metavar="NAME:MS",
    ),
]


rate = number("a rate above 0, or inf", 1e-6, float("inf"))


def rates(name: str, rest: str) -> Any:
    """Declares an option of request rates; ``rest`` ends its help."""
    return option(
        name,
        help=f"Requests a second, one run for each; {rest}.",
        parser=rate,
        metavar="R",
    )


Rounds = Annotated[
    int | None,
    option(
        "--rounds",
        help="Times each figure is measured; the best counts. Fewer are quicker and noisier (15).",
        parser=positive_int("rounds"),
        metavar="N",
    ),
]


MaxSlots = Annotated[
    int | None,
    option(
        "--max-slots",
        help="Requests that run at once; unless given, as many as fit, up to 256; 8 on a CPU.",
        parser=positive_int("requests"),
        metavar="N",
    ),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    option(
        "--max-num-batched-tokens",
        help="Tokens of a step, decoded sequences and prompts together (as many as delay others little).",
        parser=positive_int("tokens"),
        metavar="N",
    ),
]
GenerationConfig = Annotated[
    str,
    typer.Option(
        "--generation-config",
        metavar="auto|none|PATH",
        help="Sampling defaults: from generation_config.json of the model, none, or from PATH.",
    ),
]


@dataclass
class Sharding:
    """Devices, dtype, sharding and attention of a model."""

    tp: Annotated[
        Any,  # an integer, or one for each stage
        option(
            "--tp",
            help="Devices to shard over (all of them); for different pipeline stages those of each: 3,1.",
            parser=mesh_devices,
            metavar="N",
        ),
    ] = None
    dp: Annotated[
        int,
        option(
            "--dp",
            help="Replicas, each on --tp devices of its own.",
            parser=positive_int("replicas"),
            metavar="N",
        ),
    ] = 1
    pp: Annotated[
        int,
        option(
            "--pp",
            help="Pipeline stages of a replica, each with some of the layers on --tp devices of its own.",
            parser=positive_int("stages"),
            metavar="N",
        ),
    ] = 1
    dtype: Annotated[Dtype, option("--dtype", help="Of weights and cache; auto: float32 on a CPU.")] = "auto"
    quantize: Annotated[
        Quantize | None,
        option(
            "--quantize",
            help="Keep weights in 8 bits or 4, rounded at load, with a scale for each output or 128 inputs.",
        ),
    ] = None
    quantize_head: Annotated[
        bool,
        option("--quantize-head", help="Keep embedding and head in 8 bits too, or as they are stored."),
    ] = False
    kv_dtype: Annotated[
        KVDtype,
        option("--kv-dtype", help="Keep keys and values in 8 bits, a scale for each; auto: as --dtype."),
    ] = "auto"
    max_model_len: Annotated[
        int | None,
        option(
            "--max-model-len",
            help="Most tokens of prompt and answer together.",
            parser=positive_int("tokens"),
            metavar="N",
        ),
    ] = None
    expert_parallel: Annotated[
        ExpertParallel,
        option(
            "--expert-parallel",
            help="on: shard the experts; off: shard the width of each; auto: on if tp divides their number.",
        ),
    ] = "auto"
    attention: Annotated[
        AttentionBackend,
        option(
            "--attention",
            help="What computes attention: xla: any platform; tpu, gpu: kernels, unchecked; reference: slow; "
            "auto: a kernel once found right here.",
        ),
    ] = "auto"


@dataclass
class Processes:
    """The processes that run a model together."""

    distributed: Annotated[
        bool,
        option(
            "--distributed",
            help="One of several processes, as SLURM, Kubernetes, Open MPI or Cloud TPU starts them.",
        ),
    ] = False
    coordinator: Annotated[
        str | None,
        option(
            "--coordinator",
            help="One of several processes: where process 0 listens, for the others to find it.",
            metavar="HOST:PORT",
        ),
    ] = None
    num_processes: Annotated[
        int | None,
        option(
            "--num-processes",
            help="How many there are.",
            parser=positive_int("processes"),
            metavar="N",
        ),
    ] = None
    process_id: Annotated[
        int | None,
        option("--process-id", help="Which one this is, from 0.", parser=process_number, metavar="I"),
    ] = None
    start_timeout_s: Annotated[
        float,
        option(
            "--start-timeout-s",
            help="Seconds to wait for all of them.",
            parser=number("a number of seconds above 0", 1e-3, 1e6),
            metavar="S",
        ),
    ] = 300.0

    @property
    def several(self) -> bool:
        """Whether there are to be any others."""
        return self.distributed or any(one is not None for one in self._given)

    @property
    def _given(self) -> tuple[str | None, int | None, int | None]:
        return self.coordinator, self.num_processes, self.process_id

    def join(self) -> None:
        """Joins the other processes, if there are to be any; call it before JAX starts.

        Raises:
            TpjaxError: they cannot be joined.
        """
        if not self.several:
            return
        from tpjax.cli.following import handle_signals, keep_stdout
        from tpjax.distributed import initialize_distributed

        initialize_distributed(*self._given, timeout_s=self.start_timeout_s)
        handle_signals()
        keep_stdout()


@dataclass
class Sampling:
    """Sampling parameters, named as in ``SamplingParams``. Those not given have the defaults of the model."""

    max_tokens: Annotated[
        int | None,
        option(
            "--max-tokens", help="Most tokens to generate (128; 1024 in a chat).", parser=any_int, metavar="N"
        ),
    ] = None
    min_tokens: Annotated[
        int | None,
        option(
            "--min-tokens",
            help="Least tokens before end-of-text or stop can end it.",
            parser=any_int,
            metavar="N",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        option(
            "--temperature",
            help="0 takes the likeliest token (the model's own; else 1, in a chat 0.7).",
            parser=any_number,
            metavar="T",
        ),
    ] = None
    top_k: Annotated[
        int | None,
        option("--top-k", help="Keep the K likeliest tokens; 0 keeps all.", parser=any_int, metavar="K"),
    ] = None
    top_p: Annotated[
        float | None,
        option(
            "--top-p",
            help="Keep the likeliest tokens up to this total probability.",
            parser=any_number,
            metavar="P",
        ),
    ] = None
    min_p: Annotated[
        float | None,
        option(
            "--min-p",
            help="Keep tokens at least P times as likely as the likeliest.",
            parser=any_number,
            metavar="P",
        ),
    ] = None
    seed: Annotated[
        int | None,
        option(
            "--seed", help="The same seed samples the same tokens, at any tp.", parser=any_int, metavar="S"
        ),
    ] = None
    stop: Annotated[
        list[str] | None, option("--stop", help="End before this text; may be repeated.", metavar="STR")
    ] = None
    stop_token_ids: Annotated[
        list[int] | None,
        option("--stop-token-ids", help="End at these tokens.", parser=any_int, metavar="ID"),
    ] = None
    ignore_eos: Annotated[bool, option("--ignore-eos", help="Go on past the end-of-text token.")] = False
    repetition_penalty: Annotated[
        float | None,
        option(
            "--repetition-penalty",
            help="Divides logits of tokens seen before.",
            parser=any_number,
            metavar="X",
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        option(
            "--presence-penalty",
            help="Subtracted from logits of tokens generated before.",
            parser=any_number,
            metavar="X",
        ),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        option(
            "--frequency-penalty",
            help="Subtracted from a logit for each time its token was generated.",
            parser=any_number,
            metavar="X",
        ),
    ] = None
    logit_bias: Annotated[
        list[Any] | None,
        option("--logit-bias", help="Added to the logit of a token.", parser=token_bias, metavar="ID:BIAS"),
    ] = None
    logprobs: Annotated[
        int | None,
        option(
            "--logprobs",
            help="Log-probabilities of this many likeliest tokens, in JSON.",
            parser=any_int,
            metavar="N",
        ),
    ] = None

    def params(self, **defaults: Any) -> SamplingParams:
        """Makes the sampling parameters.

        Args:
            **defaults: values of options that were not given.
        """
        from tpjax.sampling_params import SamplingParams

        given = {
            name: dict(value) if name == "logit_bias" else value
            for name, value in vars(self).items()
            if value is not None
        }
        return SamplingParams(**{**defaults, **given})
