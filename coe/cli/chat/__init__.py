"""`coe chat`: a conversation in the terminal."""
