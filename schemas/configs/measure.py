"""Configuration of measuring models and drawing runs. The fields are the flags; the descriptions are the help."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from xtoken.schemas.configs.base import (
    ARGUMENTS,
    OUT_FILE,
    OUT_PAGE,
    PLACE,
    Config,
    a_day,
    argument,
    arguments_of,
    named_values,
)


class EvalConfig(Config):
    """Measure a model on held-out text and, when given, against stored teacher rows."""

    model: list[str] = argument("Hugging Face id or folder of the model; several, by commas, with --combine.")
    combine: Literal["prob", "logit", "bytes"] | None = Field(
        None,
        description="Several models as one: mean of probabilities, of log-probabilities, or of P(next byte), for any "
        "tokenizers and slow.",
    )
    max_bytes: int | None = Field(
        None,
        ge=1,
        description="--combine bytes: how much of --text is measured, 1024 when left out; a byte may take a second.",
    )
    tokenizer: str | None = Field(
        None, description="Tokenizer of a model whose folder holds none, such as 'bytes'.", json_schema_extra=PLACE
    )
    text: str | None = Field(
        None,
        description="Held-out corpus: bits per byte of its text, or of what conversations teach, with their stops.",
        json_schema_extra=PLACE,
    )
    template: str | None = Field(
        None,
        description="Of conversations: Jinja file with the chat template; left out: the model's own.",
        json_schema_extra=PLACE,
    )
    template_arg: list[str] = Field(
        default=[],
        description="Of conversations: variables of that template, as align had them, such as enable_thinking=false.",
    )
    date: str | None = Field(
        None,
        description="Of conversations: what the template takes for today, such as 2026-07-04; left out: that of "
        "--targets, else today.",
    )
    learn: list[str] = Field(
        default=[],
        description="Of conversations: what counts beside answers, calls and their ends: thinking (reasoning).",
    )
    targets: str | None = Field(
        None, description="Held-out targets: KL to the teacher and top-1 agreement.", json_schema_extra=PLACE
    )
    tasks: list[str] = Field(default=[], description="Tasks of lm-eval, such as gsm8k,mmlu (needs xtoken[tasks]).")
    task_path: str | None = Field(
        None, description="Folder with further task files for lm-eval.", json_schema_extra=PLACE
    )
    shots: int | None = Field(
        None, ge=0, description="Examples shown per question of --tasks; the task's own when left out."
    )
    apply_chat_template: bool = Field(
        False, description="Ask the questions of --tasks as messages in the model's chat template, examples as turns."
    )
    text_field: str = Field("text", description="Field or column that holds the text.")
    id_field: str | None = Field(
        None, description="Field that holds the document's id, whose part before the last '/' is its source."
    )
    limit: int | None = Field(None, ge=1, description="Read only the first N documents.")
    max_tokens: int = Field(1024, ge=8, description="Longest window in tokens.")
    out: str | None = Field(
        None,
        description="File for bits and bytes of each document of --text, as JSON Lines, to compare models by.",
        json_schema_extra=OUT_FILE,
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")

    _named_values = field_validator("template_arg")(named_values)

    _a_day = field_validator("date")(a_day)

    @property
    def of_conversations(self) -> list[str]:
        """Flags that are given and mean something for conversations only."""
        names = ("template", "template_arg", "date", "learn")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name)]

    @property
    def arguments(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return arguments_of(self.template_arg)

    @field_validator("learn")
    @classmethod
    def _known_kinds(cls, value: list[str]) -> list[str]:
        for word in value:
            if word != "thinking":
                raise ValueError(f"{word!r} does not count on demand; known is thinking")
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _models_go_together(self) -> "EvalConfig":
        if len(self.model) > 1 and self.combine is None:
            raise ValueError(f"{len(self.model)} models are named; join them by --combine prob, logit or bytes")
        if len(self.model) < 2 and self.combine is not None:
            raise ValueError(f"--combine {self.combine} joins several models, and one is named; leave it out")
        if self.combine == "bytes" and (self.text is None or self.targets is not None or self.tasks):
            raise ValueError("--combine bytes measures --text alone; give --text FILE, without --targets and --tasks")
        if self.combine == "bytes" and self.max_tokens != type(self).model_fields["max_tokens"].default:
            raise ValueError("--combine bytes cuts text into windows of 512 bytes; leave --max-tokens out")
        if self.combine != "bytes" and self.max_bytes is not None:
            raise ValueError("--max-bytes goes with --combine bytes; --limit N cuts the text to N documents")
        if self.combine == "bytes" and self.out is not None:
            raise ValueError("--combine bytes has no figures of single documents; leave --out out")
        return self

    @model_validator(mode="after")
    def _something_to_measure(self) -> "EvalConfig":
        if self.text is None and self.targets is None and not self.tasks:
            raise ValueError(
                "nothing to measure on; give --text FILE, --targets DIR, --tasks NAMES, or several of them"
            )
        if self.out is not None and self.text is None:
            raise ValueError("--out is for the documents of --text; name the file, or leave --out out")
        for name in self.of_conversations:
            if self.text is None:
                raise ValueError(f"{name} is for conversations of --text; name the file, or leave {name} out")
        chat = True if self.apply_chat_template else None
        given = (("--task-path", self.task_path), ("--shots", self.shots), ("--apply-chat-template", chat))
        for name, value in given:
            if value is not None and not self.tasks:
                raise ValueError(f"{name} goes with --tasks; name the tasks, or leave {name} out")
        return self


class ReportConfig(Config):
    """Draw runs as one self-contained HTML page: curves, held-out figures, paired tests, what differs, completions.

    Runs that differ in nothing but their seed become one band.
    """

    runs: list[str] = Field(description="Folders of 'xtoken train'.", json_schema_extra=ARGUMENTS | PLACE)
    out: str = Field("report.html", description="The page.", json_schema_extra=OUT_PAGE)

    @model_validator(mode="after")
    def _some_runs(self) -> "ReportConfig":
        if not self.runs:
            raise ValueError("no run named; 'xtoken train' writes one")
        return self
