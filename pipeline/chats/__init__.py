"""Conversations: rows of chat data in, spans of one model's tokens out, and the spans that two models share.

A row becomes a ``Conversation`` (``forms.py``), a conversation the samples that are to be learned (``turns.py``). A
model's template renders one (``template.py``), its contents and calls are found in the rendering (``slots.py``,
``calls.py``, ``spans.py``), and it becomes token ids with their ends on the byte axis (``encode.py``). What two models
make of one conversation is matched span by span (``pairing.py``). Nothing here knows of files, captures or targets.

Who captures does, once for a corpus and a teacher::

    form = form_of(columns)                                   # or forced; None: no chat data
    model = open_chat_model(teacher, date=plan_date)          # refused here if there is no template
    for row in rows:
        try:
            samples = samples_of(read_row(row, form), turns)
            for sample in samples:                            # id: the row's + sample.suffix
                conversation, tokens = fit(sample.conversation, model.encode, max_tokens, long)
        except Refused as refused:                            # counted by refused.reason, or the run stops
            ...

It stores ``tokens.text``, ``ids``, ``ends``, ``span_columns(tokens.spans)`` and ``to_json(conversation)``, and scores
the ids as they are; rows are those of tokens where ``tokens.learn``. BOS is there if the template wrote it. The plan
keeps ``model.template.sha256``, the date and ``model.stop_token``.

Who aligns renders what was stored for the student and walks each matched span by itself::

    tokens = student.encode(from_json(messages), learn)       # the same date and kinds
    pairing = pair(stored, tokens)                            # stored: text, and spans_of(columns)
    for match in pairing.matches:                             # chunks, if match.taught
        mine, theirs = shared_parts(match, tokens.ends, teacher_end)
    student_end = on_axis(pairing, tokens.ends)

``pairing.lost`` is what the teacher teaches and the student's text has not, ``pairing.alone`` what gets CE only.

Rows of token ids are no conversations: ``ids.py`` makes spans of them as they are, and of those a student's tokens.

Who measures a student reads held-out conversations by its ``StudentChats`` (``held_out.py``).
"""

from xtoken.pipeline.chats.answers import with_answer
from xtoken.pipeline.chats.conversation import Call, Conversation, Message, require_taught
from xtoken.pipeline.chats.encode import LEARNED, ChatModel, ChatTokens, Span, learned, open_chat_model
from xtoken.pipeline.chats.forms import FORMS, Form, columns_of, form_of, from_json, read_row, to_json
from xtoken.pipeline.chats.ids import IDS_LEARNED, TokenRow, end_of, open_ids_model, read_ids, retold, tokens_of
from xtoken.pipeline.chats.pairing import Match, Pairing, Part, on_axis, pair, shared_parts, span_columns, spans_of
from xtoken.pipeline.chats.refused import Refused
from xtoken.pipeline.chats.template import ChatTemplate, NoTemplate, load_template
from xtoken.pipeline.chats.turns import TOO_LONG, Turn, fit, kept_messages, samples_of

__all__ = [
    "FORMS",
    "IDS_LEARNED",
    "LEARNED",
    "TOO_LONG",
    "Call",
    "ChatModel",
    "ChatTemplate",
    "ChatTokens",
    "Conversation",
    "Form",
    "Match",
    "Message",
    "NoTemplate",
    "Pairing",
    "Part",
    "Refused",
    "Span",
    "TokenRow",
    "Turn",
    "columns_of",
    "end_of",
    "fit",
    "form_of",
    "from_json",
    "kept_messages",
    "learned",
    "load_template",
    "on_axis",
    "open_chat_model",
    "open_ids_model",
    "pair",
    "read_ids",
    "read_row",
    "require_taught",
    "retold",
    "samples_of",
    "shared_parts",
    "span_columns",
    "spans_of",
    "to_json",
    "tokens_of",
    "with_answer",
]
