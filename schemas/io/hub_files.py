"""Files of a model: there, known to be absent, or out of reach, which are three different answers.

A tokenizer whose side file cannot be reached is another tokenizer; it must not pass for one that has no such file.
"""

import os
import re
from pathlib import Path
from typing import Any

from xtoken.schemas.errors import XtokenError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def there(path: Path) -> bool:
    """Whether a folder holds this file.

    Raises:
        XtokenError: its name is there, but not its content, or nobody can tell.
    """
    try:
        if path.is_file():
            return True
    except OSError as error:
        raise XtokenError(f"{path} cannot be reached ({error.strerror}); check its rights") from error
    if os.path.lexists(path):
        raise XtokenError(f"{path} is not a file, or a link to nothing; fetch it again, or remove it")
    return False


def hub_file(repo: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a model's repository, from the cache or fetched; None where the repository has none.

    Raises:
        XtokenError: neither the hub nor the cache says whether there is one, or the id cannot be one.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        # what a commit holds never changes, and a hub that does not answer takes minutes to ask
        if revision is not None and _COMMIT.fullmatch(revision) and known_absent(repo, name, revision):
            return None
        return Path(hf_hub_download(repo, name, revision=revision))
    except LocalEntryNotFoundError as error:
        if known_absent(repo, name, revision):
            return None
        raise _out_of_reach(repo, name, revision, error) from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise XtokenError(
            f"{repo!r} is not a local folder, and {name} cannot be fetched from the hub "
            f"({type(error).__name__}); check the id and the connection, or give a local folder"
        ) from error


def require_known(source: str, name: str, commit: str | None) -> None:
    """Raise XtokenError when nobody can tell whether a folder or repository has this file."""
    if os.path.isdir(source):
        there(Path(source) / name)
    else:
        hub_file(source, name, commit)


def commit_of(path: Path) -> str | None:
    """The commit whose file this is in the hub's cache: further files are to be of the same."""
    return path.parent.name if _COMMIT.fullmatch(path.parent.name) else None


def known_absent(repo: str, name: str, revision: str | None) -> bool:
    """Whether the cache says that the repository has no such file: by a mark of an earlier request, or a listing."""
    import huggingface_hub

    cached: Any = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
    if cached is not None:
        return not isinstance(cached, str)
    listing: Any = getattr(huggingface_hub, "get_cached_repo_tree", None)  # a download of the whole leaves one
    try:
        return listing is not None and name not in {file.path for file in listing(repo, revision=revision)}
    except Exception:  # no listing of that commit; older clients have other errors for it
        return False


def _out_of_reach(repo: str, name: str, revision: str | None, error: Exception) -> XtokenError:
    from huggingface_hub import constants, try_to_load_from_cache

    said = type(error.__cause__ or error).__name__
    why = "HF_HUB_OFFLINE forbids asking the hub" if constants.HF_HUB_OFFLINE else f"the hub does not answer ({said})"
    beside = (try_to_load_from_cache(repo, known, revision=revision) for known in ("tokenizer.json", "config.json"))
    folder = next((os.path.dirname(path) for path in beside if isinstance(path, str)), None)
    way_out = "check the id and the connection, or give a local folder"
    if folder is not None:
        way_out = f"run 'hf download {repo}' where the hub answers, or give the folder {folder} if that is all there is"
    return XtokenError(f"{repo!r}: {name} is not in the cache, and {why}, so nobody knows if there is one; {way_out}")
