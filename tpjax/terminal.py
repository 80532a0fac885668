"""``tpjax chat``: a conversation in the terminal."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tpjax.errors import RequestError
from tpjax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tpjax.llm import LLM

HELP = """/help   this
/reset  forget the conversation
/exit   end; so does Ctrl-D
Ctrl-C  stops the answer, or clears the line"""


class Chat:
    """A conversation with a model.

    Args:
        llm: the model.
        params: how to sample; ``max_tokens`` is cut to what the context has room for.
        system: the system message.
        write: takes text as it comes.

    Raises:
        RequestError: the model has no tokenizer or no chat template.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str | None, write: Callable[[str], object]
    ) -> None:
        if llm.tokenizer is None or llm.tokenizer.chat_template is None:
            raise RequestError("chat needs a chat template, and this model has none: try `tpjax generate`")
        self._llm, self._tokenizer = llm, llm.tokenizer
        self._params = params
        self._write = write
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._first)

    def say(self, text: str) -> bool:
        """Takes a line: a command, or a message to answer. Returns False when it ends the conversation."""
        command = text.strip()
        if command == "/exit":
            return False
        if command == "/reset":
            self.messages = list(self._first)
            self._write("the conversation is forgotten\n")
        elif command.startswith("/"):
            self._write(HELP + "\n" if command == "/help" else f"{command} is no command: try /help\n")
        elif command:
            self._answer(text)
        return True

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokenizer.encode(
            self._tokenizer.apply_chat_template(messages), add_special_tokens=False
        )
        room = self._llm.max_model_len - len(prompt)
        if room < 1:
            self._write(
                f"the conversation has {len(prompt)} tokens, over the context of {self._llm.max_model_len}: "
                "/reset begins anew\n"
            )
            return
        params = dataclasses.replace(self._params, max_tokens=min(self._params.max_tokens, room))
        parts = []
        stream = self._llm.stream(prompt, params)
        with _interruptible() as interrupted:
            for delta in stream:
                parts.append(delta.text)
                self._write(delta.text)
                if delta.finish_reason == "error":
                    self._write(f" [{delta.error}]")
                if interrupted():
                    stream.close()  # type: ignore[attr-defined]  # it is a generator: its slot is freed now
                    self._write(" [stopped]")
                    break
        self._write("\n")
        self.messages = [*messages, {"role": "assistant", "content": "".join(parts)}]


def chat(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """Talks until the input ends."""
    import readline  # noqa: F401  (gives input() a history and a line to edit)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    conversation = Chat(llm, params, system, write)
    while True:
        try:
            if not conversation.say(input("> ")):
                return
        except KeyboardInterrupt:
            write("\n")
        except EOFError:
            write("\n")
            return


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Notes Ctrl-C instead of raising it: an exception inside a step would leave the engine half-way."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)
