"""Corpora that hold a teacher's token ids: whose they must be, and what such a run does not take."""

from xtoken.pipeline.chats import IDS_LEARNED, ChatModel, end_of, open_ids_model
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.chat import CaptureChat
from xtoken.schemas.configs.capture import RowsConfig, TeacherGroup
from xtoken.schemas.errors import XtokenError


def teacher_of_ids(config: RowsConfig) -> tuple[ChatModel, CaptureChat]:
    """The teacher of a corpus of its token ids, and what the manifest says of them.

    Args:
        config: of the run.

    Raises:
        XtokenError: nobody says whose the ids are, they are another tokenizer's, or it cannot be loaded.
    """
    model = open_ids_model(config.teacher.teacher, revision=config.teacher.revision)
    _refuse_other(config.chat.tokenizer, config.teacher, model)
    info = CaptureChat(
        template=None, date=None, learn=[*IDS_LEARNED], stop_token=end_of(model), form="ids", turns="all", long="skip"
    )
    return model, info


def _refuse_other(named: str | None, teacher: TeacherGroup, model: ChatModel) -> None:
    mine = model.tokenizer.table.info
    if named is None:
        raise XtokenError(
            "the corpus holds token ids, which mean nothing without their tokenizer; name it with --tokenizer (it must "
            f"be that of {teacher.teacher}), or give the texts or messages themselves with --text-field or --form"
        )
    if named == teacher.teacher:
        return
    theirs = load_tokenizer(named).table.info
    if theirs.hash != mine.hash:
        raise XtokenError(
            f"the ids of the corpus are of the tokenizer {named} ({theirs.hash[:12]}), and {teacher.teacher} has "
            f"another one ({mine.hash[:12]}), to which they mean other texts; give the texts or messages themselves"
        )
