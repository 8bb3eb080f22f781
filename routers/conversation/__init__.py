"""What a router reads of a conversation: the user's words of its turns, and how much each turn weighs."""

from __future__ import annotations

from routers.conversation.reading import Read, Reading, estimate, mix, read
from routers.conversation.turns import MOST_TURNS, Reads, Weighed, main_text

__all__ = ["MOST_TURNS", "Read", "Reading", "Reads", "Weighed", "estimate", "main_text", "mix", "read"]
