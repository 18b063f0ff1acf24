"""Records what bitsandbytes' CPU build computes, for tests that run without it.

    python scripts/record_golden_bitsandbytes.py      # needs requirements-parity.txt; some seconds

Writes tests/golden/bitsandbytes.npz: for each case of tests/parity/bitsandbytes_cases.py the packed
codes, absmax, its second quantisation and the dequantised values. The version is in the file.
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "parity")]

import bitsandbytes_cases
import bitsandbytes_model

if __name__ == "__main__":
    recorded, tensors = {}, bitsandbytes_cases.tensors()
    for case in bitsandbytes_cases.CASES:
        name, quant_type, double_quant = case
        for key, value in bitsandbytes_model.compute(
            tensors[name], quant_type, double_quant
        ).items():
            recorded[f"{bitsandbytes_cases.case_id(case)}/{key}"] = value
    path = TESTS / "golden" / "bitsandbytes.npz"
    np.savez_compressed(path, bitsandbytes=np.array(bitsandbytes_model.VERSION), **recorded)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} kB")
