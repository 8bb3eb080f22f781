"""The vLLM engine: continuous batching, prefix caching and LoRA adapters, in one child process for each model."""
