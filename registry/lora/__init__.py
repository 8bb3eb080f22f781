"""LoRA adapters: whether their files fit their base, and what every tensor of them changes. No torch."""
