"""The copy of a run's folder: on a folder in place of a store, and on moto's S3 server.

tests/integration/test_mirror.py has real runs.
"""

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipelines import object_store
from data_pipelines.durable import discard, remove, write_folder
from data_pipelines.errors import InputError
from data_pipelines.object_store import ObjectStore, StoreError
from tests.s3_server import Server, needs_s3, s3_server
from trainer import mirror as module
from trainer.mirror import KEPT_MANIFESTS, BehindError, Mirror, mirrored

BIG = 1 << 21  # above what is held in memory
RUN_FILES = {"config.json", "metrics.jsonl"}


class Lines(queue.Queue):
    """What a mirror logs."""

    def __call__(self, line: str) -> None:
        self.put(line)

    def wait_for(self, text: str) -> str:
        while text not in (line := self.get(timeout=60)):
            pass
        return line

    def all(self) -> list[str]:
        return [self.get() for _ in range(self.qsize())]


def write_step(folder: Path, step: int, keep: int = 2) -> None:
    """Writes what a run does until its checkpoint of `step`: metrics first, old ones go last."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    checkpoints = folder / "checkpoints"
    files = {"state.safetensors": bytes([step % 251]) * BIG, "state.json": b"%d" % step}
    write_folder(checkpoints / "unfinished", checkpoints / f"step-{step:08d}", files)
    for old in sorted(checkpoints.glob("step-*"))[:-keep]:
        discard(old)


def content(folder: Path) -> dict[str, bytes]:
    """Returns what of a run's folder is mirrored."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (module.MARKER, "run.lock")
    }


def fetched(url: str, folder: Path) -> dict[str, bytes]:
    """Returns what an empty folder gets."""
    lines = Lines()
    with mirrored(url, folder, False, lines):
        found = content(folder)
    assert not any("warning" in line for line in lines.all())
    return found


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store/run"


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "RETRY_SECONDS", (0.05, 0.2))
    monkeypatch.setattr(module, "STOP_SECONDS", 20.0)


def test_an_empty_folder_gets_what_the_last_one_had(url: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    with mirrored(url, first, False, Lines()) as saved:
        for step in (1, 2, 3):
            write_step(first, step)
            saved()
        for name in ("run.lock", "config.json.new", "store/manifest.json", "a.damaged/b"):
            (first / name).parent.mkdir(exist_ok=True)
            (first / name).write_text("stays")
        (first / "link").symlink_to("/etc/passwd")
    found = fetched(url, tmp_path / "second")
    assert {name: content(first)[name] for name in found} == found
    assert {Path(name).parts[0] for name in found} == RUN_FILES | {"checkpoints"}
    assert len([name for name in found if "step-" in name]) == 4


def test_what_no_kept_manifest_names_is_removed(url: str, tmp_path: Path) -> None:
    mirror = Mirror(url, tmp_path / "run", print)
    for step in range(1, 9):
        write_step(tmp_path / "run", step)
        mirror._upload()  # what its thread does, which is not started
    store = ObjectStore(url)
    names = sorted(store.sizes("manifests"))
    assert len(names) == KEPT_MANIFESTS
    named = {
        sha256
        for name in names
        for sha256, _ in json.loads(store.read(f"manifests/{name}"))["files"].values()
    }
    assert set(store.sizes("objects")) == named
    assert sum(size == BIG for size in store.sizes("objects").values()) == KEPT_MANIFESTS + 1


def test_a_folder_that_is_behind_the_store_is_refused(url: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    with mirrored(url, one, False, Lines()):
        write_step(one, 1)
    with mirrored(url, one, False, Lines()):  # its own state: it continues
        write_step(one, 2)
    with mirrored(url, other, False, Lines()):
        write_step(other, 3)
    with pytest.raises(InputError, match="a later state of this one than --run_dir="):
        fetched(url, one)
    with mirrored(url, one, True, Lines()):  # --resume=never
        remove(one / "checkpoints")
        write_step(one, 1)
    assert fetched(url, tmp_path / "third") == content(one)


def test_a_sitting_that_was_given_up_writes_no_more(url: str, tmp_path: Path) -> None:
    lines, lost, new = Lines(), tmp_path / "lost", tmp_path / "new"
    write_step(lost, 1)
    mirror = Mirror(url, lost, lines)
    mirror.start(False)
    while not ObjectStore(url).sizes("objects"):
        mirror.changed()
    with mirrored(url, new, False, Lines()) as saved:
        write_step(new, 2)
        saved()
        write_step(lost, 2)
        write_step(lost, 3)
        mirror.changed()
        lines.wait_for("another sitting writes there by now")
    assert not mirror.close(1)
    assert fetched(url, tmp_path / "third") == content(new)


def test_a_damaged_state_is_passed_over_and_mended(url: str, tmp_path: Path) -> None:
    first, lines = tmp_path / "first", Lines()
    mirror = Mirror(url, first, lines)
    for step in (1, 2):
        write_step(first, step)
        mirror._upload()
    (newest,) = (s for s in sorted(ObjectStore(url).sizes("manifests"))[-1:])
    files = json.loads(ObjectStore(url).read(f"manifests/{newest}"))["files"]
    sha256, size = files["checkpoints/step-00000002/state.safetensors"]
    damaged = Path(url.removeprefix("file://")) / "objects" / sha256
    damaged.write_bytes(b"\0" * size)
    second = tmp_path / "second"
    with mirrored(url, second, False, lines):
        assert "is not whole (object" in lines.wait_for("warning")
        assert not (second / "checkpoints" / "step-00000002").exists()
        write_step(second, 2)  # as the run does again
    assert damaged.read_bytes() == b"\2" * BIG
    assert fetched(url, tmp_path / "third") == content(second)


@pytest.mark.parametrize("path", ["../a", "/a", "a/../../b", "", "a//b", "a\0b", "run.lock"])
def test_a_manifest_names_nothing_outside_of_the_folder(
    url: str, tmp_path: Path, path: str
) -> None:
    values = {"format": module.FORMAT, "format_version": 1, "files": {path: ["0" * 64, 1]}}
    name = f"manifests/{1:010d}-{'0' * 12}.json"
    ObjectStore(url).write(name, module.sealed(values))
    lines = Lines()
    with mirrored(url, tmp_path / "run", False, lines):
        pass
    assert "is not read: it is not a manifest" in lines.get()


def test_a_state_is_whole_while_the_run_writes_on(url: str, tmp_path: Path) -> None:
    """Each manifest has a newest checkpoint whose metrics it has, however the two overlap."""
    folder, stop = tmp_path / "run", threading.Event()

    def write() -> None:
        for step in itertools.count(1):
            write_step(folder, step)
            if stop.is_set():
                return

    writer = threading.Thread(target=write)
    store, seen = ObjectStore(url), set()
    with mirrored(url, folder, False, Lines()) as saved, contextlib.ExitStack() as stack:
        stack.callback(writer.join)
        stack.callback(stop.set)
        writer.start()
        while len(seen) < 12:
            saved()
            for name in store.sizes("manifests").keys() - seen:
                try:
                    files = json.loads(store.read(f"manifests/{name}"))["files"]
                    metrics = store.read(f"objects/{files['metrics.jsonl'][0]}").decode()
                except (KeyError, ValueError, StoreError):
                    continue  # the claim, or removed or not whole yet
                states = sorted(path for path in files if path.endswith("state.safetensors"))
                if not states:
                    continue
                seen.add(name)
                for state in states:
                    assert state.replace("state.safetensors", "state.json") in files
                newest = int(states[-1].split("/")[1].removeprefix("step-"))
                assert newest <= int(json.loads(metrics.splitlines()[-1])["step"])
    assert fetched(url, tmp_path / "again") == content(folder)


def test_nothing_is_lost_if_the_store_is_away_at_the_end(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(module, "END_SECONDS", 0.5)

    def fail(*_: object) -> None:
        raise StoreError("it is full")

    with pytest.raises(BehindError, match=r"lacks the run's last state \(it is full\)"):  # noqa: SIM117
        with mirrored(url, folder, False, Lines()):
            monkeypatch.setattr(ObjectStore, "write", fail)
            write_step(folder, 1)
    monkeypatch.undo()
    with mirrored(url, folder, False, Lines()):  # the same command again
        pass
    assert fetched(url, tmp_path / "second") == content(folder)


# --- On moto's S3 server --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def s3(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Returns an address on the server that no other test uses; the driver retries once."""
    import s3fs

    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    server.work()
    yield f"s3://bucket/{tmp_path.name}"
    server.work()


# What the requests of an upload are.
PLACES = {
    "objects": ("PUT", "/objects/"),
    "the manifest": ("PUT", "/manifests/"),
    "listings": ("GET", "list-type"),
    "removals": ("DELETE", ""),
}
KINDS = ("slow_down", "error", "denied", "full", "cut", "cut_reply")


@needs_s3
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_fails_delays_nobody_and_gets_everything_later(
    server: Server, s3: str, tmp_path: Path, kind: str, place: str
) -> None:
    folder, lines = tmp_path / "run", Lines()
    with mirrored(s3, folder, False, lines) as saved:
        for step in itertools.count(1):  # until there is something to remove
            write_step(folder, step)
            saved()
            if len(server.keys(f"{tmp_path.name}/manifests/")) == KEPT_MANIFESTS:
                break
        before = server.counts()
        server.fail(kind, *PLACES[place])
        for later in range(step + 1, step + 3):
            write_step(folder, later)
            saved()  # it returns at once: the thread waits
        assert lines.wait_for("warning: --mirror=").endswith("once the store takes it")
        assert (server.counts() - before)[f"{PLACES[place][0]} {kind}"]
        assert not any("warning" in line for line in lines.all())  # once
        server.work()
        lines.wait_for("is up to date again, after")
    assert fetched(s3, tmp_path / "second") == content(folder)


@needs_s3
@pytest.mark.parametrize("kind", [*KINDS, "wait 0.2"])
def test_a_single_failure_is_not_even_told(
    server: Server, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    if kind in ("denied", "full"):
        pytest.skip("the driver does not repeat what was refused")
    folder, lines = tmp_path / "run", Lines()
    with mirrored(s3, folder, False, lines):
        server.fail(kind, "PUT", "/objects/", times=1)
        write_step(folder, 1)
    assert not lines.all()
    assert fetched(s3, tmp_path / "second") == content(folder)


@needs_s3
@pytest.mark.parametrize("kind", ["slow_down", "error", "cut", "cut_reply"])
def test_an_empty_folder_waits_for_a_store_that_fails(
    server: Server, s3: str, tmp_path: Path, kind: str
) -> None:
    first = tmp_path / "first"
    with mirrored(s3, first, False, Lines()):
        write_step(first, 1)
    for method, part in (("GET", "/objects/"), ("GET", "list-type"), ("PUT", "/manifests/")):
        server.fail(kind, method, part, times=4)
        second = tmp_path / method / part.strip("/")
        second.mkdir(parents=True)
        with mirrored(s3, second, False, Lines()):
            assert content(second) == content(first)


@needs_s3
def test_a_store_that_never_answers_ends_an_empty_start_but_no_other(
    server: Server, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "START_SECONDS", 0.5)
    folder, lines = tmp_path / "run", Lines()
    server.fail("cut")
    with pytest.raises(BehindError, match="cannot be reached"), mirrored(s3, folder, False, lines):
        pass
    write_step(folder, 1)
    with mirrored(s3, folder, False, lines):
        lines.wait_for("warning")
        server.work()
        lines.wait_for("is up to date again")
    assert fetched(s3, tmp_path / "second") == content(folder)


@needs_s3
def test_refused_credentials_and_missing_buckets_end_the_start(
    server: Server, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(url: str) -> None:
        with mirrored(url, tmp_path / "run", False, Lines()):
            pass

    with pytest.raises(InputError, match="--mirror=s3://none/a cannot be used: .*NoSuchBucket"):
        started("s3://none/a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    with pytest.raises(InputError, match=f"--mirror={s3} cannot be used: AccessDenied"):
        started(s3)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(InputError, match=f"--mirror={s3} cannot be used: .*[Cc]redentials"):
        started(s3)


SITTING = """
import sys
from pathlib import Path
from tests.trainer.test_mirror import Lines, write_step
from trainer.mirror import mirrored
url, folder, first, last = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
with mirrored(url, folder, False, Lines()):
    for step in range(first, last + 1):
        write_step(folder, step)
"""


def sitting(server: Server, *words: object) -> subprocess.Popen:
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", SITTING, *map(str, words)],
        env=os.environ | server.environment | path,
    )


@needs_s3
@pytest.mark.parametrize(
    ("method", "part", "skipped"),
    [
        *(("PUT", "/objects/", n) for n in (0, 2, 4)),
        ("PUT", "/manifests/", 1),  # the first one is the claim
        ("DELETE", "/manifests/", 0),
        ("DELETE", "/objects/", 0),
    ],
)
def test_a_process_that_is_killed_at_any_request_leaves_a_whole_state(
    server: Server, s3: str, tmp_path: Path, method: str, part: str, skipped: int
) -> None:
    first = tmp_path / "first"
    for step in (1, 2, 3):
        with mirrored(s3, first, False, Lines()):
            write_step(first, step)
    server.hold(method, part, skipped)
    process = sitting(server, s3, first, 4, 6)
    assert part in server.wait_until_held()
    process.kill()
    process.wait()
    server.work()
    found = fetched(s3, tmp_path / "second")
    newest = max(int(name[17:25]) for name in found if "step-" in name)
    assert newest >= (4 if method == "DELETE" else 3)
    for step in (newest - 1, newest):
        name = f"checkpoints/step-{step:08d}"
        assert found[f"{name}/state.safetensors"] == bytes([step]) * BIG
        assert found[f"{name}/state.json"] == b"%d" % step
    assert f'{{"step": {newest}}}\n' in found["metrics.jsonl"].decode()
    # The orphans of the killed upload are gone once the next one is done.
    third = tmp_path / "third"
    with mirrored(s3, third, False, Lines()):
        write_step(third, 7)
    prefix = f"{tmp_path.name}/"
    store = ObjectStore(s3)
    named = {
        sha256
        for key in server.keys(prefix + "manifests/")
        for sha256, _ in json.loads(store.read(key.removeprefix(prefix)))["files"].values()
    }
    assert {key.rpartition("/")[2] for key in server.keys(prefix + "objects/")} == named


# A file of 100 MB or more goes up in parts of 50 MB.
IN_PARTS = 105_000_000


@needs_s3
@pytest.mark.parametrize("kind", ["cut", "slow_down"])
def test_an_upload_in_parts_that_fails_is_repeated(
    server: Server, s3: str, tmp_path: Path, kind: str
) -> None:
    folder, lines = tmp_path / "run", Lines()
    folder.mkdir()
    with mirrored(s3, folder, False, lines) as saved:
        server.fail(kind, part="partNumber=2")
        (folder / "large").write_bytes(os.urandom(1000) * (IN_PARTS // 1000))
        saved()
        assert "once the store takes it" in lines.wait_for("warning")
        server.work()
        lines.wait_for("is up to date again, after")
    assert fetched(s3, tmp_path / "second") == content(folder)
    assert not server.unfinished_uploads(tmp_path.name)


@needs_s3
@pytest.mark.parametrize("skipped", [0, 3])
def test_a_process_that_is_killed_while_it_fetches_can_fetch_again(
    server: Server, s3: str, tmp_path: Path, skipped: int
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with mirrored(s3, first, False, Lines()):
        write_step(first, 1)
        write_step(first, 2)
    server.hold("GET", "/objects/", skipped)
    process = sitting(server, s3, second, 3, 3)
    assert "/objects/" in server.wait_until_held()
    process.kill()
    process.wait()
    server.work()
    assert fetched(s3, second) == content(first)


def test_where_a_kill_falls_into_the_moving_of_what_was_fetched(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    with mirrored(url, first, False, Lines()):
        write_step(first, 1)
    rename: Callable[..., Path] = Path.rename
    for last in range(3):  # checkpoints, metrics.jsonl, config.json
        moved = itertools.count()

        def one_less(path: Path, to: Path, moved: Iterator = moved, last: int = last) -> Path:
            if path.parent.name == module._FETCHED and next(moved) == last:
                raise KeyboardInterrupt  # ends as abruptly as a kill, for the folder
            return rename(path, to)

        folder = tmp_path / f"second{last}"
        monkeypatch.setattr(Path, "rename", one_less)
        with pytest.raises(KeyboardInterrupt), mirrored(url, folder, False, Lines()):
            pass
        monkeypatch.undo()
        assert fetched(url, folder) == content(first)
