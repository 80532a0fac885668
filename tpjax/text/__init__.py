"""Text to tokens and back: tokenizers, chat templates, detokenising.

``loading`` finds and loads a checkpoint's tokenizer (settings: ``tokenizer_files``; GGUF: ``gguf_vocab``).
``tokenizer`` is the same for every library; ``tokenizers_backend`` and ``sentencepiece_backend`` adapt the
two. ``detokenizer`` decodes one token at a time, ``stream`` ends a text at stop strings, ``chat_template``
renders conversations in the sandbox, ``token_bounds`` bounds the number of tokens of a text without
tokenising it.
"""
