"""LoRA adapters on a resident base: in slots, mixed by row in one batch, and mixed by token with gates."""
