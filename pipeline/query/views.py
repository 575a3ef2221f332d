"""Views as their .sql files say: a sentence, what they need, their columns, and the query.

The views of losses come from the schema (``loss_views.py``). A file is ``sql/<set>/<view>.sql``, or
``<view>.<variant>.sql`` where several ways lead to the same columns: the first whose needs are met is taken. Views
whose name starts with ``_`` serve others and are not listed.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from xtoken.pipeline.query.loss_views import loss_views
from xtoken.schemas.errors import XtokenError

_COLUMN = re.compile(r"-- (\w+): (.+)")
_NEEDS = "Needs: "
_NAME = re.compile(r"\b(capture|targets)\.(\w+)")
# Functions that come with a relation: a view that calls one needs it.
_MADE_OF = {
    "teacher_bytes_of(": "capture._vocabulary",
    "teacher_text_of(": "capture._vocabulary",
    "teacher_id_of(": "capture._vocabulary",
    "teacher_tokens_text(": "capture._vocabulary",
    "student_bytes_of(": "targets._student_vocabulary",
    "student_text_of(": "targets._student_vocabulary",
    "spelled(": "targets._student_vocabulary",
}
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class View:
    """One .sql file.

    Attributes:
        name: with the set it is of, as in ``capture.samples``.
        about: a sentence.
        columns: name and meaning of each, in order; none of a view that is not listed.
        needs: all of the first words of each choice must be held: ``p-kl | h-kl`` needs one of them.
        text: the whole file.
    """

    name: str
    about: str
    columns: tuple[tuple[str, str], ...]
    needs: tuple[str, ...]
    text: str

    @property
    def listed(self) -> bool:
        """Whether it is for people."""
        return not self.name.partition(".")[2].startswith("_")

    @property
    def uses(self) -> list[str]:
        """Relations that the query, or the comment above it, names."""
        names = [match[0] for match in _NAME.finditer(self.text)]
        return list(dict.fromkeys([*(name for word, name in _MADE_OF.items() if word in self.text), *names]))

    def lacks(self, held: Collection[str]) -> list[str]:
        """Needs that are not met."""
        return [need for need in self.needs if not set(need.split(" | ")).intersection(held)]


def read_view(folder: str, file: str, text: str) -> View:
    """A view from its file."""
    about = ""
    needs: tuple[str, ...] = ()
    columns: list[tuple[str, str]] = []
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        match = _COLUMN.fullmatch(line)
        if line.startswith(f"-- {_NEEDS}"):
            needs = tuple(line.removeprefix(f"-- {_NEEDS}").split(", "))
        elif match is None:
            about = f"{about} {line.removeprefix('-- ')}".strip()
        else:
            columns.append((match[1], match[2]))
    return View(f"{folder}.{file.split('.')[0]}", about, tuple(columns), needs, text)


def sql(name: str) -> str:
    """Text of ``sql/<name>.sql``."""
    return files("xtoken.pipeline.query").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")


def read_views(folders: Iterable[str]) -> list[View]:
    """All views of some sets, by name: those of files, and of targets those of each loss."""
    views = []
    for folder in folders:
        of_folder = sorted(files("xtoken.pipeline.query").joinpath("sql", folder).iterdir(), key=lambda file: file.name)
        in_order = [read_view(folder, file.name, file.read_text(encoding="utf-8")) for file in of_folder]
        if folder == "targets":
            in_order += [read_view(folder, name, text) for name, text in loss_views()]
        views += sorted(in_order, key=lambda view: view.name)
    return views


@dataclass(frozen=True)
class Catalog:
    """The views of what is asked, under the names that a query has for them.

    Attributes:
        views: those whose needs are met, by full name.
        lacking: the others, and what they lack.
        prefix: before the public names of the capture's views.
    """

    views: Mapping[str, View]
    lacking: Mapping[str, str]
    prefix: str = ""

    @classmethod
    def of(
        cls,
        folders: Iterable[str],
        held: Mapping[str, bool],
        reasons: Mapping[str, str],
        prefix: str,
        first: Iterable[View] = (),
    ) -> "Catalog":
        """Choose variants by what is held.

        Args:
            folders: sets of views.
            held: what views may need, and whether it is there.
            reasons: for what is not there, why, and the way out.
            first: views that come before those of the files.
        """
        there = {need for need, has in held.items() if has}
        views: dict[str, View] = {}
        lacking: dict[str, str] = {}
        for view in (*first, *read_views(folders)):
            lacks = view.lacks(there)
            if not lacks:
                views.setdefault(view.name, view)
            elif view.listed:
                lacking[view.name] = reasons[lacks[0].split(" | ")[0]]
        return cls(views, {name: why for name, why in lacking.items() if name not in views}, prefix)

    def public(self, name: str) -> str:
        """What a query calls a view."""
        folder, _, bare = name.partition(".")
        return f"{self.prefix}{bare}" if folder == "capture" else bare

    @property
    def listed(self) -> dict[str, View]:
        """Views for people, by public name: the capture's last where there are targets."""
        order = sorted(self.views.values(), key=lambda view: view.name.startswith("capture.") and bool(self.prefix))
        return {self.public(view.name): view for view in order if view.listed}

    def mentioned(self, query: str) -> list[str]:
        """Full names of the views whose name is a word of a query: at least all that it reads."""
        words = {word.lower() for word in _WORD.findall(query)}
        return [
            view.name for name, view in self.listed.items() if name in words or view.name.partition(".")[2] in words
        ]

    def closure(self, names: Iterable[str]) -> list[str]:
        """Views and relations that these need, each after what it needs."""
        order: dict[str, None] = {}
        for name in names:
            view = self.views.get(name)
            if view is not None:
                order |= dict.fromkeys(self.closure(used for used in view.uses if used != name))
            order[name] = None
        return list(order)

    def rows(self) -> list[dict[str, Any]]:
        """One row per view."""
        return [
            {"view": name, "about": view.about, "columns": ", ".join(column for column, _ in view.columns)}
            for name, view in self.listed.items()
        ]

    def missing(self) -> list[dict[str, Any]]:
        """One row per view that is not there, and why."""
        return [{"not here": self.public(name), "because": why} for name, why in self.lacking.items()]

    def described(self, name: str) -> dict[str, Any]:
        """One view's columns.

        Raises:
            XtokenError: it is not there for a reason.
        """
        for lacking, why in self.lacking.items():
            if self.public(lacking) == name:
                raise XtokenError(f"{name} is not here: {why}")
        view = self.listed[name]
        return {"view": name, "about": view.about, "columns": [{"column": c, "meaning": m} for c, m in view.columns]}

    def knows(self, word: str) -> bool:
        """Whether a word is the public name of a view, there or not."""
        return word in self.listed or word in map(self.public, self.lacking)
