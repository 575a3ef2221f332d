"""A real model under other real tokenizers, from the command line: same bytes, same logits, same answers."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.tokens import load_tokenizer

pytestmark = pytest.mark.thorough  # real models and tokenizers, for minutes
RUNNER = CliRunner()
ROOT = Path(cli.__file__).resolve().parent
CAPTURE = ROOT / "tests" / "golden" / "captures" / "v4-topk"
TEXT = "the cat sat on the table and then it went out to the garden with her friend"
NINE = [piece.encode() for piece in (" С", "т", "ан", "ов", "ни", "ш", "т", "в", "о")]  # " Становништво" of Llama-2
ROUNDING = 2e-4  # of float32 logits of some 30, made by matrices of other shapes


def xtoken(*words: object) -> dict[str, Any]:
    """Figures of a command that succeeds."""
    result = RUNNER.invoke(cli.app, [*map(str, words), "--quiet", "--json"])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def refused(*words: object) -> str:
    """What a command that is refused says, in one line."""
    result = RUNNER.invoke(cli.app, [*map(str, words), "--quiet"])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def model_of(folder: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype="auto").eval()


def logits(model: Any, ids: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.as_tensor(np.asarray(ids), dtype=torch.int64)[None]).logits[0]
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def tiny(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(**settings)``: a tiny random Llama with SmolLM2's tokenizer and a head padded by 100 rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(**settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("tiny") / "tiny"
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LlamaConfig(vocab_size=49252, **{"tie_word_embeddings": False, **sizes, **settings})
            model = LlamaForCausalLM(config)
            model.lm_head.weight.data[49152:] = 50.0  # would spoil every mean
            model.model.embed_tokens.weight.data[49152:] = 50.0
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((smollm2_dir / name).read_bytes())
        return folder

    return build


@pytest.fixture(scope="module")
def permuted(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray[Any, Any]]:
    """SmolLM2's tokenizer under other ids, and the old id of each new one."""
    folder = tmp_path_factory.mktemp("permuted") / "permuted"
    folder.mkdir()
    data = json.loads((smollm2_dir / "tokenizer.json").read_text())
    old_of = np.random.default_rng(0).permutation(len(data["model"]["vocab"]))
    new_of = np.argsort(old_of).tolist()
    data["model"]["vocab"] = {token: new_of[old] for token, old in data["model"]["vocab"].items()}
    data["added_tokens"] = [{**token, "id": new_of[token["id"]]} for token in data["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_bytes((smollm2_dir / "tokenizer_config.json").read_bytes())
    return folder, old_of


def test_its_own_tokenizer_under_other_ids_is_the_same_model(
    smollm2_dir: Path, permuted: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, old_of = permuted
    figures = xtoken("transplant", smollm2_dir, "--tokenizer", folder, "--out", tmp_path / "new")
    assert figures["tied"] is True
    assert figures["classes"]["equal"] + figures["classes"]["control"] == 49152
    assert figures["template"] == "model"
    before, after = model_of(smollm2_dir), model_of(tmp_path / "new")
    order = torch.from_numpy(old_of)
    weights = [model.get_input_embeddings().weight for model in (before, after)]
    assert torch.equal(weights[1], weights[0][order]), "every row is its own, control tokens included"
    assert after.get_output_embeddings().weight is weights[1]
    ids = load_tokenizer(str(folder)).encode(TEXT, complete=True).ids
    theirs, ours = logits(before, old_of[ids]), logits(after, ids)
    assert torch.allclose(ours, theirs[:, order], rtol=0, atol=ROUNDING)
    assert torch.equal(ours.argmax(1), torch.argsort(order)[theirs.argmax(1)])


Moved = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def moved(smollm2_dir: Path, tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Moved:
    """``moved(name)``: SmolLM2 under a real tokenizer, and the figures; once each, read only."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def build(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "new"
            made[name] = (
                out,
                xtoken("transplant", smollm2_dir, "--tokenizer", tokenizer_file(name).parent, "--out", out),
            )
        return made[name]

    return build


@pytest.mark.parametrize("name", ["gemma3", "llama2", "qwen3"])
def test_where_all_tokens_are_shared_the_shared_tokens_have_their_logits(
    smollm2_dir: Path, tokenizer_file: Callable[[str], Path], moved: Moved, name: str
) -> None:
    """A text of tokens that both have, cut at the same places: the states are the same, and so the distribution over
    the tokens that both have."""
    out, figures = moved(name)
    old, new = load_tokenizer(str(smollm2_dir)), load_tokenizer(str(out))
    assert new.table.info.hash == load_tokenizer(str(tokenizer_file(name).parent)).table.info.hash == figures["hash"]
    text = f" {TEXT}"  # Llama-2 puts a blank in front, so that it sees two
    before, after = (one.encode(text, complete=False) for one in (old, new))
    skip = len(after.ids) - len(before.ids)
    assert [old.table.token(t) for t in before.ids] == [new.table.token(t) for t in after.ids[skip:]]
    twin = old.table.by_bytes()
    shared = [(t, twin[piece]) for t, piece in enumerate(new.table.pieces()) if piece in twin]
    shared = [(t, of) for t, of in shared if not new.table.byte_fallback[t]]
    assert len(shared) > 20000
    news, olds = (torch.tensor(ids) for ids in zip(*shared, strict=True))
    theirs = logits(model_of(smollm2_dir), before.ids)[:, olds]
    ours = logits(model_of(out), after.ids[skip:])[:, news]
    assert torch.allclose(ours, theirs, rtol=0, atol=ROUNDING)
    assert torch.allclose(ours.log_softmax(1), theirs.log_softmax(1), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    # the base model of Gemma-3 has no template: only roles tell what its control tokens do
    [("gemma3", "<bos>", "<end_of_turn>"), ("qwen3", "<|im_start|>", "<|im_end|>")],
)
def test_what_lies_in_the_folder_is_the_tokenizer_to_others_too(moved: Moved, name: str, begin: str, end: str) -> None:
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    out, figures = moved(name)
    theirs, ours = auto.from_pretrained(out), load_tokenizer(str(out))
    text = "Dates like 1843, naïve cafés; 日本語 and\n\tdef f(x): return x"
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text, complete=False).ids.tolist()
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert figures["template"] == "model"
    rendered = theirs.apply_chat_template(chat, tokenize=False)
    assert rendered.endswith(f"{begin}user\nHi{end}\n{begin}assistant\nHo{end}\n")
    config = json.loads((out / "generation_config.json").read_text())
    stops = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    assert theirs.convert_tokens_to_ids(end) in stops, "generation stops at the end of a turn"
    report = json.loads((out / "transplant.json").read_text())
    assert report == {name: value for name, value in figures.items() if name != "out"}


def test_an_untied_padded_head_gets_both_matrices(
    tiny: Callable[..., Path], tokenizer_file: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny()
    words = ("--tokenizer", tokenizer_file("llama2").parent, "--pad-to", "64")
    figures = xtoken("transplant", source, *words, "--out", tmp_path / "new")
    assert (figures["tied"], figures["rows_before"], figures["rows"]) == (False, 49252, 32000)
    (note,) = figures["notes"]
    assert "the model reads no BOS before a text, and the new tokenizer puts one there" in note
    before, after = model_of(source), model_of(tmp_path / "new")
    old, new = load_tokenizer(str(source)).table, load_tokenizer(str(tmp_path / "new")).table
    twin, pieces = old.by_bytes(), new.pieces()
    worst = figures["most_pieces"][0]
    parts = load_tokenizer(str(source)).table.pieces()
    assert worst["pieces"] == 9
    for name in ("get_input_embeddings", "get_output_embeddings"):
        was, now = (getattr(model, name)().weight for model in (before, after))
        ours = [t for t, piece in enumerate(pieces) if piece in twin and not new.byte_fallback[t]]
        assert torch.equal(now[ours], was[[twin[pieces[t]] for t in ours]])
        assert float(now.detach().abs().max()) < 10, "rows that belong to no token count nowhere"
        spelt = [parts.index(piece) for piece in NINE]
        assert torch.allclose(now[worst["id"]], was[spelt].mean(0), atol=1e-6)
        letter = next(t for t, piece in enumerate(pieces) if piece == b"a" and new.byte_fallback[t])
        assert torch.allclose(now[letter], was[:49152].mean(0), atol=1e-6)


def test_the_same_command_writes_the_same_bytes(
    tiny: Callable[..., Path], tokenizer_file: Callable[[str], Path], tmp_path: Path
) -> None:
    source, target = tiny(), tokenizer_file("llama2").parent
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = ("--init", "random", "--pad-to", "100", "--seed", seed)
        xtoken("transplant", source, "--tokenizer", target, *words, "--out", tmp_path / name)
        made[name] = hashes(tmp_path / name)
    assert made["a"] == made["b"]
    differ = {file for file in made["a"] if made["a"][file] != made["c"][file]}
    assert differ == {"model.safetensors", "transplant.json"}, "the report names the seed"
    report = json.loads((tmp_path / "a" / "transplant.json").read_text())
    assert (report["init"], report["seed"], report["classes"]["padded"]) == ("random", 0, 0)


def test_a_donor_explains_its_tokens(tiny: Callable[..., Path], permuted: tuple[Path, Any], tmp_path: Path) -> None:
    """The donor is the model itself, onto half of its merges and back: the lost rows come back as sums of kept ones."""
    source = tiny(hidden_size=8, num_attention_heads=1)
    small = tmp_path / "small"
    xtoken("transplant", source, "--keep-merges", "2000", "--out", small)
    words = ("--tokenizer", source, "--init", "omp", "--donor", source, "--omp-k", "8")
    figures = xtoken("transplant", small, *words, "--out", tmp_path / "back")
    assert figures["classes"]["equal"] > 2000
    assert figures["classes"]["omp"] > 40000
    was, now = (
        model.get_input_embeddings().weight[:49152] for model in (model_of(source), model_of(tmp_path / "back"))
    )
    # eight rows of two thousand span a space of width eight: every row is found again, to rounding
    assert torch.allclose(now, was, rtol=0, atol=1e-3)
    said = refused(
        *("transplant", small, "--tokenizer", permuted[0], "--init", "omp", "--donor", source, "--out", tmp_path / "no")
    )
    assert "has another tokenizer" in said
    assert not (tmp_path / "no").exists()


def test_bytes_is_a_model_of_260_tokens_that_generates(smollm2_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    out = tmp_path / "bytes"
    figures = xtoken("transplant", smollm2_dir, "--tokenizer", "bytes", "--out", out)
    assert (figures["tied"], figures["rows"]) == (False, 260)
    assert figures["classes"]["equal"] + figures["classes"]["undecodable"] == 256
    tokenizer, theirs, model = load_tokenizer(str(out)), auto.from_pretrained(out), model_of(out)
    text = "Naïve 日本\n\x00<|eos|>"
    ids = tokenizer.encode(text, complete=False).ids.tolist()
    assert ids == list(text.encode()) == load_tokenizer("bytes").encode(text, complete=False).ids.tolist()
    assert [tokenizer.controls[t] for t in range(256, 260)] == ["<|bos|>", "<|eos|>", "<|eot|>", "<|pad|>"]
    assert (tokenizer.table.info.bos_id, tokenizer.table.info.eos_id) == (256, 257)
    embedding, head = (part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    assert head.data_ptr() != embedding.data_ptr()
    old = load_tokenizer(str(smollm2_dir)).table
    was = model_of(smollm2_dir).get_input_embeddings().weight
    assert torch.equal(embedding[ord("e")], was[old.by_bytes()[b"e"]])
    assert torch.equal(embedding[257], was[old.id_of("eos")])
    inputs = theirs("In the beginning", return_tensors="pt").input_ids
    made = model.generate(inputs, max_new_tokens=5, min_new_tokens=5)
    assert made.shape == (1, 21)
    assert int(made.max()) < 260


@pytest.mark.parametrize("tokenizer", ["its own", "bytes"])
def test_a_model_of_bytes_is_a_student(tiny: Callable[..., Path], tokenizer: str, tmp_path: Path) -> None:
    """By its own tokenizer, which knows EOS, and on targets of the tokenizer 'bytes', which has 256 ids."""
    model = tmp_path / "model"
    xtoken("transplant", tiny(tie_word_embeddings=True), "--tokenizer", "bytes", "--out", model)
    student = "bytes" if tokenizer == "bytes" else model
    words = ("--tokenizer", "bytes") if tokenizer == "bytes" else ()
    xtoken("align", CAPTURE, "--student", student, "--for", "alm", "--out", tmp_path / "targets")
    steps = ("--steps", 2, "--step-tokens", 256, "--loss", "alm", "--device", "cpu")
    xtoken("train", tmp_path / "targets", "--student", model, *words, *steps, "--out", tmp_path / "run")
    trained = model_of(tmp_path / "run" / "model")
    assert trained.get_output_embeddings().weight.shape == (260, 16)
    hash_of = [load_tokenizer(str(one)).table.info.hash for one in (student, tmp_path / "run" / "model")]
    assert hash_of[0] == hash_of[1]
    said = refused("transplant", model, "--tokenizer", "bytes", "--out", tmp_path / "again")
    assert "has the tokenizer bytes already (equal hash)" in said


def test_fewer_merges_are_the_same_rows(smollm2_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 10)
    figures = xtoken(
        *("transplant", smollm2_dir, "--keep-merges", 8000, "--text", tmp_path / "text.txt", "--out", tmp_path / "new")
    )
    assert figures["bytes_compared"] == len(TEXT) * 10
    assert figures["template"] == "model"
    old, new = load_tokenizer(str(smollm2_dir)), load_tokenizer(str(tmp_path / "new"))
    assert new.table.size == figures["rows"] == 8252
    ids = new.encode(TEXT, complete=False).ids
    names = old.table.by_bytes()
    olds = [names[new.table.token(t)] for t in ids]
    theirs, ours = logits(model_of(smollm2_dir), olds), logits(model_of(tmp_path / "new"), ids)
    kept = [t for t in range(new.table.size) if new.table.token(t)]
    assert torch.allclose(ours[:, kept], theirs[:, [names[new.table.token(t)] for t in kept]], rtol=0, atol=ROUNDING)
    before, after = (
        json.loads((folder / "tokenizer_config.json").read_text()) for folder in (smollm2_dir, tmp_path / "new")
    )
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == before["chat_template"]
    assert after["eos_token"] == before["eos_token"]


def test_refusals_are_named_and_leave_nothing(
    tiny: Callable[..., Path], tokenizer_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny(), tmp_path / "out"
    target = tokenizer_file("llama2").parent
    for words, said in (
        ((), "give --tokenizer ID, FOLDER or 'bytes', or --keep-merges N"),
        (("--tokenizer", target, "--keep-merges", 9), "not both and not neither"),
        (("--tokenizer", target, "--init", "omp"), "--init omp and --donor MODEL go together"),
        (("--tokenizer", target, "--donor", source), "--init omp and --donor MODEL go together"),
        (("--keep-merges", 9, "--init", "random"), "--init random means nothing"),
        (("--tokenizer", target, "--text", "t"), "--text is what --keep-merges is checked on"),
        (("--tokenizer", source), "already (equal hash), so nothing would change"),
        (("--tokenizer", tmp_path / "none.json"), "none.json"),
        (("--keep-merges", 99999), "has 48,900 merged tokens"),
    ):
        assert said in refused("transplant", source, *words, "--out", out), said
        assert not out.exists()
    monkeypatch.chdir(source.parent)  # not empty
    assert "is not empty" in refused("transplant", source, "--tokenizer", target, "--out", ".")
    assert "is not on this machine" in refused("transplant", source, "--tokenizer", target, "--out", "s3://b/m")
    assert "lies inside" in refused("transplant", source, "--tokenizer", target, "--out", source / "new")
    assert "is not empty" in refused("transplant", source, "--tokenizer", target, "--out", source)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "is not empty" in refused("transplant", source, "--tokenizer", target, "--out", out)
    assert (out / "mine.txt").read_text() == "mine"
    assert "cannot be loaded" in refused("transplant", target, "--tokenizer", source, "--out", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
