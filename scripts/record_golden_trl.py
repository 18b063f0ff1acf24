"""Records what trl computes, for tests that run without it.

    python scripts/record_golden_trl.py      # needs requirements-parity.txt; two minutes

Writes tests/golden/trl.npz: for each case of tests/parity/trl_cases.py the losses of five steps,
the first gradients of A and B, and A and B after the last, every fifth entry; and of GRPO and Dr.
GRPO advantages, loss and gradient of given tensors. The version of trl is in it.
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "parity"), str(TESTS / "interop")]

import trl_cases
import trl_model

if __name__ == "__main__":
    path = TESTS / "golden" / "trl.npz"
    arrays = {
        f"{name}:{key}": value.reshape(-1)[::5]
        for name in trl_cases.CASES
        for key, value in trl_model.compute(name).items()
    }
    rollouts = trl_cases.rollouts()
    for dr in (False, True):
        loss, gradient = trl_model.grpo(rollouts, dr=dr)
        worth = trl_model.advantages(rollouts["rewards"], scale=not dr)
        arrays |= {f"grpo:{dr}:loss": np.float32(loss), f"grpo:{dr}:gradient": gradient}
        arrays[f"grpo:{dr}:advantages"] = worth
    np.savez_compressed(path, trl=np.array(trl_model.trl.__version__), **arrays)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} kB")
