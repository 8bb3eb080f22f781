"""`category`: the router of Composition of Experts (arXiv 2412.01868)."""
