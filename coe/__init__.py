"""Serve and route many expert LLMs and LoRA adapters as one system."""

__version__ = "0.1.0"
