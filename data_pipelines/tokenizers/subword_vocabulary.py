"""Learns the pieces of the subword tokenizer from word counts.

Byte pair encoding (Sennrich, Haddow & Birch 2016, "Neural Machine Translation of Rare Words with
Subword Units", section 3.2): start from characters, and repeatedly join the most frequent pair of
neighbours. CONTINUED marks a piece that does not begin a word: "##ing" is the end of "going".

Imports no TensorFlow.
"""

import heapq
from collections import Counter
from collections.abc import Container, Iterator, Mapping

CONTINUED = "##"
MAX_WORD_CHARACTERS = 100  # longer words are unknown
MAX_PIECE_CHARACTERS = 20

Pair = tuple[str, str]


def learn_pieces(word_counts: Mapping[str, int], size: int, min_count: int) -> list[str]:
    """Returns pieces, most used first, ties by their text.

    Args:
        word_counts: the frequency of each word.
        size: number of pieces; the result has fewer if the words give no more.
        min_count: rarer pairs are not joined, and rarer characters are not pieces.
    """
    words = {w: n for w, n in sorted(word_counts.items()) if len(w) <= MAX_WORD_CHARACTERS}
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for piece in _characters(word):
            characters[piece] += count
    ordered = sorted(characters.items(), key=lambda item: (-item[1], item[0]))
    pieces = {piece for piece, count in ordered[:size] if count >= min_count}
    if len(pieces) < size:
        for piece in _joined_pieces(words, pieces.copy(), min_count):
            pieces.add(piece)
            if len(pieces) == size:
                break
    uses: Counter[str] = Counter()
    for word, count in words.items():
        for piece in cut(word, pieces):
            uses[piece] += count
    return sorted(pieces, key=lambda piece: (-uses[piece], piece))


def cut(word: str, pieces: Container[str]) -> list[str]:
    """Cuts a word into the longest pieces, from left to right.

    A character without a piece is returned as a piece that is not in `pieces`.
    """
    if len(word) > MAX_WORD_CHARACTERS:
        return [word]
    found, start = [], 0
    while start < len(word):
        mark = CONTINUED if start else ""
        stops = range(min(len(word), start + MAX_PIECE_CHARACTERS), start, -1)
        stop = next((s for s in stops if mark + word[start:s] in pieces), start + 1)
        found.append(mark + word[start:stop])
        start = stop
    return found


def _characters(word: str) -> list[str]:
    return [CONTINUED + c if i else c for i, c in enumerate(word)]


def _join(left: str, right: str) -> str:
    return left + right.removeprefix(CONTINUED)


def _joined_pieces(
    word_counts: Mapping[str, int], alphabet: Container[str], min_count: int
) -> Iterator[str]:
    """Yields joined pairs, most frequent first, until no pair is left."""
    counts = list(word_counts.values())
    words = [_characters(word) for word in word_counts]
    pair_counts: Counter[Pair] = Counter()
    pair_words: dict[Pair, set[int]] = {}  # words that have, or had, the pair

    def add(number: int, sign: int) -> set[Pair]:
        pairs = list(zip(words[number], words[number][1:], strict=False))
        for pair in pairs:
            pair_counts[pair] += sign * counts[number]
            pair_words.setdefault(pair, set()).add(number)
        return set(pairs)

    def joinable(pair: Pair) -> bool:
        short = len(_join(*pair).removeprefix(CONTINUED)) <= MAX_PIECE_CHARACTERS
        # A joined piece is longer than a character, so it is made of the alphabet already.
        known = all(len(p.removeprefix(CONTINUED)) > 1 or p in alphabet for p in pair)
        return short and known and pair_counts[pair] >= min_count

    for number in range(len(words)):
        add(number, 1)
    heap = [(-pair_counts[pair], pair) for pair in pair_counts if joinable(pair)]
    heapq.heapify(heap)
    while heap:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            continue  # outdated: the heap has another entry
        changed: set[Pair] = set()
        for number in pair_words.pop(pair):
            changed |= add(number, -1)
            words[number] = _with_joined(words[number], pair)
            changed |= add(number, 1)
        for other in changed - {pair}:
            if joinable(other):
                heapq.heappush(heap, (-pair_counts[other], other))
        pair_counts[pair] = 0
        yield _join(*pair)


def _with_joined(pieces: list[str], pair: Pair) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        # A piece that was just joined is not a left side: "aaa" is "aa", "a".
        if joined and (joined[-1], piece) == pair:
            joined[-1] = _join(*pair)
        else:
            joined.append(piece)
    return joined
