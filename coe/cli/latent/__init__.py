"""`coe latent`: compositions that exchange hidden states."""
