"""``LLM``: the Python API."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np

from tpjax.checkpoints import generation_config as generation
from tpjax.checkpoints.digests import digest_of_edges
from tpjax.checkpoints.hub import cache_dir, resolve
from tpjax.checkpoints.opening import check_quantize, open_checkpoint
from tpjax.config import (
    AttentionBackend,
    ExpertParallel,
    KVDtype,
    ModelConfig,
    Quantize,
    SequenceParallel,
    check_choice,
)
from tpjax.distributed import num_processes
from tpjax.engine.engine import Engine
from tpjax.engine.generation import Delta as Delta
from tpjax.engine.generation import Generation
from tpjax.engine.loading import load_engines
from tpjax.engine.replica import Replica, not_begun
from tpjax.engine.request import FinishReason, Grammar, Request, TokenLogprobs
from tpjax.engine.request_builder import CheckedParams, RequestBuilder
from tpjax.engine.router import Router
from tpjax.errors import ConfigError, RequestError
from tpjax.mesh import describe_layout, describe_tp, make_stage_meshes
from tpjax.old_spellings import accepts_old_spellings
from tpjax.runtime.limits import resolve_dtype
from tpjax.runtime.memory import device_memory
from tpjax.runtime.role import join, tells_failure
from tpjax.runtime.runner import Runner
from tpjax.sampling_params import MAX_SEED, MIN_SEED, SamplingParams
from tpjax.text.loading import load_tokenizer
from tpjax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tpjax.inspect.explain_report import Report
    from tpjax.inspect.pipeline_report import PipelineReport

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """A prompt and its continuation.

    Attributes:
        prompt: the prompt's text; ``None`` if token ids were given.
        prompt_token_ids: its tokens, special tokens included.
        text: the continuation, up to a stop string; ``""`` if the model has no tokenizer.
        token_ids: the continuation's tokens, the ending token included.
        finish_reason: ``stop`` (an end-of-text token, a stop token or string), ``length``, or ``error``.
        logprobs: one entry per token, if ``SamplingParams.logprobs`` is given.
        prompt_logprobs: one entry per prompt token, ``None`` for the first, if asked for.
        error: what went wrong: logits that are not numbers, or a dispatch that failed while the request ran.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None


class LLM:
    """A language model, sharded over a mesh of devices, or several replicas of it, each on a mesh of its own.

    As a context manager it is closed at the end of the block::

        with LLM("smollm2-135m") as llm:
            print(llm.generate("The capital of France is", max_tokens=4)[0].text)

    Args:
        model: a built-in alias, a Hugging Face id, a directory (safetensors or Orbax), or a ``.gguf`` file.
        tp: number of devices of a replica; ``None`` shares all of them out. It need not divide anything. Of
            pipeline stages it is the number for each of them, or one for each stage: ``(3, 1)``.
        dtype: dtype of weights, activations and cache: ``auto`` (bfloat16 on TPU and GPU, float32 on CPU),
            ``float32``, ``bfloat16`` or ``float16``.
        max_model_len: longest sequence, prompt and output together, tokens; ``None``: the model's longest
            context, as far as the cache has room.
        max_slots: sequences decoded at once; more are queued. ``None``: what the devices have room for, up to
            256; 8 on a CPU.
        quantize: what the weights of attention, MLPs and experts are kept in: ``int8`` or ``fp8`` (e4m3)
            with a scale for each output, or ``int4`` with one for 128 inputs; rounded while they are loaded.
            Products widen them to ``dtype``.
            ``None``: they are as they are stored, in 8 or 4 bits or in ``dtype``.
        quantize_head: embedding and head are kept so too (with ``int4`` in ``int8``); otherwise they are of
            ``dtype``, as norms, routers and biases always are.
        seed: seed for requests without one of their own; any int64, -1: another one at each start.
        expert_parallel: of a mixture of experts: ``on`` (each device holds some of the experts), ``off``
            (each expert's width is sharded), or ``auto``: ``on`` if ``tp`` divides the number of experts.
        sequence_parallel: whether prefill shards the residual over positions, so that norms compute 1/tp of
            the rows: ``on``, ``off``, or ``auto``: on TPUs, and on GPUs from 8 MiB a device. It changes no
            result.
        attention: what computes attention: ``xla`` (any platform), ``tpu`` or ``gpu`` (Pallas kernels, not
            checked; on a CPU they are interpreted, which is slow), ``reference`` (the definition, slow), or
            ``auto``: the kernel if it was found right on the chip, and no slower than ``xla``. The kernel of
            quantised products is checked in either case.
        max_num_batched_tokens: tokens of a step, those of decoded sequences and of prompts together; at least
            a page of a prompt, 128, and at most 2,048 run in any case. ``None``: as many as are predicted to
            delay decoded sequences little.
        dp: number of replicas. Each has its own weights, cache and slots on its own ``tp`` devices, and is
            stepped by a thread: :mod:`tpjax.engine.router` says how requests are spread, and how many
            replicas a process can drive.
        pp: number of pipeline stages of a replica: its layers are split over ``pp`` meshes of ``tp`` devices,
            so that each stage takes about as long, embedding and vocabulary projection counted; one of more
            devices gets more layers. Stages work at once on different sequences, thus pay with several of
            them: :mod:`tpjax.runtime.stage`.
        generation_config: source of sampling parameters that a request does not give: ``auto``: the
            checkpoint's ``generation_config.json``; ``none``: no source; or another directory or file.
        kv_dtype: what keys and values are kept in: ``int8`` or ``fp8`` (e4m3), rounded as they are written,
            with a scale for each token and head; ``auto``: they are of ``dtype``.

    Attributes:
        config: the architecture.
        dp: number of replicas.
        pp: number of stages of a replica.
        layout: the numbers of replicas, stages and devices of each, such as ``pp=2 × tp=4``.
        mesh: the mesh, of the first replica and its first stage.
        tokenizer: ``None`` if the checkpoint has none: prompts and completions are then token ids.
        eos_ids: tokens that end a text.
        sampling_defaults: sampling parameters that apply if a request does not give them.
        dtype: dtype of activations, cache, and weights that are not quantised.
        quantize: what quantised weights are kept in.
        kv_dtype: what keys and values are kept in.
        name: the model as it was given.
        path: the checkpoint on disk.
        engines: the engine of each replica.
        front: what requests are given to: the replica, or the router of several.
        role: the part of this process, if several run the model (:func:`tpjax.initialize_distributed`):
            process 0 has the requests, the others run what it does, in :meth:`follow`.

    Raises:
        TpjaxError: an argument is not supported, the checkpoint is invalid, or the model does not fit.
    """

    @tells_failure
    @accepts_old_spellings
    def __init__(
        self,
        model: str | os.PathLike[str],
        tp: int | Sequence[int] | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_slots: int | None = None,
        quantize: Quantize | None = None,
        seed: int = 0,
        expert_parallel: ExpertParallel = "auto",
        sequence_parallel: SequenceParallel = "auto",
        generation_config: str | os.PathLike[str] = "auto",
        max_num_batched_tokens: int | None = None,
        attention: AttentionBackend = "auto",
        dp: int = 1,
        pp: int = 1,
        kv_dtype: KVDtype = "auto",
        quantize_head: bool = False,
    ) -> None:
        check_quantize(quantize)
        check_choice("sequence_parallel", sequence_parallel, SequenceParallel)
        check_choice("kv_dtype", kv_dtype, KVDtype)
        if isinstance(seed, bool) or not isinstance(seed, int) or not MIN_SEED <= seed <= MAX_SEED:
            raise ConfigError(f"seed={seed!r} is not a whole number, {MIN_SEED} to {MAX_SEED}")
        if max_num_batched_tokens is not None and max_num_batched_tokens < 1:
            raise ConfigError(f"max_num_batched_tokens={max_num_batched_tokens} is less than 1")
        flags = {
            "dtype": dtype,
            "quantize": quantize,
            "kv_dtype": kv_dtype,
            "quantize_head": quantize_head,
            "max_model_len": max_model_len,
            "max_slots": max_slots,
            "expert_parallel": expert_parallel,
            "sequence_parallel": sequence_parallel,
            "attention": attention,
        }
        if num_processes() > 1:
            make_stage_meshes(tp, dp, pp)  # JAX starts in all of them at once, before one fetches the model
        path = resolve(os.fspath(model))
        checkpoint = open_checkpoint(path).with_expert_parallel(expert_parallel)
        checkpoint.check_quantize(quantize, quantize_head)
        self.config: ModelConfig = checkpoint.config
        self.tokenizer: Tokenizer | None = load_tokenizer(path)
        self.eos_ids = generation.eos_ids(path) if self.tokenizer is None else self.tokenizer.eos_ids
        self.sampling_defaults = generation.sampling_defaults(path, generation_config)
        meshes = make_stage_meshes(tp, dp, pp)
        self.dp, self.pp, self.mesh, tps = dp, pp, meshes[0][0], [mesh.size for mesh in meshes[0]]
        self.layout = describe_layout(tps, dp, pp)
        _use_compilation_cache()
        self.dtype = resolve_dtype(dtype)
        flags |= {"tp": describe_tp(tps), "pp": pp}
        self.kv_dtype: KVDtype = kv_dtype
        self.role = join(
            {"model": path.name, "checkpoint": digest_of_edges(path), **flags},
            device_memory(sum(tps) * dp),
        )
        self.quantize: Quantize | None = quantize
        self.name = str(model)
        self.path: Path = path
        engines = load_engines(
            checkpoint,
            meshes,
            self.role,
            self.dtype,
            attention=attention,
            max_model_len=max_model_len,
            max_slots=max_slots,
            quantize=quantize,
            quantize_head=quantize_head,
            kv_dtype=kv_dtype,
            sequence_parallel=sequence_parallel,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self.engines = tuple(engines)
        self.front: Replica | Router = Replica(engines[0]) if dp == 1 else Router(engines)
        self._streams: dict[Generation, deque[Delta]] = {}  # of running calls: what they have not taken yet
        self._requests = RequestBuilder(
            self.config.vocab_size, self.tokenizer, self.eos_ids, self.sampling_defaults, seed, path
        )
        if self.sampling_defaults:
            log.info("defaults of requests: %s (generation_config)", self.describe_defaults())

    def close(self) -> None:
        """Gives the memory of the devices back: weights, cache and programs.

        Requests that run or wait end with the reason ``error``. Any later call raises an ``EngineError``; a
        second ``close`` does nothing.
        """
        self.front.close()

    def follow(self) -> None:
        """Runs what process 0 runs, until that closes the model; in process 0 itself, returns at once.

        A script that is started in several processes calls it before it asks for anything::

            tpjax.initialize_distributed()
            llm = tpjax.LLM("smollm2-135m")
            llm.follow()
            if jax.process_index() == 0:
                print(llm.generate("The capital of France is")[0].text)
                llm.close()

        If process 0 is lost, this process ends with exit status 1.
        """

        def explain() -> dict[str, Any]:
            from tpjax.inspect.explain import explain_own_stages

            return explain_own_stages(self.runner)

        self.role.follow(self.runner, explain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LLM: {self.name} at {self.layout}>"

    @property
    def engine(self) -> Engine:
        """The engine, of the first replica that has not failed."""
        return self.front.engine

    @property
    def runner(self) -> Runner:
        """The compiled model that :attr:`engine` steps."""
        return self.engine.runner

    @property
    def compile_progress(self) -> tuple[int, int]:
        """How many programs :meth:`warm_up` has compiled in the background, and how many it compiles."""
        done, programs = zip(*(engine.runner.programs.progress for engine in self.engines), strict=True)
        return sum(done), sum(programs)

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together, tokens."""
        return self.runner.limits.max_model_len

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **fields: Any,
    ) -> list[Completion]:
        """Continues prompts, all at once as far as slots and cache allow.

        Args:
            prompts: texts, or lists of token ids.
            params: sampling parameters, one for all prompts or one per prompt.
            **fields: fields of ``SamplingParams`` in place of ``params``: ``generate(prompt, max_tokens=4)``.

        Returns:
            One completion per prompt, in order.

        Raises:
            RequestError: a prompt or parameter is invalid; nothing has run then.
            EngineError: the model is closed.
        """
        if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
            kind = type(prompts).__name__
            raise RequestError(f"prompts is a {kind}, not a text or a list of texts and lists of token ids")
        each: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        given = SamplingParams.of(params, fields)
        every = [given] * len(each) if isinstance(given, SamplingParams) else list(given)
        if len(every) != len(each):
            raise RequestError(f"{len(each)} prompts came with {len(every)} sampling parameters")
        running = [
            Generation(self.request(prompt, p), self.tokenizer) for prompt, p in zip(each, every, strict=True)
        ]
        try:
            for generation in running:
                self._start(generation)
            unfinished = set(running)
            while unfinished:
                unfinished.difference_update(self._step())
        finally:
            try:
                for generation in running:
                    self._end(generation)
            except BaseException:  # another interrupt
                for generation in running:
                    self._end(generation)
                raise
        return [
            Completion(
                prompt if isinstance(prompt, str) else None,
                list(generation.request.prompt_token_ids),
                generation.text,
                generation.request.output_token_ids,
                generation.request.finish_reason or "length",
                generation.request.logprobs if p.logprobs is not None else None,
                generation.request.prompt_logprobs if p.prompt_logprobs is not None else None,
                generation.request.error,
            )
            for prompt, p, generation in zip(each, every, running, strict=True)
        ]

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, **fields: Any
    ) -> Generator[Delta, None, None]:
        """Continues one prompt and yields the continuation as it is generated.

        The text of all deltas together is that of :meth:`generate`; no delta ends inside a character.
        Closing the generator early releases the request's slot and pages at once.

        Args:
            prompt: text, or token ids.
            params: sampling parameters.
            **fields: fields of ``SamplingParams`` in place of ``params``.

        Raises:
            RequestError: the prompt or a parameter is invalid.
            EngineError: the model is closed.
        """
        one = SamplingParams.of(params, fields)
        if not isinstance(one, SamplingParams):
            raise RequestError(f"1 prompt came with a list of {len(one)} sampling parameters")
        return self._stream(Generation(self.request(prompt, one), self.tokenizer))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Answers one conversation, or several at once.

        Args:
            messages: one conversation, a list of objects with ``role`` and ``content``; or a list of those.
            params: as in :meth:`generate`.
            **options: fields of ``SamplingParams`` in place of ``params``, as in :meth:`generate`; all others
                are variables of the chat template: ``tools``, and whatever else it reads.

        Returns:
            One completion per conversation.

        Raises:
            RequestError: the model has no chat template, or the template rejects the messages.
        """
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise RequestError(f"messages is a {type(messages).__name__}, not a list of messages")
        several = [messages] if messages and isinstance(messages[0], Mapping) else messages
        names = SamplingParams.__dataclass_fields__.keys() & options.keys()
        fields = {name: options.pop(name) for name in names}
        prompts = [self.chat_prompt(one, **options) for one in several]  # type: ignore[arg-type]
        return self.generate(prompts, params, **fields)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Returns the token ids of a conversation, ready to be answered.

        Args:
            messages: objects with ``role`` and ``content``.
            **options: as in :meth:`chat`.

        Raises:
            RequestError: the model has no chat template, or the template rejects the messages.
        """
        if self.tokenizer is None:
            raise RequestError(f"{self.path} has no tokenizer, thus no chat template")
        # the template writes the special tokens itself
        text = self.tokenizer.apply_chat_template(messages, **options)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Computes the logits after each token, teacher-forced.

        Args:
            token_ids: T tokens, at most ``max_model_len``.

        Returns:
            float32 [T, V], V without padding.

        Raises:
            RequestError: the tokens are invalid.
            EngineError: a dispatch failed, or the model is closed.
        """
        tokens = self._requests.checked(token_ids)
        if not tokens:
            raise RequestError("the list of tokens is empty: at least 1 is needed")
        if len(tokens) > self.max_model_len:
            raise RequestError(f"{len(tokens)} tokens are over max_model_len={self.max_model_len}")
        return self.front.run(lambda engine: engine.logits(tokens))

    def explain(self) -> Report | PipelineReport:
        """Reports what lies on which device, its bytes, and what a decode step moves between devices.

        Of a pipeline it reports each stage, and what moves between them; those of other processes as these
        report them.

        Raises:
            EngineError: the model is closed.
            LostProcessError: another process could not tell, or is lost.
        """
        from tpjax.inspect.explain import explain

        self.front.check_open()
        return explain(self.runner, name=self.name, dp=self.dp)

    def prepare(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> None:
        """Compiles what :meth:`stream` needs for this prompt, so that its first tokens do not wait.

        Raises:
            RequestError: the prompt or a parameter is invalid.
        """
        request = self.request(prompt, params or SamplingParams())

        def prepare(engine: Engine) -> None:
            with engine.guarded():
                spans = engine.scheduler.prompt_spans(len(request.prompt_token_ids))
                greedy, tokens = request.params.plain_greedy, request.params.max_tokens
                engine.runner.prepare(spans, greedy=greedy, tokens=tokens)

        self.front.run(prepare)  # of several replicas, that of an only request

    def warm_up(self, *, background: bool = False) -> None:
        """Compiles every program that serving can call; afterwards nothing compiles again.

        Args:
            background: return when requests can run, with programs for more rows or other prompts than they
                need, and compile the rest on a thread.
        """

        def warm_up(engine: Engine) -> None:
            with engine.guarded():
                engine.runner.warm_up(background=background)

        self.front.check_open()
        self.front.run_on_all(warm_up)

    def checked_params(self, params: SamplingParams) -> CheckedParams:
        """Returns sampling parameters for :meth:`requests`, checked against model and tokenizer.

        Raises:
            RequestError: a parameter is invalid.
        """
        return self._requests.check(params)

    def requests(
        self,
        prompt: str | Sequence[int],
        params: CheckedParams,
        seeds: Sequence[int | None],
        grammars: Sequence[Grammar | None] = (),
        **extra: Any,
    ) -> list[Request]:
        """Returns requests for several choices of one prompt, checked once: see :meth:`request`.

        The arguments are those of :meth:`tpjax.engine.request_builder.RequestBuilder.build`.

        Raises:
            RequestError: the prompt is invalid or too long, or a grammar leaves nothing to sample.
            EngineError: the model is closed.
        """
        self.front.check_open()
        requests = self._requests.build(prompt, params, seeds, grammars, **extra)
        self.engine.scheduler.check(requests[0])  # it looks at the lengths, which are the same for all
        return requests

    def request(self, prompt: str | Sequence[int], params: SamplingParams, **extra: Any) -> Request:
        """Returns a request for ``engine``, checked against model, tokenizer, context and cache.

        Args:
            prompt: text, or token ids.
            params: sampling parameters.
            **extra: further fields of the request (``cache_salt``, ``grammar``, ``priority``).

        Raises:
            RequestError: the prompt or a parameter is invalid.
            EngineError: the model is closed.
        """
        grammars = [extra.pop("grammar", None)]
        return self.requests(prompt, self.checked_params(params), [params.seed], grammars, **extra)[0]

    def describe_defaults(self) -> str:
        """Returns the sampling defaults as text; empty if there are none."""
        return ", ".join(f"{name}={value:g}" for name, value in self.sampling_defaults.items())

    # --- requests ------------------------------------------------------------------------------------------

    def _stream(self, generation: Generation) -> Generator[Delta, None, None]:
        ended = False
        try:
            deltas = self._start(generation)
            while not ended:
                if not deltas:
                    # an interrupt of another call may have lost its end
                    ended = not self.front.runs(generation)
                    self._step()
                while deltas:
                    yield (delta := deltas.popleft())
                    ended = delta.finish_reason is not None
        finally:
            self._end(generation)

    def _start(self, generation: Generation) -> deque[Delta]:
        """Queues a generation and returns the queue of its deltas, which any call's steps fill."""
        self.front.add(generation)
        self._streams[generation] = deque()
        return self._streams[generation]

    def _step(self) -> list[Generation]:
        """Steps the front and hands out deltas; returns the generations that ended."""
        ended, deltas = [], self.front.deltas
        try:
            self.front.step()
            while deltas:
                generation, delta = deltas.popleft()
                if generation not in self._streams:
                    continue  # an interrupt has ended its call
                self._streams[generation].append(delta)
                if delta.finish_reason is not None:
                    ended.append(generation)
        except BaseException as error:
            self._fail_streams(f"interrupted ({type(error).__name__}) while this ran")
            raise
        return ended

    def _fail_streams(self, why: str) -> None:
        """Ends what has begun with an error, for any call: a step was not handed out to its end.

        What it had for one of them may be lost, and text with a gap would be wrong.
        """
        self.front.deltas.clear()
        for one, deltas in self._streams.items():
            request = one.request
            if not_begun(request) or (deltas and deltas[-1].finish_reason is not None):
                continue
            self.front.cancel(one)
            request.finish_reason, request.error = "error", why
            deltas.append(Delta("", [], "error", error=why))

    def _end(self, generation: Generation) -> None:
        """Ends a call's generation, if it has not ended, and its queue of deltas."""
        self.front.cancel(generation)
        self._streams.pop(generation, None)


def _use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX has been told another place."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
