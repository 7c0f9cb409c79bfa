import itertools
import subprocess
import sys
from collections import Counter

import hypothesis.strategies as st
from hypothesis import given, settings

from data_pipelines.tokenizers.subword_vocabulary import cut, learn_pieces

WORD_COUNTS = st.dictionaries(
    st.text(st.sampled_from("abcdé"), min_size=1, max_size=7), st.integers(1, 9), max_size=12
)


def join(pair: tuple[str, str]) -> str:
    return pair[0] + pair[1].removeprefix("##")


def written_out(word_counts: dict[str, int], size: int, min_count: int) -> set[str]:
    """The same, with all pairs counted again after each step."""
    words = {word: ["##" + c if i else c for i, c in enumerate(word)] for word in word_counts}
    seen = Counter()
    for word, pieces in words.items():
        for piece in pieces:
            seen[piece] += word_counts[word]
    ordered = sorted(seen, key=lambda piece: (-seen[piece], piece))
    alphabet = {piece for piece in ordered[:size] if seen[piece] >= min_count}
    known = set(alphabet)
    while len(known) < size:
        pairs = Counter()
        for word, pieces in words.items():
            for pair in itertools.pairwise(pieces):
                if all(len(p.removeprefix("##")) > 1 or p in alphabet for p in pair):
                    pairs[pair] += word_counts[word]
        pairs = {pair: count for pair, count in pairs.items() if count >= min_count}
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        known.add(join(best))
        for pieces in words.values():
            at = 0
            while at + 1 < len(pieces):
                if (pieces[at], pieces[at + 1]) == best:
                    pieces[at : at + 2] = [join(best)]
                at += 1
    return known


@settings(max_examples=200, deadline=None)
@given(WORD_COUNTS, st.integers(0, 30), st.integers(1, 4))
def test_pieces_are_those_of_the_definition(
    word_counts: dict[str, int], size: int, min_count: int
) -> None:
    pieces = learn_pieces(word_counts, size, min_count)
    assert set(pieces) == written_out(word_counts, size, min_count)
    uses = Counter()
    for word, count in word_counts.items():
        for piece in cut(word, pieces):
            uses[piece] += count
    assert pieces == sorted(pieces, key=lambda piece: (-uses[piece], piece))
    assert len(set(pieces)) == len(pieces) <= size


def test_order_of_the_words_does_not_matter() -> None:
    counts = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    backwards = dict(reversed(counts.items()))
    assert learn_pieces(counts, 20, 1) == learn_pieces(backwards, 20, 1)
    assert "##est" in learn_pieces(counts, 20, 1)


def test_long_words_and_long_pieces_are_not_learned() -> None:
    pieces = learn_pieces({"a" * 101: 9, "b" * 60: 9}, 500, 1)
    assert not any("a" in piece for piece in pieces)
    assert 10 < max(len(piece.removeprefix("##")) for piece in pieces) <= 20


def test_cut_takes_the_longest_piece_first() -> None:
    known = {"un", "##aff", "##able", "##a", "u", "##b"}
    assert cut("unaffable", known) == ["un", "##aff", "##able"]
    assert cut("unaffabxb", known) == ["un", "##aff", "##a", "##b", "##x", "##b"]
    assert cut("", known) == []


def test_it_is_light() -> None:
    program = (
        "import sys; import data_pipelines.tokenizers.subword_vocabulary,"
        "data_pipelines.tokenizers.vocabulary; sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
