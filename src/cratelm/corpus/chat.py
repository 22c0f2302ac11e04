"""Chats: rows whose `messages` become a text by the chat template of a model, as `apply_chat_template` writes it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cratelm.errors import one_line

MESSAGES = "messages"
"""field of a row that holds a chat, a list of objects with `role` and `content`"""


class ChatError(Exception):
    """Why a chat cannot be written as a text."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a model, in Jinja, and the special tokens that it may name."""

    template: str
    special_tokens: tuple[tuple[str, str], ...]
    """such as ("bos_token", "<s>")"""

    @property
    def identity(self) -> str:
        """Return a sha256 over the template and the special tokens."""
        content = json.dumps([self.template, self.special_tokens])
        return hashlib.sha256(content.encode()).hexdigest()

    def text_of(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a chat, without a prompt for another answer.

        Raises `ChatError` for messages that the template refuses.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            tokens: dict[str, Any] = dict(self.special_tokens)
            conversation: Any = list(messages)
            texts, _ = render_jinja_template(
                conversations=[conversation], chat_template=self.template, **tokens
            )
        except Exception as error:  # of the template, which may raise anything
            raise ChatError(f"the chat template refuses it ({one_line(error, 120)})") from None
        return texts[0]


def why_no_chat(value: Any) -> str:
    """Return why a value is no chat; empty for a list of messages, each with a role and a content."""
    if not isinstance(value, list) or not value:
        return f"must be a list of messages, not {value!r:.40}"
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"has no role in message {number}"
        if "content" not in message:
            return f"has no content in message {number}"
    return ""
