"""Parsers of responses: text, reasoning and tool calls, told apart as the response is generated."""
