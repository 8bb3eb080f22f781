"""`coe latent`."""
