"""Questions about captures and targets, as documented views for DuckDB (docs/query.md)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xtoken.schemas.configs.artifacts import QueryConfig


def query(config: "QueryConfig") -> dict[str, Any]:
    """See ``xtoken.pipeline.query.run.query``; DuckDB is imported here and not with the package."""
    from xtoken.pipeline.query.run import query as run

    return run(config)


__all__ = ["query"]
