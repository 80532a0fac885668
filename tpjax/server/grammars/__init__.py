"""Grammars that constrain responses: JSON schemas, tool calls, structured outputs."""
