"""CIDEr-D as the COCO caption scorer has it.

An n-gram of a text weighs its count times log(items / items with it in a reference). For each n
from 1 to 4 the weights of the output, clipped to the reference's, are multiplied with the
reference's and divided by the norms of both; the score is 10 times the mean over n, references and
items, after a Gaussian penalty exp(-d^2 / 72) of the difference d in bigrams.

Sources: Vedantam et al. 2015; github.com/tylin/coco-caption.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

ORDERS = range(1, 5)
SIGMA = 6.0

Weights = dict[tuple[str, ...], float]


class _Vector(NamedTuple):
    weights: list[Weights]  # by order
    norms: list[float]
    bigrams: int


def cider(outputs: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float:
    items_with = Counter[tuple[str, ...]]()
    for texts in references:
        items_with.update({ngram for text in texts for n in ORDERS for ngram in _ngrams(text, n)})

    def vector(text: list[str]) -> _Vector:
        weights: list[Weights] = [
            {
                ngram: count * math.log(len(outputs) / max(items_with[ngram], 1))
                for ngram, count in Counter(_ngrams(text, n)).items()
            }
            for n in ORDERS
        ]
        norms = [math.sqrt(sum(weight**2 for weight in order.values())) for order in weights]
        return _Vector(weights, norms, len(_ngrams(text, 2)))

    total = 0.0
    for output, texts in zip(outputs, references, strict=True):
        one = vector(output)
        total += sum(_similarity(one, vector(text)) for text in texts) / len(texts)
    return 10 * total / len(outputs)


def _similarity(output: _Vector, reference: _Vector) -> float:
    penalty = math.exp(-((output.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2))
    cosines = [
        sum(min(w, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0) for ngram, w in ours.items())
        / (norm * other or 1.0)
        for ours, theirs, norm, other in zip(
            output.weights, reference.weights, output.norms, reference.norms, strict=True
        )
    ]
    return penalty * sum(cosines) / len(cosines)


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    words = " ".join(words).split()  # some of PTBTokenizer's words hold a no-break space
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
