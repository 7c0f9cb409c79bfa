"""--stage=export: exports a classifier bundle as a SavedModel that takes raw text.

It contains the tokenizer and the initial state (h, c), so that TensorFlow alone can run it: TF
Serving, or `tf.saved_model.load(folder).signatures["serving_default"]`. It runs on a CPU, whatever
it was trained on.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from data_pipelines.errors import InputError
from trainer.inference.text_classifier import TextClassifier, load_classifier
from trainer.safe_files import refuse_to_replace, remove

TOLERANCE = 1e-5
PROBE_WORDS = 40
# Loads the export as a stranger would: in isolated mode none of our packages can be imported.
CHECK = """
import json, sys
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
found = model.signatures["serving_default"](texts=tf.constant(json.loads(sys.stdin.read())))
assert not {"trainer", "data_pipelines", "warmstate"} & set(sys.modules)
print(json.dumps({
    "probabilities": found["probabilities"].numpy().tolist(),
    "labels": [label.decode() for label in found["label"].numpy()],
}))
"""


def export(classifier_folder: Path, folder: Path) -> str:
    """Writes the SavedModel and checks it in a process without our code.

    Its signature `serving_default` takes `texts`, string [texts], and returns `probabilities`,
    float32 [texts, classes], and `label`, string [texts]. assets.extra/classes.txt lists the names
    of the classes in order.

    Returns:
        A summary to print.

    Raises:
        InputError: The bundle is not usable, or `folder` exists or cannot be written.
    """
    model = load_classifier(classifier_folder)
    refuse_to_replace(folder, "--output")
    beside = folder.with_name(folder.name + ".new")
    remove(beside)
    try:
        save(model, beside)
        difference = largest_difference(model, beside, probes(model))
        if not difference <= TOLERANCE:  # NaN: the labels differ
            raise RuntimeError(
                f"the exported model's probabilities differ by {difference} from the trainer's"
            )
        beside.rename(folder)
    except OSError as error:
        raise InputError(f"--output={folder} cannot be written: {error.strerror}") from None
    finally:
        remove(beside)
    return (
        f"wrote {folder}; loaded by TensorFlow alone, its probabilities differ from the trainer's "
        f"by at most {difference:.1e}"
    )


def save(model: TextClassifier, folder: Path) -> None:
    """Writes `model` as a SavedModel."""
    names = tf.constant(model.class_names)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "texts")], autograph=False)
    def serve(texts: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = model.of_texts(texts)
        label = tf.gather(names, tf.argmax(probabilities, axis=1))
        return {"probabilities": probabilities, "label": label}

    # Custom gradients are not needed, and cannot be saved.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(model, str(folder), {"serving_default": serve}, options)
    extra = folder / "assets.extra"
    extra.mkdir()
    (extra / "classes.txt").write_text("\n".join(model.class_names) + "\n", encoding="utf-8")


def largest_difference(model: TextClassifier, folder: Path, texts: list[str]) -> float:
    """Returns the largest difference of a probability from the trainer's; NaN if labels differ."""
    command = [sys.executable, "-I", "-c", CHECK, str(folder)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the exported model cannot be used:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    expected = model.probabilities(texts)
    if found["labels"] != [model.class_names[c] for c in expected.argmax(axis=1)]:
        return float("nan")
    return float(np.abs(np.array(found["probabilities"], np.float32) - expected).max())


def probes(model: TextClassifier) -> list[str]:
    """Returns texts from the whole vocabulary, and some unusual ones."""
    size = model.tokenizer.vocab_size
    texts = ["", "\N{GREEK SMALL LETTER ALPHA} <br />!", "no " * (model.max_tokens + 9)]
    for start in range(3):
        ids = np.linspace(3 + start, size - 1, PROBE_WORDS).astype(int)
        texts.append(model.tokenizer.decode(ids).encode("utf-8", "replace").decode())
    return texts
