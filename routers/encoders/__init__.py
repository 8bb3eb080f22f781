"""Encoders turn text into vectors; `build` lists them by name."""
