"""One line of an API trace as what it holds: answers with their rows, or one scored prompt."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xtoken.pipeline.chats import Refused
from xtoken.pipeline.chats.refused import shown
from xtoken.pipeline.imports.api_trace_line import MOST_CHOICES, MOST_TOKENS, Line
from xtoken.pipeline.imports.api_trace_rows import TraceRow, chat_rows, prompt_rows, sglang_rows

_MENDS = {"logit_bias": ({}, None), "presence_penalty": (0, None), "frequency_penalty": (0, None)}
# A grammar masks logits before any server, vLLM too, takes their log-softmax.
_GRAMMARS = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
BLAMELESS = frozenset(
    (
        *("a changed distribution", "a temperature other than 1", "a tool call has no rows", "an answer that goes on"),
        *("an error of the server", "another kind of trace", "hidden reasoning", "no bytes", "no log-probabilities"),
        *("a damaged line", "no messages"),
    )
)
"""Reasons for which samples are left out whatever the tokenizer."""
_REASONING = ("reasoning_content", "reasoning")
_ASK = "ask for logprobs and top_logprobs"


@dataclass(frozen=True)
class Answer:
    """A choice of a chat completion.

    Attributes:
        choice: its index.
        rows: of its tokens, in order.
        ids: of its tokens, where the server tells them apart from the rows.
        content: its text, as the server shows it; None where it shows none.
        reasoning: the text before it, where the server shows it apart.
        complete: the teacher ended it.
    """

    choice: int
    rows: list[TraceRow]
    ids: list[int] | None
    content: str | None
    reasoning: str | None
    complete: bool


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt whose tokens the server scored.

    Attributes:
        ids: of the whole prompt; without its first token where nobody says that one (``headless``).
        rows: of all tokens but the prompt's first.
        headless: the first token is not known.
    """

    ids: list[int]
    rows: list[TraceRow]
    headless: bool


@dataclass(frozen=True)
class Exchange:
    """A line: what was asked, if that is there, and what was answered."""

    request: Mapping[str, Any]
    response: Mapping[str, Any]
    line: Line

    @classmethod
    def of(cls, value: Mapping[str, Any], line: Line) -> "Exchange":
        """Of a line's object: {request, response}, OpenAI's batch output (response.body), or a response alone.

        Raises:
            XtokenError: it is none of these.
        """
        if "response" not in value:
            return cls({}, value, line)
        response = line.record(value["response"] or {"error": value.get("error")}, "response")
        if "body" in response:
            response = line.record(response["body"], "response.body")
        request = value.get("request")
        return cls({} if request is None else line.record(request, "request"), response, line)

    @property
    def messages(self) -> list[Any] | None:
        """What was asked, if it was a chat and the request is there."""
        found = self.request.get("messages")
        return None if found is None else self.line.array(found, "request.messages", MOST_TOKENS)

    @property
    def reports_raw(self) -> bool:
        """Whether the server is one that reports log-probabilities before temperature and penalties: vLLM, by its
        name for itself or by a field that no other server has."""
        mark = self.response.get("system_fingerprint")
        return "kv_transfer_params" in self.response or (isinstance(mark, str) and mark.startswith("vllm-"))

    @property
    def drawn_plainly(self) -> bool:
        """Whether the request says that tokens were drawn from the distributions that are reported."""
        asked = self.request
        default = None if self.reports_raw else 1  # vLLM's defaults are those of the model's generation_config.json
        whole = asked.get("top_p", default) == asked.get("temperature", default) == 1
        all_ranks = asked.get("top_k", None if self.reports_raw else 0) in (0, -1)
        mended = any(asked.get(name) for name in ("min_p", *_MENDS)) or asked.get("repetition_penalty", 1) != 1
        return bool(asked) and whole and all_ranks and not mended

    @property
    def scored(self) -> bool:
        """Whether the prompt was scored, and not (only) answered."""
        return "meta_info" in self.response or self._prompt_logprobs is not None

    @property
    def _choices(self) -> list[Any]:
        found = self.response.get("choices")
        return [] if found is None else self.line.array(found, "choices", MOST_CHOICES)

    @property
    def _prompt_logprobs(self) -> tuple[Mapping[str, Any], str] | None:
        """What holds them, and what that is called."""
        holders = [
            (self.response, ""),
            *((self.line.record(one, "choices[0]"), "choices[0].") for one in self._choices[:1]),
        ]
        return next(((one, name) for one, name in holders if one.get("prompt_logprobs") is not None), None)

    def prompt(self) -> ScoredPrompt:
        """The scored prompt.

        Raises:
            XtokenError: its rows are not of the form.
        """
        if "meta_info" in self.response:
            ids, rows = sglang_rows(self.line.record(self.response["meta_info"], "meta_info"), self.line)
            return ScoredPrompt(ids, rows, headless=False)
        assert self._prompt_logprobs is not None, "asked only where there are some"
        holder, name = self._prompt_logprobs
        found = holder.get("prompt_token_ids")
        known = None if found is None else self.line.token_ids(found, f"{name}prompt_token_ids")
        asked = self.request.get("prompt")
        if known is None and isinstance(asked, list) and asked and all(type(one) is int for one in asked):
            known = self.line.token_ids(asked, "request.prompt")
        tokens, rows = prompt_rows(holder["prompt_logprobs"], known, self.line, f"{name}prompt_logprobs")
        return ScoredPrompt(tokens if known is None else known, rows, headless=known is None)

    def answers(self) -> Iterator[tuple[int, "Answer | Refused"]]:
        """Index and answer of every choice, or why it cannot be used.

        Raises:
            XtokenError: a choice is not of the form.
        """
        if not self._choices and "error" in self.response:
            yield 0, Refused("an error of the server", shown(self.response["error"]), "ask again")
            return
        if not self._choices:
            self.line.bad("the response", list(self.response)[:8], "it must have choices, prompt_logprobs or meta_info")
        for at, value in enumerate(self._choices):
            choice = self.line.record(value, f"choices[{at}]")
            try:
                yield at, self._answer(choice, at)
            except Refused as refused:
                yield at, refused

    def _answer(self, choice: Mapping[str, Any], at: int) -> Answer:
        self._refuse_changed()
        message = self.line.record(choice.get("message") or {}, f"choices[{at}].message")
        if message.get("tool_calls") or message.get("function_call"):
            raise Refused("a tool call has no rows", f"choice {at} calls a tool", "remove it")
        name = f"choices[{at}].logprobs.content"
        rows = chat_rows(self._content(choice, at), self.line, name)
        reasoning = next((text for key in _REASONING if (text := self.line.text(message.get(key), key))), None)
        self._refuse_hidden(reasoning)
        found = choice.get("token_ids")
        ids = None if found is None else self.line.token_ids(found, f"choices[{at}].token_ids")
        if ids is not None and len(ids) != len(rows):
            self.line.bad(f"the length of {name}", len(rows), f"token_ids has {len(ids):,}")
        content = self.line.text(message.get("content"), f"choices[{at}].message.content")
        return Answer(at, rows, ids, content, reasoning, choice.get("finish_reason") == "stop")

    def _content(self, choice: Mapping[str, Any], at: int) -> Any:
        found = choice.get("logprobs")
        logprobs = {} if found is None else self.line.record(found, f"choices[{at}].logprobs")
        if logprobs.get("content"):
            return logprobs["content"]
        if logprobs.get("tokens"):
            what = "its log-probabilities are those of the older completions API, by text, not by bytes"
            raise Refused("no bytes", what, f"use the chat API and {_ASK}, or prompt_logprobs")
        raise Refused("no log-probabilities", f"choice {at} has no logprobs.content", _ASK)

    def _refuse_changed(self) -> None:
        """Raise Refused where the reported distribution may not be the teacher's own, or not behind these messages."""
        form = self.request.get("response_format")
        if form is not None and form != {"type": "text"}:
            raise Refused("a changed distribution", f"response_format is {shown(form)}", "ask without it")
        if given := [name for name in _GRAMMARS if self.request.get(name) is not None]:
            raise Refused("a changed distribution", f"the request has {given[0]}", f"ask without {given[0]}")
        if self.request.get("continue_final_message"):
            raise Refused("an answer that goes on", "it continues the last message", "ask for a message of its own")
        if self.reports_raw:
            return
        temperature = self.request.get("temperature")
        if temperature is not None and temperature != 1:
            raise Refused(
                "a temperature other than 1",
                f"temperature is {str(temperature)[:20]}, and nobody knows whether the server divides by it first",
                "ask at temperature 1",
            )
        for name, plain in _MENDS.items():
            if self.request.get(name) not in plain:
                raise Refused("a changed distribution", f"the request has {name}", f"ask without {name}")

    def _refuse_hidden(self, reasoning: str | None) -> None:
        """Raise Refused where rows depend on reasoning that has none itself."""
        usage = self.line.record(self.response.get("usage") or {}, "usage")
        details = self.line.record(usage.get("completion_tokens_details") or {}, "usage.completion_tokens_details")
        hidden = self.line.count(details.get("reasoning_tokens"), "reasoning_tokens")
        if not hidden:
            return
        written = self.line.count(usage.get("completion_tokens"), "usage.completion_tokens")
        shown = sum(len(one.get("logprobs", {}).get("content", ())) for one in self._choices if _has_rows(one))
        if reasoning is None or shown + len(self._choices) < written:
            raise Refused(
                "hidden reasoning",
                f"the rows depend on {hidden:,} tokens of reasoning that are not in the trace",
                "ask a model, or a server, that shows its reasoning, or without reasoning",
            )


def _has_rows(choice: Any) -> bool:
    logprobs = choice.get("logprobs") if isinstance(choice, Mapping) else None
    return isinstance(logprobs, Mapping) and isinstance(logprobs.get("content"), list)
