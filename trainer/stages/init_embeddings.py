"""--init_embeddings: embeddings that start from pretrained word vectors.

This is the paper's word2vec row (Dai & Le 2015, table 2). All other weights start random.
"""

from data_pipelines.errors import InputError
from data_pipelines.tokenizers.vocabulary import FIRST_ID, vocabulary_lines
from data_pipelines.word_vectors import read_word_vectors
from trainer.models.encoder import Encoder
from trainer.training.run import Run


def init_embeddings(run: Run, encoder: Encoder) -> dict[str, int]:
    """Sets the embeddings of the words in the file; others do not change.

    A collective; only the chief reads the file.

    Returns:
        For the report: the number of words found, and of words in the vocabulary.

    Raises:
        InputError: In the chief: the file cannot be read, or has none of the words.
    """
    path, found = run.config.init_embeddings, None
    words = encoder.vocab_size - FIRST_ID
    if run.is_chief:
        with run.distributor.watchdog.local_work():
            places, vectors = read_word_vectors(
                path, vocabulary_lines(run.store.vocab_path), encoder.embedding_dim
            )
        if not len(places):
            raise InputError(
                f"--init_embeddings={path} has none of the {words:,} words of the vocabulary, "
                f"{run.store.vocab_path}"
            )
        found = {"ids": places + FIRST_ID, "vectors": vectors}
    found = run.distributor.broadcast_arrays(found)
    table = encoder.embeddings.numpy()
    table[found["ids"]] = found["vectors"]
    encoder.embeddings.assign(table)
    run.log(f"embeddings of {len(found['ids']):,} of {words:,} words are from {path}")
    return {"words_found": len(found["ids"]), "words": words}
