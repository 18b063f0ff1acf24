"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of texts that have several references each, equal to what
the scorer of the E2E NLG Challenge prints (github.com/tuetschek/e2e-metrics)."""

from collections.abc import Sequence

from experiments.scores import cider, meteor, mteval, ptb, rouge

NAMES = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr", "NIST_p")


def scores(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The scores of `outputs`, item by item beside all of their `references`, by name: those of
    `NAMES` but `missing()`.

    `NIST` is the scorer's as it runs by default, which the challenge published. With its option
    -p, which the LoRA paper's command gives, the scorer prints `NIST_p` in its place; the other
    scores stay, but for BLEU where outputs are empty or of under four words. An empty
    output counts, as one that matches nothing. Line breaks count as spaces: the scorer reads a text
    a line.

    Raises:
      ValueError: no outputs, another number of references, an item without references or with an
        empty one, or outputs that are all empty.
    """
    _check(outputs, references)
    items = mteval.items(
        [_line(text) for text in outputs], [[_line(text) for text in texts] for texts in references]
    )
    found = {"BLEU": mteval.bleu(items), "NIST": mteval.nist(items)}
    words = [ptb.words(text) for text in outputs]
    known = [[ptb.words(text) for text in texts] for texts in references]
    if not missing():
        found["METEOR"] = meteor.meteor(words, known)
    found |= {"ROUGE_L": rouge.rouge_l(words, known), "CIDEr": cider.cider(words, known)}
    return found | {"NIST_p": mteval.nist_p(items)}


def missing() -> dict[str, str]:
    """The scores that cannot be had on this machine, with the reasons."""
    reason = meteor.missing()
    return {} if reason is None else {"METEOR": reason}


def _line(text: str) -> str:
    return " ".join(text.split())


def _check(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    for name, texts in (("outputs", outputs), ("references", references)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is one text: expected a list, an entry for each item.")
    if not len(outputs):
        raise ValueError("there are no outputs to score: expected one for each item.")
    if len(outputs) != len(references):
        raise ValueError(
            f"{len(outputs)} outputs and references of {len(references)} items: expected one "
            "output for each item, in the same order."
        )
    for i, texts in enumerate(references):
        if isinstance(texts, str):
            raise ValueError(f"references[{i}] is one text, {texts!r}: expected a list of texts.")
        if not len(texts):
            raise ValueError(f"item {i} has no references: give at least one, or leave it out.")
        if not all(text.strip() for text in texts):
            raise ValueError(f"item {i} has an empty reference: remove it from references[{i}].")
    if not any(text.strip() for text in outputs):
        raise ValueError(
            f"all {len(outputs)} outputs are empty: the model answered nothing, and scores of "
            "nothing are not given. Look at its prompts and at the token that ends an answer."
        )
