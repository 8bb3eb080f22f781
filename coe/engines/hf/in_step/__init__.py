"""Members that write or read one answer in step: combined scores, and Mixture of Thoughts."""
