"""The cost of a format of the frozen base: bits, error, and the model's loss."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness import report, setup
from experiments.harness.progress import console
from lora_jax import data, models, training
from lora_jax.models.rotation import random_rotation, rotated
from lora_jax.tables import aligned
from lora_jax.training import records
from lora_jax.weights import is_weight

HEADER = ("format", "bits", "error, normal", "error, model", "val loss", "perplexity")


def compare(
    config: ConfigDict, formats: dict[str, dict[str, Any]], workdir: Path
) -> dict[str, Any]:
    """Measures each format on normal weights and on the configured model, off its file's grid.

    A format that `metrics.jsonl` already has is not measured again.
    """
    started = time.time()
    model = setup.load_model(config)
    rotation = random_rotation(model.config.hidden_size, key=jax.random.key(config.data.seed))
    exact = jax.jit(rotated)(model.params, rotation)
    validation = setup.validation_batches(config, model)
    normal = {"w": jax.random.normal(jax.random.key(0), (4096, 1024))}
    metrics = workdir / "metrics.jsonl"
    done = {record["format"] for record in records.read(metrics)}
    loss_sum = training.next_token_loss(model.config)
    loss = jax.jit(lambda params, batch: loss_sum({}, params, batch, None))
    for name, options in formats.items():
        if name in done:
            continue
        params = lora.quantize(exact, **options) if options else exact
        small = lora.quantize(normal, **options) if options else normal
        record = {
            **options,
            "format": name,
            "bits": bits(small["w"]),
            "normal_error": relative_error(small, normal),
            "model_error": relative_error(params["layers"], exact["layers"]),
            "val_loss": _mean_loss(loss, params, validation),
        }
        records.append(metrics, record)
        console.print(f"{name}: validation loss {record['val_loss']:.4f}", markup=False)
    rows = list(records.read(metrics))
    as_loaded = _mean_loss(loss, model.params, validation)
    return {
        "name": model.name,
        "source": model.source,
        "unrotated": as_loaded,
        "formats": rows,
        "seconds": time.time() - started,
    }


def bits(weight: Any) -> float:
    """Stored bits a parameter."""
    stored = sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
    return stored / math.prod(weight.shape)


def relative_error(tree: Any, exact: Any) -> float:
    """The root mean square of the quantised weights' errors, over that of the exact ones."""
    missed = total = 0.0
    for w, x in zip(jax.tree.leaves(tree, is_leaf=is_weight), jax.tree.leaves(exact), strict=True):
        if is_weight(w):
            missed += float(jnp.sum((w.dense() - x) ** 2))
            total += float(jnp.sum(x**2))
    return math.sqrt(missed / total) if total else 0.0


def write(workdir: Path, title: str, command: str, results: dict[str, Any]) -> dict[str, Any]:
    """Writes `results.json` and `results.md`, and prints the table."""
    results = {"title": title, "command": command, **results, "environment": report.environment()}
    records.write_json(workdir / "results.json", results)
    cells = [row(record) for record in results["formats"]]
    lines = [f"# {title}", "", f"`{command}`", "", *report.table(HEADER, cells), ""]
    lines += [f"As loaded, before the rotation: validation loss {results['unrotated']:.4f}."]
    lines += ["", report.machine(results)]
    (workdir / "results.md").write_text("\n".join(lines))
    console.print(f"\n[bold]{title}[/bold]")
    console.print(aligned([HEADER, *cells]), markup=False)
    return results


def row(record: dict[str, Any]) -> tuple[str, ...]:
    return (
        record["format"],
        f"{record['bits']:.3f}",
        f"{100 * record['normal_error']:.2f} %",
        f"{100 * record['model_error']:.2f} %",
        f"{record['val_loss']:.4f}",
        f"{math.exp(record['val_loss']):.3f}",
    )


def _mean_loss(loss: Any, params: models.Params, validation: Sequence[data.Batch]) -> float:
    sums = [jax.device_get(loss(params, batch)) for batch in validation]
    return setup.mean_loss(sums)
