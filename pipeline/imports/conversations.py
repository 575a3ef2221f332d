"""Rows that come with their conversation: rendered with a template, so that answers alone are taught."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from xtoken.pipeline.chats import (
    LEARNED,
    ChatModel,
    ChatTokens,
    Conversation,
    load_template,
    open_chat_model,
    open_ids_model,
    read_row,
    samples_of,
)
from xtoken.pipeline.chats.ids import IDS_LEARNED, end_of
from xtoken.pipeline.chats.turns import Turns
from xtoken.schemas.chat import CaptureChat
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import XtokenError


@dataclass(frozen=True)
class Chats:
    """How conversations of an import are read: by a template, or as token ids.

    Attributes:
        model: of the tokenizer that was named.
        info: what the manifest says.
    """

    model: ChatModel
    info: CaptureChat

    @classmethod
    def of_ids(cls, config: ImportConfig) -> "Chats":
        """Of token ids, of which nothing is rendered.

        Raises:
            XtokenError: the tokenizer cannot be loaded.
        """
        model = open_ids_model(config.tokenizer)
        learn: list[Any] = [*IDS_LEARNED]
        return cls(
            model,
            CaptureChat(template=None, date=None, learn=learn, stop_token=end_of(model), form="ids", long="skip"),
        )

    @classmethod
    def of_messages(cls, config: ImportConfig, turns: Turns) -> "Chats":
        """Of conversations.

        Raises:
            XtokenError: the tokenizer has no chat template, or cannot be loaded.
        """
        if not has_template(config.tokenizer):
            raise XtokenError(
                f"conversations need a chat template, and {config.tokenizer} has none; name the model's own folder or "
                "id with --tokenizer"
            )
        model = open_chat_model(config.tokenizer, date=datetime.fromisoformat(config.date))
        info = CaptureChat(
            template=model.template.sha256,
            date=config.date,
            learn=sorted(LEARNED),
            stop_token=model.stop_token,
            form="messages",
            turns=turns,
            long="skip",
        )
        return cls(model, info)

    def rendered(self, messages: Any) -> tuple[Conversation, ChatTokens]:
        """A conversation, and its tokens.

        Raises:
            Refused: it is none, or the template cannot write it.
        """
        conversation = samples_of(read_row({"messages": messages}, "messages"), self.info.turns)[0].conversation
        return conversation, self.model.encode(conversation)


def has_template(tokenizer: str) -> bool:
    """Whether a tokenizer comes with a chat template."""
    return bool(load_template(tokenizer, date=datetime(1970, 1, 1), optional=True).sources)
