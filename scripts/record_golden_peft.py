"""Records what PEFT computes, for tests that run without it.

    python scripts/record_golden_peft.py      # needs requirements-parity.txt; some seconds

Writes tests/golden/peft_NAME.npz for each case of tests/parity/peft_cases.py: logits, loss, the
gradients of A and B, and A and B after three steps of AdamW. For the cases of family_cases.py, the
same of what each trains, every seventh entry, in tests/golden/peft_family.npz. The version of PEFT
is in each.
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "parity"), str(TESTS / "interop")]

import family_cases
import family_model
import peft_cases
import peft_model


def save(name: str, arrays: dict[str, np.ndarray]) -> None:
    path = TESTS / "golden" / f"peft_{name}.npz"
    np.savez_compressed(path, peft=np.array(peft_model.peft.__version__), **arrays)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    for name in peft_cases.CASES:
        save(name, peft_model.compute(name))
    save("family", {
        f"{name}:{key}": value.reshape(-1)[::7]
        for name in family_cases.CASES
        for key, value in family_model.compute(name).items()
    })  # fmt: skip
