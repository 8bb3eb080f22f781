"""Latent compositions against their rivals: benches x methods x seeds, each run resumable and at most ten minutes."""
