"""A Ray Serve application: replicas of a model on the machines of a cluster, each a process with its devices.

    serve run tpjax.deploy.ray:build_app model=./Llama-3.1-8B tp=4 accelerator=GPU max_replicas=8

Ray starts, watches, restarts and scales the replicas, and spreads requests over them. Each is what ``tpjax
serve`` runs, without its socket: the OpenAI API at Ray's address, streamed through.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Receive, Scope, Send

from tpjax.errors import ConfigError
from tpjax.mesh import devices_of_stages, ensure_devices
from tpjax.server.app import create_app
from tpjax.server.middleware import MAX_BODY_BYTES, ServerMiddleware
from tpjax.server.service import Service

try:
    from ray import serve
except ImportError as error:
    raise ConfigError(f"Ray Serve is not installed ({error}): pip install 'tpjax[ray]'") from error


class Arguments(BaseModel):
    """Arguments of :func:`build_app`.

    Attributes:
        model: what ``LLM`` takes; on every machine, or at Hugging Face.
        served_model_name: the model's name in the API; ``None``: ``model``.
        tp: devices of a replica; of several pipeline stages those of each alike, or one number for each.
        pp: pipeline stages of a replica.
        accelerator: Ray's resource that counts devices; ``CPU``: they are faked.
        max_slots: sequences that a replica decodes at once.
        max_queue: choices that may wait at a replica.
        min_replicas: replicas that always run; 0 lets the last one go, too.
        max_replicas: replicas that may run.
        api_keys: keys that clients may use; none: no key is needed.
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
    api_keys: tuple[str, ...] = ()
    options: dict[str, Any] = {}


@serve.ingress()
class Replica:
    """One engine. Ray makes it an actor, and its requests go to the application of ``tpjax serve``."""

    async def __init__(self, arguments: Arguments) -> None:  # type: ignore[misc]  # Ray awaits it
        llm = await asyncio.to_thread(_load, arguments)  # Ray sends requests when this is over
        name = arguments.served_model_name or arguments.model
        self._ready = asyncio.Event()
        self._api_keys = arguments.api_keys
        self._service = Service(
            lambda: llm,
            name,
            arguments.max_queue,
            warm_up=True,
            on_ready=self._ready.set,
            on_failure=self._ready.set,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Returns the application, which Ray calls; its lifespan starts the engine's thread."""
        app = ServerMiddleware(create_app(self._service), self._api_keys, MAX_BODY_BYTES, False)

        async def when_ready(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._ready.wait()
            await app(scope, receive, send)

        return when_ready

    def check_health(self) -> None:
        """Raises if the engine has stopped; Ray then starts another replica in this one's place."""
        if self._service.error is not None:
            raise RuntimeError(f"the engine has failed: {self._service.error}")


def _load(arguments: Arguments) -> Any:
    if arguments.accelerator == "CPU":
        ensure_devices(arguments.tp, pp=arguments.pp)
    from tpjax.llm import LLM

    return LLM(
        arguments.model, tp=arguments.tp, pp=arguments.pp, max_slots=arguments.max_slots, **arguments.options
    )


def build_app(arguments: Arguments) -> serve.Application:
    """Returns the application for ``serve run`` or ``serve.run``.

    A replica takes as many requests at once as it has slots and places in its queue: Ray's default, 5, would
    keep its batches small. Replicas are added when those that run have more requests than slots.

    Args:
        arguments: of the model and its replicas; ``serve run`` makes them from its ``name=value``.

    Raises:
        ConfigError: ``min_replicas`` is over ``max_replicas``.
    """
    if arguments.min_replicas > arguments.max_replicas:
        raise ConfigError(
            f"min_replicas={arguments.min_replicas} is over max_replicas={arguments.max_replicas}"
        )
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
