"""What an id on the Hugging Face hub is: one rule, the hub's own."""

from __future__ import annotations

import re

# Up to 96 characters that begin and end with a letter, a digit or `_`.
_PART = r"(?=[^/]{1,96}(?:/|$))[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:{_PART}/)?{_PART}", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether `text` may be `name` or `owner/name` on the hub, as `huggingface_hub` decides it (`validate_repo_id`).

    Letters, digits, `-`, `_` and `.`, at most 96 characters a part; `-` and `.` neither begin nor end a part, `--` and `..`
    are nowhere, and the id does not end in `.git`.
    """
    return (
        _ID.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def is_repository(text: str) -> bool:
    """Whether `text` is an id with its owner: what can be pushed to, and what a checkpoint is fetched from."""
    return "/" in text and is_hub_id(text)
