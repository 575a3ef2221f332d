"""An audit says how far stored rows are from the same rows scored another way, and refuses rows of something else."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from in_process import InProcess

from xtoken.pipeline.capture import audit as audit_module
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.audit import Turn, accepted_audits, open_audit, read_audits, unaudited
from xtoken.pipeline.capture.worker import open_tokenizer
from xtoken.pipeline.store.codes import with_codes
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import AUDITS, clean, committed
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import Unreachable, VerificationError, XtokenError
from xtoken.schemas.manifest import AuditRecord
from xtoken.schemas.ui.progress import Silent

pytestmark = pytest.mark.usefixtures("one_worker_is_here")

STEP = 1 / 32
ROUNDED = 2.0**-16  # of a realised log-probability as it is stored, relative
TEXTS = [f"Chapter {n}: the quick brown fox, {n * 37} jumps; naïve café. " * 12 for n in range(6)]


def make_config(tmp_path: Path, teacher: str, **options: Any) -> PrecomputeConfig:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    values: dict[str, Any] = {"k": 16, "min_p": 0.01} if options.get("codec") != "sampled" else {"draws": 30}
    values |= {"backend": "fake", "max_tokens": 48, "shard_bytes": 2500, "audit_rows": 60, **options}
    return PrecomputeConfig.from_flat(
        corpus=str(tmp_path / "corpus.jsonl"), teacher=teacher, out=str(tmp_path / "out"), **values
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Callable[[str], Path]) -> PrecomputeConfig:
    """A finished capture; read only."""
    found = make_config(tmp_path_factory.mktemp("kept"), str(tokenizer_file("smollm2")))
    precompute(found, Silent(), executor=InProcess())
    return found


@pytest.fixture
def config(kept: PrecomputeConfig, tmp_path: Path) -> PrecomputeConfig:
    """A copy of it that a test may change."""
    return kept.model_copy(update={"out": str(shutil.copytree(kept.out, tmp_path / "out"))})


def audited(config: PrecomputeConfig, change: Callable[[TeacherRows], TeacherRows], shard: int = 0) -> AuditRecord:
    """Audit a shard by a second path that gives the teacher's rows, changed."""
    tokenizer, folder = open_tokenizer(config.teacher), Folder(config.out)
    teacher: Any = open_teacher(config.teacher, config.codec, tokenizer.table)
    first = teacher.rows
    teacher.second_path = lambda batch: [change(rows) for rows in first(batch)]
    bos = tokenizer.table.info.bos_id
    context = np.array([bos] if config.teacher.bos == "always" else [], np.int32)
    look = open_audit(config, folder, tokenizer, teacher, context)
    assert look is not None
    look(shard)
    return AuditRecord.model_validate_json(folder.read(f"{AUDITS}/part-{shard:05d}.json"))


def same(rows: TeacherRows) -> TeacherRows:
    return rows


def shifted(rows: TeacherRows) -> TeacherRows:
    """Each row in the place of the one before it."""
    names = ("ids", "logprob", "target_logprob")
    return replace(rows, **{name: np.roll(getattr(rows, name), 1, axis=0) for name in names})


@pytest.mark.parametrize("bos", ["never", "always"])
def test_the_teachers_own_rows_differ_by_rounding_only(config: PrecomputeConfig, bos: str, tmp_path: Path) -> None:
    config = config.changed(bos=bos, out=str(tmp_path / bos))
    precompute(config, Silent())
    found = audited(config, same)
    assert (found.method, found.against, found.capture_path) == ("path", "fake's second path (1)", "fake")
    assert 60 <= found.rows < 60 + 48
    assert 0 < found.realised_mean <= found.realised_p99 <= found.realised_max < 20 * ROUNDED
    assert found.entries_max is not None
    assert found.entries_mean is not None
    assert STEP / 8 < found.entries_mean < found.entries_max <= STEP / 2 + 1e-6
    assert (found.same_top1, found.ids_in_common) == (1.0, 1.0)
    assert found.kl_mean is not None
    assert 0 < found.kl_mean < STEP * STEP / 8
    assert found.entropy_mean is None


def test_a_small_difference_is_measured_and_let_pass(config: PrecomputeConfig) -> None:
    def off(rows: TeacherRows) -> TeacherRows:
        return replace(rows, target_logprob=rows.target_logprob - 0.02, logprob=rows.logprob - 0.1)

    found = audited(config, off)
    assert found.realised_mean == pytest.approx(0.02, abs=1e-3)
    assert found.entries_mean == pytest.approx(0.1, abs=STEP / 2)
    assert found.same_top1 == 1.0
    assert found.kl_mean is not None
    assert found.kl_mean > 0.001


def test_fewer_entries_are_fewer_in_common(config: PrecomputeConfig) -> None:
    found = audited(config, lambda rows: replace(rows, ids=rows.ids[:, :2], logprob=rows.logprob[:, :2]))
    kept = [
        count for batch in iter_capture(config.out, ["kept"], [0]) for row in batch["kept"] for count in row.as_py()
    ]
    assert found.ids_in_common == pytest.approx(np.minimum(kept, 2).sum() / sum(kept), abs=0.05)
    assert found.same_top1 == 1.0


@pytest.mark.parametrize("codec", ["topk", "sampled"])
def test_rows_of_the_next_token_are_refused(tmp_path: Path, codec: str) -> None:
    config = make_config(tmp_path, "bytes", codec=codec)
    precompute(config, Silent())
    what = (
        "of the sampled tokens are the same" if codec == "sampled" else "of the rows have the same most probable token"
    )
    turned = shifted if codec == "topk" else draws_of_the_next
    with pytest.raises(XtokenError, match=rf"is not what bytes gives when scored again.*{what}.*--audit none"):
        audited(config, turned)


def test_a_refused_capture_stays_refused(config: PrecomputeConfig) -> None:
    """The same command again must not finish what an audit has stopped."""
    folder = Folder(config.out)
    audited(config, same, shard=1)
    assert len(accepted_audits(config.run, folder)) == 1
    with pytest.raises(XtokenError, match="is not what") as first:
        audited(config, shifted)
    with pytest.raises(XtokenError, match="is not what") as again:
        accepted_audits(config.run, folder)
    assert str(again.value) == str(first.value)
    knowing = accepted_audits(config.changed(audit="none").run, folder)
    assert knowing == read_audits(folder)
    assert [record.same_top1 == 1.0 for record in knowing] == [False, True], "what was found is told"


def draws_of_the_next(rows: TeacherRows) -> TeacherRows:
    assert rows.draws is not None
    parts = np.split(rows.draws.ids, np.cumsum(rows.draws.drawn)[:-1])
    counts = np.split(rows.draws.count, np.cumsum(rows.draws.drawn)[:-1])
    turned = replace(
        rows.draws,
        drawn=np.roll(rows.draws.drawn, 1),
        ids=np.concatenate([parts[-1], *parts[:-1]]),
        count=np.concatenate([counts[-1], *counts[:-1]]),
    )
    return replace(rows, draws=turned)


def test_another_number_of_rows_is_refused(config: PrecomputeConfig) -> None:
    names = ("ids", "logprob", "target_logprob")
    with pytest.raises(XtokenError, match="other numbers of rows"):
        audited(config, lambda rows: replace(rows, **{name: getattr(rows, name)[1:] for name in names}))


@pytest.mark.parametrize("name", ["target_logprob", "logprob"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_no_number_is_refused(config: PrecomputeConfig, name: str, value: float) -> None:
    def broken(rows: TeacherRows) -> TeacherRows:
        values = getattr(rows, name).copy()
        values.ravel()[0] = value
        return replace(rows, **{name: values})

    with pytest.raises(XtokenError, match="is not what"):
        audited(config, broken)
    with pytest.raises(XtokenError, match="is not what"):
        accepted_audits(config.run, Folder(config.out))


def test_log_probabilities_of_another_model_are_refused(config: PrecomputeConfig) -> None:
    with pytest.raises(XtokenError, match=r"differ on average by 0\.7\d* nats .* .at most 0\.5."):
        audited(config, lambda rows: replace(rows, target_logprob=rows.target_logprob - 0.7))


def test_entries_of_another_step_are_refused(config: PrecomputeConfig) -> None:
    with pytest.raises(XtokenError, match=r"and by 1\.5\d* for stored entries or entropies .at most 1."):
        audited(config, lambda rows: replace(rows, logprob=rows.logprob - 1.5))


def test_a_vocabulary_with_other_codes_is_refused(config: PrecomputeConfig) -> None:
    path = Path(config.out) / "vocab.parquet"
    (Path(config.out) / "manifest.json").unlink()
    vocab = pq.read_table(path)
    codes = vocab["code"].to_numpy()
    pq.write_table(with_codes(vocab.drop_columns("code"), np.roll(codes, 1)), path)
    with pytest.raises(XtokenError, match="is not what"):
        audited(config, same)


def test_draws_and_entropy(tmp_path: Path) -> None:
    config = make_config(tmp_path, "bytes", codec="sampled")
    precompute(config, Silent())
    found = audited(config, same)
    assert found.ids_in_common == 1.0
    assert found.entropy_mean is not None
    assert found.entropy_max is not None
    assert found.entropy_mean <= found.entropy_max < 20 * ROUNDED
    assert (found.same_top1, found.entries_mean, found.kl_mean) == (None, None, None)


def test_the_sample_is_whole_windows_and_follows_from_plan_and_shard(config: PrecomputeConfig) -> None:
    asked: list[list[list[int]]] = []

    def prompts_of(shard: int, rows: int) -> list[list[int]]:
        changed = config.changed(audit_rows=rows)
        tokenizer = open_tokenizer(changed.teacher)
        teacher: Any = open_teacher(changed.teacher, changed.codec, tokenizer.table)
        first = teacher.rows
        teacher.second_path = lambda batch: asked.append([ids.tolist() for ids in batch]) or first(batch)
        look = open_audit(changed, Folder(config.out), tokenizer, teacher, np.zeros(0, np.int32))
        assert look is not None
        look(shard)
        return asked[-1]

    parts = committed(config.out)
    windows = {index: [ids for batch in iter_capture(config.out, ["teacher_ids"], [index])
                       for ids in batch["teacher_ids"].to_pylist()] for index in parts}  # fmt: skip
    few, again, more = prompts_of(0, 60), prompts_of(0, 60), prompts_of(0, 10**6)
    assert few == again
    assert all(prompt in windows[0] for prompt in few)
    assert sum(len(prompt) - 1 for prompt in few) >= 60 > sum(len(prompt) - 1 for prompt in few[1:]) - 48
    assert len(few) < len(more)
    assert more == [ids for ids in windows[0] if len(ids) > 1], "all there are where more is asked for"
    assert [windows[1].index(prompt) for prompt in prompts_of(1, 60)] != [windows[0].index(prompt) for prompt in few]


def test_the_first_record_stands(config: PrecomputeConfig) -> None:
    first = audited(config, same)
    off = audited(config, lambda rows: replace(rows, target_logprob=rows.target_logprob - 0.1))
    assert off == first
    assert read_audits(Folder(config.out)) == [first]


def test_nothing_to_audit(config: PrecomputeConfig) -> None:
    tokenizer, folder = open_tokenizer(config.teacher), Folder(config.out)
    teacher: Any = open_teacher(config.teacher, config.codec, tokenizer.table)
    context = np.zeros(0, np.int32)
    assert open_audit(config, folder, tokenizer, teacher, context) is None, "the fake teacher has no second path"
    teacher.second_path = teacher.rows
    none = config.changed(audit="none")
    assert open_audit(none, folder, tokenizer, teacher, context) is None
    look = open_audit(config, folder, tokenizer, teacher, context)
    assert look is not None
    look(10**6)  # failed, so that it was never committed
    assert read_audits(folder) == []


def test_an_outage_says_nothing_about_the_rows(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = audit_module.read_commit, []

    def flaky(folder: Folder, index: int) -> Any:
        calls.append(index)
        if len(calls) < 3:
            raise Unreachable("no answer")
        return real(folder, index)

    monkeypatch.setattr(audit_module, "read_commit", flaky)
    assert audited(config, same).same_top1 == 1.0
    assert calls == [0, 0, 0]


def test_records_are_read_in_order_and_strangers_left_alone(config: PrecomputeConfig) -> None:
    second, first = audited(config, same, shard=1), audited(config, same, shard=0)
    folder = Folder(config.out)
    (Path(config.out) / AUDITS / "part-00002.json.0a1b2c.tmp").write_text("{")
    assert read_audits(folder) == [first, second]
    broken = Path(config.out) / AUDITS / "part-00003.json"
    broken.write_text('{"method": "guess"}')
    with pytest.raises(VerificationError, match=r"part-00003.json is not an audit .* remove it"):
        read_audits(folder)
    broken.write_text(" " * (1 << 17))
    with pytest.raises(VerificationError, match="more than the 65536 bytes"):
        read_audits(folder)
    broken.unlink()
    broken.symlink_to(Path(config.out) / AUDITS / "part-00000.json")
    with pytest.raises(VerificationError, match="symbolic link"):
        read_audits(folder)


def test_one_worker_of_a_run_audits_where_one_is_enough(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    assert Turn(folder, slot=1, cell=0).taken(5), "whoever commits first"
    assert not Turn(folder, slot=0, cell=0).taken(3)
    assert not Turn(folder, slot=2, cell=0).taken(6)
    assert Turn(folder, slot=0, cell=1).taken(4), "a cell is a run of its own"
    assert Turn(folder, slot=1, cell=0).taken(7), "whoever had the slot before is dead, and left no record"
    (tmp_path / AUDITS / "part-00007.json").touch()
    assert not Turn(folder, slot=1, cell=0).taken(8), "it had done it"


def test_a_run_says_that_nobody_lived_to_audit_it(config: PrecomputeConfig) -> None:
    folder = Folder(config.out)
    audited(config, same)
    assert unaudited(config.run, folder) is None
    assert "no part was audited" in (unaudited(config.changed(audit="hf").run, folder) or "")


def test_whose_turn_it_was_is_forgotten_with_the_run(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for cell in (0, 1):
        Turn(folder, slot=0, cell=cell).taken(cell)
    clean(folder.root, lambda part: part % 2 == 1)  # the second of two cells
    assert Turn(folder, slot=3, cell=1).taken(9)
    assert not Turn(folder, slot=3, cell=0).taken(8), "another cell may be alive"
    clean(folder.root)
    assert folder.names(AUDITS) == []


@pytest.mark.engine  # imports transformers
def test_a_model_that_transformers_cannot_load_is_refused_with_the_way_out(config: PrecomputeConfig) -> None:
    tokenizer = open_tokenizer(config.teacher)
    teacher = open_teacher(config.teacher, config.codec, tokenizer.table)
    by_hf = config.changed(audit="hf")
    with pytest.raises(XtokenError, match=r"--audit hf cannot run .*\n.*--audit none"):
        open_audit(by_hf, Folder(config.out), tokenizer, teacher, np.zeros(0, np.int32))


@pytest.mark.thorough
@pytest.mark.engine
def test_transformers_against_itself(
    tmp_path: Path, smollm2_dir: Path, figure: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, str(smollm2_dir), backend="hf", device="cpu", limit=3, audit="hf", audit_rows=80)
    precompute(config.changed(audit="none"), Silent())
    tokenizer, folder = open_tokenizer(config.teacher), Folder(config.out)
    teacher: Any = open_teacher(config.changed(backend="fake").teacher, config.codec, tokenizer.table)
    look = open_audit(config, folder, tokenizer, teacher, np.zeros(0, np.int32))
    assert look is not None
    look(0)
    (found,) = read_audits(folder)
    figure(
        f"audit of SmolLM2 by itself: realised {found.realised_mean:.1e} mean, {found.realised_max:.1e} max nats; "
        f"entries {found.entries_max:.4f} max; KL {found.kl_mean:.1e}"
    )
    assert found.method == "hf"
    assert found.against.startswith("transformers ")
    assert found.against.endswith(", float32 on cpu")
    assert found.realised_max < 20 * ROUNDED + 1e-4
    assert found.entries_max is not None
    assert found.entries_max < STEP / 2 + 1e-4
    assert found.same_top1 is not None
    assert found.same_top1 > 0.98
    assert found.kl_mean is not None
    assert found.kl_mean < STEP * STEP / 8
    clean(folder.root)  # another run
    monkeypatch.setattr(audit_module, "free_memory", lambda: 10**6)
    with pytest.raises(XtokenError, match=r"its weights take 0\.5 GB in float32, 0\.0 GB are free\n.*--audit none"):
        look(0)
