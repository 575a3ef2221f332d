"""TokenTable: round trip, hash, lookups."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from xtoken.pipeline.tokens import TokenTable, load_tokenizer
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.tables import MERGES, VOCAB


def small(**changes: object) -> TokenTable:
    """Seven tokens: duplicate bytes, a byte token, EOS and a hole."""
    fields: dict[str, object] = {
        "pieces": [b"a", b",", b" a", b",", b"", b"", b","],
        "role": [None, None, None, None, "eos", "hole", None],
        "byte_fallback": [False, True, False, False, False, False, False],
        "merges": np.array([[0, 1]], dtype=np.int32),
        "name": "small",
        "kind": "metaspace",
        **changes,
    }
    return TokenTable.build(**fields)  # type: ignore[arg-type]


def test_lookups() -> None:
    table = small()
    assert (table.size, table.info.eos_id, table.id_of("eos"), table.id_of("bos")) == (7, 4, 4, None)
    assert table.lengths.tolist() == [1, 1, 2, 1, 0, 0, 1]
    assert table.lengths.dtype == np.int32
    assert table.pieces() == [table.token(token_id) for token_id in range(7)]
    assert table.by_bytes() == {b"a": 0, b",": 3, b" a": 2}
    assert table.starts_with_space().tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize(
    "change",
    [
        {"pieces": [b"a", b",", b" b", b",", b"", b"", b","]},
        {"pieces": [b"a,", b"", b" a", b",", b"", b"", b","]},
        {"role": [None, None, None, None, "eot", "hole", None]},
        {"byte_fallback": [False, True, False, True, False, False, False]},
        {"merges": np.array([[1, 0]], dtype=np.int32)},
    ],
)
def test_the_hash_covers_every_part(change: dict[str, object]) -> None:
    assert small().info.hash == small(name="another name", adds_bos=True, bos_id=4).info.hash
    assert small(**change).info.hash != small().info.hash


def test_tables_and_back() -> None:
    table = small()
    vocab, merges = table.to_tables()
    assert vocab.schema.equals(VOCAB)
    assert merges.schema.equals(MERGES)
    back = TokenTable.from_tables(vocab.take(pa.array([3, 0, 1, 2, 6, 5, 4])), merges, table.info)
    assert back.info == table.info
    assert back.role == table.role
    for name in ("data", "offsets", "byte_fallback", "merges"):
        np.testing.assert_array_equal(getattr(back, name), getattr(table, name))
        assert getattr(back, name).dtype == getattr(table, name).dtype


def test_a_changed_table_is_refused() -> None:
    table = small()
    vocab, merges = table.to_tables()
    with pytest.raises(VerificationError, match="has 6 tokens, its manifest says 7"):
        TokenTable.from_tables(vocab.slice(0, 6), merges, table.info)
    with pytest.raises(VerificationError, match=r"'small'.* changed or damaged"):
        TokenTable.from_tables(vocab, merges.slice(1), table.info)


def test_a_real_vocabulary_survives_parquet(tmp_path: Path, tokenizer_file: Callable[[str], Path]) -> None:
    import pyarrow.parquet as pq

    table = load_tokenizer(str(tokenizer_file("smollm2"))).table
    for part, name in zip(table.to_tables(), ("vocab", "merges"), strict=True):
        pq.write_table(part, tmp_path / name)
    back = TokenTable.from_tables(pq.read_table(tmp_path / "vocab"), pq.read_table(tmp_path / "merges"), table.info)
    assert back.pieces() == table.pieces()
    np.testing.assert_array_equal(back.merges, table.merges)


def test_the_hash_is_stable_over_loads(tokenizer_file: Callable[[str], Path]) -> None:
    path = tokenizer_file("llama2")
    assert load_tokenizer(str(path)).table.info == load_tokenizer(str(path.parent)).table.info


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.table.info.model_dump(exclude={"hash"}) == {
        "name": "bytes",
        "kind": "bytes",
        "size": 256,
        "adds_bos": False,
        "bos_id": None,
        "eos_id": None,
    }
    assert tokenizer.table.merges.shape == (0, 2)
    encoded = tokenizer.encode_batch(["é<s>▁\x00", ""], [True, True])[0]
    assert encoded.ids.tolist() == list("é<s>▁\x00".encode())
    assert encoded.ends.tolist() == list(range(1, 10))
    assert all(tokenizer.table.token(byte) == bytes([byte]) for byte in range(256))
