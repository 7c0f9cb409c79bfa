"""--stage=export: a classifier bundle -> a SavedModel that takes raw text.

The tokenizer and the state (h, c) that the LSTM starts from are inside, so that TensorFlow alone
runs it: TF Serving, or `tf.saved_model.load(folder).signatures["serving_default"]`. It runs on a
CPU, whatever it was trained on.
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
# What is exported is loaded as strangers load it: in isolated mode nothing of ours is importable
# from here, and nothing of ours may be imported.
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

    Its signature `serving_default` takes `texts`, string [texts], and gives `probabilities`,
    float32 [texts, classes], and `label`, string [texts]. assets.extra/classes.txt has the
    classes' names in their order, one a line.

    Returns:
        What was done, for the eye.

    Raises:
        InputError: The bundle is not usable, or `folder` is there already or cannot be written.
    """
    model = load_classifier(classifier_folder)
    refuse_to_replace(folder, "--output")
    beside = folder.with_name(folder.name + ".new")
    remove(beside)
    try:
        save(model, beside)
        difference = largest_difference(model, beside, probes(model))
        if not difference <= TOLERANCE:  # not a number is no agreement either
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

    # The gradient of our loops is not needed, and cannot be saved.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(model, str(folder), {"serving_default": serve}, options)
    extra = folder / "assets.extra"
    extra.mkdir()
    (extra / "classes.txt").write_text("\n".join(model.class_names) + "\n", encoding="utf-8")


def largest_difference(model: TextClassifier, folder: Path, texts: list[str]) -> float:
    """Returns by how much a probability of the exported model differs from the trainer's."""
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
    """Returns texts that use the vocabulary from end to end, and some that are odd."""
    size = model.tokenizer.vocab_size
    texts = ["", "\N{GREEK SMALL LETTER ALPHA} <br />!", "no " * (model.max_tokens + 9)]
    for start in range(3):
        ids = np.linspace(3 + start, size - 1, PROBE_WORDS).astype(int)
        texts.append(model.tokenizer.decode(ids).encode("utf-8", "replace").decode())
    return texts
