"""Sessions: texts that arrive in pieces, and are never read twice.

An LSTM that reads forward needs only its state to continue: h and c of each layer, the sum and the
maximum of its outputs as far as the pooling needs them, and the number of tokens. Beside it a
session holds the bytes whose tokens later text may still change, such as half a word. An answer
reads these, and the end token, from a copy of the state.

A session reads from its first token. It has no limit of tokens, whereas a classifier reads only the
last `max_tokens` of a whole text: up to that number the answers are equal.
"""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.tokenizers.tokenizer import Tokenizer
from trainer.distribution.variables import digest, values_of
from trainer.inference.compiled_reader import CompiledReader
from trainer.models import bundle
from trainer.models.classifier import Classifier
from trainer.models.context_state import UNKNOWN

MAX_PENDING_BYTES = 1 << 14
TOKENS_PER_CALL = 1024
MAGIC, FORMAT_VERSION = b"warmsess", 1
# Magic, format version, classifier's SHA-256, number of tokens, number of pending bytes.
HEADER = struct.Struct("<8sI32sQI")
CHECKSUM_BYTES = hashlib.sha256().digest_size
Padded = tuple[np.ndarray, np.ndarray]  # tokens [batch, time] and lengths [batch]


class ForeignSessionError(InputError):
    """A saved session belongs to another classifier or another version of the format."""


class SessionReader:
    """Reads the pieces of any number of sessions of one classifier, as a batch.

    Args:
        compiled: Reads in place of the classifier's graph.

    Attributes:
        shape: Shape of what a session carries on.
        sha256: Digest of the classifier and its tokenizer, 32 bytes: equal digests read alike.

    Raises:
        InputError: The classifier cannot read a text in pieces.
    """

    def __init__(
        self, classifier: Classifier, tokenizer: Tokenizer, compiled: CompiledReader | None = None
    ):
        if fault := stream_fault(classifier):
            raise InputError(fault)
        self._classifier, self._compiled = classifier, compiled
        self.tokenizer = tokenizer
        held = digest(values_of(bundle.classifier_variables(classifier)))
        facts = [held, tokenizer.sha256, str(sorted(bundle.classifier_model(classifier).items()))]
        self.sha256 = hashlib.sha256("\n".join(facts).encode()).digest()
        self.shape = tuple(classifier.unread([UNKNOWN]).shape[1:])
        vectors, ids = (tf.TensorSpec([None, *self.shape]), tf.TensorSpec([None, None], tf.int32))
        self._read_one = tf.function(
            classifier.read_on,
            input_signature=[vectors, ids, tf.TensorSpec([None], tf.int32)],
            autograph=False,
        )

    def unread(self, context: int) -> np.ndarray:
        """Returns what is carried on before the first token: float32 [vectors, units]."""
        return self._classifier.unread([context]).numpy()[0]

    def _read(self, carried: np.ndarray, *pieces: Padded) -> list[np.ndarray]:
        """Returns what is carried on after each piece; see `Classifier.read_on`."""
        if self._compiled is not None:
            return self._compiled.read_on(carried, pieces)
        found = []
        for tokens, lengths in pieces:
            carried = self._read_one(carried, tokens, lengths).numpy()
            found.append(carried)
        return found

    def _answers(self, carried: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns the probabilities of each class; see `Classifier.logits_of_carried`."""
        if self._compiled is not None:
            return self._compiled.probabilities_of_carried(carried, counts)
        logits = self._classifier.logits_of_carried(carried, counts.astype(np.float32))
        return self._classifier.probabilities(self._classifier.class_logits(logits)).numpy()

    def probabilities(self, sessions: "Sequence[Session]") -> np.ndarray:
        """Returns the probability of each class for each session: float32 [sessions, classes].

        Reads what is new of each session, which must be different ones.
        """
        cuts = [self.tokenizer.settled(session.pending) for session in sessions]
        texts = [s.pending[:cut] for s, cut in zip(sessions, cuts, strict=True)]
        texts += [s.pending[cut:] for s, cut in zip(sessions, cuts, strict=True)]
        rows = self.tokenizer.rows(texts)
        new = [row[:-1] for row in rows[: len(sessions)]]  # without the end token
        ends = rows[len(sessions) :]
        counts = np.array([s.tokens + len(n) for s, n in zip(sessions, new, strict=True)])
        totals = counts + [len(end) for end in ends]
        carried = np.stack([session.carried for session in sessions])
        while max(map(len, new)) > TOKENS_PER_CALL:
            (carried,) = self._read(carried, _padded([n[:TOKENS_PER_CALL] for n in new]))
            new = [n[TOKENS_PER_CALL:] for n in new]
        carried, at_end = self._read(carried, _padded(new), _padded(ends))
        found = self._answers(at_end, totals)
        # All at once: a session that fails to be read is as it was.
        for session, vectors, count, cut in zip(sessions, carried, counts, cuts, strict=True):
            session.carried, session.tokens = vectors.copy(), int(count)
            session.pending = session.pending[cut:]
        return found


class Session:
    """A text that arrives in pieces; see this module.

    Attributes:
        tokens: Number of tokens that were read.
        pending: Bytes that were not read: new ones, and those that later text may change.
        carried: From what reading continues: float32 [vectors, units]; see `Classifier.read_on`.
    """

    def __init__(self, reader: SessionReader, context: int = UNKNOWN):
        self._reader = reader
        self.tokens, self.pending, self.carried = 0, b"", reader.unread(context)

    def __len__(self) -> int:
        """Returns the number of bytes that were not read."""
        return len(self.pending)

    def feed(self, text: str | bytes) -> None:
        """Appends text, and reads what is pending once that exceeds MAX_PENDING_BYTES.

        Args:
            text: May end anywhere; as bytes of UTF-8, also inside a character.

        Raises:
            InputError: See `append`.
        """
        self.append(text)
        if len(self) > MAX_PENDING_BYTES:
            self._reader.probabilities([self])

    def append(self, text: str | bytes) -> None:
        """Adds a piece of text without reading it; see `feed`.

        Raises:
            InputError: More than MAX_PENDING_BYTES have no place to be cut, such as a space. The
                session is as it was.
        """
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        pending = self.pending + data
        held = len(pending) - self._reader.tokenizer.settled(pending)
        if held > MAX_PENDING_BYTES:
            raise InputError(
                f"{held:,} bytes without a space or another place to be cut are more than "
                f"{MAX_PENDING_BYTES:,}: this is no text that the tokenizer has words for"
            )
        self.pending = pending

    def probabilities(self) -> np.ndarray:
        """Returns the probability of each class after the text so far: float32 [classes]."""
        return self._reader.probabilities([self])[0]

    def save(self) -> bytes:
        """Returns the session, for `load`: a header, what is carried, pending bytes, a checksum."""
        fields = (self._reader.sha256, self.tokens, len(self.pending))
        body = HEADER.pack(MAGIC, FORMAT_VERSION, *fields)
        body += self.carried.astype("<f4").tobytes() + self.pending
        return body + hashlib.sha256(body).digest()

    def load(self, saved: bytes) -> None:
        """Continues a saved session of the same classifier in place of this one.

        Raises:
            ForeignSessionError: It is a session of another classifier or format version.
            InputError: It is damaged or no saved session.
        """
        body = saved[:-CHECKSUM_BYTES]
        if len(body) < HEADER.size or saved[len(body) :] != hashlib.sha256(body).digest():
            raise InputError("the saved session is damaged: its checksum does not match")
        magic, version, sha256, tokens, pending_bytes = HEADER.unpack_from(body)
        if magic != MAGIC:
            raise InputError(f"this is no saved session: it begins with {magic!r}")
        if version != FORMAT_VERSION:
            raise ForeignSessionError(
                f"the saved session has format version {version}; this program reads version "
                f"{FORMAT_VERSION}"
            )
        if sha256 != self._reader.sha256:
            raise ForeignSessionError(
                f"the saved session belongs to the classifier {sha256.hex()[:12]}, not to this "
                f"one, {self._reader.sha256.hex()[:12]}"
            )
        shape = self._reader.shape
        start = HEADER.size + 4 * shape[0] * shape[1]
        if pending_bytes > MAX_PENDING_BYTES or len(body) != start + pending_bytes:
            raise InputError(f"the saved session is damaged: its size is {len(saved):,} bytes")
        carried = np.frombuffer(body[HEADER.size : start], "<f4").reshape(shape)
        if not np.isfinite(carried).all():
            raise InputError("the saved session is damaged: it has non-finite values")
        self.tokens, self.pending, self.carried = tokens, body[start:], carried


def stream_fault(classifier: Classifier) -> str:
    """Returns why a classifier cannot read a text in pieces, or ""."""
    if classifier.backward is not None:
        return (
            "a classifier of two directions cannot read a text in pieces: the second direction "
            "starts at the end; fine-tune one without --backward_encoder"
        )
    if classifier.reader is not None:
        return (
            "a classifier of --initial_state=encode cannot read a text in pieces: it starts from a "
            "state of the whole text; fine-tune one with --initial_state=learned, mean or zero"
        )
    return ""


def _padded(rows: Sequence[Sequence[int] | np.ndarray]) -> Padded:
    """Returns int32 tokens [rows, time], with at least one step, and lengths [rows]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), max(lengths.max(), 1)), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return tokens, lengths
