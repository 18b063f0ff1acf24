"""Times our training step: beside PEFT's on a CPU, or at size on an accelerator.

    pip install -r requirements-parity.txt && python scripts/bench_train.py
    pip install -r requirements.txt "jax[cuda13]"
    python scripts/bench_train.py --shape=llama-3-8b

Both sides train LoRA (r = 16, all-linear) on SmolLM2-135M's shape with random float32 weights, on
8 rows of 64 tokens whose every next token counts, with AdamW. Each has a process of its own,
and runs only on request; blocks of steps alternate, so that a slower machine slows both.
`--ours=/path/to/python` runs our side on another interpreter, and so on another jax.

With `--shape`, our step alone, over random weights of that shape on one device: LoRA on a base in
bfloat16, QLoRA at the same batch, and QLoRA with the least memory. Tokens a second, the fraction
of the device's peak in bfloat16 that the model's FLOPs are, and the peak of device memory. Each
setting has a process of its own, whose peak is its alone. `--shape=tiny` runs on any machine, to
try the script; its times mean nothing and are not written.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROWS, LENGTH, RANK = 8, 64, 16
# Whether the base is in NF4, rows, tokens a row, and what the backward pass recomputes.
SETTINGS = {
    "lora": (False, 1, 4096, "elementwise"),
    "qlora": (True, 1, 4096, "elementwise"),
    "qlora-sparing": (True, 2, 2048, "full"),
}


def ours() -> tuple[str, Callable[[], float]]:
    """Our step: a function that makes one update and returns its loss."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import jax
    import numpy as np

    import lora_jax as lora
    from lora_jax import training
    from lora_jax.models import SHAPES, llama

    config = SHAPES["smollm2-135m"]
    params = jax.jit(lambda key: llama.init(config, key=key))(jax.random.key(0))
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=RANK, alpha=RANK), key=jax.random.key(1)
    )
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH + 1))
    batch = training.next_token_batch(rows)
    tx = training.adamw(steps=10_000, schedule="constant", clip_norm=None)
    step = jax.jit(training.train_step(training.next_token_loss(config), tx), donate_argnums=0)
    state = training.init_state(delta, tx, learning_rate=1e-4, seed=0)

    def one() -> float:
        nonlocal state
        state, metrics = step(state, base, batch)
        return float(metrics.loss)

    return f"lora_jax, jax {jax.__version__}, Python {platform.python_version()}", one


def peft() -> tuple[str, Callable[[], float]]:
    """PEFT's step on the same shape."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    )
    adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = get_peft_model(LlamaForCausalLM(config), adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    rows = torch.randint(0, config.vocab_size, (ROWS, LENGTH + 1))

    def one() -> float:
        logits = model(input_ids=rows[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, config.vocab_size), rows[:, 1:].reshape(-1)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    names = ("peft", "torch", "transformers")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names), one


def serve(side: str) -> None:
    """Runs blocks of steps on request: a line with a count in, a line with seconds a step out."""
    name, one = {"ours": ours, "peft": peft}[side]()
    one()
    print(json.dumps(name), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            one()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def ask(process: subprocess.Popen, line: str | None = None):
    if line is not None:
        print(line, file=process.stdin, flush=True)
    assert process.stdout
    answer = process.stdout.readline()
    if not answer:
        sys.exit("bench_train: a side ended early; its error stands above.")
    return json.loads(answer)


def compare(interpreters: dict[str, str], blocks: int, steps: int) -> dict:
    """Alternates blocks of steps between both sides and compares their medians."""
    processes = {
        side: subprocess.Popen(
            [interpreter, __file__, f"--serve={side}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            text=True,
        )
        for side, interpreter in interpreters.items()
    }
    names = {side: ask(process) for side, process in processes.items()}
    seconds: dict[str, list[list[float]]] = {side: [] for side in processes}
    for _ in range(blocks):
        for side, process in processes.items():
            seconds[side].append(ask(process, str(steps)))
    for process in processes.values():
        process.communicate()
    rates = {
        side: ROWS * LENGTH / statistics.median(step for block in of_side for step in block)
        for side, of_side in seconds.items()
    }
    ratios = [
        statistics.median(theirs) / statistics.median(own)
        for own, theirs in zip(seconds["ours"], seconds["peft"], strict=True)
    ]
    return {
        "setting": f"SmolLM2-135M shape, LoRA r={RANK} all-linear, {ROWS} x {LENGTH}, float32",
        "command": "python " + " ".join(sys.argv),
        "cpus": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        **{
            side: {"what": names[side], "tokens_per_second": round(rates[side], 1)}
            for side in rates
        },
        "ratio": round(statistics.median(ratios), 3),
        "ratio_by_block": [round(ratio, 3) for ratio in ratios],
    }


def measure(setting: str, shape: str, blocks: int, steps: int) -> dict:
    """One setting at size, timed in this process: the median of blocks of steps."""
    import at_size
    import jax
    from bench_kernels import LIMITS

    from lora_jax.models import SHAPES

    config = SHAPES[shape]
    quantized, rows, length, remat = SETTINGS[setting]
    length = min(length, config.context_length)
    base = at_size.random_base(config, quantized)
    [state] = at_size.states_of(base, 1)
    batch = at_size.batch(config, rows, length)
    step = jax.jit(at_size.step_of(config, remat), donate_argnums=0)
    state, metrics = jax.block_until_ready(step(state, base, batch))
    seconds = []
    for _ in range(blocks):
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, base, batch)
        jax.block_until_ready(metrics)
        seconds.append((time.perf_counter() - start) / steps)
    rate = rows * length / statistics.median(seconds)
    device = jax.devices()[0]
    peak = next((found[1] for kind, found in LIMITS.items() if kind in device.device_kind), None)
    statistic = device.memory_stats() or {}
    flops = at_size.model_flops_per_token(config, length)
    return {
        "device": device.device_kind,
        "rows": rows,
        "tokens_a_row": length,
        "remat": remat,
        "tokens_per_second": round(rate, 1),
        "model_flops_per_token": flops,
        "peak_flops_per_second": peak,
        "model_flop_utilisation": round(rate * flops / peak, 4) if peak else None,
        "peak_bytes": statistic.get("peak_bytes_in_use"),
        "loss": float(metrics.loss),
    }


def at_size_of(shape: str, blocks: int, steps: int) -> dict:
    """All settings, each in a process of its own."""
    from at_size import versions

    command = [sys.executable, __file__, f"--shape={shape}", f"--blocks={blocks}"]
    records = {}
    for setting in SETTINGS:
        given = [*command, f"--steps={steps}", f"--setting={setting}"]
        done = subprocess.run(given, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            records[setting] = {"error": "it ended early; see the output"}
            continue
        records[setting] = json.loads(done.stdout.splitlines()[-1])
        print(setting, json.dumps(records[setting]), flush=True)
    return {
        "setting": f"{shape}, random weights, LoRA r={RANK} all-linear, one device",
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "records": records,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ours", default=sys.executable, help="the interpreter of our side")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps a block")
    parser.add_argument("--output", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--shape", help="a name in lora_jax.models.SHAPES: times it at size")
    parser.add_argument("--setting", choices=SETTINGS, help="with --shape: this one, here")
    parser.add_argument("--serve", choices=("ours", "peft"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    if args.setting:
        return print(json.dumps(measure(args.setting, args.shape, args.blocks, args.steps)))
    if args.shape == "tiny" and args.output:
        sys.exit("bench_train: times of --shape=tiny mean nothing and are not written.")
    if args.shape:
        result = at_size_of(args.shape, args.blocks, args.steps)
    else:
        result = compare({"ours": args.ours, "peft": sys.executable}, args.blocks, args.steps)
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
