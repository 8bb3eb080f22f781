"""What experts exist: specs, a versioned store, and where their files come from."""
