"""The student of a run, from its folder or config to a model ready to train, and what probes find out about it.

Under FSDP the first rank alone reads its weights and probes it; the others hold an outline of it until it is sharded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.ranks import Ranks
from xtoken.trainer.run import Run
from xtoken.trainer.student.adapters import add_adapters
from xtoken.trainer.student.flat import set_flat
from xtoken.trainer.student.head import Head, attend_flat, find_head, leaves_some_out, pick_packing
from xtoken.trainer.student.memory import room_notes
from xtoken.trainer.student.model import (
    check_context,
    check_width,
    end_answers_with,
    head_width,
    open_student,
    pick_autocast,
    prepare,
    rehearse_save,
)
from xtoken.trainer.student.outline import outline, refuse_unlike, slots
from xtoken.trainer.student.writable import mend_settings


@dataclass
class Opened:
    """A student on this rank.

    Attributes:
        vocabulary: columns of its head that count.
        head: None on a rank that has an outline, until the first rank says what it found.
        packing, flat, some_left_out: see ``pick_packing``, ``attend_flat``, ``leaves_some_out``.
        notes: what the user should know of it, a sentence each.
        tokenizer_files: see ``rehearse_save``; None on ranks that do not write.
    """

    model: Any
    vocabulary: int
    head: Head | None
    packing: bool
    flat: bool
    some_left_out: bool
    notes: list[str]
    tokenizer_files: Path | None


def open_model(
    config: TrainConfig, tokenizer: TokenizerInfo, folders: Sequence[Targets], run: Run, ranks: Ranks
) -> Opened:
    """The student, ready to train but not yet wrapped; all ranks must call it.

    Raises:
        XtokenError: model, targets and options do not fit each other; on every rank, whichever found it.
    """
    shared = ranks.size > 1 and config.student.parallel == "fsdp"
    with ranks.together():
        opened = _open(config, tokenizer, folders, run, ranks, whole=ranks.first or not shared)
    if not shared:
        return opened
    head = replace(opened.head, model=None) if opened.head is not None else None
    found = (slots(opened.model), head, opened.packing, opened.flat)
    wanted, head, packing, flat = ranks.share(found)
    with ranks.together():
        refuse_unlike(opened.model, wanted, config.student.source)
        if flat and not ranks.first:
            set_flat(opened.model)
    return replace(opened, head=replace(head, model=opened.model), packing=packing, flat=flat)


def _open(
    config: TrainConfig, tokenizer: TokenizerInfo, folders: Sequence[Targets], run: Run, ranks: Ranks, whole: bool
) -> Opened:
    """``whole``: with its weights, so that it can be probed."""
    asked, data = config.student, config.data
    model = None if whole else outline(asked, tokenizer, data.seed)
    if model is None:
        model = open_student(asked, ranks.device, tokenizer, data.seed)
    check_width(model, max(targets.needed_width for targets in folders), asked.source)
    check_context(model, data.max_tokens, asked.source)
    notes = _notes(config, folders, mend_settings(model))
    chat = folders[0].manifest.chat
    end_answers_with(model, chat.stop_token if chat is not None else None)
    files = rehearse_save(model, asked.tokenizer_source, run.rehearsal, asked.template) if ranks.first else None
    vocabulary = min(tokenizer.size, head_width(model))
    head = find_head(model) if whole else None
    if config.loss.mix == "gradmag" and head is not None and not head.fusable:
        notes.append(
            f"--mix gradmag compares gradients by the logits: {asked.source} makes its logits in a way of its own, so "
            "those by the hidden states are not known"
        )
    packing = head is not None and pick_packing(head, data.batching, asked.source)
    if asked.lora is not None:
        model = add_adapters(model, asked.lora, asked.lora_alpha, data.seed, embeddings=asked.lora_embeddings)
    replicated = ranks.size > 1 and asked.parallel != "fsdp"
    some_left_out = replicated and head is not None and leaves_some_out(head)
    prepare(model, asked.activation_checkpointing, asked.compile)
    autocast = pick_autocast(asked.autocast, ranks.device)
    notes += room_notes(model, config, ranks, autocast)
    flat = head is not None and packing and not asked.compile and attend_flat(head, autocast)
    return Opened(model, vocabulary, head, packing, flat, some_left_out, notes, files)


def _notes(config: TrainConfig, folders: Sequence[Targets], mended: Sequence[str]) -> list[str]:
    changes, taught = "; ".join(mended), list(zip(folders, config.losses, strict=True))
    notes = [f"the trained model will not have all settings of {config.student.source}: {changes}"] if changes else []
    notes += [note for targets, loss in taught if (note := targets.lacking(loss))]
    if config.loss.ce_weight == 0:
        notes += [note for targets, loss in taught if (note := targets.untaught(loss))]
    return notes
