"""--stage=export: exports a classifier bundle as a SavedModel or a .keras file that takes raw text.

A SavedModel contains the tokenizer and the initial state (h, c), so that TensorFlow alone can run
it: TF Serving, or `tf.saved_model.load(folder).signatures["serving_default"]`. A .keras file is
read by `keras.models.load_model` after `import warmstate`. Both run on a CPU, whatever the
classifier was trained on.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from data_pipelines.durable import put_in_place, remove
from data_pipelines.errors import InputError
from trainer.inference.keras_model import keras_model
from trainer.inference.text_classifier import SEPARATOR, TextClassifier, load_classifier
from trainer.models.context_state import UNKNOWN
from trainer.safe_files import refuse_to_replace

KERAS_ENDING = ".keras"
TOLERANCE = 1e-5
PROBE_WORDS = 40
# Loads the export as a stranger would: in isolated mode none of our packages can be imported.
CHECK = """
import json, sys
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
inputs = {name: tf.constant(values) for name, values in json.loads(sys.stdin.read()).items()}
found = model.signatures["serving_default"](**inputs)
assert not {"trainer", "data_pipelines", "warmstate"} & set(sys.modules)
print(json.dumps({
    "probabilities": found["probabilities"].numpy().tolist(),
    "labels": [each.decode() for each in (found.get("label", found.get("labels"))).numpy()],
}))
"""
KERAS_CHECK = """
import json, sys
import keras, warmstate
import tensorflow as tf
texts = tf.constant(json.loads(sys.stdin.read())["texts"])
print(json.dumps({"probabilities": keras.models.load_model(sys.argv[1])(texts).numpy().tolist()}))
"""


def export(classifier_folder: Path, folder: Path) -> str:
    """Writes the SavedModel and checks it in a process without our code.

    If the name ends in .keras, it writes a Keras model, and checks it in a process with our code.

    The SavedModel's signature `serving_default` takes `texts`, string [texts], and if the
    classifier has contexts, `contexts`, string [texts]. It returns `probabilities`, float32
    [texts, classes], and `label`, string [texts]. A classifier of --labels=multi returns `labels`
    in its place: those whose probability reaches their threshold, separated by "|".
    assets.extra/classes.txt lists the names of the classes in order.

    Returns:
        A summary to print.

    Raises:
        InputError: The bundle is not usable, or `folder` exists or cannot be written.
    """
    model = load_classifier(classifier_folder)
    refuse_to_replace(folder, "--output")
    beside = folder.with_name(f".new.{folder.name}")  # Keras looks at the ending
    remove(beside)
    try:
        if folder.suffix == KERAS_ENDING:
            keras_model(model, classifier_folder).save(beside)
        else:
            save(model, beside)
        difference = largest_difference(model, beside, probes(model))
        if not difference <= TOLERANCE:  # NaN: the labels differ
            raise RuntimeError(
                f"the exported model's probabilities differ by {difference} from the trainer's"
            )
        put_in_place(beside, folder)
    except OSError as error:
        raise InputError(f"--output={folder} cannot be written: {error.strerror}") from None
    finally:
        remove(beside)
    reader = "keras.models.load_model" if folder.suffix == KERAS_ENDING else "TensorFlow alone"
    return (
        f"wrote {folder}; loaded by {reader}, its probabilities differ from the trainer's by at "
        f"most {difference:.1e}"
    )


def save(model: TextClassifier, folder: Path) -> None:
    """Writes `model` as a SavedModel."""
    names, thresholds = tf.constant(model.class_names), model.thresholds

    known = list(model.context_names)
    numbers = tf.lookup.KeyValueTensorInitializer(known or [""], tf.range(max(len(known), 1)))
    model.context_table = tf.lookup.StaticHashTable(numbers, UNKNOWN)  # is saved with the model

    def serve(texts: tf.Tensor, contexts: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        if contexts is None:
            numbers = tf.fill(tf.shape(texts), UNKNOWN)
        else:
            numbers = model.context_table.lookup(contexts)
        probabilities = model.of_texts(texts, numbers)
        if thresholds is None:
            label = tf.gather(names, tf.argmax(probabilities, axis=1))
            return {"probabilities": probabilities, "label": label}
        every = tf.repeat(names[None], tf.shape(texts)[0], axis=0)
        reached = tf.ragged.boolean_mask(every, probabilities >= thresholds)
        labels = tf.strings.reduce_join(reached, axis=1, separator=SEPARATOR)
        return {"probabilities": probabilities, "labels": labels}

    inputs = ("texts", "contexts") if known else ("texts",)
    signature = [tf.TensorSpec([None], tf.string, name) for name in inputs]
    serve = tf.function(serve, input_signature=signature, autograph=False)

    # Custom gradients are not needed, and cannot be saved.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(model, str(folder), {"serving_default": serve}, options)
    extra = folder / "assets.extra"
    extra.mkdir()
    (extra / "classes.txt").write_text("\n".join(model.class_names) + "\n", encoding="utf-8")


def largest_difference(model: TextClassifier, folder: Path, texts: list[str]) -> float:
    """Returns the largest difference of a probability from the trainer's; NaN if labels differ."""
    is_keras = folder.suffix == KERAS_ENDING
    flags = ["-c", KERAS_CHECK] if is_keras else ["-I", "-c", CHECK]
    command = [sys.executable, *flags, str(folder)]
    inputs = {"texts": texts}
    contexts = None
    if known := model.context_names:  # some of them, and one that is unknown
        contexts = [["", *known][number % (len(known) + 1)] for number in range(len(texts))]
        inputs["contexts"] = contexts
    done = subprocess.run(command, input=json.dumps(inputs), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the exported model cannot be used:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    expected = model.probabilities(texts, contexts=contexts)
    if not is_keras and found["labels"] != [model.prediction(row).answer for row in expected]:
        return float("nan")
    return float(np.abs(np.array(found["probabilities"], np.float32) - expected).max())


def probes(model: TextClassifier) -> list[str]:
    """Returns texts from the whole vocabulary, and some unusual ones."""
    size = model.tokenizer.vocab_size
    texts = ["", "\N{GREEK SMALL LETTER ALPHA} <br />!", "no " * (model.max_tokens + 9)]
    for start in range(3):
        ids = np.linspace(min(3 + start, size - 1), size - 1, PROBE_WORDS).astype(int)
        texts.append(model.tokenizer.decode(ids).encode("utf-8", "replace").decode())
    return texts
