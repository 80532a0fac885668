"""Text to token ids and back, the same for every tokenizer library.

Decoding does not use the libraries. A token is a byte string (``Tokenizer.token_bytes``); a text is the
concatenation of its tokens' bytes, decoded as UTF-8, with invalid bytes shown as U+FFFD as Unicode advises.
That makes streaming exact: ``IncrementalDetokenizer`` is a UTF-8 decoder fed one token at a time. It agrees
with transformers on all valid text; on invalid bytes from a byte-fallback vocabulary, transformers replaces a
whole run of byte tokens, valid characters included, and this keeps them. ``clean_up_tokenization_spaces`` is
ignored, as transformers 5 does for BPE: it removes spaces that the model wrote.

Nothing here imports JAX or a tokenizer library: ``loading.load_tokenizer`` chooses the backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from tpjax.errors import RequestError
from tpjax.text.chat_template import ChatTemplates
from tpjax.text.token_bounds import TokenBound


class Backend(Protocol):
    """Interface of a tokenizer library: encodes without BOS and EOS, decodes single tokens to bytes.

    Attributes:
        vocab_size: number of ids, added tokens included.
        strips_leading_space: a text loses the space that the library puts before it.
    """

    vocab_size: int
    strips_leading_space: bool

    @property
    def added(self) -> Mapping[int, object]:
        """Added tokens by id: matched in a text before the library splits the rest."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token; none for an id beyond the vocabulary."""
        ...

    def token_bound(self) -> TokenBound | None:
        """Returns a lower bound of the number of tokens of a text; ``None`` if there is no safe one."""
        ...


class Tokenizer:
    """Encodes and decodes text as the checkpoint's authors did.

    Attributes:
        vocab_size: number of token ids, added tokens included (a model may have more rows).
        bos_id, unk_id, pad_id: ids of these tokens, or None.
        eos_ids: every id that ends generation: the tokenizer's EOS, those in the checkpoint's settings, and
            the special token with which the chat template ends an assistant's turn.
        special_ids: control tokens, which ``decode`` leaves out by default.
        chat_templates: the checkpoint's chat templates, used by ``apply_chat_template``.
        strips_leading_space: ``decode`` removes the space that the tokenizer puts before every text.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
        roles: Mapping[str, tuple[str, int]],
        eos_ids: Iterable[int] = (),
        special_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str],
    ) -> None:
        """Use ``load_tokenizer`` or ``tokenizer_from_gguf``.

        Args:
            backend: turns plain text into ids and ids into bytes.
            prefix_ids: ids that ``encode`` puts before a text (usually BOS).
            suffix_ids: ids that ``encode`` puts after a text (usually none).
            roles: ``"bos_token"``, ``"eos_token"``, ... -> (text, id).
            eos_ids: ids that end generation, in addition to the one in ``roles``.
            special_ids: further control tokens.
            chat_templates: name -> Jinja source; ``"default"`` is the usual one.
        """
        self._backend = backend
        self._prefix_ids, self._suffix_ids = list(prefix_ids), list(suffix_ids)
        self.chat_templates = ChatTemplates(chat_templates, {role: text for role, (text, _) in roles.items()})
        self._bytes: dict[int, bytes] = {}
        self._special: dict[bytes, int] | None = None  # made when first asked for
        ids = {role: id_ for role, (_, id_) in roles.items()}
        self.vocab_size: int = backend.vocab_size
        self.strips_leading_space: bool = backend.strips_leading_space
        self.bos_id: int | None = ids.get("bos_token")
        self.unk_id: int | None = ids.get("unk_token")
        self.pad_id: int | None = ids.get("pad_token")
        self.eos_ids = frozenset(eos_ids) | ({ids["eos_token"]} if "eos_token" in ids else frozenset())
        self.special_ids = frozenset(special_ids) | frozenset(ids.values()) | self.eos_ids
        self.eos_ids |= self._end_of_turn()
        self.special_ids |= self.eos_ids

    @property
    def edges(self) -> tuple[int, int]:
        """Number of tokens that ``encode`` puts before and after a text."""
        return len(self._prefix_ids), len(self._suffix_ids)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the default chat template, or None."""
        return self.chat_templates.sources.get("default")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text.

        Special tokens spelled out in it become their ids, as in transformers.

        Args:
            text: any valid Unicode; may be empty.
            add_special_tokens: add BOS and EOS as the checkpoint's settings say. Pass False for the output of
                ``apply_chat_template``, which writes its own.

        Raises:
            RequestError: the text holds a lone surrogate, which has no UTF-8 encoding.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text is not valid Unicode: position {error.start} is a lone surrogate"
            ) from error
        ids = self._backend.encode(text)
        return [*self._prefix_ids, *ids, *self._suffix_ids] if add_special_tokens else ids

    def fewest_tokens(self, text: str) -> int:
        """Returns a lower bound of the number of tokens of a text, without encoding it; 0 if unknown."""
        bound = self._bound
        return 0 if bound is None else bound.fewest(text)

    @cached_property
    def _bound(self) -> TokenBound | None:
        return self._backend.token_bound()

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids. An id beyond the vocabulary (a padded row of the model) is no text.

        Removes the leading space that some tokenizers put before every text.
        """
        data = b"".join([self.visible_bytes(i, skip_special_tokens) for i in ids])
        text = data.decode("utf-8", "replace")
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token in the middle of a text; special tokens give their own spelling."""
        token_id = int(token_id)
        found = self._bytes.get(token_id)
        if found is None:
            found = self._backend.token_bytes(token_id) if 0 <= token_id < 1 << 32 else b""
            self._bytes[token_id] = found
        return found

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Renders a conversation as the prompt the model was trained on.

        The template runs in Jinja's immutable sandbox with transformers' settings and helpers. A template
        named ``tool_use`` is preferred when ``tools`` are given.

        Args:
            messages: ``{"role": ..., "content": ...}``, oldest first.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: end with the text of the last message, so that the model continues it;
                pass ``add_generation_prompt=False`` too.
            tools: JSON schemas the template may describe to the model.
            chat_template: Jinja source to use in place of the checkpoint's.
            **kwargs: further template variables (``enable_thinking=False``).

        Returns:
            The prompt, BOS included where the template writes it: encode it with
            ``add_special_tokens=False``.

        Raises:
            RequestError: there is no template, or it rejects the messages.
            CheckpointError: the template is not valid Jinja.
        """
        return self.chat_templates.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template=chat_template,
            **kwargs,
        )

    def special_id(self, text: str) -> int | None:
        """Returns the id of the special token with this text, or None."""
        if self._special is None:
            self._special = {self.token_bytes(i): i for i in sorted(self.special_ids, reverse=True)}
        return self._special.get(text.encode("utf-8", "surrogatepass"))

    def _end_of_turn(self) -> frozenset[int]:
        """Returns the special token that the chat template writes after an assistant's message, if any."""
        after = self.chat_templates.after_reply().lstrip()
        if not after:
            return frozenset()
        first = self._backend.encode(after[:256])[:1]
        special = set(first) & (self.special_ids | self._backend.added.keys())
        return frozenset(i for i in special if after.encode().startswith(self.token_bytes(i)))

    def visible_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        """Returns the bytes of a token in a decoded text: none for a control token that is skipped."""
        return b"" if skip_special_tokens and token_id in self.special_ids else self.token_bytes(token_id)
