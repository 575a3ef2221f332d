"""What an align run refuses before any worker starts: a pair, a capture or settings that a loss has no meaning with."""

from collections.abc import Sequence
from itertools import islice

from xtoken.pipeline.align.losses import builders
from xtoken.pipeline.align.losses.base import TargetBuilder
from xtoken.pipeline.align.plain_columns import peek
from xtoken.pipeline.align.sample_texts import CorpusTexts, refuse_without_text
from xtoken.pipeline.store.files import StopRun
from xtoken.pipeline.store.left_out import without_rows
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.codecs import registered
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.heads import refuse_narrow_head, stated_rows
from xtoken.schemas.imported import why_not
from xtoken.schemas.losses import LOSSES
from xtoken.schemas.manifest import CaptureManifest, TokenizerInfo


def refuse_losses(config: AlignConfig, student: TokenizerInfo, capture: CaptureManifest) -> None:
    """Raise XtokenError for a loss that this pair or this capture (the first of ``config``) cannot serve."""
    losses, tau = builders(config.losses), config.tau
    if config.w is None:
        w_rule(losses)
    for loss in losses:
        loss.refuse(config, student, capture)
    _refuse_without_rows(config, losses, capture)
    _refuse_unknown(config, losses, capture)
    if registered(capture.codec.name).linear:
        _refuse_biased(config, losses)
    if tau in capture.codec.temperatures:
        return
    refused = [words for loss in losses if (words := loss.without_tail(config))]
    if refused:
        stored = ", ".join(f"{known:g}" for known in capture.codec.temperatures)
        again = f"capture again with --temperatures {tau:g}, or " if capture.imported is None else ""
        raise XtokenError(
            f"{', '.join(refused)} at --tau {tau:g} needs the tail mass (what was not kept) at that temperature, and "
            f"{config.captures[0]} stores it at {stored} only; {again}leave --tau out"
        )


def w_rule(losses: Sequence[TargetBuilder]) -> str:
    """The rule by which the W of these losses is built where none is given; a target folder has one W.

    Raises:
        XtokenError: two of them want different ones.
    """
    by_rule = {loss.w_rule: loss.name for loss in reversed(losses) if loss.w_rule}
    if len(by_rule) > 1:
        wanted = " and ".join(f"{name} through one of rule {rule}" for rule, name in reversed(by_rule.items()))
        raise XtokenError(
            f"targets have one W, and {wanted} cannot share it; align them into two folders, or build one W for both "
            "with 'xtoken project' and give it with --w"
        )
    return next(iter(by_rule), "pieces")


def refuse_narrow_student(config: AlignConfig, student: TokenTable) -> None:
    """Raise XtokenError where the config.json beside the student's tokenizer is of a model that lacks its tokens."""
    if config.student != "bytes":
        refuse_narrow_head(config.student, stated_rows(config.student), student.role, student.pieces())


def _refuse_without_rows(config: AlignConfig, losses: Sequence[TargetBuilder], capture: CaptureManifest) -> None:
    """Raise XtokenError for a loss that needs the distributions, where a subset left them out."""
    refused = [loss.name for loss in losses if loss.needs_rows]
    if refused and without_rows(capture.left_out):
        others = ",".join(loss.name for loss in builders(LOSSES) if not loss.needs_rows)
        raise XtokenError(
            f"{config.captures[0]} is a subset without the teacher's rows, which --for {','.join(refused)} needs; take "
            f"--for {others}, or fetch the capture with rows among its --columns"
        )


def _refuse_unknown(config: AlignConfig, losses: Sequence[TargetBuilder], capture: CaptureManifest) -> None:
    """Raise XtokenError for a loss, or a way of merging, that needs what an imported capture does not know."""
    known = capture.imported
    if known is None:
        return
    root, reasons = config.captures[0], {name: why_not(name, known.rest, known.labels_unknown) for name in LOSSES}
    refused = [f"--for {loss.name}: {reasons[loss.name]}" for loss in losses if reasons.get(loss.name)]
    if refused:
        others = ",".join(name for name, why in reasons.items() if why is None)
        raise XtokenError(f"{root} was imported ({known.format}): {'; '.join(refused)}. It can serve --for {others}")
    if config.merge != "first" and not known.whole_rest:
        raise XtokenError(
            f"{root} was imported ({known.format}), and its tail mass is unknown: --merge {config.merge} joins "
            "probabilities that are too large by a factor of each row; leave --merge out"
        )


def _refuse_biased(config: AlignConfig, losses: Sequence[TargetBuilder]) -> None:
    """Raise XtokenError for what samples cannot serve: their shares are right in the mean, and so is only what is
    linear in them."""
    reasons = [reason for loss in losses for reason in loss.biased(config)]
    if config.tau != 1:
        reasons.append(f"--tau {config.tau:g} takes powers of probabilities")
    if config.merge == "mean":
        reasons.append("--merge mean takes means of logarithms")
    if reasons:
        linear = ", ".join(loss.name for loss in builders(LOSSES) if not loss.not_linear)
        raise XtokenError(
            f"{config.captures[0]} holds samples of the teacher's distributions, and only what is linear in them is "
            f"right in the mean: {'; '.join(reasons)}. Leave it out ({linear} remain), or capture with --codec topk"
        )


def refuse_other_kind(config: AlignConfig, capture: CaptureManifest) -> None:
    """Raise XtokenError for a flag that means something for conversations only, or for texts only."""
    root = config.captures[0]
    if capture.chat is None:
        given = [f"--{name.replace('_', '-')}" for name in ("template", "template_arg") if getattr(config, name)]
        if given:
            raise XtokenError(f"{root} holds texts, which no chat template writes; leave {' and '.join(given)} out")
        return
    if capture.chat.template is None and (config.template or config.template_arg):
        named = "--template" if config.template else "--template-arg"
        raise XtokenError(f"{root} holds token ids, of which nothing is rendered; leave {named} out")
    if config.corpus is not None:
        raise XtokenError(f"{root} holds conversations, which are read from the capture itself; leave --corpus out")


def refuse_no_text(config: AlignConfig, capture: CaptureManifest) -> None:
    """Look at the first samples that can be read; with --corpus, look whether that is there.

    Raises:
        XtokenError: their text was not stored, or the corpus is not that of the capture.
    """
    root = config.captures[0]
    if config.corpus is not None:
        CorpusTexts(root, config.corpus)
        return
    columns = ["text"] if capture.chat is None else ["text", "messages"]
    for part in capture.parts:
        try:
            for batch in islice(peek(root, capture, part, columns), 1):
                refuse_without_text(batch, root)
        except StopRun:
            raise
        except XtokenError:
            continue  # the part's own worker says what is wrong with it
        return
