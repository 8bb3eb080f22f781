"""`coe profile`: what experts are good at, measured or read from a table, kept in the registry."""
