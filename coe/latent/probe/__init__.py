"""`coe latent probe`: where a label can be read from an expert's hidden states."""
