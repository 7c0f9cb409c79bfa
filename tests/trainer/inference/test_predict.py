import csv
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.sources.rows import Row
from tests import forked
from tests.conftest import REPOSITORY
from tests.processes import ended
from trainer.config import Config
from trainer.inference import predict as stage
from trainer.inference.prediction_files import writer
from trainer.inference.text_classifier import Prediction, load_classifier

TEXTS = ["A fine film.", "bad, bad, bad", "So long " * 40, 'He said: "no,\nnever"', "café crème"]


def predict(classifier: Path, *texts: str, **settings: object) -> None:
    stage.predict(Config(stage="predict", classifier=str(classifier), **settings), texts)


@pytest.fixture(scope="module")
def expected(classifier_bundle: Path) -> list:
    """Returns the predictions for TEXTS."""
    return load_classifier(classifier_bundle).predict(TEXTS)


def test_texts_of_the_command_line(
    classifier_bundle: Path, expected: list, capsys: pytest.CaptureFixture
) -> None:
    predict(classifier_bundle, *TEXTS)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [p.label for p in expected]
    assert {line[0] for line in lines} == {"neg", "pos"}
    for line, text, prediction in zip(lines, TEXTS, expected, strict=True):
        assert float(line[1]) == pytest.approx(max(prediction.probabilities.values()), abs=5e-5)
        assert line[2] == " ".join(text.split())


@pytest.mark.parametrize("kind_in", ["csv", "jsonl"])
@pytest.mark.parametrize("kind_out", ["csv", "jsonl", "tsv"])
def test_records_keep_what_they_had(
    classifier_bundle: Path, expected: list, tmp_path: Path, kind_in: str, kind_out: str
) -> None:
    rows = [{"id": f"n{i}", "body": text} for i, text in enumerate(TEXTS)]
    given, made = tmp_path / f"in.{kind_in}", tmp_path / f"out.{kind_out}"
    with given.open("w", newline="") as file:
        if kind_in == "csv":
            table = csv.DictWriter(file, ["id", "body"])
            table.writeheader()
            table.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    predict(classifier_bundle, input=str(given), output=str(made), text_key="body")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([given.name, made.name])
    text = made.read_text(encoding="utf-8")
    if kind_out == "jsonl":
        found = [json.loads(line) for line in text.splitlines()]
        assert [r.pop("probabilities") for r in found] == [p.probabilities for p in expected]
    else:
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind_out == "tsv" else {}
        found = list(csv.DictReader(io.StringIO(text), **dialect))
        for row, prediction in zip(found, expected, strict=True):
            for name, probability in prediction.probabilities.items():
                assert float(row.pop(f"probability_{name}")) == probability
    assert [r.pop("predicted") for r in found] == [p.label for p in expected]
    if kind_out == "tsv":
        rows = [{k: v.replace("\n", " ") for k, v in row.items()} for row in rows]
    assert found == rows


def test_bad_rows_are_named_and_the_others_answered(
    classifier_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given, made = tmp_path / "in.csv", tmp_path / "out.jsonl"
    given.write_bytes(b"id,text\n1,good\n2,\n3,bad \xff\n4,too,many\n5,fine\n")
    with pytest.raises(InputError, match="3 of 5 rows"):
        predict(classifier_bundle, input=str(given), output=str(made))
    assert [json.loads(line)["id"] for line in made.read_text().splitlines()] == ["1", "5"]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said] == [f"{given}, line {n}" for n in (3, 4, 5)]
    assert "the text is empty" in said[0]
    assert "not UTF-8: byte 0xff" in said[1]
    assert "3 columns instead of 2" in said[2]


def test_many_bad_rows_are_counted(
    classifier_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "in.txt").write_text("\n" * 5000)
    with pytest.raises(InputError, match="5,000 of 5,000 rows"):
        predict(classifier_bundle, input=f"{tmp_path}/in.txt")
    assert len(capsys.readouterr().err.splitlines()) == stage.FAULTS_SHOWN + 1


@pytest.mark.parametrize(
    ("content", "settings", "says"),
    [
        ("body\nx\n", {}, "has no column 'text' (--text_key); it has body"),
        ("text,predicted\nx,y\n", {"output": "csv:-"}, "has predicted already"),
        ("text\nx\n", {"output": "no/such/folder.csv"}, "--output=no/such/folder.csv cannot be"),
        ("text,text\nx,y\n", {}, "names a column twice"),
    ],
)
def test_what_cannot_be_done_is_said(
    classifier_bundle: Path, tmp_path: Path, content: str, settings: dict, says: str
) -> None:
    (tmp_path / "in.csv").write_text(content)
    with pytest.raises(InputError) as caught:
        predict(classifier_bundle, input=f"{tmp_path}/in.csv", **settings)
    assert says in str(caught.value)


def test_no_file_matches(classifier_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file matches .*nothing\.csv"):
        predict(classifier_bundle, input=f"{tmp_path}/nothing.csv")


def test_words_are_explained(classifier_bundle: Path, capsys: pytest.CaptureFixture) -> None:
    predict(classifier_bundle, "A fine film", explain=True)
    line, marks = capsys.readouterr().out.splitlines()
    assert "[+" in marks or "[-" in marks
    assert "\x1b" not in marks and line.endswith("A fine film")
    predict(classifier_bundle, "A fine film", explain=True, output="jsonl:-")
    found = json.loads(capsys.readouterr().out)["contributions"]
    assert [piece for piece, _ in found] == ["a", "fine", "film"]


def test_a_stream_is_answered_line_by_line_as_the_text_so_far(classifier_bundle: Path) -> None:
    command = [sys.executable, "-m", "trainer.main", "--stage=predict", "--stream"]
    process = forked.Popen(
        [*command, f"--classifier={classifier_bundle}", "--output=jsonl:-"],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = ["A fine film.", "It is bad,", "bad to the end."]
    with ended(process, seconds=280):
        found = []
        for line in lines:  # each is answered before the next is written
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            found.append(json.loads(process.stdout.readline()))
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    assert [row["text"] for row in found] == lines
    so_far = ["\n".join(lines[:count]) for count in (1, 2, 3)]
    for row, expected in zip(
        found, load_classifier(classifier_bundle).predict(so_far), strict=True
    ):
        assert row["probabilities"] == pytest.approx(expected.probabilities, abs=2e-6)


def test_contexts_are_a_column(
    make_classifier_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = make_classifier_bundle(num_contexts=3)
    (tmp_path / "in.csv").write_text("author,text\nann,good film\nbob,good film\n,good film\n")
    predict(folder, input=f"{tmp_path}/in.csv", output="jsonl:-", explain=True)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = load_classifier(folder)
    contexts = ["ann", "bob", None]
    expected = model.predict(["good film"] * 3, contexts)
    assert [row["probabilities"] for row in found] == [p.probabilities for p in expected]
    assert found[0]["contributions"] != found[1]["contributions"]
    with pytest.raises(InputError, match="its 'author' is 'bob', but --stream reads one text"):
        predict(folder, input=f"{tmp_path}/in.csv", stream=True)
    (tmp_path / "other.csv").write_text("writer,text\nann,good film\n")
    with pytest.raises(InputError, match=r"has no column 'author' \(the classifier's contexts\)"):
        predict(folder, input=f"{tmp_path}/other.csv")
    with pytest.raises(InputError, match="2 contexts for 1 texts"):
        model.predict(["good"], ["ann", "bob"])
    with pytest.raises(InputError, match="it was trained without --context_key"):
        load_classifier(make_classifier_bundle()).predict(["good"], ["ann"])


def test_a_window_is_bounded_and_rows_are_read_one_window_at_a_time() -> None:
    read = itertools.count()
    rows = (Row("", "x", {}, "") for _ in iter(lambda: next(read), -1))
    window = next(stage.windows(rows, 10, stage.WINDOW_CHARACTERS))
    assert len(window) == 10 and next(read) == 10
    long = (Row("", "x" * (1 << 23), {}, "") for _ in itertools.count())
    assert len(next(stage.windows(long, 10, stage.WINDOW_CHARACTERS))) == 2


@pytest.mark.slow("a million lines; quick: one window at a time")
def test_a_million_lines_in_bounded_memory_and_in_order(
    classifier_bundle: Path, tmp_path: Path
) -> None:
    program = (
        "import resource, subprocess, sys;"
        "code = subprocess.call(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr);"
        "sys.exit(code)"
    )
    peaks = {}
    for lines in (10_000, 1_000_000):
        given, made = tmp_path / f"{lines}.txt", tmp_path / f"{lines}.jsonl"
        with given.open("w") as file:
            file.writelines(f"line {i} is {'good' if i % 3 else 'bad'}\n" for i in range(lines))
        flags = (f"--classifier={classifier_bundle}", f"--input={given}", f"--output={made}")
        command = (sys.executable, "-m", "trainer.main", "--stage=predict", *flags)
        done = subprocess.run(
            [sys.executable, "-c", program, *command], capture_output=True, text=True, check=True
        )
        peaks[lines] = int(done.stderr.split()[-1])
        with made.open() as file:
            for number, line in enumerate(file):
                assert json.loads(line)["text"].startswith(f"line {number} is")
        assert number == lines - 1
    assert peaks[1_000_000] < peaks[10_000] + 100_000  # KiB


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "tsv"])
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_escape_sequences_are_written_out_on_terminals_alone(kind: str, stream: type) -> None:
    file = stream(newline="")
    write = writer(f"{kind}:-", file, lambda found: "")
    row = Row("line 1", "a \x9b2J film", {"text": "a \x9b2J film"}, "")
    write(row, Prediction("\x9b31mpos", {"\x9b31mpos": 1.0}), None)
    written = file.getvalue()
    if stream is Terminal:
        assert r"\x9b2J" in written and r"\x9b31mpos" in written and "\x9b" not in written
    else:
        assert "\x9b2J" in written and "\x9b31mpos" in written and "\\" not in written
