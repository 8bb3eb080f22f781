"""`skill`: the recruiting of Symbolic-MoE (arXiv 2503.05641), by a query's skills and the experts' profiles."""
