"""What the lab does on disk, by xtoken's own verbs; what is there is not made again.

WORK/texts, tokenizers, captures, targets, students: made when a run first needs them. WORK/runs/NAME: one folder per
training run, which "xtoken report" reads; WORK/figures/NAME.json: what it was judged by.
"""

import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab import next_byte, numerals, texts
from benchmarks.lab.plan import Plan, Run
from benchmarks.verbs import ROOT, xtoken

MODELS, TOKENIZERS = ROOT / ".cache" / "models", ROOT / ".cache" / "tokenizers"
STUDENT = Path(__file__).parent
# Numerals of up to three digits are a token, as Llama-3's and GPT-4's tokenizers have them.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
VOCABULARY = 8192
LOSSES = "p-kl,h-kl,gold,alm,byte-prefix,strict"
WINDOW = 256  # teacher tokens of a sample
EARLY = "80"  # steps
Figures = dict[str, Any]
Documents = dict[str, list[float]]  # what is summed, and what it is divided by


class NotSwept(Exception):
    """The learning rate of a setting is not known yet."""


class Lab:
    """A plan and the folder it is carried out in."""

    def __init__(self, plan: Plan, work: Path, threads: int) -> None:
        """Write the texts, which are small.

        Raises:
            SystemExit: there are others.
        """
        self.plan, self.work, self.threads = plan, work, threads
        self._best_rates: dict[tuple[Run, ...], float] = {}  # of sweeps that were run
        judge = work / "texts" / "judge.jsonl"
        if not judge.exists():
            texts.prepare(work / "texts")
            parts = [(work / "texts" / f"{name}.jsonl").read_text("utf-8") for name in ("held-out", "other")]
            judge.write_text("".join(parts), encoding="utf-8")
        kinds = {json.loads(line)["id"].split("/")[0] for line in judge.read_text("utf-8").splitlines()}
        if kinds != {*texts.JUDGE, *texts.OTHER}:
            raise SystemExit(f"{judge} has documents of {', '.join(sorted(kinds))}, not as texts.py: take another WORK")

    def done(self, run: Run) -> Figures | None:
        """A run's figures; None: it was not run, or its rate is not known yet."""
        try:
            kept = self.figures(self.name(run))
        except NotSwept:
            return None
        if not kept.exists():
            return None
        found: Figures = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def carry_out(self, experiment: str, jobs: int, until: float) -> bool:
        """The runs of an experiment that are not done, and the sweeps that they need; whether all are done.

        Args:
            jobs: runs at a time; each has ``threads`` threads.
            until: of ``time.monotonic``; no run begins later.
        """
        runs = self.plan.runs(experiment)
        sweeps = [one for run in runs if run.rate is None for one in self.plan.sweep(run)]
        given = [*sweeps, *(run for run in runs if run.rate is not None)]
        # what is given first, since the others take their rates from it
        for wave in (given, [run for run in runs if run.rate is None]):
            waiting = {self.name(run): run for run in wave if not self._finished(run)}
            for run in waiting.values():
                self._targets(run)  # not by two at once
                self._student(run)
                if "next-byte" in self.asked(self.name(run)):
                    self._original(run.student)

            def train(run: Run) -> None:
                if time.monotonic() < until:
                    self.train(run)

            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(train, waiting.values()))
            if not all(map(self._finished, wave)):
                return False
        self._judge_untrained(experiment)
        return True

    def _finished(self, run: Run) -> bool:
        if self.done(run) is None:
            return False
        name = self.name(run)
        return all(self._kept(name, what).exists() for what in self.asked(name))

    def train(self, run: Run) -> None:
        """A run whose rate is known, how it is judged, and what claims need to know of it."""
        name = self.name(run)
        if self.done(run) is None or not (self.work / "runs" / name).exists():
            self.keep(name, self._trained(run))
        self.measure(run)

    def _trained(self, run: Run) -> Figures:
        name = self.name(run)
        began = time.monotonic()
        out, student = self.work / "runs" / name, self.plan.words["students"][run.student]
        folders, more = self._targets(run)
        words = ["train", ",".join(map(str, folders)), *self._student(run), "--out", out, "--seed", run.seed]
        words += _flags({**self.plan.words["settings"][run.setting], **student["flags"], **more})
        words += ["--steps", run.steps, "--step-tokens", student["step_tokens"], "--lr", self.rate(run)]
        words += ["--eval-text", self.work / "texts" / "judge.jsonl", "--eval-id-field", "id", "--completions", 0]
        # what is kept must be saved in the first place
        if kept_every := self.plan.checkpoints(run):
            words += ["--save-every", kept_every, "--keep-every", kept_every]
        else:
            words += ["--save-every", min(250, run.steps), "--keep", 1]
        summary = xtoken(words, self.threads)
        return {
            "run": name,
            "experiment": run.experiment,
            "setting": run.setting,
            "variant": run.variant,
            "rate": self.rate(run),
            "seed": run.seed,
            "steps": run.steps,
            "summary": summary,
            "documents": judged(out / "held-out.jsonl"),
            "minutes": (time.monotonic() - began) / 60,
        }

    def name(self, run: Run) -> str:
        """Of a run's folder: all that decides it, so that experiments share runs."""
        student, setting, variant, _, seed, steps = self.plan.key(run)
        parts = [student, setting, variant, f"{self.rate(run):g}", f"{steps}", f"seed {seed}"]
        return "_".join(part.replace(" ", "-").replace(":", "-") for part in parts if part)

    def rate(self, run: Run) -> float:
        """Peak learning rate: the run's own, else the best of its setting's sweep.

        Raises:
            NotSwept: that was not run yet.
        """
        if run.rate is not None:
            return run.rate
        sweep = tuple(self.plan.sweep(run))
        if sweep in self._best_rates:
            return self._best_rates[sweep]
        swept = {one.rate: self.done(one) for one in sweep}
        scores = {rate: bits_per_byte(one["documents"], texts.JUDGE) for rate, one in swept.items() if one and rate}
        if len(scores) < len(swept):
            raise NotSwept(run.setting)
        self._best_rates[sweep] = min(scores, key=lambda rate: scores[rate])
        return self._best_rates[sweep]

    def _student(self, run: Run) -> list[Any]:
        student = self.plan.words["students"][run.student]
        if "config" in student:
            return ["--from-scratch", STUDENT / student["config"], "--tokenizer", self.tokenizer(student["tokenizer"])]
        return ["--student", self.transplant(run.student, self.plan.variant(run))]

    def tokenizer(self, name: str) -> Path:
        """A tokenizer of a package, or the one that is trained on the texts."""
        if name != "packed-8k":
            return TOKENIZERS / name if (TOKENIZERS / name).exists() else MODELS / name
        folder = self.work / "tokenizers" / name
        if not (folder / "tokenizer_config.json").exists():
            train_tokenizer(self.work / "texts" / "train.jsonl", folder)
        return folder

    def transplant(self, student: str, variant: Mapping[str, Any]) -> Path:
        """The student of a transfer before its training."""
        asked = {**self.plan.words["students"][student]["transplant"], **variant}
        out = self._transplanted(student, asked)
        if not (out / "config.json").exists():
            tokenizer = asked["tokenizer"] if asked["tokenizer"] == "bytes" else self.tokenizer(asked["tokenizer"])
            words = ["transplant", MODELS / asked["model"], "--tokenizer", tokenizer, "--init", asked["init"]]
            donor = ["--donor", MODELS / asked["donor"]] if "donor" in asked else []
            xtoken([*words, *donor, "--out", out], self.threads)
        return out

    def _transplanted(self, student: str, asked: Mapping[str, Any]) -> Path:
        return self.work / "students" / f"{student}-{asked['init']}"

    def _targets(self, run: Run) -> tuple[list[Path], Figures]:
        """Folders of targets, and flags of training that go with them."""
        variant = self.plan.variant(run)
        teachers = variant.get("teachers", [self.plan.words["students"][run.student].get("teacher", "smollm2-135m")])
        rows = {name: variant[name] for name in ("k", "min-p", "codec", "draws") if name in variant}
        losses = (
            "mined" if run.setting == "mined" else "p-kl" if {*variant} & {"rule", "k", "min-p", "codec"} else LOSSES
        )
        made = [
            self.targets(run.student, self.capture("train", teacher, rows), losses, variant.get("rule", "pieces"))
            for teacher in teachers
        ]
        return made, {name: variant[name] for name in ("weights", "weighting") if name in variant}

    def measured(self, figures: Figures, figure: str) -> Documents | None:
        """What is summed and what it is divided by, of each document, of a figure that a claim is about.

        ``held-out`` and ``other`` come with the run; ``measure`` finds the others, which are None before that.
        """
        if figure in ("held-out", "other"):
            kinds = texts.JUDGE if figure == "held-out" else texts.OTHER
            return {name: one for name, one in figures["documents"].items() if name.split("/")[0] in kinds}
        if figure == "next-byte":
            kept = self._kept(figures["run"], figure)
            found: Documents | None = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else None
            return found
        steps = self.numerals(figures)
        return steps.get(EARLY if figure == "early" else max(steps, key=int)) if steps else None

    def numerals(self, figures: Figures) -> dict[str, Documents]:
        """Of a run by step; nothing before ``measure``."""
        kept = self._kept(figures["run"], "numerals")
        found: dict[str, Documents] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        return found

    def asked(self, name: str) -> set[str]:
        """What claims need of a run beyond what it says itself: of ``numerals`` and ``next-byte``."""
        return self._asked_of.get(name, set())

    @property
    def _asked_of(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for claim in self.plan.words["claims"]:
            what = {"early": "numerals", "numerals": "numerals", "next-byte": "next-byte"}.get(claim["figure"])
            for run in self.plan.runs(claim["experiment"]) if what else ():
                if f"{run.setting} {run.variant}".strip() in self.plan.compared(claim):
                    with suppress(NotSwept):
                        found.setdefault(self.name(run), set()).add(str(what))
        return found

    def measure(self, run: Run) -> None:
        """What claims need of a run beyond what it says itself; once, and its checkpoints are removed then."""
        name = self.name(run)
        asked = {what for what in self.asked(name) if not self._kept(name, what).exists()}
        folder = self.work / "runs" / name
        if "next-byte" in asked:
            self.keep(name, self._next_byte(run.student, name), "next-byte")
        if "numerals" in asked:
            self.keep(name, numerals.measure(folder, self.work / "texts" / "held-out.jsonl"), "numerals")
        # two gigabytes of a run whose checkpoints were all kept
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def figures(self, name: str) -> Path:
        """Where a run's own figures are."""
        return self.work / "figures" / f"{name}.json"

    def keep(self, name: str, figures: Figures, what: str = "") -> None:
        """Write figures of a run, whole."""
        kept = self._kept(name, what) if what else self.figures(name)
        kept.parent.mkdir(exist_ok=True)
        whole = kept.with_suffix(".part")
        whole.write_text(json.dumps(figures), encoding="utf-8")
        whole.replace(kept)

    def baselines(self, experiment: str) -> dict[str, Documents]:
        """Of a transfer: the model before it moved, and right after; what ``measure`` has judged."""
        found = {}
        for label, model in self._untrained(experiment).items():
            kept = self._kept(model.name, "untrained")
            if kept.exists():
                found[label] = judged(kept)
        return found

    def untrained(self) -> dict[str, Documents]:
        """Of the models of every transfer before their training, by folder; what is judged."""
        found = {}
        for kept in sorted((self.work / "figures").glob("*.untrained.json")):
            found[kept.name.removesuffix(".untrained.json")] = judged(kept)
        return found

    def keep_untrained(self, name: str, documents: Documents) -> None:
        """What a model that was not trained was judged by, unless it is there."""
        kept = self._kept(name, "untrained")
        rows = [json.dumps({"id": one, "bits": bits, "bytes": size}) for one, (bits, size) in documents.items()]
        if not kept.exists():
            kept.write_text("\n".join(rows) + "\n", encoding="utf-8")

    def check_judge(self, sizes: Mapping[str, float], results: Path) -> None:
        """Whether results are of the documents that are here.

        Args:
            sizes: bytes by id; windows of one document have its id, "#" and a number.
            results: file, for the message.

        Raises:
            SystemExit: they are not.
        """
        judge = self.work / "texts" / "judge.jsonl"
        rows = map(json.loads, judge.read_text("utf-8").splitlines())
        here = {row["id"]: len(row["text"].encode()) for row in rows}
        there: dict[str, float] = {}
        for name, size in sizes.items():
            document = name.rpartition("#")[0]
            there[document] = there.get(document, 0) + size
        if there != here:
            raise SystemExit(
                f"{results} was judged by other documents than {self.work}: take another WORK, or --afresh"
            )

    def _judge_untrained(self, experiment: str) -> None:
        for model in self._untrained(experiment).values():
            kept = self._kept(model.name, "untrained")
            if not kept.exists():
                judge = self.work / "texts" / "judge.jsonl"
                xtoken(["eval", model, "--text", judge, "--id-field", "id", "--out", kept], self.threads)

    def _untrained(self, experiment: str) -> dict[str, Path]:
        """Models by label; the transplants are there once the experiment's runs are."""
        asked = self.plan.words["experiments"][experiment]
        given = self.plan.words["students"].get(asked.get("student"), {}).get("transplant")
        if given is None:
            return {}
        found = {f"original {given['model']}": MODELS / given["model"]}
        for name, variant in asked.get("variants", {"": {}}).items():
            folder = self._transplanted(asked["student"], {**given, **variant})
            found[f"moved, untrained {name}".strip()] = folder
        return found

    def _next_byte(self, student: str, run: str) -> Documents:
        """KL of the next byte from the model that a student was before it moved, after a run."""
        model = self.work / "runs" / run / "model"
        moved = next_byte.measured(model, str(model), self.work / "texts" / "judge.jsonl")
        return next_byte.divergence(self._original(student), moved)

    def _original(self, student: str) -> dict[str, Any]:
        model = MODELS / str(self.plan.words["students"][student]["transplant"]["model"])
        kept = self._kept(model.name, "next-byte").with_suffix(".npz")
        if not kept.exists():
            np.savez(kept, **next_byte.measured(model, str(model), self.work / "texts" / "judge.jsonl"))
        return dict(np.load(kept))

    def _kept(self, run: str, what: str) -> Path:
        return self.work / "figures" / f"{run}.{what}.json"

    def capture(self, text: str, teacher: str, rows: Mapping[str, Any]) -> Path:
        """A teacher's rows of a text."""
        out = self.work / "captures" / "-".join([text, teacher, *(f"{name}-{value}" for name, value in rows.items())])
        if not (out / "manifest.json").exists():
            words = ["precompute", self.work / "texts" / f"{text}.jsonl", "--id-field", "id", "--teacher"]
            words += [MODELS / teacher, "--max-tokens", WINDOW, "--shard-bytes", 1 << 16, *_flags(rows)]
            xtoken([*words, "--out", out], self.threads)
        return out

    def targets(self, student: str, capture: Path, losses: str, rule: str) -> Path:
        """A capture's rows as a student is taught them."""
        rule_words = [] if rule == "pieces" else [rule.replace(":", "-")]
        losses_words = [] if losses == LOSSES else [losses]
        out = self.work / "targets" / "-".join([student, capture.name, *losses_words, *rule_words])
        if not (out / "manifest.json").exists():
            asked = self.plan.words["students"][student]
            tokenizer = self.tokenizer(asked["tokenizer"]) if "tokenizer" in asked else self.transplant(student, {})
            words = ["align", capture, "--student", tokenizer, "--for", losses, "--out", out]
            if rule != "pieces":
                w = self.work / "w" / f"{student}-{capture.name}-{rule.replace(':', '-')}"
                if not (w / "manifest.json").exists():
                    xtoken(
                        ["project", "--student", tokenizer, "--teacher", capture, "--rule", rule, "--out", w],
                        self.threads,
                    )
                words += ["--w", w]
            xtoken(words, self.threads)
        return out


def _flags(values: Mapping[str, Any]) -> list[str]:
    """As words of a command."""
    words = []
    for name, value in values.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def judged(held_out: Path) -> dict[str, list[float]]:
    """Bits and bytes of each held-out document, after training where the file is a run's, by id."""
    rows = map(json.loads, held_out.read_text(encoding="utf-8").splitlines())
    return {row["id"]: [row["bits"], row["bytes"]] for row in rows if row.get("when", "after") == "after"}


def bits_per_byte(documents: Mapping[str, list[float]], kinds: Mapping[str, int]) -> float:
    """Of the documents of some kinds."""
    chosen = [size for name, size in documents.items() if name.split("/")[0] in kinds]
    return sum(bits for bits, _ in chosen) / sum(size for _, size in chosen)


def train_tokenizer(text: Path, folder: Path) -> None:
    """A byte-level BPE whose numerals are packed, with a token that ends a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    split: Any = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    numerals = [f"{number}" for number in range(1000)] + [f"{number:02d}" for number in range(10)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    lines = text.read_text(encoding="utf-8").splitlines()
    # every numeral of up to three digits, often enough to be merged, as in Llama-3's vocabulary
    backend.train_from_iterator(
        [*(json.loads(line)["text"] for line in lines), *(" ".join(numerals) for _ in range(99))], trainer
    )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}\n')
