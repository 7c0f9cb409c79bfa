"""Classifiers to give away: --hub_dir writes a folder for a model hub, and bundles are fetched.

The folder is the bundle and a model card, README.md, made of what the bundle and the run's report
record.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.durable import write_folder
from data_pipelines.errors import InputError
from data_pipelines.store.fetch import Fetching, cached
from trainer.models import bundle
from trainer.safe_files import DamagedError, read_json, refuse_to_replace

CARD = """---
library_name: warmstate
pipeline_tag: text-classification
{licence_line}---

# A text classifier

An LSTM ({num_layers} layers of {units} units, embeddings of {embedding_dim}) with {number} classes:
{classes}. Its weights come from: {init_weights}; its initial state: {initial_state}.

## Use

```python
import warmstate

classifier = warmstate.load_classifier("this folder, or its address")
classifier.predict(["A text."])
```

The folder holds no code: `classifier.safetensors` has the weights, `classifier.json` sizes and
settings, `vocab.txt` the vocabulary.

## Data

- Source: `{source}`
- Labelled documents trained on: {labelled_documents}
- Tokens read of a text: the last {max_tokens}

## Measures

| | |
|---|---:|
{measures}

{steps} steps, the best after {best_step}; seed {seed}. `config` in `classifier.json` has all settings.{no_test}

## Limits

- It answers with these classes only, whatever a text is about.
- Texts of another source, language or time than the training data were not measured.
- Errors by group, such as dialects or topics, were not measured. Expect the bias of the data.

## Licence

{licence}
"""  # noqa: E501


def write_hub_folder(classifier: Path, folder: Path, licence: str) -> str:
    """Writes the bundle `classifier` and its card to the new `folder`; returns a line to print.

    Raises:
        InputError: The bundle is not usable, or `folder` exists or cannot be written.
    """
    loaded = bundle.load(classifier, "classifier", "--classifier")
    refuse_to_replace(folder, "--hub_dir")
    names = ("classifier.json", "classifier.safetensors", "vocab.txt")
    files = {name: (classifier / name).read_bytes() for name in names}
    files["README.md"] = card(loaded.info, recorded_test_error(classifier), licence).encode()
    try:
        write_folder(folder.with_name(folder.name + ".new"), folder, files)
    except OSError as error:
        raise InputError(f"--hub_dir={folder} cannot be written: {error.strerror}") from None
    return f"wrote {folder}: look through README.md before you publish it"


def recorded_test_error(classifier: Path) -> float | None:
    """Returns the test error in the report of the run that wrote the bundle, if there is one."""
    for folder in (classifier.parent, classifier.parent.parent):
        try:
            report = read_json(folder / "report.json")
        except DamagedError:
            continue
        errors = report.get("test_error_percent")
        error = errors.get(classifier.parent.name) if isinstance(errors, dict) else None
        if isinstance(error, float | int):
            return float(error)
    return None


def card(info: dict[str, Any], test_error: float | None, licence: str) -> str:
    """Returns a model card: a header that hubs read, data, measures, use and limits."""
    config, report, model, names = (
        info["config"],
        info["report"],
        info["model"],
        info["class_names"],
    )
    rows = [(f"validation, {key}", value) for key, value in report["validation"].items()]
    rows += [("test, error_percent", test_error)] if test_error is not None else []
    return CARD.format(
        licence_line=f"license: {json.dumps(licence)}\n" if licence else "",
        classes=", ".join(f"`{name}`" for name in names[:30]) + (", ..." if names[30:] else ""),
        number=len(names),
        source=config.get("labelled") or config.get("source") or config.get("store") or "unknown",
        measures="\n".join(f"| {name} | {value:.4g} |" for name, value in rows),
        no_test="" if test_error is not None else " No test error is recorded.",
        licence=licence or "Not stated. That of the training data may restrict the weights' use.",
        **{name: model[name] for name in ("units", "num_layers", "embedding_dim")},
        **{name: report[name] for name in ("init_weights", "initial_state", "labelled_documents")},
        **{name: report[name] for name in ("steps", "best_step")},
        max_tokens=info["max_tokens"],
        seed=config["seed"],
    )


def fetched_bundle(url: str, name: str, log: Callable[[str], None] = print) -> Path:
    """Returns the folder of the bundle `name` at an address, fetched if the cache lacks it.

    Raises:
        InputError: It cannot be fetched, is damaged, or the cache cannot be written.
    """

    def fetch(fetching: Fetching) -> None:
        for file in (f"{name}.safetensors", "vocab.txt"):
            fetching.download(file)
        bundle.load(fetching.folder, name, url)  # compares digests, before it counts as fetched

    return cached(url, "bundles", f"{name}.json", fetch, log, f"{url}: the {name} bundle")
