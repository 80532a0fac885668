"""Loads the tokenizer of a checkpoint: ``tokenizer.json``, ``tokenizer.model`` or a GGUF file."""

from __future__ import annotations

from array import array
from base64 import b64encode
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpjax.checkpoints.orbax import VOCABULARY
from tpjax.errors import CheckpointError
from tpjax.text import gguf_vocab
from tpjax.text.sentencepiece_backend import AddedToken, SentencePieceBackend, load_processor
from tpjax.text.tokenizer import Backend, Tokenizer
from tpjax.text.tokenizer_files import ROLES, TokenizerFiles
from tpjax.text.tokenizers_backend import TokenizersBackend

if TYPE_CHECKING:
    import tokenizers


def load_tokenizer(path: Path) -> Tokenizer | None:
    """Loads the tokenizer of a checkpoint directory or a ``.gguf`` file.

    A directory holds ``tokenizer.json`` (preferred) or ``tokenizer.model``, with these optional files beside
    it: ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json``,
    ``generation_config.json``, ``config.json``, ``chat_template.jinja`` and ``additional_chat_templates/``;
    or ``tokenizer.gguf``.

    Returns:
        The tokenizer, or None if the directory has none.

    Raises:
        CheckpointError: the path does not exist, or a file in it is broken; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        for name, load in (
            ("tokenizer.json", _load_tokenizer_json),
            ("tokenizer.model", _load_tokenizer_model),
        ):
            if (path / name).is_file():
                return load(path / name, TokenizerFiles.read(path))
        if not (path / VOCABULARY).is_file():
            return None
        path = path / VOCABULARY
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: a tokenizer is read from a directory or a .gguf file")
    from tpjax.checkpoints.gguf import GGUFFile

    metadata = GGUFFile(path).metadata
    try:
        return tokenizer_from_gguf(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer a GGUF file describes.

    Follows llama.cpp: special and user-defined tokens are found in the text first; a ``llama`` vocabulary
    with ``add_space_prefix`` puts a space before each stretch of text between them; ``eos_ids`` holds EOS,
    EOT, EOM and the well-known texts in ``gguf_vocab.END_OF_GENERATION``. The NFC normalisation of a model's
    own tokenizer (Qwen's), which llama.cpp leaves out, is applied.

    Args:
        metadata: the file's key-value pairs, decoded to Python values and lists.

    Raises:
        CheckpointError: a key is missing, malformed, or names something unsupported.
    """
    vocab = gguf_vocab.read_vocab(metadata)
    if vocab.model == "gpt2":
        backend: Backend = TokenizersBackend(gguf_vocab.byte_level_bpe(vocab))
    else:
        added = {
            i: AddedToken(text, rstrip=i in vocab.strip_right) for text, i in vocab.special_tokens.items()
        }
        backend = SentencePieceBackend(gguf_vocab.sentencepiece_model(vocab), added, prefix_every_part=True)
    by_role = zip(ROLES, (vocab.bos_id, vocab.eos_id, vocab.unk_id, vocab.pad_id), strict=True)
    special = (gguf_vocab.CONTROL, gguf_vocab.UNKNOWN)
    return Tokenizer(
        backend,
        prefix_ids=vocab.prefix_ids,
        suffix_ids=vocab.suffix_ids,
        roles={role: (vocab.tokens[i], i) for role, i in by_role if i is not None},
        eos_ids=vocab.eos_ids,
        special_ids=(i for i, kind in enumerate(vocab.types) if kind in special),
        chat_templates=vocab.chat_templates,
    )


def encode_job(path: str, text: str, add_special_tokens: bool, limit: int | None) -> dict[str, Any]:
    """Encodes a text with the tokenizer of a checkpoint; runs in a worker process.

    Returns:
        ``count``, and ``ids`` (base64 of C unsigned integers) if the count is at most ``limit``.
    """
    tokenizer = _loaded(path)
    assert tokenizer is not None
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if limit is not None and len(ids) > limit:
        return {"count": len(ids)}
    return {"count": len(ids), "ids": b64encode(array("I", ids)).decode()}


@lru_cache(1)
def _loaded(path: str) -> Tokenizer | None:
    return load_tokenizer(Path(path))


def _load_tokenizer_json(path: Path, beside: TokenizerFiles) -> Tokenizer:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: {error}") from error
    known = library.get_added_tokens_decoder()
    for i, (token, special) in sorted(beside.added.items()):
        # The library numbers a new token itself: add it only where it will get the id it is listed under.
        lands_at = library.token_to_id(token.text)
        if i not in known and i == (library.get_vocab_size() if lands_at is None else lands_at):
            flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": False, "special": special}
            library.add_tokens([AddedToken(token.text, **flags)])
    texts = beside.role_texts()
    found = ((role, text, library.token_to_id(text)) for role, text in texts.items())
    roles = {role: (text, token_id) for role, text, token_id in found if token_id is not None}
    # EOS and friends are matched in a text even where tokenizer.json does not call them special.
    listed = {token.content for token in library.get_added_tokens_decoder().values()}
    library.add_special_tokens(
        [AddedToken(t, normalized=False) for t, _ in roles.values() if t not in listed]
    )
    try:
        backend = TokenizersBackend(library)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    prefix, suffix = _post_processor_edges(library)
    if not prefix + suffix and str(beside.config.get("tokenizer_class", "")).startswith("Llama"):
        # transformers 4's Llama class added BOS by flag, so files such as DeepSeek-V3's leave it out.
        ids = {role: i for role, (_, i) in roles.items()}
        prefix, suffix = beside.edges(ids.get("bos_token"), ids.get("eos_token"), default_bos=False)
    return Tokenizer(
        backend,
        prefix_ids=prefix,
        suffix_ids=suffix,
        roles=roles,
        eos_ids=beside.eos_ids,
        special_ids=(i for i, token in library.get_added_tokens_decoder().items() if token.special),
        chat_templates=beside.chat_templates,
    )


def _post_processor_edges(library: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the fixed ids that a post-processor puts before and after a text, read off an example."""
    for probe in ("a", "0", ".", " "):  # a small vocabulary may lack any of them
        bare, full = library.encode(probe, add_special_tokens=False).ids, library.encode(probe).ids
        for start in range(len(full) - len(bare) + 1 if bare else 0):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    return [], []


def _load_tokenizer_model(path: Path, beside: TokenizerFiles) -> Tokenizer:
    """Loads a SentencePiece file; as in transformers 5, BOS is on and ``legacy`` off by default."""
    added = {i: token for i, (token, _) in beside.added.items()}
    legacy = bool(beside.config.get("legacy", False))
    try:
        model = path.read_bytes()
        processor = load_processor(model)
        roles = _sentencepiece_roles(processor, beside.role_texts(), added)
        specials = {i: AddedToken(text) for text, i in roles.values()}
        backend = SentencePieceBackend(model, specials | added, prefix_every_part=legacy)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    ids = {role: i for role, (_, i) in roles.items()}
    prefix, suffix = beside.edges(ids.get("bos_token"), ids.get("eos_token"), default_bos=True)
    control = (
        i for i in range(processor.get_piece_size()) if processor.is_control(i) or processor.is_unknown(i)
    )
    return Tokenizer(
        backend,
        prefix_ids=prefix,
        suffix_ids=suffix,
        roles=roles,
        eos_ids=beside.eos_ids,
        special_ids=[*control, *(i for i, (_, special) in beside.added.items() if special)],
        chat_templates=beside.chat_templates,
    )


def _sentencepiece_roles(
    processor: Any, texts: Mapping[str, str], added: Mapping[int, AddedToken]
) -> dict[str, tuple[str, int]]:
    """Returns role -> (text, id) of BOS, EOS, ...: from the JSON files, else from the model itself."""
    by_text = {token.text: i for i, token in added.items()}
    own = zip(
        ROLES, (processor.bos_id(), processor.eos_id(), processor.unk_id(), processor.pad_id()), strict=True
    )
    roles = {role: (processor.id_to_piece(i), i) for role, i in own if i >= 0}
    for role, text in texts.items():
        i = by_text.get(text, processor.piece_to_id(text))
        if text in by_text or processor.id_to_piece(i) == text:  # else piece_to_id said <unk>
            roles[role] = (text, i)
    return roles
