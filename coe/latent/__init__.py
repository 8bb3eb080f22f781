"""Latent compositions: what can be read from an expert (`coe latent probe`), and training (`coe latent train`)."""
