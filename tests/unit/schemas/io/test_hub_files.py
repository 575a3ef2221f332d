"""There, absent and out of reach: what the hub's cache says when the hub says nothing."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.hub_files import commit_of, hub_file, require_known, there
from xtoken.trainer.student.tokenizer_files import copy_tokenizer

COMMIT, REPO = "0123456789abcdef0123456789abcdef01234567", "acme/q"
SIDE = ("tokenizer_config.json", "special_tokens_map.json", "config.json", "chat_template.jinja")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of one repository in a cache whose hub is not to be asked; it holds a tokenizer.json."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--acme--q"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    copy_tokenizer("bytes", root / "snapshots" / COMMIT)
    (root / "snapshots" / COMMIT / "tokenizer_config.json").unlink()
    return root


def mark_absent(cache: Path, *names: str) -> None:
    """As the client marks what the hub said it has not."""
    for name in names:
        (cache / ".no_exist" / COMMIT).mkdir(parents=True, exist_ok=True)
        (cache / ".no_exist" / COMMIT / name).touch()


def list_files(cache: Path, *names: str) -> None:
    """As a download of the whole repository leaves its listing."""
    if not hasattr(huggingface_hub, "get_cached_repo_tree"):
        pytest.skip("this huggingface_hub keeps no listings")
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
    (cache / "trees").mkdir()
    (cache / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))


def write_side_file(cache: Path, *names: str) -> None:
    for name in names:
        (cache / "snapshots" / COMMIT / name).write_text("{}")


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does to who asks for a file that is not there, or that is not for them."""

    def do_HEAD(self) -> None:
        """Every repository has nothing but files called secret."""
        secret = self.path.endswith("secret.json")
        self.send_response(403 if secret else 404)
        self.send_header("X-Error-Code", "GatedRepo" if secret else "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_what_the_hub_itself_says(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    url = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    try:
        assert hub_file(REPO, "config.json") is None
        with pytest.raises(XtokenError, match=r"secret\.json cannot be fetched from the hub \(GatedRepoError\)"):
            hub_file(REPO, "secret.json")
    finally:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub_file(REPO, "config.json") is None, "the client has left a mark"


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_three_answers(cache: Path, revision: str | None) -> None:
    found = hub_file(REPO, "tokenizer.json", revision)
    assert found == cache / "snapshots" / COMMIT / "tokenizer.json"
    assert commit_of(found) == COMMIT
    with pytest.raises(XtokenError) as caught:
        hub_file(REPO, "config.json", revision)
    for part in ("'acme/q'", "config.json", "HF_HUB_OFFLINE", "hf download acme/q", str(found.parent)):
        assert part in str(caught.value)
    mark_absent(cache, "config.json")
    assert hub_file(REPO, "config.json", revision) is None


def test_a_listing_says_what_there_is_not(cache: Path) -> None:
    list_files(cache, "tokenizer.json", "config.json")
    assert hub_file(REPO, "generation_config.json") is None
    with pytest.raises(XtokenError, match=r"config\.json is not in the cache"):
        hub_file(REPO, "config.json")


@pytest.mark.parametrize("missing", SIDE[:3])
def test_a_tokenizer_without_a_side_file_is_no_tokenizer(cache: Path, missing: str) -> None:
    write_side_file(cache, *(name for name in SIDE if name != missing))
    with pytest.raises(XtokenError, match=f"{missing} is not in the cache"):
        load_tokenizer(REPO)
    # the way out that the error names: the folder, which has what it has
    assert load_tokenizer(str(cache / "snapshots" / COMMIT)).table.info.size == 256
    mark_absent(cache, missing)
    assert load_tokenizer(REPO).table.info.size == 256


@pytest.mark.parametrize("missing", SIDE)
def test_a_trained_model_gets_the_whole_tokenizer(cache: Path, tmp_path: Path, missing: str) -> None:
    write_side_file(cache, *(name for name in SIDE if name != missing))
    (tmp_path / "out").mkdir()
    if missing == "config.json":  # the model's own, not the tokenizer's
        copy_tokenizer(REPO, tmp_path / "out")
        return
    with pytest.raises(XtokenError, match=f"{missing} is not in the cache"):
        copy_tokenizer(REPO, tmp_path / "out")
    mark_absent(cache, missing)
    copy_tokenizer(REPO, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        {"tokenizer.json", *SIDE[:2], SIDE[3]} - {missing}
    )


def test_generation_settings_are_known_or_named(cache: Path) -> None:
    with pytest.raises(XtokenError, match=r"generation_config\.json is not in the cache"):
        require_known(REPO, "generation_config.json", COMMIT)
    require_known(str(cache / "snapshots" / COMMIT), "generation_config.json", None)


def test_a_repository_that_is_not_in_the_cache(cache: Path, tmp_path: Path) -> None:
    for work in (load_tokenizer, lambda repo: copy_tokenizer(repo, tmp_path)):
        with pytest.raises(XtokenError, match="'acme/other'"):
            work("acme/other")


def test_a_link_to_nothing_is_not_absent(tmp_path: Path) -> None:
    """A snapshot that was copied without the files its links point to."""
    copy_tokenizer("bytes", tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(tmp_path)).table.info.size == 256
    (tmp_path / "tokenizer_config.json").symlink_to(tmp_path / "blobs")
    assert not there(tmp_path / "nothing")
    out = tmp_path / "out"
    out.mkdir()
    works: tuple[Callable[[str], object], ...] = (load_tokenizer, lambda source: copy_tokenizer(source, out))
    for work in works:
        with pytest.raises(XtokenError, match=r"tokenizer_config\.json is not a file"):
            work(str(tmp_path))
