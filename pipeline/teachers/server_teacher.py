"""A teacher behind a server: ``vllm serve``, by its prompt log-probabilities.

The server tells its model's name, its version and its context. It does not tell weights, dtype or the head's width:
they are recorded as unknown.

Shapes: T tokens of one prompt, R = T - 1 rows, K entries asked for.
"""

import json
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.teachers.base import (
    Batch,
    EngineLost,
    Question,
    TeacherRows,
    check_prompt,
    entries_asked,
    shows_bos,
)
from xtoken.pipeline.teachers.model_source import NO_LIMIT
from xtoken.pipeline.teachers.server_client import Client, origin
from xtoken.pipeline.teachers.vllm_replies import Entries
from xtoken.pipeline.teachers.vllm_rows import RULES, rows_from
from xtoken.pipeline.tokens import CANARY, TokenTable, load_tokenizer
from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.heads import stated_rows
from xtoken.schemas.manifest import TeacherInfo

UNKNOWN = "unknown"
# vLLM says so of probability 0: JSON has no infinity.
_NOTHING = -9999.0
_ENTRY_BYTES = 400  # of JSON, at most; some 60 as a rule
_REPLY_BYTES = 1 << 20  # beside its entries
_KEEP_ALIVE_SECONDS = 1.0
_IMPATIENCE_SECONDS = 10.0  # with a server that is asked whether it is there at all
# What follows looks like control tokens, which a server reads as such, and a capture as text.
_TEXT = CANARY.partition("<s>")[0]


class Entry(msgspec.Struct):
    """One token of a row; what else a server says of it is not read."""

    logprob: float
    rank: int


class _Scored(msgspec.Struct):
    prompt_logprobs: list[dict[int, Entry] | None] | None = None


class _Written(msgspec.Struct):
    token_ids: list[int] | None = None


class _Scores(msgspec.Struct):
    choices: list[_Scored]


class _Answers(msgspec.Struct):
    choices: list[_Written]


# A quarter of the CPU time of json and a loop, and types are checked on the way (benchmarks/server.py).
_SCORES, _ANSWERS = msgspec.json.Decoder(_Scores), msgspec.json.Decoder(_Answers)


class ServerTeacher:
    """One server; requests go out from threads, ``requests`` at a time."""

    def __init__(self, client: Client, info: TeacherInfo, model: str, k: int, requests: int) -> None:
        """See ``open_teacher``; ``model`` is the name it is served by."""
        self.info, self.settings = info, {"served_as": model, "server": info.engine_version}
        self._client, self._model, self._k, self._requests = client, model, k, requests
        self._pool = ThreadPoolExecutor(requests, thread_name_prefix="server")

    def rows(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows]:
        """Score sequences (see ``xtoken.pipeline.teachers.base.Teacher``); there are no figures of whole rows.

        Raises:
            XtokenError: a token the tokenizer does not have, or a reply that is not what was asked.
            EngineLost: the server is gone.
        """
        found = dict(self.stream(iter([list(enumerate(batch))])))
        return [found[at] for at in range(len(batch))]

    def second_path(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows] | None:  # noqa: ARG002
        """None: a server has one way."""
        return None

    def stream(self, batches: Iterator[Batch | None]) -> Iterator[tuple[Hashable, TeacherRows]]:
        """Score batch after batch, as many at a time as the server was said to take.

        Raises:
            XtokenError: as ``rows``.
        """
        waiting: dict[Future[TeacherRows], Hashable] = {}
        more = True
        try:
            while more or waiting:
                while more and len(waiting) < 2 * self._requests:
                    try:
                        batch = next(batches)
                    except StopIteration:
                        more = False
                        break
                    if batch is None:
                        assert waiting, "nothing is ready and nothing is unanswered"
                        break
                    for key, ids in batch:
                        check_prompt(ids, self.info)
                        waiting[self._pool.submit(self._score, ids)] = key
                done, _ = wait(waiting, timeout=_KEEP_ALIVE_SECONDS, return_when=FIRST_COMPLETED)
                for one in done:
                    yield waiting.pop(one), one.result()
        except BaseException:
            self._client.close()  # or its threads would go on asking, and the process wait for them
            raise
        finally:
            for one in waiting:
                one.cancel()

    def generate(self, questions: Sequence[Question]) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Answer prompts (see ``xtoken.pipeline.teachers.base.Teacher``).

        Raises:
            XtokenError: a reply without an answer, or with a token that is none.
        """
        for question in questions:
            check_prompt(question.ids, self.info)
        waiting = {self._pool.submit(self._answer, question): number for number, question in enumerate(questions)}
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for one in done:
                    yield waiting.pop(one), one.result()
        finally:
            for one in waiting:
                one.cancel()

    def _score(self, ids: NDArray[np.int32]) -> TeacherRows:
        body = self._body(ids, 1) | {"prompt_logprobs": self._k}
        most = _REPLY_BYTES + len(ids) * (self._k + 2) * _ENTRY_BYTES
        choice = self._choice(_SCORES, self._client.ask("/v1/completions", body, most=most))
        entries, wrong = entries_of(choice.prompt_logprobs, ids, self._k)
        if entries is None:
            raise self._bad_reply(wrong)
        rows, broken = rows_from(ids, entries, self.info.vocab_rows)
        if broken:
            raise self._bad_reply(RULES[broken])
        return rows

    def _answer(self, question: Question) -> NDArray[np.int32]:
        body = self._body(question.ids, question.tokens) | {
            "temperature": question.temperature,
            "top_p": question.top_p,
            "seed": question.seed,
            "stop_token_ids": list(question.stops),
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        most = _REPLY_BYTES + 100 * question.tokens
        ids = self._choice(_ANSWERS, self._client.ask("/v1/completions", body, most=most)).token_ids
        if ids is None or not 1 <= len(ids) <= question.tokens:
            raise self._bad_reply(f"an answer of {len(ids or [])} tokens")
        if not all(0 <= one < self.info.vocab_rows for one in ids):
            raise self._bad_reply("an answer with tokens that there are not")
        return np.array(ids, np.int32)

    def _body(self, ids: NDArray[np.int32], tokens: int) -> dict[str, Any]:
        prompt = {"model": self._model, "prompt": ids.tolist(), "add_special_tokens": False}
        return prompt | {"max_tokens": tokens, "temperature": 0}

    def _choice(self, decoder: Any, data: bytes) -> Any:
        try:
            choices = decoder.decode(data).choices
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise self._bad_reply(f"{type(error).__name__}: {str(error)[:200]}") from error
        if len(choices) != 1:
            raise self._bad_reply(f"{len(choices)} choices")
        return choices[0]

    def _bad_reply(self, what: str) -> XtokenError:
        return XtokenError(
            f"{self._client.server} did not answer what was asked ({what}); 'vllm serve' from 0.29 on does, with "
            f"--max-logprobs {self._k} or more"
        )


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def entries_of(
    found: list[dict[int, Entry] | None] | None, ids: NDArray[np.int32], k: int
) -> tuple[Entries | None, str]:
    """A reply's ``prompt_logprobs`` as arrays, or what is wrong with them.

    They are null, then for each token a map of ids: ranks 1 to k, and the label where it is none of these.

    Args:
        found: what was parsed.
        ids: [T], the prompt.
        k: entries asked for.
    """
    rows = len(ids) - 1
    if found is None or len(found) != rows + 1 or found[0] is not None or not all(found[1:]):
        return None, f"prompt_logprobs are not null and {rows} rows"
    maps = [entries for entries in found[1:] if entries]
    count_R = np.array([len(entries) for entries in maps])
    if not ((count_R == k) | (count_R == k + 1)).all():
        other = int(count_R[(count_R != k) & (count_R != k + 1)][0])
        return None, f"{other} entries of a row, and {k} were asked for"
    all_entries = [entry for entries in maps for entry in entries.values()]
    try:
        token_E = np.array([token for entries in maps for token in entries], np.int32)
        rank_E = np.array([entry.rank for entry in all_entries], np.int32)
    except OverflowError:
        return None, "an id or a rank is no 32-bit number"
    logprob_E = np.array([entry.logprob for entry in all_entries], np.float32)
    logprob_E[logprob_E == _NOTHING] = -np.inf
    row_E = np.repeat(np.arange(rows), count_R)
    is_label_E, kept_E = token_E == ids[1:][row_E], (rank_E >= 1) & (rank_E <= k)
    if not (is_label_E | kept_E).all():
        return None, f"rank {int(rank_E[~(is_label_E | kept_E)][0])} of a token that is not in the text"
    times_RK = np.bincount(row_E[kept_E] * k + rank_E[kept_E] - 1, minlength=rows * k)
    if (times_RK != 1).any() or is_label_E.sum() != rows:
        return None, "a rank or the label is missing in a row"
    token, logprob = np.empty((rows, k + 1), np.int32), np.empty((rows, k + 1), np.float32)
    token[row_E[kept_E], rank_E[kept_E]], logprob[row_E[kept_E], rank_E[kept_E]] = token_E[kept_E], logprob_E[kept_E]
    token[:, 0], logprob[row_E[is_label_E], 0] = ids[1:], logprob_E[is_label_E]
    label_rank = np.empty(rows, np.int32)
    label_rank[row_E[is_label_E]] = rank_E[is_label_E]
    return (token, logprob, label_rank), ""


def check_servers(config: TeacherGroup) -> None:
    """See ``xtoken.pipeline.teachers.check_reach``."""
    for server in config.server:
        client = Client(origin(server, insecure=config.insecure), patience=_IMPATIENCE_SECONDS)
        try:
            _served(client, config)
        except EngineLost as error:
            raise XtokenError(f"{error}; start 'vllm serve' there, or give --server its address") from error
        finally:
            client.close()


def open_teacher(config: TeacherGroup, codec: CodecGroup, table: TokenTable) -> ServerTeacher:
    """Ask the server what it serves (see ``xtoken.pipeline.teachers.open_teacher``).

    Raises:
        XtokenError: the server serves another model or tokenizer, or the request does not fit it.
        EngineLost: it is out of reach.
    """
    client = Client(origin(config.server[0], insecure=config.insecure))
    try:
        served = _served(client, config)
        context = served.get("max_model_len")
        context = context if type(context) is int and context > 0 else NO_LIMIT
        room = context - int(shows_bos(config, table.info)) - 1
        if codec.max_tokens > room:
            raise XtokenError(
                f"--max-tokens {codec.max_tokens} does not fit {client.server}, of --max-model-len {context}; use "
                f"--max-tokens {room} or less"
            )
        canary = _tokens_of_both(client, config, served["id"])
        info = TeacherInfo(
            model=config.teacher,
            backend="server",
            vocab_rows=stated_rows(config.teacher, config.revision) or table.size,
            context=context,
            dtype=UNKNOWN,
            head_dtype=UNKNOWN,
            device=UNKNOWN,
            capture_path="server",
            engine_version=_version(client),
        )
        k = entries_asked(codec, info.vocab_rows)
        teacher = ServerTeacher(client, info, served["id"], k, config.server_requests)
        teacher.rows([canary])  # so that a server that gives fewer entries is refused now
    except BaseException:
        client.close()
        raise
    return teacher


def _served(client: Client, config: TeacherGroup) -> dict[str, Any]:
    """What /v1/models says of the teacher."""
    reply = _parsed(client.ask("/v1/models"))
    models = reply.get("data") if isinstance(reply, dict) else None
    known = [one for one in models or [] if isinstance(one, dict) and isinstance(one.get("id"), str)]
    wanted = config.served_as or config.teacher
    for one in known:
        if wanted == one["id"] or (config.served_as is None and wanted == one.get("root")):
            return one
    names = ", ".join(repr(one["id"][:100]) for one in known[:10]) or "nothing"
    raise XtokenError(
        f"{client.server} serves {names}, not {wanted!r}; say --served-as and the name of the teacher there"
    )


def _version(client: Client) -> str:
    reply = _parsed(client.ask("/version"))
    found = reply.get("version") if isinstance(reply, dict) else None
    return f"vllm {str(found)[:40]}" if found else UNKNOWN


def _tokens_of_both(client: Client, config: TeacherGroup, model: str) -> NDArray[np.int32]:
    """Tokens of a text that the server reads as the teacher's tokenizer here does.

    Raises:
        XtokenError: it reads other tokens.
    """
    tokenizer = load_tokenizer(config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code)
    ours = list(tokenizer.token_ids([_TEXT])[0])
    reply = _parsed(client.ask("/tokenize", {"model": model, "prompt": _TEXT, "add_special_tokens": False}))
    theirs = reply.get("tokens") if isinstance(reply, dict) else None
    if theirs != ours:
        pairs = zip(theirs if isinstance(theirs, list) else [], ours, strict=False)
        at = next((at for at, (one, two) in enumerate(pairs) if one != two), 0)
        raise XtokenError(
            f"{client.server} reads a text as other tokens than the tokenizer of {config.teacher!r} (token {at} is the "
            "first that differs); give --teacher the model that it serves"
        )
    return np.array(ours, np.int32)
