"""Broken and hostile files, drawn from seeds: bytes, JSON, headers and templates."""

import copy
import json
import struct
from typing import Any

import numpy as np

VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**62,
    2**64,
    -(2**63),
    10**400,
    0.5,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\x00",
    "../../etc/passwd",
    "/etc/passwd",
    "model.bin",
    "é" * 200,
    [],
    [[]],
    [None],
    [0] * 100,
    {},
    {"": {}},
    {"type": "x"},
    {"__class__": "os.system"},
]
NUMBERS = [0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
SNIPPETS = [
    "{{ messages }}",
    "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{% for i in range(99999) %}",
    "{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ 'a' * 10**9 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ 'a' | center(10**12) }}",
    "{{ range(10**12) | list }}",
    "{% set x = 'aaaaaaaaaaaaaaaa' %}",
    "{% for i in range(60) %}{% set x = x ~ x %}{% endfor %}{{ x }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ raise_exception('no') }}",
    "{{ messages[0]['content'] | tojson(indent=10**9) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% if ",
    "%}",
    "{{",
    "}}",
    "{#",
    "{% generation %}x{% endgeneration %}",
    "{{ bos_token }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ strftime_now('%Y') }}",
    "{{ namespace(a=messages).a }}",
    "\x00",
    "{{ ((((((((((1)))))))))) }}",
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ [" * 300,
]


def mutate_bytes(data: bytes, random: np.random.Generator, *, head: int | None = None) -> bytes:
    """Truncated, or a few bytes flipped, inserted or removed, mostly in the first `head`."""
    if random.random() < 0.25:
        return data[: random.integers(len(data) + 1)]
    mutated = bytearray(data)
    end = head if head and random.random() < 0.8 else len(data)
    for _ in range(random.integers(1, 5)):
        if not mutated:
            break
        at, kind = int(random.integers(min(end, len(mutated)))), random.integers(5)
        if kind < 2:
            mutated[at] ^= 1 << int(random.integers(8))
        elif kind == 2:
            mutated[at] = int(random.integers(256))
        elif kind == 3:
            number = NUMBERS[random.integers(len(NUMBERS))]
            mutated[at : at + 8] = struct.pack("<Q", number)
        elif random.random() < 0.5:
            del mutated[at : at + int(random.integers(1, 9))]
        else:
            mutated[at:at] = random.bytes(int(random.integers(1, 9)))
    return bytes(mutated)


def mutate_json(value: Any, random: np.random.Generator) -> Any:
    """One to three values anywhere inside replaced, removed, renamed or moved."""
    value = copy.deepcopy(value)
    for _ in range(random.integers(1, 4)):
        node, key = _anywhere(value, random)
        kind = random.integers(8)
        if kind == 0 and isinstance(node, dict):
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[str(random.choice(["", "x", "../x", "weight"]))] = node.pop(key)
        elif kind == 2:
            node[key] = copy.deepcopy(value) if random.random() < 0.5 else [node[key]]
        elif kind == 3 and isinstance(node[key], int | float):
            node[key] = -node[key] if random.random() < 0.5 else node[key] * 1000 + 1
        else:
            node[key] = copy.deepcopy(VALUES[random.integers(len(VALUES))])
        if not isinstance(value, dict | list) or not value:
            break
    return value


def _anywhere(value: Any, random: np.random.Generator) -> tuple[Any, Any]:
    places, pending = [], [value]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                pending.append(node[key])
    # A vocabulary has most of the places: take those near the root as often.
    shallow = places[:12] if random.random() < 0.4 else places
    return shallow[random.integers(len(shallow))]


def json_bytes(value: Any, random: np.random.Generator) -> bytes:
    """A JSON file with something wrong in its values, its bytes, or its depth."""
    kind = random.random()
    if kind < 0.75:
        return json.dumps(mutate_json(value, random)).encode()
    if kind < 0.95:
        return mutate_bytes(json.dumps(value).encode(), random)
    depth = int(random.integers(1, 200_000))
    opening, closing = [("[", "]"), ('{"a":', "}")][random.integers(2)]
    return (opening * depth + "1" + closing * depth * int(random.integers(2))).encode()


def safetensors_bytes(data: bytes, random: np.random.Generator) -> bytes:
    """A safetensors file with a hostile header before its bytes, or broken bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    if random.random() < 0.4:
        return mutate_bytes(data, random, head=8 + length)
    header = json_bytes(json.loads(data[8 : 8 + length]), random)
    claimed = len(header)
    if random.random() < 0.1:
        claimed = NUMBERS[random.integers(len(NUMBERS))]
    return struct.pack("<Q", claimed) + header + data[8 + length :]


def template(good: str, random: np.random.Generator) -> str:
    """Pieces of templates, kind and unkind, after one another."""
    known = [good, *SNIPPETS]
    pieces = [known[i] for i in random.integers(len(known), size=random.integers(1, 5))]
    text = "".join(pieces)
    if random.random() < 0.3:
        text = mutate_bytes(text.encode(), random).decode(errors="replace")
    return text
