"""Notes of rows: hidden states and key-value entries that they leave, and those of peers that they read."""
