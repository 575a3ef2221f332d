"""The SQL of the stage, by file name."""

from importlib.resources import files


def query(name: str) -> str:
    """Text of ``sql/<name>.sql``.

    ``check``, ``check_chat`` and ``joined`` run in the stage; the others say in plain SQL what the kernels compute and
    are what the tests compare them with (as joins they are several times slower).
    """
    return files("xtoken.pipeline.align").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")
