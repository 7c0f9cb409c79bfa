"""Sessions against reading the whole again: equal answers, time, and memory of a server.

    python -m benchmarks.sessions

IMDB reviews are cut at random bytes, and the answer after each piece is compared with that for all
of the text so far. A chat of 20 messages is answered after each message, by a session and by
reading the whole again. A server holds 10,000 sessions.
"""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import facts
from benchmarks.processes import in_turn, min_and_median, write_results
from data_pipelines.sources.movie_reviews import MovieReviews

REVIEWS, PIECES = 1_000, 6
MESSAGES, MESSAGE_WORDS = 20, (20, 60, 200)
SESSIONS, CLIENTS = 10_000, 32


def reviews(count: int) -> list[bytes]:
    """Returns IMDB reviews."""
    source = MovieReviews()
    examples = (e for part in source.parts("test") for e in source.examples("test", part))
    return [example.text.encode() for example in itertools.islice(examples, count)]


def largest_difference(model: Any, whole: Any, texts: list[bytes]) -> dict[str, Any]:
    """Returns the largest difference of a probability over all pieces of all texts."""
    random = np.random.default_rng(0)
    largest, answers, inside_words = 0.0, 0, 0
    for text in texts:
        cuts = np.sort(random.integers(1, len(text), PIECES - 1)).tolist()
        session, found, so_far = model.session(), [], []
        for start, stop in itertools.pairwise([0, *cuts, len(text)]):
            session.feed(text[start:stop])
            found.append(session.probabilities())
            so_far.append(text[:stop])
            inside_words += stop < len(text) and text[stop - 1 : stop + 1].isalpha()
        expected = whole.of_texts(so_far, np.full(len(so_far), -1, np.int32)).numpy()
        largest = max(largest, float(np.abs(expected - found).max()))
        answers += len(found)
    return {
        "reviews": len(texts),
        "answers": answers,
        "cuts_inside_words": int(inside_words),
        "largest_difference": float(f"{largest:.2g}"),
    }


def chat(model: Any, whole: Any, messages: list[str], repeats: int) -> dict[str, Any]:
    """Returns the processor seconds of a chat by a session and by reading the whole again."""

    def by_session() -> float:
        began, session = time.process_time(), model.session()
        for message in messages:
            session.feed(message)
            session.probabilities()
        return time.process_time() - began

    def by_reading_again() -> float:
        began, so_far = time.process_time(), ""
        for message in messages:
            so_far += message
            whole.probabilities([so_far])
        return time.process_time() - began

    programs: dict[str, Callable[[], float]] = {"session": by_session, "again": by_reading_again}
    in_turn(programs, 1)  # traces
    times = in_turn(programs, repeats)
    ratios = [a / s for a, s in zip(times["again"], times["session"], strict=True)]
    return {
        "messages": len(messages),
        "words_a_message": len(messages[0].split()),
        "processor_seconds": {name: min_and_median(values) for name, values in times.items()},
        "faster_by": round(float(np.median(ratios)), 2),
    }


def chats(model: Any, whole: Any, texts: list[bytes], repeats: int) -> list[dict[str, Any]]:
    """Returns the results of `chat` for messages of each length."""
    words, found = b" ".join(texts).decode().split(), []
    for length in MESSAGE_WORDS:
        starts = range(0, MESSAGES * length, length)
        messages = [" ".join(words[start : start + length]) + " " for start in starts]
        found.append(chat(model, whole, messages, repeats))
    return found


async def client(port: int, bodies: Iterator[bytes], ids: list[str]) -> None:
    """Opens sessions and feeds each one message, on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def post(path: str, body: bytes) -> dict[str, Any]:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next(int(x.split(b":")[1]) for x in lines if x.startswith(b"content-length:"))
        answer = json.loads(await reader.readexactly(length))
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    for body in bodies:
        ids.append((await post("/sessions", b"{}"))["session"])
        await post(f"/sessions/{ids[-1]}", body)
    writer.close()


def resident_megabytes(process: int) -> float:
    """Returns the resident set of a process, in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def server_memory(classifier: str, texts: list[bytes]) -> dict[str, Any]:
    """Returns the memory of a server before and after SESSIONS sessions, and their rate."""
    command = [sys.executable, "-u", "-m", "trainer.main", "--stage=serve", "--port=0"]
    server = subprocess.Popen(
        [*command, f"--classifier={classifier}", f"--max_sessions={SESSIONS + 500}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        port = int(server.stdout.readline().rsplit(":", 1)[1])
        words = b" ".join(texts).decode().split()
        messages = (" ".join(words[i : i + 20]) for i in itertools.count())
        bodies = (json.dumps({"text": message}).encode() for message in messages)

        async def load(count: int) -> list[str]:
            ids: list[str] = []
            some = itertools.islice(bodies, count)
            await asyncio.gather(*(client(port, some, ids) for _ in range(CLIENTS)))
            return ids

        asyncio.run(load(500))  # traces, and fills TensorFlow's pools
        before, began = resident_megabytes(server.pid), time.perf_counter()
        count = len(set(asyncio.run(load(SESSIONS))))
        seconds = time.perf_counter() - began
        after = resident_megabytes(server.pid)
    finally:
        server.terminate()
        server.wait(timeout=60)
    return {
        "sessions": count,
        "megabytes_before": round(before, 1),
        "megabytes_after": round(after, 1),
        "kilobytes_a_session": round(1024 * (after - before) / count, 2),
        "sessions_opened_and_fed_per_second": round(count / seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classifier", default="results/imdb_cpu_384")
    parser.add_argument("--out", default="sessions", help="name of the JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("answers", "chats", "server"))
    args = parser.parse_args()
    from trainer import native
    from trainer.inference.text_classifier import TextClassifier, load_classifier

    native.use_in_inference()  # as `predict` and `serve` do
    model = load_classifier(args.classifier)
    whole = TextClassifier(model.classifier, model.tokenizer, model.class_names, 1 << 20)
    texts = reviews(REVIEWS)
    out = Path("benchmarks/results") / f"{args.out}.json"
    results = json.loads(out.read_text())["results"] if args.only and out.exists() else {}
    results["model"] = json.loads((Path(args.classifier) / "classifier.json").read_text())["model"]
    parts = {
        "answers": lambda: largest_difference(model, whole, texts),
        "chats": lambda: chats(model, whole, texts, args.repeats),
        "server": lambda: server_memory(args.classifier, texts),
    }
    for name, measured in parts.items():
        if args.only in (None, name):
            results[name] = measured()
            print(name, results[name], flush=True)
    write_results(args.out, facts(), results)


if __name__ == "__main__":
    main()
