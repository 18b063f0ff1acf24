"""Regular expressions of an adapter's config, matched against module names in bounded time."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

_SECONDS, _MANY = 10, 1_000_000
_MATCHER = """
import json, re, sys
expressions, names = json.load(sys.stdin)
try:
    compiled = [re.compile(expression) for expression in expressions]
except (re.error, RecursionError, OverflowError) as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
else:
    print(json.dumps([[name for name in names if one.fullmatch(name)] for one in compiled]))
"""


def matching(what: str, expressions: Sequence[str], names: Iterable[str]) -> list[set[str]]:
    """For each expression, the names that it matches from end to end, as `re.fullmatch` does.

    Args:
      what: the field that holds the expressions, for messages.
      expressions: of any syntax that `re` takes.
      names: of modules.

    Raises:
      ValueError: an invalid expression, or more than ten seconds for all of them.
    """
    names = list(names)
    if len(expressions) * len(names) <= _MANY and all(map(_is_plain, expressions)):
        try:
            compiled = [re.compile(expression) for expression in expressions]
        except (re.error, RecursionError, OverflowError) as error:
            raise _no_expression(what, str(error)) from None
        return [{name for name in names if one.fullmatch(name)} for one in compiled]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([list(expressions), names]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        shown = ", ".join(expressions)
        raise ValueError(
            f"{what}: {shown[:200]!r} takes more than {_SECONDS} s to match this model's "
            f"{len(names)} names. List the modules, or write it without repetitions of "
            "repetitions."
        ) from None
    if done.returncode:
        raise _no_expression(what, done.stderr.strip().rpartition("\n")[2])
    found = json.loads(done.stdout)
    if isinstance(found, str):
        raise _no_expression(what, found)
    return [set(each) for each in found]


def _is_plain(expression: str) -> bool:
    """Whether matching, which backtracks, is quick for sure: few ways to match a name, so no
    repeated group, and few repetitions, options and alternatives after one another. All else is
    matched in a process that can be ended."""
    bare = expression.replace("(?:", "(")
    return (
        len(bare) <= 300
        and sum(map(bare.count, "*+?{")) <= 4
        and bare.count("(") <= 4
        and not re.search(r"\)[*+{]|\\\d|\(\?|\0|\[\[|--|&&|~~|\|\|", bare)
    )


def _no_expression(what: str, why: str) -> ValueError:
    return ValueError(
        f"{what}: expected names of modules, or regular expressions over them, found one that is "
        f"none ({why})."
    )
