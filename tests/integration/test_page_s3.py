"""A sample's page of artifacts in a store: the same page, and only the parts that hold the sample are fetched."""

import json
import os
import subprocess
import sys
from pathlib import Path

from s3_server import S3Server

from xtoken.pipeline.page.find import all_ids, find

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "captures"


def test_a_page_from_a_store(s3_server: S3Server, tmp_path: Path) -> None:
    remote = s3_server.filesystem("alpha")
    for name in ("v3-topk", "v3-targets"):
        remote.put(str(GOLDEN / name), f"alpha-store/page/{name}", recursive=True)
    sample = list(all_ids(str(GOLDEN / "v3-targets")))[-1]
    part = find(str(GOLDEN / "v3-topk"), sample).part
    assert part > 0
    pages = []
    for place in (str(GOLDEN), "s3://alpha-store/page"):
        out = tmp_path / f"{len(pages)}.html"
        words = ["inspect", f"{place}/v3-targets", "--html", sample, "--capture", f"{place}/v3-topk", "--out", str(out)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), *words, "--json"],
            env={**kept, **s3_server.environment("alpha"), "XTOKEN_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["sample_id"] == sample
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]
    sizes = {path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    for name in ("v3-topk", "v3-targets"):
        for path in (GOLDEN / name / "data").iterdir():
            assert (path.stat().st_size in sizes) == path.name.endswith(f"{part:05d}.parquet"), path
