"""Records what PEFT computes, for tests that run without it.

    python scripts/record_golden_peft.py      # wants requirements-parity.txt; some seconds

Writes tests/golden/peft_NAME.npz for each case of tests/parity/peft_cases.py: logits, loss, the
gradients of A and B, and A and B after three steps of AdamW. The version of PEFT stands in each.
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "parity"), str(TESTS / "interop")]

import peft_cases
import peft_model

if __name__ == "__main__":
    for name in peft_cases.CASES:
        path = TESTS / "golden" / f"peft_{name}.npz"
        version = np.array(peft_model.peft.__version__)
        np.savez_compressed(path, peft=version, **peft_model.compute(name))
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} kB")
