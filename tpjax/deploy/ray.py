"""A Ray Serve application: replicas of a model on the machines of a cluster, each a process with its devices.

    serve run tpjax.deploy.ray:build_app model=./Llama-3.1-8B tp=4 accelerator=GPU max_replicas=8

Ray starts, watches, restarts and scales the replicas, and spreads requests over them. Each is what ``tpjax
serve`` runs, without its socket: the OpenAI API at Ray's address, streamed through.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.types import ASGIApp

from tpjax.errors import ConfigError
from tpjax.llm import LLM
from tpjax.mesh import devices_of_stages, ensure_devices
from tpjax.server.app import create_app
from tpjax.server.middleware import MAX_BODY_BYTES, ServerMiddleware, check_keys
from tpjax.server.service import Service, name_in_api

try:
    from ray import serve
except ImportError as error:
    raise ConfigError(f"Ray Serve is not installed ({error}): pip install 'tpjax[ray]'") from error


class Arguments(BaseModel):
    """Arguments of :func:`build_app`.

    ``serve run`` has only texts: ``tp=3,1``, ``api_keys=one,other``, ``options={"dtype":"float32"}``.

    Attributes:
        model: what ``LLM`` takes; on every machine, or at Hugging Face.
        served_model_name: the model's name in the API; ``None``: ``model``, of a path its last part.
        tp: devices of a replica; of several pipeline stages those of each alike, or one number for each.
        pp: pipeline stages of a replica.
        accelerator: Ray's resource that counts devices; ``CPU``: they are faked.
        max_slots: sequences that a replica decodes at once.
        max_queue: choices that may wait at a replica, and requests that Ray may hold where all are full.
        min_replicas: replicas that always run; 0 lets the last one go, too.
        max_replicas: replicas that may run.
        drain_s: seconds that the requests of a replica have to finish when it is not needed any more.
        api_keys: keys that clients may use; none: no key is needed.
        api_key_file: a file of further keys, one a line, where :func:`build_app` runs.
        options: further arguments of ``LLM``, such as ``dtype`` or ``max_model_len``.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    served_model_name: str | None = None
    tp: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], ...] = 1
    pp: int = Field(default=1, ge=1)
    accelerator: Literal["CPU", "GPU", "TPU"] = "CPU"
    max_slots: int = Field(default=8, ge=1)
    max_queue: int = Field(default=256, ge=1)
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    drain_s: float = Field(default=600, ge=0)
    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    options: dict[str, Any] = {}

    @field_validator("tp", mode="before")
    @classmethod
    def _of_stages(cls, given: Any) -> Any:
        return given.split(",") if isinstance(given, str) and "," in given else given

    @field_validator("api_keys", mode="before")
    @classmethod
    def _each_key(cls, given: Any) -> Any:
        return given.split(",") if isinstance(given, str) else given

    @field_validator("options", mode="before")
    @classmethod
    def _parsed(cls, given: Any) -> Any:
        return json.loads(given) if isinstance(given, str) else given

    @field_validator("options")
    @classmethod
    def _of_a_model(cls, given: dict[str, Any]) -> dict[str, Any]:
        known = inspect.signature(LLM).parameters.keys() - cls.model_fields.keys() - {"dp"}
        if unknown := given.keys() - known:
            raise ValueError(f"{min(unknown)!r} is none of {', '.join(sorted(known))}")
        return given


@serve.ingress()
class Replica:
    """One engine. Ray makes it an actor, and its requests go to the application of ``tpjax serve``."""

    async def __init__(self, arguments: Arguments) -> None:  # type: ignore[misc]  # Ray awaits it
        ended = asyncio.Event()
        self._api_keys = arguments.api_keys
        self._service = Service(
            lambda: _load(arguments),
            arguments.served_model_name or name_in_api(arguments.model),
            arguments.max_queue,
            warm_up=True,
            on_ready=ended.set,
            on_failure=ended.set,
        )
        self._service.start()
        await ended.wait()  # Ray sends requests when this is over
        if self._service.error is not None:
            raise self._service.error

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Returns the application, which Ray calls."""
        return ServerMiddleware(create_app(self._service), self._api_keys, MAX_BODY_BYTES, False)

    def check_health(self) -> None:
        """Raises if the engine has stopped; Ray then starts another replica in this one's place."""
        if self._service.error is not None:
            raise RuntimeError(f"the engine has failed: {self._service.error}")


def _load(arguments: Arguments) -> LLM:
    if arguments.accelerator == "CPU":
        ensure_devices(arguments.tp, pp=arguments.pp)
    return LLM(
        arguments.model, tp=arguments.tp, pp=arguments.pp, max_slots=arguments.max_slots, **arguments.options
    )


def build_app(arguments: Arguments | Mapping[str, Any]) -> serve.Application:
    """Returns the application for ``serve run`` or ``serve.run``.

    A replica takes as many requests at once as it has slots and places in its queue: Ray's default, 5, would
    keep its batches small. Replicas are added when those that run have more requests than slots.

    Args:
        arguments: of the model and its replicas: fields of :class:`Arguments`, as ``serve run`` makes them
            from its ``name=value``.

    Raises:
        ConfigError: an argument is wrong.
    """
    arguments = _checked(arguments)
    devices = sum(devices_of_stages(arguments.tp, arguments.pp))
    match arguments.accelerator:
        case "CPU":
            resources: dict[str, Any] = {"num_cpus": 1}
        case "GPU":
            resources = {"num_gpus": devices}
        case "TPU":
            resources = {"resources": {"TPU": devices}}
    deployment = serve.deployment(
        Replica,
        name="tpjax",
        ray_actor_options=resources,
        max_ongoing_requests=arguments.max_slots + arguments.max_queue,
        max_queued_requests=arguments.max_queue,
        graceful_shutdown_timeout_s=arguments.drain_s,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "initial_replicas": max(arguments.min_replicas, 1),
            "target_ongoing_requests": arguments.max_slots,
        },
        health_check_period_s=5,
        health_check_timeout_s=30,
    )
    return deployment.bind(arguments)


def _checked(given: Arguments | Mapping[str, Any]) -> Arguments:
    """Returns the arguments, with all API keys.

    Raises:
        ConfigError: one is wrong.
    """
    try:
        arguments = Arguments.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name, why = first["loc"][0], first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] == "missing" or name == "api_keys" else f"={first['input']!r}"
        raise ConfigError(f"{name}{value}: {why}") from error
    if arguments.min_replicas > arguments.max_replicas:
        raise ConfigError(
            f"min_replicas={arguments.min_replicas} is over max_replicas={arguments.max_replicas}"
        )
    if (file := arguments.api_key_file) is not None:
        try:
            keys = file.read_text().split()
        except (OSError, ValueError) as error:
            raise ConfigError(f"api_key_file={file}: {error}") from error
        if not keys:
            raise ConfigError(f"api_key_file={file}: no key in it")
        arguments = arguments.model_copy(update={"api_keys": (*arguments.api_keys, *keys)})
    check_keys(arguments.api_keys)
    return arguments
