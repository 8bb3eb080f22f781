"""The user's words of a user message: what agent frameworks add around them is left out.

- `<user_query>` and the like: only what these tags hold is read.
- Blocks that a harness writes (`<system-reminder>`, `<environment_details>`, `<tool_result>`, ...) are left out.
- In a conversation of several user turns, so are paragraphs that open as reminders do ("Reminder: ...", "Remember to
  ..."), and paragraphs of an earlier turn that are repeated beside other words.

Tags of other names, such as those of HTML, are the user's. One pass over a text: its time is linear, whatever the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

HARNESS_TAGS: Final = (
    *("system-reminder", "system_reminder", "system-message", "system_message", "system_warning", "system-warning"),
    *("system_notification", "system-notification", "system_information", "task-notification", "new-diagnostics"),
    *("environment_details", "environment_context", "additional_context", "additional_data", "workspace_info"),
    *("ide_opened_file", "ide_selection", "ide_diagnostics", "open_and_recently_viewed_files", "attached_files"),
    *("local-command-stdout", "local-command-stderr", "local-command-caveat", "command-name", "command-message"),
    *("bash-stdout", "bash-stderr", "tool_result", "tool_results", "tool_response", "tool_use_error", "tool_call"),
    *("function_results", "function_result", "user_info", "user_rules", "project_layout", "git_status", "rules"),
    *("user-prompt-submit-hook", "reminder", "reminder_instructions", "reminderInstructions", "editorContext"),
    *("persisted-output", "important_instructions", "INSTRUCTIONS", "toolReferences", "repoContext"),
)
"""Names of tags whose blocks are not the user's words."""
USER_TAGS: Final = ("user_query", "user_message", "user_request", "userRequest", "user_input")
"""Names of tags that hold the user's words where a harness writes the rest."""
REPEATED_CHARACTERS: Final = 40
"""Least length of a paragraph that counts as boilerplate because it is repeated."""
_OPENING: Final = re.compile(r"<({})(?:\s[^<>]{{0,500}})?>".format("|".join(sorted(HARNESS_TAGS, reverse=True))))
_USER: Final = re.compile("<({})>".format("|".join(USER_TAGS)))
_BLANK_LINE: Final = re.compile(r"\n[^\S\n]*\n")
_REMINDER: Final = re.compile(
    r"\s*[\[(*_#]{0,4}\s?(?:reminder|remember to|remember that you|remember:|important(?: note)?:"
    r"|system(?: note| message)?:|note to (?:the )?(?:assistant|model)|(?:automated|automatic) message"
    r"|erinnerung:|denke? daran|wichtig:|rappel\s?:|n'oublie[sz]? pas|important\s:|recordatorio:|recuerda que"
    r"|promemoria:|lembrete:|herinnering:|напоминание:|提醒：|リマインダー：)",
    re.IGNORECASE,
)


def without_tags(content: str) -> str:
    """The text without the blocks of a harness; unchanged where there is none."""
    if "<" not in content:
        return content
    inside = _blocks(content, _USER)
    if inside:
        return "\n".join(content[start:end].strip() for _, start, end, _ in inside)
    blocks = _blocks(content, _OPENING)
    if not blocks:
        return content
    kept, at = [], 0
    for before, _, _, after in blocks:
        kept.append(content[at:before])
        at = after
    return "".join([*kept, content[at:]]).strip()


def user_words(contents: Sequence[str]) -> list[str]:
    """The user's words of each of n user messages; "" where a message has none.

    Paragraphs are compared only where there are several messages with words.
    """
    texts = [without_tags(content) for content in contents]
    if sum(map(bool, texts)) < 2:
        return texts
    found = []
    seen: set[str] = set()
    for text in texts:
        paragraphs = [part.strip() for part in _BLANK_LINE.split(text)]
        own = [part for part in paragraphs if part and not _REMINDER.match(part)]
        fresh = [part for part in own if len(part) < REPEATED_CHARACTERS or part not in seen]
        seen.update(part for part in own if len(part) >= REPEATED_CHARACTERS)
        found.append(text if len(own) == len(paragraphs) == len(fresh) else "\n\n".join(fresh or own))
    return found


def _blocks(text: str, opening: re.Pattern[str]) -> list[tuple[int, int, int, int]]:
    """Where each closed block begins, its content begins, its content ends, and the block ends. Blocks do not nest."""
    found: list[tuple[int, int, int, int]] = []
    unclosed: set[str] = set()  # looked for once: a text of a million opening tags stays cheap
    at = 0
    while match := opening.search(text, at):
        name, at = match[1], match.end()
        if name in unclosed:
            continue
        closing = f"</{name}>"
        end = text.find(closing, at)
        if end < 0:
            unclosed.add(name)
            continue
        found.append((match.start(), match.end(), end, end + len(closing)))
        at = end + len(closing)
    return found
