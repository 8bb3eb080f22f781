"""The engine `remote`: experts behind OpenAI-compatible endpoints."""
