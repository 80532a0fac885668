"""Serves a model over HTTP with the OpenAI API.

The way of a request: ``middleware`` (API key, body size, request id) -> ``app`` (routes) -> ``protocol``
(validation) -> ``chat`` or ``completions`` (prompt, grammar, sampling parameters) -> ``service`` (queue to
the engine's thread) -> ``responses`` and ``event_stream`` (JSON or server-sent events).

- A request waits in ``engine/scheduler.py``; ``service.Service`` bounds how many may wait, and
  ``admission_budget`` how many bytes of text may be prepared at once.
- An endpoint is added in ``app.create_app``; its body is a model in ``protocol``. Parameters that are
  accepted for compatibility only, or refused by name, are in ``compatibility``.
- A tool-call format is added in ``parsing/tool_call_formats.py``: a row in the table at its end, and a parser
  in ``parsing/model_parsers.py`` if no existing one reads it. Reasoning marks: ``parsing/reasoning.py``.
- What constrains a response (``response_format``, tools, ``structured_outputs``) is in ``grammars``.
- What runs untrusted code or takes long (templates, grammars, long texts) runs in ``worker_pools``.
"""
