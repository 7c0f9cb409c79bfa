"""Sources at addresses, read from real servers: a web server, and moto's S3 server if installed.

s3fs and the kubernetes client cannot be installed together (one wants python-dateutil < 3, the
other >= 3), so S3 is not in the test extra: `make test-s3` runs these tests, too.
"""

import gzip
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipelines import files
from data_pipelines.errors import InputError
from data_pipelines.prepare import PrepareConfig, ensure_store
from data_pipelines.sources import open_source

needs_s3 = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("s3fs", "moto", "boto3"))),
    reason="s3fs, moto or boto3 is not installed",
)
ROWS = [(f"text number {i} of {i % 7} kinds", ("no", "yes")[i % 2]) for i in range(30_000)]
CSV = ("text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with a plain CSV file of several parts, and a compressed one."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.csv").write_bytes(CSV)
    (folder / "b.csv.gz").write_bytes(gzip.compress(CSV[:90_000].rpartition(b"\n")[0]))
    return folder


@pytest.fixture
def s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves the folder as a bucket of a real S3 server; returns the bucket's address."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for path in folder.iterdir():
        client.upload_file(str(path), "bucket", f"data/{path.name}")
    yield "s3://bucket/data"
    server.stop()


def stores_are_equal(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir() if path.name != "manifest.json")
    return names == sorted(p.name for p in other.iterdir() if p.name != "manifest.json") and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@needs_s3
def test_prepare_reads_an_s3_server_as_it_reads_a_folder(
    folder: Path, s3: str, tmp_path: Path
) -> None:
    here = PrepareConfig(f"csv:{folder}/*", vocab_size=500, min_count=1)
    ensure_store(here, tmp_path / "here", lambda line: None)
    command = [sys.executable, "-m", "data_pipelines.prepare", f"--source=csv:{s3}/*"]
    command += [f"--out={tmp_path / 'there'}", "--vocab_size=500", "--min_count=1"]
    result = subprocess.run([*command, "--processes=2"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert stores_are_equal(tmp_path / "here", tmp_path / "there")


@needs_s3
def test_names_at_an_s3_server(s3: str) -> None:
    assert files.find_files(f"{s3}/*") == [f"{s3}/a.csv", f"{s3}/b.csv.gz"]
    assert files.find_files(f"{s3}/a.csv") == [f"{s3}/a.csv"]
    assert files.is_dir(s3) and files.is_file(f"{s3}/a.csv") and not files.is_file(f"{s3}/none")
    assert files.size_bytes(f"{s3}/a.csv") == len(CSV)
    for path in (f"{s3}/none.csv", "s3://no-such-bucket/a.csv"):
        with pytest.raises(InputError, match=f"--source=csv:{path}: {path} cannot be read: .+"):
            open_source(f"csv:{path}")


@needs_s3
def test_a_server_that_refuses_the_credentials_is_named(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(InputError, match=r"s3://bucket/data/a\.csv cannot be read: .*[Cc]redent"):
        open_source("csv:s3://bucket/data/a.csv")


def test_parquet_is_read_from_a_web_server(tmp_path: Path, web: Callable[[Path], str]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [text for text, _ in ROWS], "label": [n for _, n in ROWS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10_000)
    source = open_source(f"parquet:train={web(tmp_path)}/a.parquet")
    examples = [e for s in source.splits for p in source.parts(s) for e in source.examples(s, p)]
    assert sorted(e.text for e in examples) == sorted(text for text, _ in ROWS)


def test_prepare_reads_a_web_server_as_it_reads_a_folder(
    folder: Path, tmp_path: Path, web: Callable[[Path], str]
) -> None:
    here = PrepareConfig(f"csv:{folder}/*", vocab_size=500, min_count=1)
    ensure_store(here, tmp_path / "here", lambda line: None)
    there = PrepareConfig(f"csv:{web(folder)}/*", vocab_size=500, min_count=1)
    ensure_store(there, tmp_path / "there", lambda line: None)
    assert stores_are_equal(tmp_path / "here", tmp_path / "there")
