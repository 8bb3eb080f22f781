"""What experts exchange besides text: hidden states and key-value entries, and how a model reads them."""
