import csv
import gzip
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.errors import InputError
from data_pipelines.sources import BadExample, Example, SourceOptions, open_source
from data_pipelines.sources.record_files import RecordFiles
from data_pipelines.sources.text import text_fault
from tests.fuzzing import EDITS, FUZZ, edited

repeated = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
texts = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: not text_fault(text))


def write(path: Path, data: bytes) -> str:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_text_is_a_document_a_line(tmp_path: Path, read: Callable) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n two \nthree")
    source = open_source(f"text:unsupervised={path},validation={write(tmp_path / 'b', b'b')}")
    assert read(source, "unsupervised") == [
        Example("a.txt@0", "one", None),
        Example("a.txt@8", " two ", None),
        Example("a.txt@14", "three", None),
    ]
    assert read(source, "validation") == [Example("b@0", "b", None)]
    assert (source.splits, len(source.class_names)) == (("validation", "unsupervised"), 0)
    assert "splits as given; no labels" in source.note


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("csv", b'id,text,label\r\n7,"a ""b"", c\nd",pos\r\n8,x,neg\r\n'),
        ("tsv", b"id\ttext\tlabel\n7\ta \"b\", c d\tpos\n8\tx\tneg"),
        (
            "jsonl",
            b'{"id": 7, "text": "a \\"b\\", c\\nd", "label": "pos"}\n'
            b'{"label": "neg", "text": "x", "id": "8", "more": [1]}\n',
        ),
    ],
)  # fmt: skip
def test_tables_with_labels_and_ids(
    tmp_path: Path, read: Callable, kind: str, data: bytes, ending: str
) -> None:
    path = write(tmp_path / f"a{ending}", data)
    spec = f"{kind}:train={path},validation={write(tmp_path / 'v', data)}"
    source = open_source(spec, id_key="id")
    text = 'a "b", c d' if kind == "tsv" else 'a "b", c\nd'
    assert read(source, "train") == [Example("7", text, 1), Example("8", "x", 0)]
    assert (source.splits, len(source.class_names)) == (("train", "validation"), 2)
    assert "labels neg=0, pos=1" in source.note
    ids = [example.id for example in read(open_source(spec), "train")]
    assert ids[0].startswith(f"a{ending}@") and len(set(ids)) == 2


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["0", "1"], {"0": 0, "1": 1}),
        (["10", "9", "-1"], {"-1": 0, "9": 1, "10": 2}),
        (["b", "a", "10", "9"], {"10": 0, "9": 1, "a": 2, "b": 3}),
    ],
)
def test_labels_are_classes_in_sorted_order(
    tmp_path: Path, read_all: Callable, labels: list[str], classes: dict[str, int]
) -> None:
    rows = "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
    path = write(tmp_path / "a.csv", f"text,label\n{rows}".encode())
    found = {e.text: e.label for e in read_all(f"csv:{path}")}
    assert found == {f"text {i}": classes[label] for i, label in enumerate(labels)}


def test_json_labels_may_be_numbers_and_truth_values(tmp_path: Path, read_all: Callable) -> None:
    values = [True, False, 3, "x", 1.5, None, ["x"], ""]
    data = "".join(json.dumps({"text": f"t{i}", "label": v}) + "\n" for i, v in enumerate(values))
    found = read_all(f"jsonl:{write(tmp_path / 'a', data.encode())}")
    good = {e.text: e.label for e in found if isinstance(e, Example)}
    assert good == {"t0": 2, "t1": 1, "t2": 0, "t3": 3}
    bad = {e.where.rpartition(" ")[2]: e.why for e in found if isinstance(e, BadExample)}
    assert bad == {
        "5": "'label' is a number, not a word or a whole number",
        "6": "'label' is missing, not a word or a whole number",
        "7": "'label' is a list, not a word or a whole number",
        "8": "'label': the text is empty",
    }


def test_a_bare_pattern_is_divided_and_loses_nothing(tmp_path: Path, read: Callable) -> None:
    for name in "ab":
        rows = "".join(f"text {name}{i},{i % 2}\n" for i in range(500))
        write(tmp_path / f"{name}.csv", f"text,label\n{rows}".encode())
    source = open_source(f"csv:{tmp_path}/*.csv")
    found = {split: read(source, split) for split in source.splits}
    assert list(found) == ["train", "validation", "test"]
    assert abs(len(found["train"]) - 800) < 40 and abs(len(found["test"]) - 100) < 30
    every = [e.text for examples in found.values() for e in examples]
    assert sorted(every) == sorted(f"text {name}{i}" for name in "ab" for i in range(500))
    assert "train 80 %, validation 10 %, test 10 %" in source.note


def test_without_a_label_column_text_is_unsupervised(tmp_path: Path, read: Callable) -> None:
    data = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(300)).encode()
    source = open_source(f"jsonl:{write(tmp_path / 'a.jsonl', data)}")
    assert source.splits == ("validation", "unsupervised") and len(source.class_names) == 0
    assert {e.label for e in read(source, "unsupervised")} == {None}
    assert "no labels" in source.note


def test_labels_that_are_not_wanted_are_not_read(tmp_path: Path, read: Callable) -> None:
    path = write(tmp_path / "a.csv", b"text,label\nx,1\ny,oops\n")
    source = open_source(f"csv:train={path}", with_labels=False)
    assert len(source.class_names) == 0
    assert [e.label for s in source.splits for e in read(source, s)] == [None, None]


def test_unsupervised_files_need_no_labels(tmp_path: Path, read: Callable) -> None:
    train = write(tmp_path / "a.csv", b"text,label\nx,1\ny,0\n")
    more = write(tmp_path / "b.csv", b"text\nz\n")
    source = open_source(f"csv:train={train},unsupervised={more}")
    assert read(source, "unsupervised") == [Example("b.csv@5", "z", None)]
    assert len(source.class_names) == 2


def test_classes_without_labelled_training_files_are_those_of_the_test_files(
    tmp_path: Path, read: Callable
) -> None:
    more = write(tmp_path / "a.csv", b"text,label\nx,5\n")
    test = write(tmp_path / "b.csv", b"text,label\nz,no\nw,yes\n")
    source = open_source(f"csv:unsupervised={more},test={test}")
    assert [e.label for e in read(source, "test")] == [0, 1] and len(source.class_names) == 2
    assert source.class_names == ("no", "yes")
    assert [e.label for s in source.splits for e in read(source, s)].count(None) == 1


def test_labels_of_the_test_files_must_be_those_of_training(tmp_path: Path, read: Callable) -> None:
    train = write(tmp_path / "a.csv", b"text,label\nx,1\ny,0\n")
    test = write(tmp_path / "b.csv", b"text,label\nz,1\nw,7\n")
    source = open_source(f"csv:train={train},test={test}")
    assert read(source, "test") == [
        Example("b.csv@11", "z", 1),
        BadExample(test + ", line 3", "label '7' is not one of 0, 1"),
    ]


DIRTY = [
    ("text", b"good\n\n", {2: "the text is empty"}),
    ("text", b"good\na\0b\n", {2: "NUL at character 2"}),
    ("text", b"good\ncaf\xe9\nfine", {2: "not UTF-8: byte 0xe9 at character 4"}),
    ("csv", b"text,label\ngood,1\n\n", {3: "an empty line"}),
    ("csv", b"text,label\ngood,1\nbad\n", {3: "1 columns instead of 2"}),
    ("csv", b"text,label\ngood,1\nbad,1,2\n", {3: "3 columns instead of 2"}),
    ("csv", b"text,label\ngood,1\n  ,1\n", {3: "the text is empty"}),
    ("csv", b'text,label\n"go\nod",1\n\xff,1\n', {4: "not UTF-8: byte 0xff"}),
    ("csv", b'text,label\ngood,1\n"a"b,1\n', {3: "not CSV: ',' expected after '\"'"}),
    ("csv", b"text,label\ngood,1\na\0,1\n", {3: "NUL"}),
    ("csv", b"text,label\ngood,1\nbad,\n", {3: "'label': the text is empty"}),
    ("csv", b"text,label\ngood,1\nbad,\xff\n", {3: "'label': not UTF-8"}),
    ("tsv", b"text\tlabel\ngood\t1\nbad\n\nbad\t1\t1", {3: "1 col", 4: "an empty", 5: "3 col"}),
    ("tsv", b"text\tlabel\r\ngood\t1\r\n\t1\r\n", {3: "the text is empty"}),
    ("jsonl", b'{"text": "good"}\n{"text": "ba', {2: "not JSON: Unterminated string"}),
    ("jsonl", b'{"text": "good"}\n[1]\n3\n', {2: "a list instead", 3: "a number instead"}),
    ("jsonl", b'{"text": "good"}\n{"tex": "bad"}\n', {2: "'text' is missing, not text"}),
    ("jsonl", b'{"text": "good"}\n{"text": 7}\n\n', {2: "'text' is a number", 3: "an empty line"}),
    ("jsonl", b'{"text": "good"}\n{"text": "\\ud83d"}\n', {2: r"lone surrogate U\+D83D"}),
    ("jsonl", b'{"text": "good"}\n{"text": "\xff"}\n', {2: "not UTF-8: byte 0xff"}),
    ("jsonl", b'{"text": "good"}\n{"text": "a\\u0000"}\n', {2: "NUL at character 2"}),
    ("jsonl", b'{"text": "good"}\n' + b"[" * 100_000 + b"\n", {2: "not JSON"}),
    ("jsonl", b'{"text": "good"}\n{"text": "a", "b": ' + b"9" * 5000 + b"}\n", {2: "not JSON"}),
]


@pytest.mark.parametrize(("kind", "data", "bad"), DIRTY)
def test_dirty_records_are_told_once_with_file_and_line(
    tmp_path: Path, read_all: Callable, kind: str, data: bytes, bad: dict[int, str]
) -> None:
    path = write(tmp_path / "dirty", data)
    found = read_all(f"{kind}:{path}")
    told = {e.where: e.why for e in found if isinstance(e, BadExample)}
    assert list(told) == [f"{path}, line {line}" for line in bad]
    assert len(told) == sum(isinstance(e, BadExample) for e in found)
    assert all(re.search(w, t) for w, t in zip(bad.values(), told.values(), strict=True))
    assert re.sub(r"\s", "", next(e.text for e in found if isinstance(e, Example))) == "good"


@pytest.mark.parametrize(
    ("kind", "data", "options", "messages"),
    [
        ("csv", b"", {}, ["does not name the columns"]),
        ("csv", b"a,b\n1,2\n", {}, [r"has no 'text' \(--text_key\); it has a, b"]),
        ("csv", b"text,b\nx,2\n", {"label_key": "stars"}, [r"no 'stars' \(--label_key\)"]),
        (
            "csv",
            b"a,b\nx,2\n",
            {"text_key": "c", "id_key": "d"},
            [r"'c' \(--text_key\)", r"'d' \(--id_key\)"],
        ),
        ("csv", b"text,text\nx,2\n", {}, ["names a column twice"]),
        ("csv", b'text\n"x\n', {}, ["line 2: a quote in this record is never closed"]),
        ("csv", b"text,label\nx,\n", {}, [r"no document has a usable 'label' \(--label_key\)"]),
        ("tsv", b"", {}, ["does not name the columns"]),
        ("jsonl", b'{"body": "x"}\n', {}, [r"no 'text' \(--text_key\); it has body"]),
    ],
)
def test_faults_of_whole_files(
    tmp_path: Path, kind: str, data: bytes, options: dict[str, str], messages: list[str]
) -> None:
    path = write(tmp_path / "a", data)
    with pytest.raises(InputError) as caught:
        open_source(f"{kind}:{path}", **options)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"--source={kind}:{path}: ") for line in lines)
    assert len(lines) == len(messages)
    assert all(re.search(m, line) for m, line in zip(messages, lines, strict=True))


def test_files_that_differ_in_having_labels(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", b"text,label\nx,1\n")
    write(tmp_path / "b.csv", b"text\ny\n")
    with pytest.raises(InputError, match=r"b\.csv has no 'label'"):
        open_source(f"csv:{tmp_path}/*.csv")


def test_a_column_with_a_value_a_row_is_no_label(tmp_path: Path) -> None:
    rows = "".join(f"t,{i / 7}\n" for i in range(1001))
    path = write(tmp_path / "a.csv", f"text,score\n{rows}".encode())
    with pytest.raises(InputError, match="more than 1,000 distinct values of 'score', e.g. 0.0"):
        open_source(f"csv:{path}", label_key="score")


def test_cut_off_gzip_is_found_when_it_is_opened(tmp_path: Path) -> None:
    data = gzip.compress(b"text,label\n" + b"".join(b"%d,1\n" % (i * i) for i in range(9999)))
    (tmp_path / "a.csv.gz").write_bytes(data[:-500])
    with pytest.raises(InputError, match=r"a\.csv\.gz is cut off in line \d{4} "):
        open_source(f"csv:{tmp_path}/a.csv.gz")


@repeated
@given(documents=st.lists(texts, max_size=8), part_bytes=st.integers(1, 40))
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_any_text_comes_back_whatever_the_size_of_parts(
    tmp_path: Path, read: Callable, kind: str, documents: list[str], part_bytes: int
) -> None:
    path = tmp_path / "a"
    with path.open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            csv.writer(file).writerows([["n", "text"], *enumerate(documents)])
        else:
            file.writelines(
                json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) + "\n"
                for text in documents
            )
    options = SourceOptions()
    source = RecordFiles(kind, f"unsupervised={path}", options, part_bytes)
    again = RecordFiles(kind, f"unsupervised={path}", options, part_bytes)
    found = [e for split in source.splits for e in read(source, split)]
    assert sorted(e.text for e in found) == sorted(documents)
    assert len({e.id for e in found}) == len(found)
    assert source.parts("unsupervised") == again.parts("unsupervised")
    one = RecordFiles(kind, f"unsupervised={path}", options)
    assert read(one, "unsupervised") == read(source, "unsupervised")


GOOD = {
    "csv": b'id,text,label\r\n1,"a, ""b""\nc",pos\r\n2,d,neg\r\n3,"",pos\r\n',
    "tsv": b"id\ttext\tlabel\n1\ta b\tpos\n2\t\xc3\xa4\tneg\n",
    "jsonl": b'{"id": 1, "text": "a \\u00e4", "label": "pos"}\n{"text": "b", "label": "neg"}\n',
}


@FUZZ
@given(kind=st.sampled_from(sorted(GOOD)), edits=EDITS, part_bytes=st.integers(1, 60))
def test_changed_tables_give_only_the_named_errors(
    tmp_path: Path, kind: str, edits: list, part_bytes: int
) -> None:
    for data in (edited(GOOD[kind], edits), b"".join(piece for _, _, piece in edits)):
        path = tmp_path / "a"
        path.write_bytes(data)
        try:
            source = RecordFiles(kind, f"unsupervised={path}", SourceOptions(), part_bytes)
            for split in source.splits:
                for part in source.parts(split):
                    for example in source.examples(split, part):
                        assert isinstance(example, Example | BadExample)
        except InputError as error:
            assert str(path) in str(error)


def test_small_files_are_put_together(tmp_path: Path, read: Callable) -> None:
    for i in range(10):
        write(tmp_path / f"{i}.txt", f"text {i}\n".encode() * (30 if i == 4 else 1))
    source = RecordFiles("text", f"unsupervised={tmp_path}/*", SourceOptions(with_labels=False), 20)
    parts = source.parts("unsupervised")
    assert parts[:2] == ["0.txt[0:] and 1 more", "2.txt[0:] and 1 more"]
    assert parts[2:4] == ["4.txt[0:20]", "4.txt[20:40]"] and parts[-1] == "8.txt[0:] and 1 more"
    assert "4.txt[200:210] and 1 more" in parts
    found = [e.text for e in read(source, "unsupervised")]
    assert found == [f"text {i}" for i in range(10) for _ in range(30 if i == 4 else 1)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_labelled_parts_give_each_document_once(tmp_path: Path, read: Callable, kind: str) -> None:
    join = {"csv": ",", "tsv": "\t"}.get(kind)
    rows = [(f"text {i * i}", str(i % 3)) for i in range(500)]
    lines = [json.dumps({"text": t, "label": n}) for t, n in rows]
    if join:
        lines = [join.join(row) for row in [("text", "label"), *rows]]
    path = write(tmp_path / "a", ("\n".join([*lines[:-1], "", lines[-1]])).encode())
    source = RecordFiles(kind, path, SourceOptions(), 100)
    assert len(source.parts("train")) == len(set(source.parts("train"))) > 40
    found = [e for split in source.splits for e in read(source, split)]
    bad = [e for e in found if isinstance(e, BadExample)]
    assert [e.where for e in bad] == [f"{path}, line {len(lines)}"]
    assert {(e.text, str(e.label)) for e in found if isinstance(e, Example)} == set(rows)


@pytest.mark.parametrize("kind", ["text", "csv", "tsv", "jsonl"])
def test_a_document_of_a_million_words(tmp_path: Path, read_all: Callable, kind: str) -> None:
    long = " ".join(str(i) for i in range(1_000_000))
    lines = {
        "text": long,
        "csv": f'text,n\n"{long}",1',
        "tsv": f"text\tn\n{long}\t1",
        "jsonl": json.dumps({"text": long}),
    }
    path = write(tmp_path / "a", lines[kind].encode())
    begin = time.process_time()
    assert [e.text for e in read_all(f"{kind}:{path}")] == [long]
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("csv", b"text,label\none,b|a\ntwo,\nthree, c | a|a \nfour,a\n"),
        ("tsv", b"text\tlabel\none\ta|b\ntwo\t\nthree\ta|c\nfour\ta\n"),
        (
            "jsonl",
            b'{"text": "one", "label": ["b", "a"]}\n{"text": "two", "label": []}\n'
            b'{"text": "three", "label": "a|c"}\n{"text": "four", "label": ["a"]}\n',
        ),
    ],
)
def test_documents_have_sets_of_labels(
    tmp_path: Path, read: Callable, kind: str, data: bytes
) -> None:
    train, test = write(tmp_path / "train", data), write(tmp_path / "test", data)
    source = open_source(f"{kind}:train={train},test={test}", labels="multi")
    assert source.class_names == ("a", "b", "c")
    assert source.label_sets == ((), (0,), (0, 1), (0, 2))
    for split in ("train", "test"):
        found = {example.text: example.label for example in read(source, split)}
        found |= {e.text: e.label for e in read(source, "validation")} if split == "train" else {}
        assert found == {"one": 2, "two": 0, "three": 3, "four": 1}
    assert "several a document" in source.note


def test_faults_of_sets_of_labels(tmp_path: Path, read: Callable) -> None:
    train = b'{"text": "x", "label": ["a", "b"]}\n' * 20
    bad = (
        b'{"text": "1", "label": ["c", "a"]}\n{"text": "2", "label": [["a"]]}\n'
        b'{"text": "3"}\n{"text": "4", "label": "[\'a\', \'b\']"}\n{"text": "5", "label": ["b"]}\n'
    )
    paths = [write(tmp_path / name, data) for name, data in (("a", train), ("b", bad))]
    source = open_source(f"jsonl:train={paths[0]},test={paths[1]}", labels="multi")
    *faults, good = read(source, "test")
    assert source.label_sets == ((0, 1), (1,)) and good.label == 1
    assert [fault.why for fault in faults] == [
        "label 'c' is not one of a, b",
        "'label' is a list, not a word or a whole number",
        "'label' is missing, not a word or a whole number",
        "'label' is \"['a', 'b']\", a list written as text: write a|b",
    ]
    with pytest.raises(InputError, match="text:.*has one label a document: use --labels=single"):
        open_source(f"text:{paths[0]}", labels="multi")
