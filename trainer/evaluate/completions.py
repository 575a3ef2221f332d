"""What a student writes after the beginning of held-out samples, or answers: the first thing that people look at.

Shapes: B samples of one prompt length, L tokens of the prompt.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.data.samples import context_token
from xtoken.trainer.evaluate.samples import EvalSample
from xtoken.trainer.evaluate.spelling import Spelling
from xtoken.trainer.objective import Student
from xtoken.trainer.student.flat import rows_again

PROMPT_TOKENS, NEW_TOKENS, ANSWER_TOKENS = 32, 48, 128
_BATCH = 8
_ENDS = ("eos", "eot")


@dataclass(frozen=True)
class _Prompt:
    """What a student goes on from.

    Attributes:
        id: of the sample.
        ids: tokens, with what stands before them.
        shown: they and what truly follows, as text.
        ends: the tokens that end what is written.
        count: of tokens to be written, at most.
    """

    id: str
    ids: list[int]
    shown: tuple[str, str]
    ends: frozenset[int]
    count: int


def complete(
    student: Student, tokenizer: TokenizerInfo, spelling: Spelling, samples: Sequence[EvalSample], count: int
) -> list[dict[str, str]]:
    """Greedy continuations of ``count`` samples taken evenly from all that have two tokens or more.

    A prompt is a sample's first 32 tokens, of a shorter one the first half, and ends with a whole character if it
    can. The student goes on for at most 48 tokens, within its context, and stops at the end of text. Of a conversation
    the prompt is its question, left out where the context has no room for it, and the answer has at most 128 tokens.
    The same model writes the same again.

    Returns:
        ``id``, ``prompt``, ``completion`` and ``text`` (how the sample itself goes on, as many tokens at most; the
        answer of a conversation) of each, in the order of the samples. Specials that were written are shown by their
        role.
    """
    found = [_prompt(student, tokenizer, spelling, sample) for sample in samples]
    possible = [prompt for prompt in found if prompt is not None]
    chosen = np.linspace(0, len(possible) - 1, min(count, len(possible)), dtype=int).tolist()
    prompts = [possible[i] for i in chosen]
    written: dict[int, list[int]] = {}
    training = student.model.training
    student.model.eval()
    with rows_again(student.model):
        for batch in _batches(prompts):
            written |= zip(batch, _continued(student, [prompts[i] for i in batch]), strict=True)
    student.model.train(training)
    return [
        {
            "id": prompt.id,
            "prompt": prompt.shown[0],
            "completion": spelling.text(written[i]),
            "text": prompt.shown[1],
        }
        for i, prompt in enumerate(prompts)
    ]


def _prompt(student: Student, tokenizer: TokenizerInfo, spelling: Spelling, sample: EvalSample) -> _Prompt | None:
    """None where a sample is too short to go on from, or its question too long."""
    ends = {i for i in spelling.ids(*_ENDS) if i < student.vocabulary}
    most = getattr(student.model.config, "max_position_embeddings", None)
    question = sample.question
    if question is not None:
        ends |= {question.stop} if question.stop is not None else set()
        ids, shown, count = question.ids.tolist(), (question.text, question.answer), ANSWER_TOKENS
        if most is not None and len(ids) >= most:
            return None
    elif sample.taught is None and len(sample.ids) > 1:
        tokens, length = sample.ids.tolist(), _prompt_length(sample, spelling)
        context, count = context_token(tokenizer), NEW_TOKENS
        ids = ([] if context is None else [context]) + tokens[:length]
        shown = spelling.text(tokens[:length]), spelling.text(tokens[length : length + NEW_TOKENS])
    else:
        return None
    return _Prompt(sample.id, ids, shown, frozenset(ends), count if most is None else min(count, most - len(ids)))


def _prompt_length(sample: EvalSample, spelling: Spelling) -> int:
    longest = min(PROMPT_TOKENS, len(sample.ids) // 2)
    pieces = [spelling.bytes_V[i] for i in sample.ids[:longest].tolist()]
    # a character is at most four tokens of a byte each
    for length in range(longest, max(0, longest - 4), -1):
        if _whole(b"".join(pieces[:length])):
            return length
    return longest


def _whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _batches(prompts: Sequence[_Prompt]) -> Iterator[list[int]]:
    """Indices of prompts of one length, a few at a time: no padding, so no sample sees another."""
    for length in sorted({len(prompt.ids) for prompt in prompts}):
        same = [i for i, prompt in enumerate(prompts) if len(prompt.ids) == length]
        yield from (same[start : start + _BATCH] for start in range(0, len(same), _BATCH))


def _continued(student: Student, prompts: Sequence[_Prompt]) -> list[list[int]]:
    """What follows each prompt, up to and with the token that ends the text."""
    ids_BL = torch.tensor([prompt.ids for prompt in prompts])
    ends = torch.tensor(sorted(frozenset.intersection(*(prompt.ends for prompt in prompts))), dtype=torch.long)
    written = _greedy(student, ids_BL, ends, max(prompt.count for prompt in prompts))
    return [_until_end(row[: prompt.count], prompt.ends) for row, prompt in zip(written.tolist(), prompts, strict=True)]


def _until_end(ids: list[int], ends: Collection[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _greedy(student: Student, ids_BL: Tensor, ends: Tensor, count: int) -> Tensor:
    """[B, at most ``count``] most probable tokens, one after the other, until every row has ended.

    Not ``model.generate``: that mixes in what a model's generation_config asks for, and may emit the head's padding.
    """
    written: list[Tensor] = []
    inputs, cache = ids_BL.to(student.device), None
    ended_B = torch.zeros(len(ids_BL), dtype=torch.bool)
    while len(written) < count and not ended_B.all():
        output = _forward(student, inputs, cache)
        token_B = output.logits[:, -1, : student.vocabulary].argmax(dim=-1, keepdim=True)
        written.append(token_B.cpu())
        ended_B |= torch.isin(written[-1][:, 0], ends)
        cache = getattr(output, "past_key_values", None)
        # a model that gives no cache of keys and values reads everything again
        inputs = torch.cat([inputs, token_B], dim=1) if cache is None else token_B
    return torch.cat(written, dim=1) if written else torch.zeros(len(ids_BL), 0, dtype=torch.long)


@torch.no_grad()
def _forward(student: Student, inputs: Tensor, cache: object) -> Any:
    """The model's output for ``inputs`` behind what ``cache`` holds."""
    with student.precision():
        return student.model(input_ids=inputs, past_key_values=cache, use_cache=True)
