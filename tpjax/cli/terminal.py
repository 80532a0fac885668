"""A conversation in the terminal."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tpjax.cli.compiling import compile_for
from tpjax.errors import RequestError
from tpjax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tpjax.llm import LLM

HELP = """/help            this
/reset           forget the conversation
/system TEXT     start again with this system message; without TEXT: with none
/set NAME VALUE  a sampling parameter, such as /set temperature 0.2; without arguments: show them
/save FILE       write the conversation as JSON
/exit            end; so does Ctrl-D
Ctrl-C           stops the answer, or clears the line"""


def check_template(model: str) -> None:
    """Checks that a model can chat, before any weight is read.

    Raises:
        RequestError: the model has no tokenizer or no chat template.
    """
    from tpjax.checkpoints.hub import resolve
    from tpjax.text.loading import load_tokenizer

    tokenizer = load_tokenizer(resolve(model))
    if tokenizer is None or tokenizer.chat_template is None:
        raise RequestError(f"{model} has no chat template: try `tpjax generate`")


class Chat:
    """A conversation with a model.

    Args:
        llm: the model.
        params: sampling parameters; ``max_tokens`` is limited to the room in the context.
        system: the system message.
        write: writes text as it comes.
        prepare: compiles what a prompt needs, before it is answered.

    Attributes:
        params: sampling parameters, which ``/set`` changes.
        messages: the conversation so far.
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None,
        write: Callable[[str], object],
        prepare: Callable[[list[int], SamplingParams], object] = lambda prompt, params: None,
    ) -> None:
        self._llm = llm
        self._write = write
        self._prepare = prepare
        self.params = params
        self._begin(system)

    def say(self, text: str) -> bool:
        """Runs a command or answers a message. Returns False if that ends the conversation."""
        if not text.strip().startswith("/"):
            if text.strip():
                self._answer(text)
            return True
        command, _, argument = text.strip().partition(" ")
        try:
            match command:
                case "/exit":
                    return False
                case "/help":
                    self._write(HELP + "\n")
                case "/reset":
                    self.messages = list(self._first)
                    self._write("the conversation is forgotten\n")
                case "/system":
                    self._begin(argument.strip())
                    self._write("a new conversation\n")
                case "/set":
                    self._set(*argument.split(maxsplit=1))
                case "/save":
                    self._save(argument.strip())
                case _:
                    self._write(f"{command} is no command: try /help\n")
        except RequestError as error:
            self._write(f"{error}\n")
        except OSError as error:
            self._write(f"{error.filename}: {error.strerror}\n")
        return True

    def _begin(self, system: str | None) -> None:
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._first)

    def _set(self, name: str = "", value: str = "") -> None:
        """Sets a sampling parameter, or shows those that are set."""
        if not name:
            given = {
                field.name: getattr(self.params, field.name) for field in dataclasses.fields(self.params)
            }
            self._write(
                "".join(f"{key} = {item!r}\n" for key, item in given.items() if item not in (None, (), {}))
            )
            return
        if name not in {field.name for field in dataclasses.fields(self.params)}:
            raise RequestError(f"{name} is no sampling parameter")
        try:
            number = json.loads(value)
        except (ValueError, RecursionError):
            number = value  # a string, such as /set stop ###
        self.params = dataclasses.replace(self.params, **{name: number})
        self._write(f"{name} = {number!r}\n")

    def _save(self, file: str) -> None:
        if not file:
            raise RequestError("/save needs a file's name")
        Path(file).expanduser().write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n")
        self._write(f"{len(self.messages)} messages are in {file}\n")

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._llm.chat_prompt(messages)
        room = self._llm.max_model_len - len(prompt)
        if room < 1:
            self._write(
                f"the conversation has {len(prompt)} tokens, over the context of {self._llm.max_model_len}: "
                "/reset starts again\n"
            )
            return
        params = dataclasses.replace(self.params, max_tokens=min(self.params.max_tokens, room))
        self._prepare(prompt, params)
        parts = []
        stream = self._llm.stream(prompt, params)
        with _interruptible() as interrupted:
            for delta in stream:
                parts.append(delta.text)
                self._write(delta.text)
                if delta.finish_reason == "error":
                    self._write(f" [{delta.error}]")
                if interrupted():
                    stream.close()  # its slot is freed now
                    self._write(" [stopped]")
                    break
        self._write("\n")
        self.messages = [*messages, {"role": "assistant", "content": "".join(parts)}]


def chat(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """Reads lines from the terminal and answers them until the input ends."""
    import readline  # noqa: F401  (gives input() a history and a line to edit)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    conversation = Chat(llm, params, system, write, partial(compile_for, llm))
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
    """Records Ctrl-C in place of raising it: in a step that would drop the cache, and with it this chat's."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)
