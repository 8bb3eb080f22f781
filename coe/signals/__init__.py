"""Signals: features of a query that a router asks for, such as a model's hidden states or skill keywords."""
