"""scripts/serve.py with an engine that has no model, as a process of its own."""

import sys

from fake_engine import FakeEngine
from served import MODEL

from scripts.serve import Parts, main


def parts(arguments, adapters):
    engine = FakeEngine(rows=arguments.rows, max_waiting=arguments.max_waiting, seconds=0.002)
    return Parts(MODEL, engine, engine)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], parts))
