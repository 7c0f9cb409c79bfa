"""The page: what it says of runs that are whole, dead, damaged and hostile; then in a browser."""

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.browser import Page, chromium, open_browser
from tests.trainer.report_page.test_run_folder import EXAMPLE, write_metrics, write_predictions
from trainer.report_page import html, run_folder
from trainer.safe_files import sealed, specs, tensor_parts

HOSTILE = '</script><img src="http://127.0.0.1:9/x" onerror="alert(1)"><b>\u202ebold'
SECTIONS = (
    *("Verdict", "Learning", "Throughput", "Learned states", "Where documents end", "Mistakes"),
    *("Calibration", "Documents", "Settings", "Environment"),
)


def write_run(folder: Path, text: str = " film", seed: int = 0) -> Path:
    """Writes all that a run of --stage=all leaves, its words being `text`."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for name, values in (
        ("config.json", {"seed": seed, "units": 40, "store": text}),
        ("environment.json", {"python": "3.12", "command": ["trainer.main", text]}),
        ("report.json", {"stage": "all", "world_size": 2, "wall_seconds": 75.0, "data_note": text}),
    ):
        (folder / name).write_text(json.dumps(values))
    for part, stage in (("pretrain", "pretrain"), ("scratch", "finetune"), ("warm", "finetune")):
        lines = []
        for step in range(10, 110, 10):
            line = {"stage": stage, "step": step, "unix_time": 1e9 + step}
            lines.append(line | {"loss": 60 / step, "tokens_per_second": 900.0 + step})
            value = "nats_per_token" if part == "pretrain" else "error_percent"
            lines.append(line | {value: 300 / step, "loss": 50 / step})
        write_metrics(folder / part, *lines)
        if part != "pretrain":
            label = random.integers(0, 2, 300).astype(np.int32)
            examples = [EXAMPLE | {"pieces": ["<i>", text]}, EXAMPLE | {"predicted": 1}]
            write_predictions(
                folder / part / "predictions",
                {"class_names": ["bad", text], "examples": examples},
                document=np.arange(300),
                label=np.zeros(300, np.int32) if part == "warm" else label * 0,
                logits=random.normal(-1, 1, (300, 1)).astype(np.float32),
                **{
                    "state/label": label[:50],
                    "state/h": random.normal(size=(50, 40)).astype(np.float32),
                    "state/c": random.normal(size=(50, 40)).astype(np.float32),
                },
            )
    states = {
        f"states/{name}": random.normal(size=40).astype(np.float32)
        for name in ("learned/h", "learned/c", "mean/h", "mean/c")
    }
    encoder = folder / "pretrain" / "encoder"
    encoder.mkdir()
    (encoder / "encoder.json").write_bytes(sealed({"tensors": specs(states)}))
    (encoder / "encoder.safetensors").write_bytes(b"".join(map(bytes, tensor_parts(states))))
    return folder


def page_of(*folders: Path) -> str:
    return html.page([run_folder.read(folder) for folder in folders], made_at=0)


def test_sets_of_labels_have_a_table_and_no_matrix(tmp_path: Path) -> None:
    run, random = write_run(tmp_path / "run"), np.random.default_rng(0)
    sets = random.integers(0, 2, (300, 3)).astype(np.uint8)
    example = EXAMPLE | {"label": [0, 2], "predicted": [], "explained": 2}
    for part in ("scratch", "warm"):
        info = {"class_names": ["a", "b", "<c>"], "classes": 3, "thresholds": [0.5, 0.4, 0.3]}
        write_predictions(
            run / part / "predictions",
            info | {"examples": [example]},
            document=np.arange(300),
            label=np.zeros(300, np.int32),
            labels=sets,
            logits=random.normal(3 * sets - 1.5, 1).astype(np.float32),
            **{
                "state/label": np.zeros(0, np.int32),
                "state/h": np.zeros((0, 4), np.float32),
                "state/c": np.zeros((0, 4), np.float32),
            },
        )
    page = page_of(run)
    assert page.count("all labels, micro") == 2 and "Confusion matrix" not in page
    assert ">Calibration</h2>" not in page and ">Where documents end</h2>" not in page
    assert " a, &lt;c&gt;, predicted as no label" in page
    assert "shaded for &lt;c&gt;" in page and "both wrong" not in page


def test_a_whole_run_has_every_section_and_misses_nothing(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    for title in SECTIONS:
        assert f">{title}</h2>" in page, title
    assert ">Missing</h2>" not in page
    assert "Of 300 test documents" in page and page.isascii()
    assert "--units" in page and "1m15s" in page


def test_the_page_is_one_file_that_fetches_nothing_and_names_every_target(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    assert not re.findall(r'(?:src|href)="(?!#)', page) and "url(" not in page
    assert 'content="default-src &#x27;none&#x27;; style-src &#x27;sha256-' in page
    assert " style=" not in page
    for target in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{target}"' in page
    headings = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))


def test_strangers_text_stays_text(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", HOSTILE))
    assert "<img" not in page and "&lt;img src=" in page and "<i>" not in page
    assert page.count("</script>") == 1


def test_a_dead_run_says_what_is_missing(tmp_path: Path) -> None:
    write_metrics(
        tmp_path / "pretrain",
        {"stage": "pretrain", "step": 5, "loss": 1.5, "unix_time": 86400.0},
    )
    page = page_of(tmp_path)
    assert "No classifier has been evaluated yet" in page
    assert "it is running or was interrupted; last line written 1970-01-02 00:00:00 UTC" in page
    assert "report.json: the run writes it when it ends" in page
    assert ">Learning</h2>" in page and ">Calibration</h2>" not in page


def test_several_runs_are_one_table(tmp_path: Path) -> None:
    page = page_of(*(write_run(tmp_path / f"run-{seed}", seed=seed) for seed in range(3)))
    assert "Over 3 seeds" in page
    for seed in range(3):
        assert f'<th scope="row">run-{seed}</th><td>{seed}</td>' in page
    assert "Warm start, run-2" in page


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert html.main([str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    out = tmp_path / "both.html"
    assert html.main([str(run), str(run), f"--out={out}"]) == 0 and out.exists()
    assert html.main([str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert html.main([str(run), f"--out={tmp_path}/no/where.html"]) == 2
    with pytest.raises(SystemExit) as exit_:
        html.main([str(run), str(run)])
    assert exit_.value.code == 2 and "need --out" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if chromium() is None:
        pytest.skip("no Chromium here; $CHROMIUM names one")
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", HOSTILE)
    html.main([str(folder)])
    with open_browser() as page:
        page.open(folder / "report.html")
        yield page


def test_a_browser_has_no_complaint_and_asks_for_nothing(browser_page: Page) -> None:
    assert browser_page.complaints == []
    assert [url for url in browser_page.requests if not url.startswith("file:")] == []
    text = browser_page.evaluate("document.body.innerText")
    for words in ("300 test documents", "expected calibration error", "predicted as", "wrong"):
        assert words in text
    assert "NaN" not in text and "undefined" not in text
    wide = "document.documentElement.scrollWidth"
    assert browser_page.evaluate(wide) <= 1200
    browser_page.size(360, 800)
    assert browser_page.evaluate(wide) <= 360  # a telephone scrolls one way
    browser_page.size(1200, 900)


def test_the_keyboard_reads_values_and_hides_lines(browser_page: Page) -> None:
    browser_page.evaluate("document.querySelector('[data-chart]').focus()")
    for _ in range(2):
        browser_page.press("ArrowRight")
    spoken = browser_page.evaluate("document.querySelector('.spoken[role=status]').textContent")
    assert spoken == "Pretraining, training  3  at 20; Pretraining, validation  15  at 20"
    assert not browser_page.evaluate("document.querySelector('[data-chart] .tip').hidden")
    browser_page.press("Escape")
    assert browser_page.evaluate("document.querySelector('[data-chart] .tip').hidden")
    button = "document.querySelector('button[data-line]')"
    browser_page.evaluate(f"{button}.focus()")
    browser_page.press("Enter", 13)
    browser_page.evaluate(f"{button}.click()")
    assert browser_page.evaluate(f"{button}.getAttribute('aria-pressed')") == "false"
    shown = "getComputedStyle(document.querySelector('g[data-line]')).display"
    assert browser_page.evaluate(shown) == "none"


CONTRAST = """
(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const part = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a = 1] = rgb(getComputedStyle(at).backgroundColor);
      layers.push([r, g, b, a]);
      if (a === 1) break;
    }
    return layers.reduceRight((under, [r, g, b, a]) =>
      under ? [r, g, b].map((v, i) => v * a + under[i] * (1 - a)) : [r, g, b], null);
  };
  let worst = [99, ""];
  document.querySelectorAll("body *").forEach((element) => {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const hidden = !element.getClientRects().length || element.closest(".spoken, .skip, script");
    if (!own || hidden) return;
    const style = getComputedStyle(element);
    const ink = rgb(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 120)];
  });
  return worst;
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_aa_asks_for(browser_page: Page, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser_page.send("Emulation.setEmulatedMedia", features=[feature])
    browser_page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    ratio, where = browser_page.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    assert ratio < 22  # it looked at something
    assert browser_page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(251, 250, 248)" if scheme == "light" else "rgb(20, 20, 23)"
    )


def test_a_screen_reader_finds_names_on_all_that_it_can_reach(browser_page: Page) -> None:
    nodes = browser_page.send("Accessibility.getFullAXTree")["nodes"]
    unnamed = []
    for node in nodes:
        role = node.get("role", {}).get("value")
        named = node.get("name", {}).get("value", "").strip()
        if role in ("button", "link", "heading", "image", "img", "region") and not named:
            unnamed.append((role, node))
    assert not unnamed
    roles = {node.get("role", {}).get("value") for node in nodes}
    assert {"main", "navigation", "heading", "table", "button"} <= roles


@pytest.mark.seconds
@pytest.mark.parametrize(("classes", "documents"), [(1_000, 3_000), (30_000, 400)])
def test_many_classes_are_the_largest_thirty_and_the_rest(
    tmp_path: Path, classes: int, documents: int
) -> None:
    """A page of 1,000 classes had 71 MB and took 79 s; 30,000 classes ran out of memory."""
    folder = write_run(tmp_path / "run")
    random = np.random.default_rng(1)
    label = np.minimum(random.geometric(0.02, documents) + 5, classes - 1).astype(np.int32)
    logits = random.normal(size=(documents, classes)).astype(np.float32)
    logits[np.arange(documents), label] += 4
    write_predictions(
        folder / "warm" / "predictions",
        {"classes": classes, "class_names": [f"{i} <topic>" for i in range(classes)]},
        document=np.arange(documents),
        label=label,
        logits=logits,
        **{"state/label": label[:400]},
        **{f"state/{part}": random.normal(size=(400, 40)).astype(np.float32) for part in "hc"},
    )
    began = time.process_time()
    page = page_of(folder)
    assert time.process_time() - began < 10
    assert len(page) < 5_000_000
    for largest in np.argsort(-np.bincount(label), kind="stable")[:30]:
        assert f">predicted as {largest} &lt;topic&gt;<" in page
    assert f">predicted as {classes - 30:,} others<" in page
    assert f"The 30 largest of {classes:,} labels" in page


def test_long_documents_are_cut(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    long = {"pieces": [" first", *[" word"] * 9_000], "contributions": [0.5] * 9_001}
    write_predictions(folder / "warm" / "predictions", {"examples": [EXAMPLE | long] * 9})
    page = page_of(folder)
    assert ">word<" in page and ">first<" not in page
    assert len(page) < 5_000_000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("report.json", {"wall_seconds": float("nan")}, ""),
        ("report.json", {"wall_seconds": float("inf")}, ""),
        ("report.json", {"pretrain": {"perplexity": 10**400}}, ""),
        ("report.json", {"test": {"scratch": {"error_percent": 3.0, "documents": 10**400}}}, ""),
        ("report.json", "{" * 100_000, "no JSON"),
        ("report.json", [], "no JSON object"),
        ("config.json", '{"seed": ' + "1" * 5000 + "}", "no JSON"),
        ("config.json", '{"store": "' + "x" * (5 << 20) + '"}', "has more than 4194304 bytes"),
        ("metrics.jsonl", {"stage": "pretrain", "step": 1, "unix_time": 2**62}, ""),
        ("metrics.jsonl", {"stage": "pretrain", "step": 1, "unix_time": 1e299}, ""),
        ("metrics.jsonl", {"stage": "\ud800", "step": 1e299, "loss": -1e299}, ""),
        ("metrics.jsonl", b"\xff\xfe\n", "1 damaged lines"),
    ],
)
def test_odd_files_of_a_run_are_faults_not_errors(
    tmp_path: Path, name: str, content: object, says: str
) -> None:
    folder = write_run(tmp_path / "run")
    for part in ("scratch", "warm"):
        shutil.rmtree(folder / part / "predictions")
    if name == "metrics.jsonl":
        (folder / "report.json").unlink()  # the page of a run without it has the time
    data = content if isinstance(content, str | bytes) else json.dumps(content) + "\n"
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    faults = run_folder.read(folder).faults
    assert all(says in fault for fault in faults) and bool(faults) == bool(says)
    assert page_of(folder).endswith("</html>\n")


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "socket"])
@pytest.mark.parametrize("name", ["config.json", "warm/metrics.jsonl", "report.json"])
def test_what_is_no_file_of_a_run_is_a_fault(tmp_path: Path, name: str, kind: str) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / name
    path.unlink()
    with contextlib.ExitStack() as stack:
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to("/dev/zero")
        else:
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        (fault,) = run_folder.read(folder).faults
    assert str(path) in fault
    assert path.name in page_of(folder)


@pytest.mark.parametrize("units", [0, 1])
def test_odd_tensors_of_a_run_are_faults_or_left_out(tmp_path: Path, units: int) -> None:
    folder = write_run(tmp_path / "run")
    states = {"states/learned/h": np.ones(units, np.float32)}
    encoder = folder / "pretrain" / "encoder"
    (encoder / "encoder.json").write_bytes(sealed({"tensors": specs(states)}))
    (encoder / "encoder.safetensors").write_bytes(b"".join(map(bytes, tensor_parts(states))))
    for part, odd in (
        ("scratch", {"state/h": np.zeros((3, units), np.float32)}),
        ("warm", {"state/label": np.zeros((3, 2 - units), np.int32)}),
    ):
        shutil.rmtree(folder / part / "predictions")
        write_predictions(folder / part / "predictions", **odd)
    faults = run_folder.read(folder).faults
    assert len(faults) == 2 - units, faults
    assert page_of(folder).endswith("</html>\n")
