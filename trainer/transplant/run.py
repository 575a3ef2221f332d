"""The verb's half that holds the model: new matrices, settings, and files of a folder that transformers loads.

Shapes: R old rows, N new rows, H width.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from xtoken.schemas.configs.transplant import TransplantConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.atomic import whole_folder
from xtoken.schemas.io.overlap import refuse_inside
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.token_map import CONTROL, PIECES, UNDECODABLE, UNUSED, TokenMap
from xtoken.schemas.ui.progress import Progress
from xtoken.trainer.student.expansion import ExpandedModel
from xtoken.trainer.student.model import load_student, pick_device, readable_like, save_pretrained
from xtoken.trainer.student.tokenizer_files import copy_tokenizer, located, write_bytes_with_controls
from xtoken.trainer.student.writable import mend_settings
from xtoken.trainer.transplant.model import OldModel
from xtoken.trainer.transplant.omp import shared_sums
from xtoken.trainer.transplant.rows import Sums, new_rows

REPORT = "transplant.json"
_EMBEDDING, _HEAD, _BIAS = range(3)  # beside the seed: each matrix has normal rows of its own


@dataclass(frozen=True)
class NewVocabulary:
    """What the trainer's half must know of the new tokenizer.

    Attributes:
        info: the tokenizer.
        pad: its padding token.
        token_map: the old ids of each of its tokens.
        check: raises where the files in the folder are not this tokenizer.
        old_text: bytes -> old id of all text tokens, under ``--expand-inputs``.
    """

    info: TokenizerInfo
    pad: int | None
    token_map: TokenMap
    check: Callable[[], None]
    old_text: Mapping[bytes, int] | None = None


@contextmanager
def new_model_folder(config: TransplantConfig) -> Iterator[Path]:
    """A folder that becomes ``--out`` once all is in it.

    Raises:
        XtokenError: there is something at ``--out`` already, or it lies inside the model's folder.
    """
    out = Path(os.path.realpath(config.out))  # a link is no folder that another could take the place of
    if out.exists() and any(out.iterdir()):
        raise XtokenError(f"--out {config.out} is not empty, and nothing there is replaced; name a new folder")
    if os.path.isdir(config.model):
        refuse_inside("--out", config.out, config.model, "the model is read there")
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as folder:
        folder.mkdir()
        yield folder


def put_tokenizer(config: TransplantConfig, folder: Path, adds_bos: bool) -> Path:
    """Put the files of the new tokenizer, or of the model's own that is to be cut, into ``folder``.

    Args:
        config: the verb's.
        folder: for the new model.
        adds_bos: whether the model's own tokenizer puts BOS in front of a text.

    Returns:
        The folder of the model's own tokenizer files.
    """
    if config.tokenizer == "bytes":
        write_bytes_with_controls(folder, adds_bos)
    else:
        copy_tokenizer(config.tokenizer or config.model, folder)
    return located(config.model)[0]


def transplant(
    config: TransplantConfig, old: OldModel, vocabulary: NewVocabulary, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Give a model its new rows and write it into ``folder``, beside the tokenizer; returns what was done.

    All that can be refused is refused before the first row is made.

    Raises:
        XtokenError: the donor is no model of the new tokenizer, or transformers refuses to write the model.
    """
    token_map = vocabulary.token_map
    _refuse_fewer_rows(old, token_map)
    device = pick_device(config.device)
    size = -(-token_map.size // config.pad_to) * config.pad_to
    if config.tokenizer == "bytes" and old.tied:
        old.untie()
    model = _expanded(old, vocabulary.old_text) if vocabulary.old_text is not None else old.model
    before = old.embedding_RH.clone(), None if old.tied else old.head_RH.clone(), old.bias_R
    donor_UH = None if config.donor is None else _donor_rows(config, token_map)
    old.resize(size)
    _settle(old, vocabulary, size)
    mended = mend_settings(old.model)
    save_pretrained(model, folder, {})
    vocabulary.check()
    sums = None if donor_UH is None else shared_sums(donor_UH, token_map, config.omp_k, device, progress)
    _fill(config, old, before, token_map, size, sums)
    progress.start("write", None, "model")
    save_pretrained(model, folder, None)
    readable_like(folder / "config.json", folder)
    return _chosen(config) | {
        "rows_before": len(before[0]),
        "rows": size,
        "dtype": str(before[0].dtype).removeprefix("torch."),
        "tied": old.tied,
        "expanded_by": len(model.tokens) if isinstance(model, ExpandedModel) else 0,
        "classes": _classes(config.init, token_map, size),
        "notes": [*mended, *_padding_note(size - token_map.size)],
    }


def _expanded(old: OldModel, old_text: Mapping[bytes, int]) -> ExpandedModel:
    """The model with its old embedding beside the one that it will get."""
    inside = {data: token for data, token in old_text.items() if token < old.rows}
    return ExpandedModel(old.model, list(inside), old.inputs_of(list(inside.values())))


def _chosen(config: TransplantConfig) -> dict[str, Any]:
    donor = {"donor": config.donor, "omp_k": config.omp_k} if config.init == "omp" else {}
    return {"init": config.init, **donor, "seed": config.seed, "xtoken": version("xtoken")}


def _padding_note(padded: int) -> list[str]:
    if not padded:
        return []
    return [
        f"the last {padded:,} rows are padding: suppress_tokens keeps them from being generated, and xtoken leaves "
        "them out of its softmax; other software sees them"
    ]


def write_report(folder: Path, figures: dict[str, Any]) -> None:
    """The report beside the model."""
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    (folder / REPORT).write_text(f"{text}\n", encoding="utf-8")


def _refuse_fewer_rows(old: OldModel, token_map: TokenMap) -> None:
    highest = int(token_map.known.max(initial=0))
    if old.rows <= highest:
        raise XtokenError(
            f"{old.source} has {old.rows:,} rows, but its config.json says that there is one for token {highest}; "
            "fetch the model again"
        )


def _donor_rows(config: TransplantConfig, token_map: TokenMap) -> torch.Tensor:
    """[U, H] the donor's embedding."""
    source = str(config.donor)
    donor = load_student(source, torch.device("cpu"), config.trust_remote_code, dtype="auto")
    rows_UH: torch.Tensor = donor.get_input_embeddings().weight.detach()
    if len(rows_UH) < token_map.size:
        raise XtokenError(
            f"--donor {source} has {len(rows_UH):,} rows for the {token_map.size:,} tokens of the new tokenizer; give "
            "a model of that tokenizer"
        )
    return rows_UH[: token_map.size].clone()


def _settle(old: OldModel, vocabulary: NewVocabulary, size: int) -> None:
    """Settings: generation stops at EOS and at each token that does what one of the model's ends did."""
    token_map = vocabulary.token_map
    control = token_map.of(CONTROL)
    same = [new for new, of in zip(control.tolist(), token_map.first(control).tolist(), strict=True) if of in old.ends]
    eos = vocabulary.info.eos_id
    ends = sorted({*same, *([] if eos is None else [eos])})
    never = [*token_map.of(UNUSED).tolist(), *range(token_map.size, size)]
    old.name_tokens(vocabulary.info, vocabulary.pad, ends, never)


def _fill(
    config: TransplantConfig, old: OldModel, before: Any, token_map: TokenMap, size: int, sums: Sums | None
) -> None:
    embedding_RH, head_RH, bias_R = before
    embedding_NH, head_NH, bias_N1 = (
        None if matrix is None else new_rows(matrix, token_map, size, (config.seed, which), config.init, sums)
        for which, matrix in ((_EMBEDDING, embedding_RH), (_HEAD, head_RH), (_BIAS, _column(bias_R)))
    )
    assert embedding_NH is not None
    old.fill(embedding_NH, head_NH, None if bias_N1 is None else bias_N1[:, 0])


def _column(bias_R: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias_R is None else bias_R[:, None]


def _classes(init: str, token_map: TokenMap, size: int) -> dict[str, int]:
    """Rows by how they were made; tokens of several pieces under the name of the init."""
    counts = token_map.counts()
    made = len(token_map.of(PIECES, UNDECODABLE)) if init == "omp" else counts["pieces"]
    name = "pieces" if init == "fvt" else init
    undecodable = {} if init == "omp" else {"undecodable": counts["undecodable"]}
    rest = {name: counts[name] for name in ("new_control", "unused")}
    return {
        "control": counts["control"],
        "equal": counts["equal"],
        name: made,
        **undecodable,
        **rest,
        "padded": size - token_map.size,
    }
