"""Answers of models to text, reasoning and tool calls."""
