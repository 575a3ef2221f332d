"""What an align run refuses before any worker starts: a pair, a capture or settings that a loss has no meaning with."""

from itertools import islice

from xtoken.pipeline.align.plain_columns import peek
from xtoken.pipeline.align.sample_texts import CorpusTexts, refuse_without_text
from xtoken.pipeline.store.files import StopRun
from xtoken.pipeline.store.left_out import without_rows
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.codecs import registered
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.heads import refuse_narrow_head, stated_rows
from xtoken.schemas.manifest import CaptureManifest, TokenizerInfo

# Losses that have no meaning without the mass not kept.
_NEED_REST = ("h-kl", "gold", "uld", "byte-prefix")
# Losses that are served by the log-probability of the text alone (ALM's correction reads space_logprob).
_NEED_NO_ROWS = ("ce", "alm")
# Losses whose targets are no linear function of a row.
_NOT_LINEAR = {"h-kl": "compares sorted lists", "gold": "compares sorted lists", "uld": "compares sorted lists"}


def refuse_losses(config: AlignConfig, student: TokenizerInfo, capture: CaptureManifest) -> None:
    """Raise XtokenError for a loss that this pair or this capture (the first of ``config``) cannot serve."""
    teacher, tau = capture.tokenizer, config.tau
    if "sparse-kl" in config.losses and student.hash != teacher.hash:
        raise XtokenError(
            f"sparse-kl compares rows of one vocabulary, but the student's tokenizer {student.name} "
            f"({student.hash[:12]}) is not the teacher's, {teacher.name} ({teacher.hash[:12]}); take --for p-kl"
        )
    _refuse_without_rows(config, capture)
    if registered(capture.codec.name).linear:
        _refuse_biased(config)
    if tau in capture.codec.temperatures:
        return
    refused = [loss for loss in config.losses if loss in _NEED_REST]
    if "p-kl" in config.losses and config.merge == "mean":
        refused.append("p-kl with --merge mean")
    if refused:
        stored = ", ".join(f"{known:g}" for known in capture.codec.temperatures)
        raise XtokenError(
            f"{', '.join(refused)} at --tau {tau:g} needs the mass not kept at that temperature, and "
            f"{config.captures[0]} stores it at {stored} only; capture again with "
            f"--temperatures {tau:g}, or leave --tau out"
        )


def refuse_narrow_student(config: AlignConfig, student: TokenTable) -> None:
    """Raise XtokenError where the config.json beside the student's tokenizer is of a model that lacks its tokens."""
    if config.student != "bytes":
        refuse_narrow_head(config.student, stated_rows(config.student), student.role, student.pieces())


def _refuse_without_rows(config: AlignConfig, capture: CaptureManifest) -> None:
    """Raise XtokenError for a loss that needs the distributions, where a subset left them out."""
    refused = [loss for loss in config.losses if loss not in _NEED_NO_ROWS]
    if refused and without_rows(capture.left_out):
        raise XtokenError(
            f"{config.captures[0]} is a subset without the teacher's rows, which --for {','.join(refused)} needs; take "
            f"--for {','.join(_NEED_NO_ROWS)}, or fetch the capture with rows among its --columns"
        )


def _refuse_biased(config: AlignConfig) -> None:
    """Raise XtokenError for what draws cannot serve: their shares are right in the mean, and so is only what is
    linear in them."""
    reasons = [f"--for {loss} {_NOT_LINEAR[loss]}" for loss in config.losses if loss in _NOT_LINEAR]
    if config.tau != 1:
        reasons.append(f"--tau {config.tau:g} takes powers of probabilities")
    if config.merge == "mean":
        reasons.append("--merge mean takes means of logarithms")
    if "p-kl" in config.losses and config.unreached != "prefix":
        what = {"none": "divides by what was drawn", "rest": "lets the student's REST depend on what was drawn"}
        reasons.append(f"--unreached {config.unreached} {what[config.unreached]} (prefix does not)")
    if reasons:
        raise XtokenError(
            f"{config.captures[0]} holds draws of teacher rows, and only what is linear in them is right in the mean: "
            f"{'; '.join(reasons)}. Leave it out (ce, alm, p-kl, sparse-kl and byte-prefix remain), or capture with "
            "--codec topk"
        )


def refuse_no_text(config: AlignConfig, capture: CaptureManifest) -> None:
    """Look at the first samples that can be read; with --corpus, look whether that is there.

    Raises:
        XtokenError: their text was not stored, or the corpus is not that of the capture.
    """
    root = config.captures[0]
    if config.corpus is not None:
        CorpusTexts(root, config.corpus)
        return
    for part in capture.parts:
        try:
            for batch in islice(peek(root, capture, part, ["text"]), 1):
                refuse_without_text(batch, root)
        except StopRun:
            raise
        except XtokenError:
            continue  # the part's own worker says what is wrong with it
        return
