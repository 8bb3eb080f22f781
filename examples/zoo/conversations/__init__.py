"""Conversations over the zoo's families, each with the right expert of its last turn."""
