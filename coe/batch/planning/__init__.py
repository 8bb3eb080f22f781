"""`coe plan`: what a batch will call, load, move and cost, found by rehearsing it."""
