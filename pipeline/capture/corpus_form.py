"""What the corpus of a run holds, text, conversations or token ids, and which settings mean nothing to that."""

from xtoken.pipeline.capture.plan import PLAN_FILE, load_plan
from xtoken.pipeline.chats import FORMS, form_of
from xtoken.pipeline.corpus import Corpus
from xtoken.pipeline.store.files import Folder
from xtoken.schemas.configs.base import flag, leaves
from xtoken.schemas.configs.capture import ChatGroup, CorpusConfig, CorpusForm, PrecomputeConfig
from xtoken.schemas.errors import XtokenError


def form_of_run(config: PrecomputeConfig, folder: Folder) -> CorpusForm:
    """What the corpus holds: as the run's plan says; without one, as the settings or the corpus's columns do.

    Raises:
        XtokenError: there is no corpus; or a setting of conversations, and it holds text; or the other way round,
            such as ``--no-text`` for conversations, which no student could read.
    """
    plan = load_plan(folder) if folder.exists(PLAN_FILE) else None
    form = plan.form if plan is not None else _found_form(config)
    _refuse_unused(config.chat, form)
    if form != "text":
        _refuse_of_text(config, form)
    return form


def _found_form(config: PrecomputeConfig) -> CorpusForm:
    corpus = Corpus(config.corpus)
    alone = config.corpus.form == "auto" and config.chat.generate is not None and "prompt" in corpus.columns
    return corpus.form or ("prompt" if alone and config.corpus.text_field not in corpus.columns else "text")


def _refuse_of_text(config: PrecomputeConfig, form: CorpusForm) -> None:
    """Refuse a setting of plain text for conversations and token ids."""
    bos, rendered = config.teacher.bos, config.corpus.on_rendered
    if bos != "auto" and form == "ids":
        raise XtokenError(f"--bos {bos} is for text: token ids are scored as they are; leave it out")
    if bos != "auto":
        raise XtokenError(
            f"--bos {bos} is for text: of conversations the chat template says whether BOS comes first; "
            "leave it out, or change the template with --template"
        )
    if rendered != "stop":
        why = "token ids are scored as they are" if form == "ids" else "the contents of messages are always text"
        raise XtokenError(f"--on-rendered {rendered} is for a corpus of text: {why}; leave it out")
    if not config.codec.text:
        held = "token ids" if form == "ids" else "conversations"
        raise XtokenError(
            f"--no-text is for a corpus of text: a student reads {held} from the capture itself, so that rows without "
            "them could never be aligned; leave it out, and give others a copy without text (xtoken share pull "
            "--columns rows,space_logprob)"
        )


def _refuse_unused(chat: ChatGroup, form: CorpusForm) -> None:
    """Refuse a setting that says nothing to what the corpus holds."""
    conversations = "is for conversations, and the corpus holds"
    for leaf in leaves(ChatGroup):
        value = getattr(chat, leaf.name)
        if value == leaf.field.get_default(call_default_factory=True):
            continue
        shown = f"--{flag(leaf.name, leaf.field)} {','.join(value) if isinstance(value, list) else value}"
        if form == "text":
            named = f"say with --form how conversations lie in the corpus ({', '.join(FORMS)})"
            raise XtokenError(f"{shown} {conversations} text; leave it out, or {named}")
        if form == "ids" and leaf.name not in ("tokenizer", "long"):
            raise XtokenError(f"{shown} {conversations} token ids, which are scored as they are; leave it out")
        if form != "ids" and leaf.name == "tokenizer":
            raise XtokenError(f"{shown} is for --form ids, and the corpus holds messages; leave it out, or say --form")


def form_words(config: CorpusConfig, folder: Folder, form: CorpusForm) -> list[str]:
    """What a run that is yet to be planned says of what it found in the corpus; nothing of plain text."""
    if folder.exists(PLAN_FILE):
        return []
    columns = Corpus(config).columns
    found = form_of(columns)
    others: list[str] = [] if found is None or found == form else [found]
    if form != "text" and config.text_field in columns:
        others.append("text")
    also = f"; its columns could be read as {' or '.join(others)}, see --form" if others else ""
    if form == "text":
        return [f"the corpus is read as text{also}"] if others else []
    what = "token ids, which are scored as they are" if form == "ids" else f"conversations, form {form}"
    return [f"the corpus holds {what}{also}"]
