"""ROUGE-L as the COCO caption scorer has it.

    F = (1 + b^2) P R / (R + b^2 P),  b = 1.2,  P = max over references of lcs / len(output),
                                                R = max over references of lcs / len(reference)

with lcs the length of the longest common subsequence of words; the score is the mean over outputs.
P and R may come from different references. Sources: Lin 2004; github.com/tylin/coco-caption.
"""

from collections import defaultdict
from collections.abc import Sequence

BETA = 1.2


def rouge_l(outputs: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float:
    scores = [_score(*item) for item in zip(outputs, references, strict=True)]
    return sum(scores) / len(scores)


def _score(output: list[str], references: Sequence[list[str]]) -> float:
    # A text without words counts as one empty word.
    output, references = output or [""], [reference or [""] for reference in references]
    common = [_common(output, reference) for reference in references]
    precision = max(common) / len(output)
    recall = max(lcs / len(text) for lcs, text in zip(common, references, strict=True))
    if not max(common):
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence, row by row of the usual table: bit i of `row`
    is 0 where the length grows at `one[i]` (Hyyrö 2004)."""
    places: defaultdict[str, int] = defaultdict(int)
    for i, word in enumerate(one):
        places[word] |= 1 << i
    row = full = (1 << len(one)) - 1
    for word in other:
        matched = row & places[word]
        row = ((row + matched) | (row - matched)) & full
    return len(one) - row.bit_count()
