"""Loading: normalising tokenizers, roles, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from xtoken.pipeline.tokens import load_tokenizer, refuse_long_prefix
from xtoken.schemas.errors import XtokenError


def byte_level(normalizer: Any | None = None, *, drop: str = "") -> Tokenizer:
    """Byte-level BPE without merges: every byte is a token."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(drop))
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def saved(folder: Path, tokenizer: Tokenizer, **side: Any) -> str:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in side.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def test_stable_normalisation_gives_the_normalised_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(
        saved(tmp_path, byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])))
    )
    encoded = tokenizer.encode("The ﬁrst Ｗ", complete=False)
    assert encoded.text == tokenizer.normalise("The ﬁrst Ｗ") == "the first w"
    assert encoded.ends.tolist() == list(range(1, 12))
    assert not encoded.snapped


def test_a_kept_text_is_snapped(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, byte_level(normalizers.NFKC())))
    encoded = tokenizer.encode("aﬁb", complete=False, keep_text=True)
    assert (encoded.text, encoded.snapped, encoded.ends.tolist()) == ("aﬁb", True, [1, 4, 4, 5])


def test_unstable_normalisation_is_snapped(tmp_path: Path) -> None:
    # "aa" becomes "a" each time it is applied: there is no text that stays as it is.
    tokenizer = load_tokenizer(saved(tmp_path, byte_level(normalizers.Replace("aa", "a"))))
    encoded = tokenizer.encode("x aaaa y", complete=False)
    assert tokenizer.normalise("x aaaa y") == "x aaaa y"
    assert (encoded.text, encoded.snapped) == ("x aaaa y", True)
    assert encoded.ends.tolist() == [1, 2, 6, 6, 7, 8]


def test_missing_bytes_are_snapped(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, byte_level(drop="q")))
    encoded = tokenizer.encode("qaqbq", complete=False)
    assert (encoded.snapped, encoded.ends.tolist()) == (True, [2, 5])


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    with pytest.raises(XtokenError, match=r"do not rejoin the text .* at byte 3 .*tokenizer\.json"):
        load_tokenizer(saved(tmp_path, tokenizer))


def test_added_tokens(tmp_path: Path) -> None:
    """Special ones have no bytes and are not found in text; others are literal text and are."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|sep|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think é>", normalized=False), "<fin>"])
    loaded = load_tokenizer(saved(tmp_path, tokenizer, special_tokens_map={"eos_token": {"content": "<fin>"}}))
    assert loaded.table.role[256:] == ("special", "eot", None, "eos")
    assert loaded.table.token(258) == "<think é>".encode()
    encoded = loaded.encode("<|sep|><think é><fin>", complete=True)
    assert encoded.ids.tolist()[7] == 258
    assert encoded.ids.tolist()[-1] == 259
    assert set(encoded.ids.tolist()[:-1]) & {256, 257, 259} == set()


def test_roles_by_config_ids_and_one_role_per_token(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<a>", "<b>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 257)])
    config = {"bos_token_id": 257, "eos_token_id": [257, 256], "pad_token_id": None}
    table = load_tokenizer(saved(tmp_path, tokenizer, config=config)).table
    assert table.role[256:] == ("special", "eos", "special")
    assert (table.info.adds_bos, table.info.bos_id, table.info.eos_id) == (True, 257, 257)


def test_a_declared_token_that_text_produces_stays_text(tmp_path: Path) -> None:
    loaded = load_tokenizer(saved(tmp_path, byte_level(), tokenizer_config={"pad_token": "!", "bos_token": "!"}))
    assert (loaded.table.id_of("pad"), loaded.table.info.bos_id) == (None, None)
    assert loaded.encode("!", complete=False).ends.tolist() == [1]


def test_truncation_padding_and_dropout_are_off(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.model.dropout = 0.9
    loaded = load_tokenizer(saved(tmp_path, tokenizer))
    assert len(loaded.encode("0123456789", complete=False).ids) == 10


def test_unigram_with_byte_fallback(tmp_path: Path) -> None:
    """Unigram with byte fallback whose pre-tokenizer prepends a metaspace."""
    vocab = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("▁", -1.0), ("▁ab", -2.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    loaded = load_tokenizer(saved(tmp_path, tokenizer))
    assert (loaded.table.info.kind, loaded.table.merges.shape, loaded.table.id_of("unk")) == ("metaspace", (0, 2), 0)
    for text, ends in (("ab", [2]), (" ab", [3]), ("  ab", [1, 4]), ("▁ab ▁x", [5, 6, 9, 10])):
        encoded = loaded.encode(text, complete=False)
        assert (encoded.ends.tolist(), encoded.snapped, encoded.text) == (ends, False, text)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordPiece"),
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, byte_fallback=False), "Unigram without byte fallback"),
        (models.WordLevel({"a": 0}, unk_token="a"), "WordLevel"),
    ],
)
def test_other_families_are_refused(tmp_path: Path, model: Any, message: str) -> None:
    with pytest.raises(XtokenError, match=f"{message}.*supported are byte-level BPE"):
        load_tokenizer(saved(tmp_path, Tokenizer(model)))


def test_sources_that_hold_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match="does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(XtokenError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(XtokenError, match=r"only model\.gguf.*save_pretrained"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(XtokenError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"vocab": {"a": 0}, "type": "BPE"}}'])
def test_damaged_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(XtokenError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_hub_id_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(XtokenError, match=r"'nobody/nothing'.*local folder"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(XtokenError, match="check the id"):
        load_tokenizer("no body")


def control_unigram(text: str = "") -> Tokenizer:
    """Unigram as converted from SentencePiece: its control tokens stand in its vocabulary with the best of scores."""
    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz/"]
    vocab = [(token, 0.0) for token in ("<unk>", "<s>", "</s>")]
    vocab += [("▁", -2.0), *letters, *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    tokenizer = Tokenizer(models.Unigram([*vocab, *([(text, -1.0)] if text else [])], 0, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_control_tokens_of_a_unigram_vocabulary_are_not_found_in_text(tmp_path: Path) -> None:
    tokenizer = control_unigram()
    side = {"bos_token": "<s>", "eos_token": "</s>"}
    loaded = load_tokenizer(saved(tmp_path, tokenizer, tokenizer_config=side))
    assert [loaded.table.id_of(role) for role in ("unk", "bos", "eos")] == [0, 1, 2]
    assert (loaded.prefix, loaded.table.info.adds_bos, loaded.table.size) == ((1,), True, tokenizer.get_vocab_size())
    for text in ("a <s>b</s> <unk>", "<s>", "the 中 </s>", "x<tool>y"):
        encoded = loaded.encode(text, complete=False)
        assert not set(encoded.ids.tolist()) & {0, 1, 2}
        spelt = b"".join(loaded.table.token(token) for token in encoded.ids.tolist())
        assert spelt == b" " + text.encode()
        assert encoded.ends[-1] == len(text.encode())
    plain = "the 中 boats"
    wanted = tokenizer.encode(plain, add_special_tokens=False).ids
    assert loaded.encode(plain, complete=False).ids.tolist() == wanted


def test_a_byte_that_the_vocabulary_lacks_is_named(tmp_path: Path) -> None:
    data = json.loads(control_unigram().to_str())
    data["model"]["vocab"] = [["<0x??>" if token == "<0xE4>" else token, s] for token, s in data["model"]["vocab"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(XtokenError, match=r"no token for the byte <0xE4> .*byte fallback needs all"):
        load_tokenizer(str(tmp_path))


def _edit(data: dict[str, Any], path: list[Any], value: Any) -> None:
    for step in path[:-1]:
        data = data[step]
    if value is None:
        del data[path[-1]]
    else:
        data[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["decoder"], "ByteLevel", "'decoder' of tokenizer.json is 'ByteLevel'"),
        (["pre_tokenizer"], ["ByteLevel"], "'pre_tokenizer'"),
        (["normalizer"], {"type": "Sequence", "normalizers": "NFC"}, "'normalizers' of 'normalizer'"),
        (["normalizer"], {"type": "Sequence", "normalizers": ["NFC"]}, r"normalizer\.normalizers\[0\]"),
        (["added_tokens", 0, "id"], None, "added token 0, '<|a|>',.*whole number"),
        (["added_tokens", 0, "id"], -1, "added token 0, '<|a|>',.*whole number"),
        (["added_tokens", 0, "special"], None, "added token 0, '<|a|>',.*true or false"),
        (["added_tokens", 0, "content"], None, 'added token 0 .*"content"'),
        (["added_tokens", 0], "<|a|>", "added token 0"),
        (["added_tokens"], "<|a|>", "'added_tokens'"),
        (["added_tokens", 0, "id"], 200_000_000, r"id of '<\|a\|>' .*200000000.*beyond the 257 tokens"),
        (["added_tokens", 0, "id"], 300, r"'<\|a\|>' has id 300, but it is loaded as 256"),
        (["model", "merges", 0], "   ", "merge 0 of tokenizer.json is '   '"),
        (["model", "merges", 0], ["a"], "merge 0"),
        (["model", "merges"], "a b", "'merges'"),
        (["model", "vocab", "a"], "7", "id of 'a' in the vocabulary"),
        (["model", "vocab"], ["a"], "entry 0 of the vocabulary"),
        (["model", "vocab"], 7, "the vocabulary of tokenizer.json is '7'"),
    ],
)
def test_a_damaged_entry_is_named(tmp_path: Path, path: list[Any], value: Any, message: str) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|a|>"])
    data = json.loads(tokenizer.to_str())
    if "merges" in path:
        data["model"]["merges"] = [["a", "b"]]
    _edit(data, path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(XtokenError, match=message):
        load_tokenizer(str(tmp_path))


def test_several_tokens_in_front_are_refused_by_name(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["[gMASK]", "<sop>"])
    specials = [("[gMASK]", 256), ("<sop>", 257)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=specials)
    loaded = load_tokenizer(saved(tmp_path, tokenizer))
    assert loaded.prefix == (256, 257)
    with pytest.raises(XtokenError, match=r"2 tokens in front of every text \(\[gMASK\] <sop>\).* or do this$"):
        refuse_long_prefix(loaded, ", or do this")


def test_tekken_is_named(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(XtokenError, match=r"holds only tekken\.json, but tokenizer\.json is needed; convert"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ({"added_tokens_decoder": {"257": {"content": "<think>"}}}, "added_tokens_decoder .* names '<think>'"),
        ({"eos_token": "<nope>"}, "eos_token .* names '<nope>'"),
        ({"bos_token": {"content": "<nope>"}}, "bos_token .* names '<nope>'"),
    ],
)
def test_tokens_that_only_a_side_file_has_are_named(tmp_path: Path, side: dict[str, Any], message: str) -> None:
    with pytest.raises(XtokenError, match=f"{message}, which tokenizer.json lacks"):
        load_tokenizer(saved(tmp_path, byte_level(), tokenizer_config=side))


def test_the_first_known_id_of_several(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<a>"])
    assert load_tokenizer(saved(tmp_path, tokenizer, config={"eos_token_id": [9999, 256]})).table.info.eos_id == 256


def test_an_empty_token_has_no_role(tmp_path: Path) -> None:
    data = json.loads(byte_level().to_str())
    data["model"]["vocab"][""] = 256
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "pad_token": None}))
    table = load_tokenizer(str(tmp_path)).table
    assert (table.info.bos_id, table.role[256]) == (None, None)


def test_a_declared_token_of_a_unigram_vocabulary(tmp_path: Path) -> None:
    """Whether it is an added token or not: SentencePiece knows it as a control token."""
    data = json.loads(control_unigram().to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "</s>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.table.info.eos_id == 2
    assert 2 not in loaded.encode("a</s>", complete=False).ids.tolist()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["normalizer"], {"type": "Precompiled", "precompiled_charsmap": None}, "cannot be loaded"),
        (["post_processor", "special_tokens", "<s>", "ids"], [9999], "puts id 9999 in front of a text"),
        (["post_processor", "special_tokens"], {}, "cannot be loaded|fails at work"),
        (["model", "unk_id"], 9999, "unk_id"),
    ],
)
def test_what_the_library_stumbles_over_is_one_error(tmp_path: Path, path: list[Any], value: Any, message: str) -> None:
    data = json.loads(control_unigram().to_str())
    _edit(data, path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(XtokenError, match=message):
        load_tokenizer(str(tmp_path))


def test_a_pointer_and_a_tekken_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(XtokenError, match="pointer of Git LFS"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(XtokenError, match=r"tekken\.json is not a tokenizer\.json; convert"):
        load_tokenizer(str(tmp_path / "tekken.json"))
