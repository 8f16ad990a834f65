"""Real data for the examples, out of packages. ``python examples/prepare.py TASK``

sentiment   sentences of film reviews, rated by people (vaderSentiment): positive or negative
words       the same sentences, each word positive, negative or neither (VADER's lexicon); a fifth of its words is only
            in the sentences to test on
reviews     the same sentences as plain text
chat        questions and answers as chat messages (chatterbot-corpus)
manual      Python's reference manual as plain text, which comes with Python

Writes train.jsonl and test.jsonl into runs/data/TASK. No network: the first three read the source archive of
vaderSentiment, which pip leaves where it is told to.
"""

from __future__ import annotations

import argparse
import io
import json
import pydoc_data.topics
import random
import re
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import demo

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHARE = Path(sys.prefix) / "share" / "fastlora"
DOWNLOAD = f"pip download --no-deps --no-build-isolation --no-binary :all: -d {SHARE} vaderSentiment==3.3.2"
SEED = 7
CLEAR = 0.5
"""A rating, from -4 to 4, that is nearer to 0 says neither."""
Rows = list[dict[str, Any]]


def member(archive: tarfile.TarFile, ending: str) -> bytes:
    """The content of the one file of ``archive`` whose name ends so."""
    (name,) = (name for name in archive.getnames() if name.endswith(ending))
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def vader(path: Path) -> tuple[list[tuple[float, str]], dict[str, float]]:
    """(mean rating, sentence) of the film reviews, each sentence once, and the rating of each word of the lexicon."""
    with tarfile.open(path) as outer:
        lexicon = member(outer, "vaderSentiment/vader_lexicon.txt").decode("utf-8")
        with tarfile.open(fileobj=io.BytesIO(member(outer, "hutto_ICWSM_2014.tar.gz"))) as inner:
            lines = member(inner, "movieReviewSnippets_GroundTruth.txt").decode("utf-8", errors="replace")
    ratings: dict[str, float] = {}
    for line in lines.splitlines():
        parts = line.split("\t")
        if len(parts) == 3:
            ratings.setdefault(" ".join(parts[2].replace("''", '"').split()), float(parts[1]))
    words = {line.split("\t")[0]: float(line.split("\t")[1]) for line in lexicon.splitlines() if line.count("\t") >= 2}
    return [(rating, text) for text, rating in ratings.items()], words


def shuffled(rows: Iterable[Any]) -> list[Any]:
    """The rows in an order that the seed alone decides."""
    result = list(rows)
    random.Random(SEED).shuffle(result)
    return result


def sentiment(archive: Path) -> tuple[Rows, Rows]:
    ratings, _ = vader(archive)
    rows = [
        {"text": text, "label": "positive" if rating > 0 else "negative"}
        for rating, text in shuffled(ratings)
        if abs(rating) > CLEAR
    ]
    return rows[1000:], rows[:1000]


def words(archive: Path) -> tuple[Rows, Rows]:
    ratings, lexicon = vader(archive)
    rated = sorted(word for word in lexicon if word.isalpha())
    unseen = set(random.Random(SEED).sample(rated, len(rated) // 5))
    train, test = [], []
    for _, text in shuffled(ratings):
        tokens = re.findall(r"\w+(?:'\w+)?|[^\w\s]", text)
        values = [lexicon.get(token.lower(), 0.0) for token in tokens]
        tags = ["POS" if value > CLEAR else "NEG" if value < -CLEAR else "O" for value in values]
        if any(tag != "O" for tag in tags):
            part = test if any(token.lower() in unseen for token in tokens) else train
            part.append({"tokens": tokens, "tags": tags})
    return train, test[:1000]


def reviews(archive: Path) -> tuple[Rows, Rows]:
    rows = [{"text": text} for _, text in shuffled(vader(archive)[0])]
    return rows[500:], rows[:500]


def chat(archive: Path) -> tuple[Rows, Rows]:
    pairs = demo.distinct(demo.read_pairs(demo.package_folder("chatterbot_corpus") / "data" / "english"))
    train, test = demo.split(pairs, 64)
    return [pair.messages() for pair in train], [pair.messages() for pair in test]


def manual(archive: Path) -> tuple[Rows, Rows]:
    topics = pydoc_data.topics.topics
    paragraphs = (part for name in sorted(topics) for part in topics[name].split("\n\n"))
    rows = [{"text": text} for text in shuffled(dict.fromkeys(" ".join(part.split()) for part in paragraphs)) if text]
    return rows[len(rows) // 20 :], rows[: len(rows) // 20]


TASKS: dict[str, Callable[[Path], tuple[Rows, Rows]]] = {
    "sentiment": sentiment,
    "words": words,
    "reviews": reviews,
    "chat": chat,
    "manual": manual,
}


def prepare(task: str, out: Path, archive: Path = SHARE / ARCHIVE) -> tuple[int, int]:
    """Writes ``train.jsonl`` and ``test.jsonl`` of ``task`` into ``out``; the numbers of their rows."""
    train, test = TASKS[task](archive)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return len(train), len(test)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", type=Path, help="folder [default: runs/data/TASK]")
    parser.add_argument("--archive", type=Path, default=SHARE / ARCHIVE, help="source archive of vaderSentiment")
    arguments = parser.parse_args()
    out = arguments.out or Path("runs/data") / arguments.task
    try:
        train, test = prepare(arguments.task, out, arguments.archive)
    except demo.Missing as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        if Path(str(error.filename)) != arguments.archive:
            raise
        print(f"prepare: {arguments.archive} is not there: {DOWNLOAD}", file=sys.stderr)
        return 2
    print(f"{train} rows to train on and {test} to test on in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
