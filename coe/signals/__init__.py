"""Signals: features of a query that a router requires and an expert provides, such as hidden states or keywords."""
