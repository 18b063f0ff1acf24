"""bitsandbytes' NF4 matmul for `bench_kernels.py`, in a process of its own: this file, run."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

BLOCK = 64  # weights that share an absmax


def bitsandbytes_block(rows: int, K: int, N: int, backward: bool, copies: int) -> Callable:
    """A block of calls of bitsandbytes' own dispatch, on weights that it packed itself."""
    import torch
    from bitsandbytes import functional, matmul_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = partial(torch.randn, dtype=torch.bfloat16, device=device)
    x, dy = draw(rows, K).requires_grad_(backward), draw(rows, N)
    weights = [
        functional.quantize_4bit(draw(N, K), quant_type="nf4", blocksize=BLOCK)
        for _ in range(copies)
    ]

    def forward():
        return [matmul_4bit(x, packed.t(), quant_state=state) for packed, state in weights]

    ys = forward() if backward else []

    def block() -> float:
        start = time.perf_counter()
        if backward:
            for y in ys:
                torch.autograd.grad(y, x, dy, retain_graph=True)
        else:
            forward()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / copies

    block()
    return block


def serve() -> None:
    """Answers a line of settings by seconds a call."""
    block, prepared = None, None
    for line in sys.stdin:
        if line != prepared:
            block, prepared = bitsandbytes_block(*json.loads(line)), line
        assert block
        print(json.dumps(block()), flush=True)


def peer_process() -> subprocess.Popen | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    command = [sys.executable, __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen, setting: list) -> float:
    assert process.stdin and process.stdout
    print(json.dumps(setting), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        sys.exit("bench_kernels: bitsandbytes ended early; its error stands above.")
    return json.loads(answer)


if __name__ == "__main__":
    serve()
