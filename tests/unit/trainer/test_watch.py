"""A step of NaN or inf, or far above the last ones is stopped, and its worst samples are named."""

import json
import math
import random

import pytest

from xtoken.trainer.watch import LEAST, WINDOW, Diagnosis, SampleScore, Verdict, Watch, worst_samples

NAN, INF = math.nan, math.inf
STEP = {"ce": 3.0, "kd": 1.0, "grad_norm": 1.0}


def noisy(steps: int, spike: float = 20.0, seed: int = 0, kd: float = 1.0) -> Watch:
    """A watch that has seen terms with a tenth of noise, none of them a spike."""
    watch, rng = Watch(spike), random.Random(seed)
    for _ in range(steps):
        assert watch.look(3 + rng.gauss(0, 0.1), kd + rng.gauss(0, 0.1), rng.uniform(0.5, 50)) is None
    return watch


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("term", ["ce", "kd", "grad_norm"])
@pytest.mark.parametrize("spike", [0.0, 20.0])
def test_what_is_no_number_stops_the_first_step(value: float, term: str, spike: float) -> None:
    verdict = Watch(spike).look(**STEP | {term: value})
    assert verdict is not None
    assert (verdict.term, verdict.median) == (term, None)
    assert verdict.sentence.endswith(f"is {value:g}")


def test_deviations_are_those_of_the_median() -> None:
    """By hand: of 1..21 in steps of 0.1 the median is 2, the median distance 0.5, so 20 deviations are 14.826."""
    for value, expected in ((2 + 14.82, None), (2 + 14.83, 20.005)):
        watch = Watch(20.0)
        for i in range(21):
            assert watch.look(1 + i / 10, None, 1.0) is None
        verdict = watch.look(value, None, 1.0)
        assert (verdict is None) == (expected is None)
        if verdict is not None:
            assert verdict.deviations == pytest.approx(expected, abs=1e-3)
            assert verdict.sentence == "CE is 16.83, 20 deviations above its median of the last 21 steps, 2"


def test_a_spike_needs_steps_before_it() -> None:
    assert noisy(LEAST - 1).look(3.0, 99.0, 1.0) is None
    verdict = noisy(LEAST).look(3.0, 99.0, 1.0)
    assert verdict is not None
    assert verdict.term == "kd"


def test_one_that_was_stopped_does_not_become_usual() -> None:
    watch = noisy(LEAST)
    for _ in range(2 * WINDOW):
        assert watch.look(3.0, 99.0, 1.0) is not None
    assert watch.look(3.0, 1.0, 1.0) is None


def test_the_window_moves() -> None:
    """A term that has slowly come down is compared with where it is now, and one that falls at once is no fault."""
    watch = Watch(20.0)
    for step in range(400):
        assert watch.look(10 * math.exp(-step / 100), None, 1.0) is None
    assert watch.look(5.0, None, 1.0) is not None, "what it was 320 steps ago"
    assert watch.look(0.0, None, 1.0) is None


def test_both_spike_and_the_further_one_is_named() -> None:
    verdict = noisy(WINDOW).look(9.0, 1e6, 1.0)
    assert verdict is not None
    assert verdict.term == "kd"
    verdict = noisy(WINDOW).look(1e6, 9.0, 1.0)
    assert verdict is not None
    assert verdict.term == "ce"


@pytest.mark.parametrize("level", [0.0, -0.4, 1e-9])
def test_a_term_near_zero_may_move(level: float) -> None:
    """h-kl: its median may be zero or below and hardly move; twenty floors of 0.01 nats above are a spike."""
    for rise, stopped in ((0.15, False), (0.21, True)):
        watch = Watch(20.0)
        for _ in range(WINDOW):
            watch.look(3.0, level, 1.0)
        assert (watch.look(3.0, level + rise, 1.0) is not None) == stopped


def test_a_term_that_stands_still_may_move_by_its_size() -> None:
    """Two per cent of a median of 10 are a deviation of 0.2, so it stops beyond 14."""
    watch = Watch(20.0)
    for _ in range(WINDOW):
        watch.look(10.0, None, 1.0)
    assert watch.look(13.9, None, 1.0) is None
    assert watch.look(14.1, None, 1.0) is not None


def test_a_mean_of_few_may_lie_further_off() -> None:
    """Steps of 400 tokens with a spread of 0.1: one of 4 tokens may lie ten times as far off, one of 1600 no nearer."""
    watch, spread = Watch(20.0), [2.9, 3.0, 3.1]
    for step in range(WINDOW):
        watch.look(spread[step % 3], None, 1.0, 400)
    deviation = 1.4826 * 0.1
    for tokens, wider in ((1600, 1), (400, 1), (4, 10)):
        assert watch.look(3 + 20.1 * wider * deviation, None, 1.0, tokens) is not None
        assert watch.look(3 + 19.9 * wider * deviation, None, 1.0, tokens) is None
        watch.restore({"kd": [], "ce": [[spread[step % 3], 400] for step in range(WINDOW)]})


def test_off() -> None:
    assert noisy(WINDOW, spike=0.0).look(1e9, 1e9, 1e9) is None


@pytest.mark.parametrize("kept", [0, LEAST - 1, LEAST, WINDOW, 3 * WINDOW])
def test_restored_it_judges_alike(kept: int) -> None:
    """Through JSON, in the middle of everything, every later deviation is the same number."""
    watch, again = noisy(kept), Watch(20.0)
    again.look(500.0, 500.0, 1.0)  # what it saw itself is forgotten
    again.restore(json.loads(json.dumps(watch.state())))
    rng = random.Random(9)
    for _ in range(2 * WINDOW):
        ce, kd = rng.lognormvariate(1, 1), rng.lognormvariate(0, 2)
        assert watch.look(ce, kd, 1.0) == again.look(ce, kd, 1.0)
    assert watch.state() == again.state()


def test_no_teacher() -> None:
    """--loss ce: there is no KD, before or after a resume."""
    watch, again = Watch(20.0), Watch(20.0)
    for _ in range(LEAST):
        assert watch.look(3.0, None, 1.0) is None
    again.restore(watch.state())
    verdict = again.look(9.0, None, 1.0)
    assert verdict is not None
    assert verdict.term == "ce"


SPIKE = Verdict("kd", 41.25, 1.93, 37.4, 50)
SCORES = [
    SampleScore("doc1#0", 512, 3.1, (1.8,)),
    SampleScore("doc2#0", 40, 9.5, (2.2,)),
    SampleScore("doc3#1", 812, 2.3, (131.25,)),
    SampleScore("doc4#0", 77, 4.0, (17.0,)),
]


def test_the_worst_by_their_term() -> None:
    assert [score.id for score in worst_samples(SCORES, "kd")] == ["doc3#1", "doc4#0", "doc2#0", "doc1#0"]
    assert [score.id for score in worst_samples(SCORES, "ce")] == ["doc2#0", "doc4#0", "doc1#0", "doc3#1"]
    assert worst_samples(SCORES, "grad_norm")[0].id == "doc3#1"


def test_no_number_is_worst_whatever_the_term() -> None:
    broken = [SampleScore("x", 1, NAN, (1.0,)), SampleScore("y", 1, 1.0, (INF,)), SampleScore("z", 1, 2.0, (NAN, 3.0))]
    for term in ("kd", "ce", "grad_norm"):
        assert {score.id for score in worst_samples([*SCORES, *broken], term)[:3]} == {"x", "y", "z"}


def test_a_sample_that_a_teacher_does_not_hold() -> None:
    scores = [SampleScore("a", 9, 5.0, (None, None)), SampleScore("b", 9, 1.0, (None, 7.0)), SampleScore("c", 9, 1.0)]
    assert [score.id for score in worst_samples(scores, "kd")] == ["b", "a", "c"]
    assert str(scores[1]) == "b (9 tokens, KD - / 7, CE 1)"
    assert str(scores[2]) == "c (9 tokens, CE 1)"


def test_the_message_says_all_and_the_way_out() -> None:
    assert str(Diagnosis(412, SPIKE, SCORES).error()) == (
        "step 412: KD is 41.25, 37.4 deviations above its median of the last 50 steps, 1.93; the step was not taken, "
        "the last checkpoint stays; worst of its 4 samples, each scored alone: doc3#1 (812 tokens, KD 131.2, CE 2.3), "
        "doc4#0 (77 tokens, KD 17, CE 4), doc2#0 (40 tokens, KD 2.2, CE 9.5); look at one with 'xtoken inspect TARGETS "
        "--html doc3#1', go back and leave the step out with --rollback N, lower --lr, or --spike 0 to go on regardless"
    )


def test_broken_weights_are_told_from_a_broken_sample() -> None:
    """NaN in every sample is the weights' doing; in one, the sample's; in none, the backward pass's."""
    verdict = Verdict("ce", NAN)
    bad = [SampleScore(score.id, score.tokens, NAN, (NAN,)) for score in SCORES]
    weights, sample, none = (
        str(Diagnosis(4, verdict, scores).error()) for scores in (bad, [*SCORES[1:], bad[0]], SCORES)
    )
    assert "each of its 4 samples alone gives NaN or inf: the weights are at fault" in weights
    assert "4 samples, each scored alone: doc1#0 (512 tokens, KD nan, CE nan)," in sample
    assert "at fault" not in sample
    assert "they break in the backward pass; worst of its 4 samples" in none
    for message in (weights, sample, none):
        assert "step 4: CE is nan" in message
        assert "--spike" not in message, "it would not help"
        assert "--rollback N" in message


def test_a_step_without_scores_is_still_explained() -> None:
    message = str(Diagnosis(4, SPIKE, []).error())
    assert "the last checkpoint stays; go back" in message
    assert "inspect" not in message


def test_the_record_is_json_with_every_sample() -> None:
    scores = [*SCORES, SampleScore("doc9#0", 3, NAN, (INF, None))]
    record = Diagnosis(412, SPIKE, scores).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["no_number"] == 1
    assert [sample["id"] for sample in record["samples"]] == ["doc9#0", "doc3#1", "doc4#0", "doc2#0", "doc1#0"]
    assert record["samples"][0] == {"id": "doc9#0", "tokens": 3, "ce": "nan", "kd": ["inf", None]}
    assert (record["term"], record["median"], record["deviations"]) == ("kd", 1.93, 37.4)
    assert Diagnosis(1, Verdict("ce", INF), []).record()["value"] == "inf"
