"""Sets to import: the golden ones of other toolkits, and such that are drawn from the rows that they hold."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.distillkit_sets import QWEN3, Document, sampled, write
from xtoken.schemas.configs.imports import ImportConfig

GOLDEN = Path(__file__).resolve().parents[3] / "golden"
IMPORT, TINY = GOLDEN / "import", GOLDEN / "captures" / "tiny"
SIZE = 400  # tokens of TINY
TEXTS = [
    "The river runs past the old mill, and 27 boats wait for rain. ",
    "def area(r):\r\n\treturn 3.14159 * r * r  # unit\n",
    "Der Fluss läuft an der alten Mühle vorbei, naïve Leser zählen 3 Brücken; ",
    "for boat in range(27): print(boat, 'waits for rain at the mill') ",
]


def golden(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a golden file must decode to, and its rows."""
    return json.loads((IMPORT / f"{name}.json").read_text()), pq.read_table(IMPORT / f"{name}.parquet").to_pylist()


def numbers(rows: Sequence[Sequence[Any]]) -> NDArray[np.float64]:
    """Golden numbers, of which "nan" and "-inf" are strings."""
    return np.array([[float(value) for value in row] for row in rows])


def words_tokenizer(folder: Path) -> Path:
    """A tokenizer whose ids 0 to 998 are words of three letters and 999 is padding: any golden spells a text."""
    letters = "abcdefghij"
    vocabulary = {letters[at // 100] + letters[at // 10 % 10] + letters[at % 10]: at for at in range(999)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary |= {"<pad>": 999} | {letter: 1000 + at for at, letter in enumerate(alphabet)} | {"</s>": 1256}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("</s>", special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}')
    return folder


def drawn_rows(ids: Sequence[int], size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A distribution for each token, from which its rank was drawn: log-probabilities, float32 [T, size]."""
    rows = []
    for token in ids:
        logit_U = -1.6 * np.log(np.arange(1, size + 1)) + 0.2 * rng.standard_normal(size)
        p_U = np.sort(np.exp(logit_U) / np.exp(logit_U).sum())[::-1]
        order = np.insert(rng.permutation(np.delete(np.arange(size), token)), rng.choice(size, p=p_U), token)
        rows.append(np.log(p_U)[np.argsort(order)])
    return np.array(rows, np.float32)


def documents(count: int = 8, seed: int = 3) -> list[Document]:
    """Documents in the tokens of TINY; row j is about token j + 1, the last one about nothing."""
    backend, rng = Tokenizer.from_file(str(TINY / "tokenizer.json")), np.random.default_rng(seed)
    made = []
    for number in range(count):
        ids = np.array([*backend.encode(TEXTS[number % len(TEXTS)] * (1 + number % 3)).ids, 0])
        rows = drawn_rows(ids.tolist(), SIZE, rng)
        made.append(Document(ids, np.concatenate([rows[1:], rows[:1]])))
    return made


def write_set(folder: Path, count: int = 8, config: Mapping[str, Any] = QWEN3, group: int = 2) -> Path:
    """A sampled set of such documents."""
    write(folder / "rows.parquet", [sampled(one, config, SIZE) for one in documents(count)], config, SIZE, group)
    return folder


def config_of(folder: Path, out: Path, **more: Any) -> ImportConfig:
    """How it is imported."""
    given = {"format": "distillkit", "tokenizer": str(TINY), **more}
    return ImportConfig(paths=[str(folder)], out=str(out), **given)
