from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.store.token_store import TokenStore
from data_pipelines.tokenizers.vocabulary import vocabulary_lines
from trainer.distribution.tf_distribute import one_device
from trainer.models.encoder import Encoder
from trainer.stages.init_embeddings import init_embeddings


def run_of(store: TokenStore, path: Path, lines: list[str]) -> Any:
    config = SimpleNamespace(init_embeddings=str(path))
    distributor = one_device()
    return SimpleNamespace(
        config=config, distributor=distributor, store=store, is_chief=True, log=lines.append
    )


def test_words_in_the_file_get_their_vectors(small_store: Path, tmp_path: Path) -> None:
    store = TokenStore(small_store)
    words = vocabulary_lines(store.vocab_path)
    path = tmp_path / "vectors.txt"
    path.write_text(f"{words[7]} 1 2 3\nnot-a-word 4 5 6\n{words[0]} 7 8 9\n")
    encoder = Encoder(store.vocab_size, 3, 4, seed=0)
    encoder.build()
    expected = encoder.embeddings.numpy()
    expected[[3 + 7, 3]] = [[1, 2, 3], [7, 8, 9]]
    lines: list[str] = []
    report = init_embeddings(run_of(store, path, lines), encoder)
    np.testing.assert_array_equal(encoder.embeddings.numpy(), expected)
    assert report == {"words_found": 2, "words": len(words)}
    assert lines == [f"embeddings of 2 of {len(words)} words are from {path}"]
    path.write_text("not-a-word 4 5 6\n")
    with pytest.raises(InputError, match="has none of the 997 words of"):
        init_embeddings(run_of(store, path, lines), encoder)
