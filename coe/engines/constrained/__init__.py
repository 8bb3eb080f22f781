"""Constrained decoding: answers of hf experts that satisfy a JSON schema or have the form of a tool call."""
