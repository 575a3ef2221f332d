"""Run folders as they are found: whole, unfinished, torn, hostile."""

import json
import math
from pathlib import Path

import pytest
from report_runs import write_run

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.report.run_folder import read_run


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "p-kl", 3, steps=20, documents=5))
    assert (run.seed, run.losses, run.steps, len(run.step_N)) == (3, ("p-kl",), 20, 20)
    assert run.tokens == run.tokens_N[-1] == json.loads((tmp_path / "run" / "summary.json").read_text())["tokens"]
    rows, values = run.curves["kd"]
    assert run.final("kd") == pytest.approx(values[-10:].mean())
    assert list(rows) == list(range(20))
    after, before = run.evaluation("after"), run.evaluation("before")
    assert after is not None
    assert before is not None
    assert after.figures["bits_per_byte"] < before.figures["bits_per_byte"]
    assert set(after.by_category) >= {"numerals_1", "latin"}
    assert sorted(run.documents) == [f"doc-{at}" for at in range(5)], "two windows of a document are one"
    assert {size for _, size in run.documents.values()} == {1000.0}
    assert run.at(0) == (0.0, 0.0)
    assert run.at(20) == (run.tokens, run.seconds)


def test_an_unfinished_run_with_a_torn_line(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", steps=150, finished=False)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 151, "lo')
    run = read_run(root)
    assert run.summary is None
    assert run.steps == 150
    assert run.evaluation("after") is None
    latest = run.evaluation("latest")
    assert latest is not None
    assert latest.step == 100


def test_a_step_made_again_after_a_rollback_counts_once(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", steps=12, finished=False, held_out=False)
    again = {"step": 11, "tokens": 45000, "seconds": 1.0, "loss": 7.0, "ce": 7.0}
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, "event": "rollback", "to": 10}) + "\n" + json.dumps(again) + "\n")
    run = read_run(root)
    assert list(run.step_N) == list(range(1, 13))
    assert run.curves["loss"][1][10] == 7.0
    assert [(event.step, event.name, event.details) for event in run.events] == [(12, "rollback", {"to": 10})]
    assert (run.tokens_N[1:] >= run.tokens_N[:-1]).all()


def test_no_number_is_kept_as_such(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", steps=1, finished=False, held_out=False)
    line = '{"step": 2, "tokens": 9000, "seconds": NaN, "loss": NaN, "kd": null, "ce": Infinity}\n'
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(line)
    run = read_run(root)
    assert math.isnan(run.curves["loss"][1][1])
    assert math.isnan(run.curves["kd"][1][1])
    assert run.curves["ce"][1][1] == math.inf
    assert math.isfinite(run.seconds)


def test_a_summary_serves_where_metrics_are_gone(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", steps=20)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    run = read_run(root)
    assert (run.steps, run.seconds) == (20, 40.0)
    after = run.evaluation("after")
    assert after is not None
    assert after.figures["kl"] > 0
    assert run.final("ce") is not None


@pytest.mark.parametrize(
    "content", [None, "{}", '{"identity": {"corpus": "x"}}', '{"identity": 3}', '{"identity": {"loss": "p-kl"}}']
)
def test_what_is_no_run_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(XtokenError, match=r"is not a training run.*'xtoken train'"):
        read_run(str(tmp_path))


def test_a_url_is_refused() -> None:
    with pytest.raises(XtokenError, match="is a URL"):
        read_run("s3://bucket/run")


HOSTILE = {
    "run.json": [
        "[]",
        "{",
        "\xff",
        "[" * 100_000,
        '{"identity": {"loss": ["$\\\\frac{"]}}',
        '{"identity": {"loss": [["p-kl"]]}}',
        '{"identity": {"loss": ["ce"], "seed": "0"}}',
        '{"identity": {"loss": ["ce"]}, "config": []}',
        '{"identity": {"loss": ["ce"], "seed": ' + "9" * 5000 + "}}",
    ],
    "metrics.jsonl": [
        "[1]\n",
        "{'step': 1}\n",
        '{"step": true, "loss": 1}\n',
        '{"step": -1, "loss": 1}\n',
        '{"step": 1, "loss": "low"}\n',
        '{"step": 1, "loss": {}}\n',
        '{"step": 1, "loss": 1, "tokens": [1]}\n',
        '{"step": 1, "loss": ' + "9" * 400 + "}\n",
        '{"step": 1, "loss": 1e308}\n',
        '{"step": 1, "eval": 7}\n',
        '{"step": 1, "eval": "after", "kl": "x"}\n',
        '{"step": 1, "eval": "after", "by_source": []}\n',
        '{"step": 1, "eval": "after", "by_source": {"a": 1}}\n',
        '{"step": 1, "event": {}}\n',
        '{"event": "spike"}\n',
    ],
    "summary.json": ["7", '{"after": []}', '{"after": {"kl": "x"}}', '{"steps": "many"}'],
    "held-out.jsonl": ['{"when": 1}\n', '{"when": "after", "id": 1}\n', '{"when": "after", "id": "a", "bits": "1"}\n'],
    "completions.jsonl": ['{"when": "after", "id": "a", "prompt": 7}\n', "null\n"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in HOSTILE.items() for text in texts])
def test_wrong_types_are_named_and_nothing_else_is_raised(tmp_path: Path, name: str, text: str) -> None:
    from xtoken.trainer.report.groups import group_runs
    from xtoken.trainer.report.verdict import Verdict

    root = write_run(tmp_path / "run", "ce", steps=2, held_out=False)
    if name == "summary.json":
        (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(XtokenError, match=name.replace(".", r"\.")):
        Verdict(group_runs([read_run(root)])).rows()
