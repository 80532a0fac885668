"""Reads the files beside a tokenizer: special tokens, added tokens and chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpjax.checkpoints.generation_config import eos_ids, read_object
from tpjax.errors import CheckpointError
from tpjax.text.sentencepiece_backend import AddedToken

ADDITIONAL = "additional_chat_templates"  # folder of a checkpoint: NAME.jinja
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """Settings in the files beside a tokenizer; a missing file is an empty one.

    Attributes:
        config: ``tokenizer_config.json``, with ``special_tokens_map.json`` for what it lacks.
        added: id -> (added token, whether it is special).
        eos_ids: ids that end generation.
        chat_templates: name -> Jinja source.
    """

    config: dict[str, Any]
    added: dict[int, tuple[AddedToken, bool]]
    eos_ids: frozenset[int]
    chat_templates: dict[str, str]

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        """Reads the files of a checkpoint directory.

        Raises:
            CheckpointError: a file is not valid.
        """
        config = read_object(directory / "tokenizer_config.json")
        for role, value in read_object(directory / "special_tokens_map.json").items():
            if config.get(role) is None:
                config[role] = value
        return cls(
            config, _added_tokens(directory, config), eos_ids(directory), _chat_templates(directory, config)
        )

    def role_texts(self) -> dict[str, str]:
        """Returns role -> text of BOS, EOS, ...; older files hold ``AddedToken`` objects, not strings."""
        values = {role: self.config.get(role) for role in ROLES}
        texts = {
            role: value.get("content") if isinstance(value, dict) else value for role, value in values.items()
        }
        return {role: text for role, text in texts.items() if isinstance(text, str)}

    def edges(self, bos_id: int | None, eos_id: int | None, default_bos: bool) -> tuple[list[int], list[int]]:
        """Returns the ids before and after a text, from ``add_bos_token`` and ``add_eos_token``."""
        prefix = [bos_id] if bos_id is not None and self.config.get("add_bos_token", default_bos) else []
        suffix = [eos_id] if eos_id is not None and self.config.get("add_eos_token", False) else []
        return prefix, suffix


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[int, tuple[AddedToken, bool]]:
    added = {
        i: (AddedToken(text), False)
        for text, i in read_object(directory / "added_tokens.json").items()
        if isinstance(i, int)
    }
    try:
        for key, token in (config.get("added_tokens_decoder") or {}).items():
            flags = [bool(token.get(name)) for name in ("lstrip", "rstrip", "special")]
            added[int(key)] = (AddedToken(str(token["content"]), flags[0], flags[1]), flags[2])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'}: malformed added_tokens_decoder"
        ) from error
    return added


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns templates by name, found as transformers finds them.

    ``chat_template.jinja`` and ``additional_chat_templates/NAME.jinja`` override ``chat_template`` of
    tokenizer_config.json, which is a template, an object name -> template, or a list of objects with both; a
    processor's ``chat_template.json`` is read only if there is nothing else.
    """
    found = _template_files(directory)
    if "default" not in found:
        found = _named_templates(config.get("chat_template"), directory / "tokenizer_config.json") | found
    if not found:
        file = directory / "chat_template.json"
        found = _named_templates(read_object(file).get("chat_template"), file)
    return found


def _template_files(directory: Path) -> dict[str, str]:
    files = {file.name.removesuffix(".jinja"): file for file in (directory / ADDITIONAL).glob("*.jinja")}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    templates = {}
    for name, file in sorted(files.items()):
        try:
            templates[name] = file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not UTF-8 text") from error
    return templates


def _named_templates(value: Any, file: Path) -> dict[str, str]:
    """Reads templates from JSON: one, an object name -> template, or a list of objects with both."""
    if value is None:
        return {}
    templates = {"default": value} if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        templates = {item.get("name"): item.get("template") for item in value}
    if not isinstance(templates, dict) or not all(
        isinstance(name, str) and isinstance(source, str) for name, source in templates.items()
    ):
        raise CheckpointError(f"{file}: chat_template is not a template, nor templates with their names")
    return dict(templates)
