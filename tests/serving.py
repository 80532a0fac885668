"""A tiny model with a tokenizer, and a server of it in this process: what the server's tests share."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import uvicorn
from conftest import GOLDENS
from safetensors.numpy import load_file, save_file

from tpjax import LLM
from tpjax.server.run import Options, Server, listen
from tpjax.server.service import Service

VOCAB, CONTEXT, SLOTS = 384, 1024, 4
WAIT_S = 60  # for what takes no time on a quiet machine; nothing here may fail because the machine is busy
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# a template that does not end
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
WORDS = "the quick brown fox jumps over the lazy dog while tokens become words and words become text "


def tiny_checkpoint(directory: Path, golden: str = "llama") -> Path:
    """A golden, untied, with another vocabulary: random rows, and a byte-level tokenizer of 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator([WORDS * 3], trainer)
    library.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    config = json.loads((GOLDENS / golden / "config.json").read_text())
    config |= {"vocab_size": VOCAB, "eos_token_id": 1, "bos_token_id": 0, "max_position_embeddings": CONTEXT}
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(GOLDENS / golden / "model.safetensors")
    random = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shape = (VOCAB, weights[name].shape[1])
        weights[name] = random.normal(0, weights[name].std(), shape).astype(np.float32)
    save_file(weights, directory / "model.safetensors")
    return directory


class Running:
    """A server that runs in this process.

    Attributes:
        url: where.
        service: its service.
    """

    def __init__(self, server: uvicorn.Server, service: Service, url: str) -> None:
        self.server, self.service, self.url = server, service, url

    @property
    def llm(self) -> LLM:
        return self.service.llm

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=2 * WAIT_S, **options)

    def metric(self, name: str) -> float:
        """The value of a metric; its labels may be left out."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"tpjax:{name}{{"))

    def until(self, holds: Callable[[], bool], seconds: float = WAIT_S) -> None:
        """Waits until something holds."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, "it never came about"
            time.sleep(0.01)


@contextlib.contextmanager
def running(
    load: Callable[[], LLM], *, wait: bool = True, send_buffer: int | None = None, **options: Any
) -> Iterator[Running]:
    """Serves a model on a free port until the block ends."""
    sock = listen("127.0.0.1", 0)
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    chosen = Options(model="tiny", port=0, **options)
    service = Service(load, chosen.model, chosen.max_queue, on_failure=lambda: server.finish())
    server = Server(service, chosen)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    one = Running(server, service, f"http://127.0.0.1:{sock.getsockname()[1]}")
    try:
        if wait:
            one.until(lambda: service.state != "loading", 5 * WAIT_S)
            assert service.state == "ready", service.error
        yield one
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def load_tiny(directory: Path, **options: Any) -> LLM:
    """The tiny model at tp=2."""
    return LLM(directory, **({"tp": 2, "max_model_len": CONTEXT, "max_slots": SLOTS} | options))
