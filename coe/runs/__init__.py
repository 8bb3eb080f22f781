"""Where long commands write, and how an interrupted run is resumed: the same way for `coe eval` and `coe batch`."""
