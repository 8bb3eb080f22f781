"""`quality`: stacked, calibrated learners of the score of each expert."""
