"""Views of what each loss holds, from the schema: entries, values, and the mass that its targets give student tokens.

A loss that is added to ``xtoken.schemas.losses.LOSSES`` has them without a file here. Each is SQL as in ``sql/``, below
the same comments: a sentence, what it needs, its columns.
"""

from collections.abc import Iterator

from xtoken.schemas.losses import LOSSES, EntryTable, LossColumn, LossSchema

_IDS = ("student ids", "teacher ids", "shared ids")
# How many elements a place has, and what a place is called.
_PLACES = {
    "chunk": ("chunk", "the chunk, as in chunks"),
    "token": ("pos", "the student token that the target predicts, as in student_tokens"),
}


def loss_views() -> Iterator[tuple[str, str]]:
    """Name and text of every view, as of a file: ``NAME_entries.LOSS``; variants of one name stand in order."""
    for loss, schema in LOSSES.items():
        for table in schema.entry_tables:
            yield f"{table.name}_entries", _entries(loss, schema, table)
        for axis in _PLACES:
            if values := schema.along(axis, "value"):
                yield f"{schema.module}_{axis}_values", _values(loss, schema, axis, values)
        if any(column.holds in _IDS for column in schema.columns):
            yield "_student_mass", _student_mass(loss, schema)


def serves_student_mass(loss: str) -> bool:
    """Whether the targets of a loss say of which student tokens they are."""
    return any(column.holds in _IDS for column in LOSSES[loss].columns)


def _entries(loss: str, schema: LossSchema, table: EntryTable) -> str:
    """One row per entry. ``places`` numbers the chunk (or token) of each entry, and its rank there."""
    axis = schema.column(table.counts[0]).axis
    place, meaning = _PLACES[axis]
    whose = "chunk" if axis == "chunk" else "student token"
    tail = schema.tail_of(table)
    lists = {count: {_shown(column, table): column for column in _along(schema, count)} for count in table.counts}
    # of two count columns, what one has and the other lacks is null
    names = list(dict.fromkeys(name for columns in lists.values() for name in columns))
    order = "rank" if "low" not in names else "number"
    head = [
        f"One row per entry of each {whose}'s target for {loss}, list {table.name}.",
        f"Needs: {loss}",
        "sample_id: the sample",
        f"{place}: {meaning}",
        *([f"{table.split[0]}: {table.split[1]}"] if table.split else []),
        f"{order}: {_order(order, split=table.split is not None)}",
    ]
    outer = ["sample_id", place, *([table.split[0]] if table.split else []), order]
    for name in names:
        doc, more = _column(name, next(columns[name] for columns in lists.values() if name in columns))
        head += [doc, *more]
        outer += [name, *_COMPUTED.get(name, ())]
    if tail is not None:
        head.append("rest: probability of all else; null where it is unknown at this temperature")
        outer.append("exp(known(rest_logprob)) AS rest")
    parts = [_part(table, count, lists[count], names, place, order, tail) for count in table.counts]
    return _text(head, f"SELECT {', '.join(outer)}\nFROM (\n" + "\n    UNION ALL\n".join(parts) + "\n)")


_COMPUTED = {
    "student_id": ("student_bytes_of(student_id) AS bytes", "student_text_of(student_id) AS token"),
    "logprob": ("exp(logprob) AS probability",),
}


def _part(
    table: EntryTable,
    count: str,
    columns: dict[str, LossColumn],
    names: list[str],
    place: str,
    order: str,
    tail: LossColumn | None,
) -> str:
    """The entries of one count column."""
    chosen = ["sample_id"]
    if table.split:
        chosen.append(f"{'true' if count == table.counts[0] else 'false'} AS {table.split[0]}")
    chosen += [f"unnest(p.place) AS {place}", f"unnest(p.rank) AS {order}"]
    chosen += [f"unnest({columns[name].name}) AS {name}" if name in columns else f"NULL AS {name}" for name in names]
    if tail is not None:
        at = "list_transform(p.place, lambda place: place + 1)"
        chosen.append(f"unnest(list_select({tail.name}, {at})) AS rest_logprob")
    first = next(iter(columns.values())).name
    source = f"(SELECT *, places({count}, CAST(len({first}) AS INTEGER)) AS p FROM targets._stored)"
    return f"    SELECT {', '.join(chosen)}\n    FROM {source}"


def _along(schema: LossSchema, count: str) -> list[LossColumn]:
    return [column for column in schema.columns if column.axis == count]


def _shown(column: LossColumn, table: EntryTable) -> str:
    """A list's name in a view."""
    if column.holds == "student ids":
        return "student_id"
    if column.holds in _IDS:
        return "teacher_id"
    return "logprob" if column.holds == "logprob" else column.name.removeprefix(f"{table.name}_")


def _order(name: str, *, split: bool) -> str:
    if name == "number":
        return "number of the entry at this place, from 0"
    return f"0 for the most probable {'of its kind' if split else 'entry'}"


def _column(name: str, column: LossColumn) -> tuple[str, tuple[str, ...]]:
    """What a column means, and what those computed from it mean."""
    if name == "student_id":
        return "student_id: the entry's student token; null without one", (
            "bytes: its bytes",
            "token: its bytes as text",
        )
    if name == "teacher_id":
        return "teacher_id: the entry's token, of the teacher's vocabulary", ()
    if name == "logprob":
        return "logprob: nats at the targets' temperature", ("probability: the same as a probability",)
    return f"{name}: {column.doc.partition('] ')[2]}", ()


def _values(loss: str, schema: LossSchema, axis: str, values: list[LossColumn]) -> str:
    """One row per chunk (or student token): the log-probabilities that a loss stores beside its entries."""
    place, meaning = _PLACES[axis]
    names = {column.name.removeprefix(f"{schema.module}_"): column for column in values}
    head = [
        f"One row per {'chunk' if axis == 'chunk' else 'student token'}: what {loss} stores of it beside entries.",
        f"Needs: {loss}",
        "sample_id: the sample",
        f"{place}: {meaning}",
        *(f"{name}: {column.label or column.doc.partition('] ')[2]}; nats" for name, column in names.items()),
    ]
    shown = [f"known(unnest({column.name})) AS {name}" for name, column in names.items()]
    numbers = f"CAST(unnest(range(len({values[0].name}))) AS INTEGER) AS {place}"
    return _text(head, f"SELECT sample_id, {numbers}, {', '.join(shown)}\nFROM targets._stored")


def _student_mass(loss: str, schema: LossSchema) -> str:
    """Mass of student tokens: of the teacher's tokens, each added up first, through W."""
    pairs = [
        (column, logprob)
        for column in schema.columns
        if column.holds in _IDS
        for logprob in schema.along(column.axis, "logprob")[:1]
    ]
    entries = "\n    UNION ALL ".join(
        f"SELECT unnest({ids.name}) AS token_id, unnest({logprob.name}) AS logprob FROM targets._stored"
        for ids, logprob in pairs
    )
    head = [f"Mass of student tokens in the targets for {loss}.", f"Needs: {loss}"]
    if any(ids.holds == "teacher ids" for ids, _ in pairs):
        head[0] = f"Mass of student tokens in the targets for {loss}: that of the teacher's tokens, through W."
        teacher = f"SELECT token_id AS teacher_id, sum(exp(logprob)) AS mass FROM ({entries}) GROUP BY token_id"
        through = "SELECT student_id, sum(weight * mass) AS mass\nFROM targets._w JOIN teacher USING (teacher_id)"
        return _text(head, f"WITH teacher AS (\n    {teacher}\n)\n{through}\nGROUP BY student_id")
    return _text(head, f"SELECT token_id AS student_id, sum(exp(logprob)) AS mass\nFROM ({entries})\nGROUP BY token_id")


def _text(head: list[str], sql: str) -> str:
    return "".join(f"-- {line}\n" for line in head) + sql + "\n"
