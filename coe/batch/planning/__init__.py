"""`coe plan`: calls, loads, moved bytes, cost and time of a batch, found by a rehearsal without its experts."""
