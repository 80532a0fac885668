"""Model families: one module per lineage, from a published configuration to a ``ModelConfig``.

To add a family:

1. Choose the module of its lineage (``llama.py``, ``gemma.py``, ...) or start one. Write a function that
   takes the ``Fields`` of a ``config.json`` and returns a ``ModelConfig``. If the family has Llama's field
   names, ``llama.llama_like`` reads everything that the function does not set itself.
2. If its tensors have other names or another layout than Llama's, describe the differences as a ``WeightMap``
   (``tensor_names.py``).
3. If it exists as GGUF, write the same two for the metadata and tensor names: a ``GGUFArchitecture``.
4. Add a ``Family`` (``family.py``) to the module's ``FAMILIES``, and a new module to ``registry.py``.
5. Record a golden with ``scripts/make_goldens.py``: ``tests/test_parity.py`` then compares logits and tokens
   with transformers at every tp, ``tests/test_config_fields.py`` the fields read.

What families share: ``config_reader.py`` (fields of ``config.json``), ``gguf_metadata.py``,
``rope_variants.py`` (RoPE scaling), ``quantization.py`` (quantised checkpoints) and ``unread.py`` (fields
that no family asked for).
"""
