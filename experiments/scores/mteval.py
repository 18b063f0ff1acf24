"""BLEU and NIST as mteval-v13a computes them, with any number of references an item.

    BLEU = exp(min(0, 1 - r / c)) * (p_1 p_2 p_3 p_4)^(1/4)
    NIST = penalty(c / r') * sum_n (sum over matched n-grams of their information) / (n-grams)

c is the number of words in the outputs, p_n the share of their n-grams that a reference of the item
has (each as often as one reference has it), r sums the length of each item's closest reference, and
the information of w_1..w_n is log2(count(w_1..w_n-1) / count(w_1..w_n)) over all references.

Sources: Papineni et al. 2002; Doddington 2002; github.com/tuetschek/e2e-metrics, by which these
numbers are the ones printed for the E2E NLG Challenge.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

Words = list[str]
Ngram = tuple[str, ...]

_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_PUNCTUATION = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # but after a digit
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),  # but before a digit
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ASCII_LOWER = str.maketrans({chr(c): chr(c + 32) for c in range(ord("A"), ord("Z") + 1)})


class Item(NamedTuple):
    """One output and its references, in words."""

    output: Words
    references: list[Words]


def words(text: str) -> Words:
    """`text` in lower case (ASCII alone), split as mteval-v13a does."""
    text = text.replace("<skipped>", "")
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text.translate(_ASCII_LOWER)} "
    for pattern, spaced in _PUNCTUATION:
        text = pattern.sub(spaced, text)
    return text.split()


def items(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[Item]:
    return [
        Item(words(output), [words(text) for text in texts])
        for output, texts in zip(outputs, references, strict=True)
    ]


def bleu(items: Sequence[Item]) -> float:
    """BLEU of the corpus, from 0 to 1. The k-th order that matches nothing counts 1 / 2^k matches;
    one of which the outputs have no n-gram counts as matched."""
    produced = sum(len(item.output) for item in items)
    if not produced:
        return 0.0
    expected = sum(_closest_length(item) for item in items)
    log_precisions, halvings = 0.0, 0
    for n in range(1, 5):
        total = sum(max(len(item.output) - n + 1, 0) for item in items)
        matched = sum(matches(item, n).total() for item in items)
        if total and not matched:
            halvings += 1
        if total:
            log_precisions += math.log((matched or 0.5**halvings) / total)
    return math.exp(min(0.0, 1 - expected / produced) + log_precisions / 4)


def nist(items: Sequence[Item]) -> float:
    """NIST of the corpus. Its r' is the mean length of all references times the number of items.
    The script takes a first word 0 for no word: what follows it is as rare as among all words."""
    lengths = [len(reference) for item in items for reference in item.references]
    produced = [sum(max(len(item.output) - n + 1, 0) for item in items) for n in range(1, 6)]
    return _nist(items, produced, sum(lengths) * len(items) / len(lengths), no_word=("0",))


def nist_p(items: Sequence[Item]) -> float:
    """NIST as the scorer's option -p has it, which the LoRA paper's command gives: r' sums each
    item's mean length, case is Unicode's, and outputs of under five words, an empty one being one,
    count fewer than no n-grams of an order."""
    items = [
        Item(_lower(item.output) or [""], [_lower(text) for text in item.references])
        for item in items
    ]
    produced = [sum(len(item.output) - n + 1 for item in items) for n in range(1, 6)]
    means = [sum(map(len, item.references)) / len(item.references) for item in items]
    return _nist(items, produced, sum(means))


def _nist(
    items: Sequence[Item], produced: Sequence[int], expected: float, no_word: Ngram = ()
) -> float:
    """`produced` counts the outputs' n-grams by order, `expected` is r'."""
    gains = [_information(items, n, no_word) for n in range(1, 6)]
    gain = sum(gain / (total or 1) for gain, total in zip(gains, produced, strict=True))
    return gain * _length_penalty(produced[0] / expected)


def _lower(words: Words) -> Words:
    return [word.lower() for word in words]


def _information(items: Sequence[Item], n: int, no_word: Ngram) -> float:
    """The summed information of the outputs' matched n-grams."""
    longer, shorter = Counter[Ngram](), Counter[Ngram]()
    for item in items:
        for reference in item.references:
            longer.update(_ngrams(reference, n))
            shorter.update(_ngrams(reference, n - 1))
    if no_word in shorter:
        shorter[no_word] = shorter.total()
    return sum(
        count * math.log2(shorter[ngram[:-1]] / longer[ngram])
        for item in items
        for ngram, count in matches(item, n).items()
    )


def _length_penalty(ratio: float) -> float:
    """1 from a ratio of 1, 1/2 at 2/3."""
    if ratio <= 0 or ratio >= 1:
        return float(ratio > 0)
    return math.exp(math.log(0.5) * (math.log(ratio) / math.log(1.5)) ** 2)


def _closest_length(item: Item) -> int:
    """Of two that are as close, the shorter."""
    lengths = map(len, item.references)
    return min(lengths, key=lambda length: (abs(length - len(item.output)), length))


def matches(item: Item, n: int) -> Counter[Ngram]:
    """The output's n-grams, each at most as often as one reference has it."""
    allowed = Counter[Ngram]()
    for reference in item.references:
        allowed |= _ngrams(reference, n)
    return _ngrams(item.output, n) & allowed


def _ngrams(words: Words, n: int) -> Counter[Ngram]:
    """The n-grams of `words`; of order 0, as many empty ones as there are words."""
    count = len(words) - max(n, 1) + 1
    return Counter(tuple(words[i : i + n]) for i in range(count))
