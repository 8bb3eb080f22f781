"""`contrastive`: expert embeddings trained with the losses of RouterDC (arXiv 2409.19886)."""
