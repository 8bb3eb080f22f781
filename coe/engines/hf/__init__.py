"""The engine `hf`: transformers and peft in this process; batches, LoRA adapters mixed on a shared base, streaming."""
