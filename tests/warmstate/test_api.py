import json
import subprocess
import sys
from pathlib import Path

import pytest

import warmstate
from tests import forked
from tests.integration.equivalence import free_port
from warmstate import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
# Another process: the stages set how TensorFlow works.
PROGRAM = """
import gc, json, signal, sys
import keras
import warmstate
store, folder, port = sys.argv[1:]
before = signal.getsignal(signal.SIGTERM)
lines = []
small = {"log": lines.append, "embedding_dim": 8, "units": 12, "status_port": int(port)}
encoder = warmstate.pretrain(
    f"{folder}/a", store, **small, pretrain_steps=4, sampled_softmax=0, pretrain_max_tokens=24,
    pretrain_evaluate_documents=20, mean_state_documents=20, pretrain_learning_rate=1,
)
rest = {"finetune_steps": 4, "finetune_max_tokens": 24, "log": lines.append,
        "status_port": int(port)}
warm = warmstate.finetune(f"{folder}/b", store, encoder.folder, **rest)
longer = {"hidden_units": 5, "classify_max_tokens": 40}
scratch = warmstate.finetune(f"{folder}/c", store, **longer, **small | rest)
keras.backend.clear_session()
gc.collect()
graphs = sum(type(held).__name__ == "FuncGraph" for held in gc.get_objects())
losses = [
    warmstate.evaluate(f"{folder}/{name}", store, scratch.folder, log=lines.append, **reads)["loss"]
    for name, reads in [("e", {}), ("f", {"classify_max_tokens": 2})]
]
found = warmstate.evaluate(f"{folder}/d", store, warm.folder, log=lines.append)
predictions = warmstate.predict(warm.folder, ["A fine film.", "Bad."])
model = warmstate.load_classifier(scratch.folder)
assert warmstate.predict(model, [])  == []
_, final = None, warmstate.load_encoder(encoder.folder)(["some text", "more"])
(learned,) = warmstate.states.load(encoder.folder)
from absl import flags
assert "pretrain_steps" not in flags.FLAGS, "a program of ours defined flags"
assert signal.getsignal(signal.SIGTERM) is before
from trainer import native
assert native.operations(training=False) is None, "an export would need our operations"
print(json.dumps({
    "graphs": graphs,
    "lines": len(lines), "error": found["error_percent"], "documents": found["documents"],
    "perplexity": encoder.report["perplexity"], "broadcast": len(warm.report["broadcast"]),
    "weights": [warm.report["init_weights"], scratch.report["init_weights"]],
    "losses": losses,
    "reads": [warmstate.load_classifier(made.folder).max_tokens for made in (warm, scratch)],
    "labels": [p.label for p in predictions], "h": list(final[0][0].shape),
    "learned": list(learned.h.shape),
}))
"""


def test_importing_it_does_not_import_tensorflow() -> None:
    program = "import sys, warmstate; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


def test_the_stages_one_after_the_other(small_store: Path, tmp_path: Path) -> None:

    done = forked.run(
        [sys.executable, "-c", PROGRAM, str(small_store), str(tmp_path), str(free_port())],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()  # the rest went to log=
    found = json.loads(line)
    assert found["graphs"] == 0  # each holds its stage's weights
    assert found["lines"] > 10 and found["documents"] == 60 and 0 < found["error"] < 100
    assert found["perplexity"] > 1 and found["broadcast"] == 3
    assert found["weights"] == ["encoder", "random"]
    assert found["reads"] == [24, 40] and found["losses"][0] != found["losses"][1]
    assert set(found["labels"]) <= {"0", "1"}  # a store of a source without names
    assert found["h"] == [2, 12] and found["learned"] == [12]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pretrain_step": 3}, "pretrain_step is not a setting; did you mean pretrain_steps?"),
        ({"units": "12"}, "units='12' is not of type int"),
        ({"units": True}, "units=True is not of type int"),
        ({"units": 0, "seed": -1}, "--seed=-1 must be at least 0\n--units=0 must be at least 1"),
    ],
)
def test_wrong_settings_raise_all_at_once(
    small_store: Path, tmp_path: Path, settings: dict, says: str
) -> None:
    with pytest.raises(InputError) as caught:
        warmstate.pretrain(tmp_path / "run", small_store, **settings)
    assert says in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_not_there_raises(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a token store"):
        warmstate.pretrain(tmp_path / "run", tmp_path)
    with pytest.raises(InputError, match=f"folder={tmp_path} is no classifier bundle"):
        warmstate.predict(tmp_path, ["a text"])
    with pytest.raises(InputError, match="folder=.* is no encoder bundle"):
        warmstate.load_encoder(tmp_path)
    with pytest.raises(InputError, match="put it in a list"):
        warmstate.predict(tmp_path, "a text")
    with pytest.raises(InputError, match="sorce is not a setting; did you mean source"):
        warmstate.prepare(tmp_path / "store", sorce="movie_reviews")
    with pytest.raises(AttributeError):
        _ = warmstate.no_such_thing


def test_a_store_is_made_and_opened(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f"w {i},{'yn'[i % 2]}\n" for i in range(60))
    )
    lines: list[str] = []
    settings = {"source": f"csv:{tmp_path}/a.csv", "vocab_size": 4, "log": lines.append}
    store = warmstate.prepare(tmp_path / "store", **settings)
    assert store.class_names == ("n", "y") and lines
    assert warmstate.prepare(tmp_path / "store", **settings).vocab_sha256 == store.vocab_sha256
