"""The engine `command`: OpenAI-compatible servers that a command line starts on demand on this machine."""
