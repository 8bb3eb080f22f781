"""Latent compositions: peers leave notes, which the primary reads while it answers."""
