"""hf rows against full float64 logits of tiny random models of several families."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from xtoken.pipeline.teachers import hf_teacher, open_teacher
from xtoken.pipeline.teachers.base import Teacher, TeacherRows
from xtoken.pipeline.teachers.sliced_rows import SlicedReader, TorchScan
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError

VOCAB = 101
TOKENS = 97  # the tokenizer knows fewer ids than the head has rows, as padded heads do
LENGTHS = (2, 7, 40, 40, 13)
CLOSE = 3e-5  # nats: float32 against float64 through two small layers
HALF = 0.25  # nats: bfloat16 weights and activations against float64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
SOFT_CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "gemma2-soft-caps": ("Gemma2Config", {**GEMMA, **SOFT_CAPS, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "sliding_window": 8}),
    "granite-scale": ("GraniteConfig", {"logits_scaling": 5.0}),
    "cohere-scale": ("CohereConfig", {"logit_scale": 0.25}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
Edit = Callable[[Any], None]


def save_model(folder: Path, family: str, edit: Edit | None = None) -> Path:
    name, extra = FAMILIES[family]
    sizes = {key: SIZES[key] for key in ("vocab_size", "initializer_range")} if family == "gpt2" else SIZES
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**sizes, **extra}))
    if edit is not None:
        with torch.no_grad():
            edit(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table() -> TokenTable:
    pieces = [(b" " if index % 3 == 0 else b"") + bytes([65 + index % 26, index]) for index in range(TOKENS)]
    return TokenTable.build(
        pieces, [None] * TOKENS, [False] * TOKENS, np.zeros((0, 2), np.int32), name="tiny", kind="byte-level"
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def opened(config: PrecomputeConfig, table: TokenTable) -> Teacher:
    return open_teacher(config.teacher, config.codec, table)


def request(folder: Path | str, **options: Any) -> PrecomputeConfig:
    return PrecomputeConfig.from_flat(corpus="-", out="-", teacher=str(folder), **{"k": 9, "max_tokens": 60, **options})


def sequences(lengths: tuple[int, ...] = LENGTHS) -> list[NDArray[np.int32]]:
    random = np.random.default_rng(3)
    return [random.integers(0, TOKENS, length, dtype=np.int32) for length in lengths]


def reference(folder: Path, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """[R, U] log-probabilities from the model's own forward pass, one sequence, all in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].numpy()
    assert logits.dtype == np.float64
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def assert_rows(rows: TeacherRows, expected_RU: NDArray[np.float64], ids: NDArray[np.int32], atol: float) -> None:
    k = rows.ids.shape[1]
    target = ids[1:, None].astype(np.int64)
    at_target = np.take_along_axis(expected_RU, target, axis=1)
    assert rows.ids.dtype == np.int32
    assert rows.logprob.dtype == np.float32
    np.testing.assert_allclose(rows.logprob, -np.sort(-expected_RU, axis=1)[:, :k], atol=atol, rtol=0)
    np.testing.assert_allclose(rows.logprob, np.take_along_axis(expected_RU, rows.ids, axis=1), atol=atol, rtol=0)
    np.testing.assert_allclose(rows.target_logprob, at_target[:, 0], atol=atol, rtol=0)
    # Entries nearer than the tolerance may stand either way round.
    least = 1 + (expected_RU > at_target + 2 * atol).sum(axis=1)
    most = (expected_RU >= at_target - 2 * atol).sum(axis=1)
    assert ((least <= rows.target_rank) & (rows.target_rank <= most)).all()
    space = np.logaddexp.reduce(expected_RU[:, :TOKENS:3], axis=1)
    np.testing.assert_allclose(rows.space_logprob, space, atol=atol, rtol=0)


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_float64_logits_whatever_the_padding(family: str, table: TokenTable, tmp_path: Path) -> None:
    folder = save_model(tmp_path, family)
    teacher = opened(request(folder), table)
    batch = sequences()
    found = teacher.rows(batch)
    assert teacher.info.capture_path == "hf-blocks"
    assert [len(rows.ids) for rows in found] == [length - 1 for length in LENGTHS]
    for ids, rows in zip(batch, found, strict=True):
        assert_rows(rows, reference(folder, ids), ids, CLOSE)


@pytest.mark.parametrize("options", [{"temperatures": [0.5, 2.0]}, {"codec": "sampled", "draws": 7, "k": None}])
def test_the_reader_of_gpus_reads_the_same(table: TokenTable, llama: Path, options: dict[str, Any]) -> None:
    """As Triton's kernels do on a GPU, here in plain torch: the whole vocabulary as one slice."""
    options = {name: value for name, value in ({"k": 9} | options).items() if value is not None}
    config = PrecomputeConfig.from_flat(corpus="-", out="-", teacher=str(llama), max_tokens=60, **options)
    teacher: Any = opened(config, table)
    batch = sequences()
    expected = teacher.rows(batch)
    teacher._reader = SlicedReader(teacher._reader, TorchScan, VOCAB)
    for one, other in zip(teacher.rows(batch), expected, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        for name in ("logprob", "target_logprob", "lse", "space_logprob", "tau_lognorm"):
            if getattr(other, name) is not None:
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=CLOSE, rtol=0)
        if other.draws is not None:
            for name in ("drawn", "ids", "count"):
                np.testing.assert_array_equal(getattr(one.draws, name), getattr(other.draws, name))


def test_heads_of_another_kind_run_whole(table: TokenTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # HyperCLOVA X multiplies by what Granite divides by; nothing but a comparison can tell.
    monkeypatch.setitem(FAMILIES, "other", ("HyperCLOVAXConfig", {"logits_scaling": 0.5, "head_dim": 8}))
    folder = save_model(tmp_path, "other")
    teacher = opened(request(folder), table)
    assert teacher.info.capture_path == "hf-forward"
    batch = sequences()
    for ids, rows in zip(batch, teacher.rows(batch), strict=True):
        assert_rows(rows, reference(folder, ids), ids, CLOSE)


def test_every_token_of_the_vocabulary_can_be_asked_for(llama: Path, table: TokenTable) -> None:
    (ids,) = sequences((20,))
    (rows,) = opened(request(llama, k=VOCAB), table).rows([ids])
    assert (np.sort(rows.ids, axis=1) == np.arange(VOCAB)).all()
    assert_rows(rows, reference(llama, ids), ids, CLOSE)
    np.testing.assert_allclose(np.exp(rows.logprob.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    assert (np.take_along_axis(rows.ids, rows.target_rank[:, None] - 1, axis=1)[:, 0] == ids[1:]).all()


def test_small_blocks_and_whole_batches_give_the_same_rows(
    llama: Path, table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sequences()
    whole = opened(request(llama), table).rows(batch)
    monkeypatch.setitem(hf_teacher.BLOCK_LOGITS, "cpu", 3 * VOCAB)
    for one, other in zip(whole, opened(request(llama), table).rows(batch), strict=True):
        assert one.ids.shape == other.ids.shape
        np.testing.assert_allclose(one.logprob, other.logprob, atol=CLOSE, rtol=0)
        np.testing.assert_allclose(one.target_logprob, other.target_logprob, atol=CLOSE, rtol=0)


def test_exact_ties_stand_in_the_order_of_their_ids(table: TokenTable, tmp_path: Path) -> None:
    equal = [90, 4, 33, 60, 5, 71, 88, 12, 47, 100]

    def tie(model: Any) -> None:
        model.lm_head.weight[equal] = 0.0  # logits of exactly 0

    folder = save_model(tmp_path, "llama", tie)
    ids = np.array([1, 60, 5, 88, 4, 12, 47, 33, 2, 90], np.int32)
    (rows,) = opened(request(folder, k=VOCAB), table).rows([ids])
    for row in range(len(ids) - 1):
        ranking = rows.ids[row].tolist()
        places = [ranking.index(token) for token in sorted(equal)]
        assert places == list(range(places[0], places[0] + len(equal)))
        assert rows.target_rank[row] == 1 + ranking.index(int(ids[row + 1]))
    for k in (1, 3, 40, 50, 60, 70):  # some of these cut the tie
        (fewer,) = opened(request(folder, k=k), table).rows([ids])
        np.testing.assert_array_equal(fewer.ids, rows.ids[:, :k])
        np.testing.assert_array_equal(fewer.target_rank, rows.target_rank)


def test_rows_do_not_depend_on_the_call_or_the_company(llama: Path, table: TokenTable) -> None:
    teacher = opened(request(llama), table)
    batch = sequences()
    first, again = teacher.rows(batch), teacher.rows(batch)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.logprob, other.logprob)
        np.testing.assert_array_equal(one.lse, other.lse)
    for ids, together in zip(batch, first, strict=True):
        (alone,) = teacher.rows([ids])
        np.testing.assert_allclose(alone.logprob, together.logprob, atol=CLOSE, rtol=0)
        np.testing.assert_allclose(alone.lse, together.lse, atol=CLOSE, rtol=0)


def test_half_precision_models_keep_a_float32_head(table: TokenTable, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    teacher = opened(request(folder, dtype="bfloat16", k=VOCAB), table)
    assert (teacher.info.dtype, teacher.info.head_dtype) == ("bfloat16", "float32")
    (ids,) = sequences((40,))
    (rows,) = teacher.rows([ids])
    assert_rows(rows, reference(folder, ids), ids, HALF)
    assert np.mean(np.diff(rows.logprob, axis=1) == 0) < 0.01  # a bfloat16 head gives many more ties


def test_info_says_which_model_it_was(table: TokenTable, tmp_path: Path) -> None:
    one = opened(request(save_model(tmp_path / "one", "llama")), table).info
    same = opened(request(save_model(tmp_path / "same", "llama")), table).info

    def change(model: Any) -> None:
        model.lm_head.weight[0, 0] += 1

    other = opened(request(save_model(tmp_path / "other", "llama", change)), table).info
    assert (one.vocab_rows, one.context, one.dtype, one.device) == (VOCAB, 64, "float32", "cpu")
    assert one.weights_hash is None, "a run hashes a folder once, not each engine"
    assert one.config_hash == same.config_hash == other.config_hash


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": VOCAB + 1}, "--k 102 is more than the 101 rows"),
        ({"max_tokens": 65}, "use --max-tokens 64 or less"),
        ({"max_tokens": 64, "bos": "always"}, "use --max-tokens 63 or less"),
        ({"device": "cuda:99"}, "cuda:99.*torch sees"),
        ({"device": "graphics"}, "is not a device"),
        ({"device": "meta"}, "runs on cpu and cuda"),
    ],
)
def test_what_the_model_cannot_give_is_refused(
    options: dict[str, Any], message: str, llama: Path, table: TokenTable
) -> None:
    with pytest.raises(XtokenError, match=message):
        opened(request(llama, **options), table)


def test_models_that_are_not_there_are_named(table: TokenTable, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match="nowhere does not exist"):
        opened(request(tmp_path / "nowhere"), table)
    with pytest.raises(XtokenError, match="'nobody/no-such-model' cannot be loaded"):
        opened(request("nobody/no-such-model"), table)
    with pytest.raises(XtokenError, match="cannot be loaded"):
        opened(request(tmp_path), table)


def test_damaged_models_are_refused(table: TokenTable, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(XtokenError, match="cannot be loaded"):
        opened(request(folder), table)
    weights.unlink()
    with pytest.raises(XtokenError, match="cannot be loaded"):
        opened(request(folder), table)


def test_weights_that_are_missing_are_not_made_up(llama: Path, table: TokenTable, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(XtokenError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        opened(request(tmp_path), table)


def test_a_model_with_its_own_code_needs_leave(table: TokenTable, tmp_path: Path) -> None:
    config = {"model_type": "brand-new", "auto_map": {"AutoConfig": "new.NewConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(XtokenError, match="--trust-remote-code"):
        opened(request(tmp_path), table)


def test_logits_that_are_no_numbers_are_refused(table: TokenTable, tmp_path: Path) -> None:
    def spoil(model: Any) -> None:
        model.lm_head.weight[3] = float("nan")

    teacher = opened(request(save_model(tmp_path, "llama", spoil)), table)
    with pytest.raises(XtokenError, match="NaN"):
        teacher.rows(sequences((5,)))


def test_tokens_of_another_model_are_refused(llama: Path, table: TokenTable) -> None:
    teacher = opened(request(llama), table)
    with pytest.raises(XtokenError, match="token id 101 is beyond the 101 rows"):
        teacher.rows([np.array([1, VOCAB], np.int32)])


def test_groups_hold_all_within_the_limit_and_little_padding() -> None:
    lengths = [5, 100, 3, 60, 49, 50, 2, 300]
    found = list(hf_teacher.groups(lengths, 120))
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    for group in found:
        longest = lengths[group[0]]
        assert len(group) == 1 or longest * len(group) <= 120
        assert all(2 * lengths[index] >= longest for index in group)
    assert list(hf_teacher.groups([], 10)) == []
