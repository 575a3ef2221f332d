"""Configuration of 'xtoken transplant'. The fields are the flags; the descriptions are the help."""

from typing import Literal

from pydantic import Field, model_validator

from xtoken.schemas.configs.base import COMMON, OUT_FOLDER, PLACE, Config, argument


class TransplantConfig(Config):
    """Write the same model under another tokenizer: a row of its embedding and head for every new token.

    What comes out is a student that starts from all that the model knows; distil the model itself into it.
    """

    model: str = argument("Hugging Face id or folder of the model.")
    tokenizer: str | None = Field(
        None,
        description="New tokenizer: Hugging Face id, folder, tokenizer.json, or 'bytes' (256 bytes, BOS, EOS, "
        "end-of-turn, padding; the head is untied).",
        json_schema_extra=PLACE | COMMON,
    )
    out: str = Field(description="New folder for the model; it must be empty.", json_schema_extra=OUT_FOLDER | COMMON)
    init: Literal["fvt", "omp", "random"] = Field(
        "fvt",
        description="Rows of tokens that the model lacks: fvt: mean of their pieces' rows; omp: found in the embedding "
        "of --donor; random: the control.",
        json_schema_extra=COMMON,
    )
    donor: str | None = Field(
        None,
        description="omp: a model of the new tokenizer. Its row of a token is written as a sum of rows of shared "
        "tokens, and the same sum is taken here.",
        json_schema_extra=PLACE,
    )
    omp_k: int = Field(64, ge=1, description="omp: most shared tokens in one sum.")
    pad_to: int = Field(
        1,
        ge=1,
        description="Round the number of rows up to a multiple of this. Padded rows are copies of the mean row, which "
        "other software sees; 1: none.",
    )
    keep_merges: int | None = Field(
        None,
        ge=1,
        description="Instead of --tokenizer: the model's own tokenizer with its first N merged tokens, base tokens and "
        "control tokens.",
    )
    text: str | None = Field(
        None,
        description="--keep-merges: text or corpus on which the smaller tokenizer is compared with the whole one; a "
        "built-in sample when left out.",
        json_schema_extra=PLACE,
    )
    expand_inputs: bool = Field(
        False,
        description="--tokenizer bytes: keep the old embedding, frozen, and add to each byte's row that of the longest "
        "old token that ends there. Only xtoken loads such a model.",
    )
    seed: int = Field(0, ge=0, description="Seed of random rows.")
    device: str = Field("auto", description="omp: where sums are searched: auto, cpu, cuda, cuda:1, ...")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model or the donor.")

    @model_validator(mode="after")
    def _one_tokenizer(self) -> "TransplantConfig":
        if (self.tokenizer is None) == (self.keep_merges is None):
            raise ValueError("give --tokenizer ID, FOLDER or 'bytes', or --keep-merges N, not both and not neither")
        if (self.init == "omp") != (self.donor is not None):
            raise ValueError("--init omp and --donor MODEL go together; give both, or leave both out")
        if self.expand_inputs and self.tokenizer != "bytes":
            raise ValueError("--expand-inputs is for --tokenizer bytes; give that, or leave it out")
        if self.keep_merges is not None and self.init != "fvt":
            raise ValueError(f"--keep-merges copies rows, so --init {self.init} means nothing; leave it out")
        if self.text is not None and self.keep_merges is None:
            raise ValueError("--text is what --keep-merges is checked on; leave it out")
        if "://" in self.out:
            raise ValueError(f"--out {self.out} is not on this machine; a model is written to a local folder")
        return self
