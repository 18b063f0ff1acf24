"""Fingerprints, and the folder that a run claims."""

import json
import shutil
import traceback

import cases
import chex
import jax
import jax.numpy as jnp
import pytest
import small

import lora_jax as lora
from lora_jax.training import checkpoints, records
from lora_jax.training.checkpoints import fingerprint


def test_a_fingerprint_depends_on_every_bit_name_and_type():
    base = small.params()
    nudged = {**base, "norm": base["norm"].at[3].add(1e-6)}
    swapped = {**base, "norm": base["norm"].at[0].set(2.0)}
    swapped_elsewhere = {**base, "norm": base["norm"].at[1].set(2.0)}
    renamed = {**{k: v for k, v in base.items() if k != "norm"}, "final": base["norm"]}
    halved = {**base, "norm": base["norm"].astype(jnp.bfloat16)}
    trees = [base, nudged, swapped, swapped_elsewhere, renamed, halved]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)
    assert fingerprint(base) == fingerprint(small.params())


def test_a_workdir_holds_one_run(tmp_path):
    config = {"train": {"steps": 3, "rates": (1, 2)}, "name": "a"}
    records.claim(tmp_path / "run", config)
    records.claim(tmp_path / "run", config)
    with pytest.raises(ValueError, match=r"train\.steps \(3 there, 4 here\).*another --workdir"):
        records.claim(tmp_path / "run", {**config, "train": {"steps": 4, "rates": (1, 2)}})


def test_metrics_rewind_to_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        for arm in ("a", "b"):
            records.append(path, {"step": step, "arm": arm, "loss": 0.5})
    with path.open("a") as file:
        file.write('{"step": 4, "arm": "a", "lo')
    records.rewind(path, ["a"], 2)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["arm"]) for r in kept] == [
        (1, "a"),
        (1, "b"),
        (2, "a"),
        (2, "b"),
        (3, "b"),
    ]


def test_deltas_of_every_method_come_back_bit_for_bit(tmp_path):
    """All of them as the arms of one run."""
    case = cases.stacked()
    fresh = {name: cases.transform(case, method)[1] for name, method in cases.METHODS.items()}
    trained = {name: cases.moved(delta) for name, delta in fresh.items()}
    checkpoints.save(tmp_path, 1, trained, identity={"base": "b"}, position=None)
    step, back, _ = checkpoints.restore(tmp_path, fresh, identity={"base": "b"})
    chex.assert_trees_all_equal(back, trained)
    assert step == 1 and jax.tree.structure(back) == jax.tree.structure(fresh)


def test_states_may_be_donated_while_they_are_written(tmp_path):
    """The next step overwrites them in place; the checkpoint holds what they were."""
    state = {"a": jnp.arange(2**20, dtype=jnp.float32), "b": jnp.ones(3)}
    before = jax.device_get(jax.tree.map(jnp.copy, state))
    step = jax.jit(lambda s: jax.tree.map(lambda x: -x, s), donate_argnums=0)
    with checkpoints.saving(tmp_path, identity={}) as save:
        for number in (1, 2):
            save(number, state, {"data": number})
            state = step(state)
    number, back, position = checkpoints.restore(tmp_path, state, identity={})
    assert (number, position) == (2, {"data": 2})
    chex.assert_trees_all_equal(back, jax.tree.map(lambda x: -x, before))


STATE = {"delta": jnp.arange(3000.0)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
def test_files_that_cannot_be_read_are_named_as_damaged(tmp_path):
    checkpoints.save(tmp_path / "whole", 6, STATE, identity={}, position=None)
    for name in ("manifest.ocdbt", "_METADATA", "d", "_CHECKPOINT_METADATA"):
        for damage in ("cut", "removed"):
            folder = tmp_path / f"{name} {damage}"
            shutil.copytree(tmp_path / "whole", folder)
            place = next(p for p in sorted((folder / "6").rglob(name)) if "process_0" not in str(p))
            for file in [place] if place.is_file() else list(place.iterdir()):
                cut = file.read_bytes()[:40]
                file.unlink()
                if damage == "cut":
                    file.write_bytes(cut)
            with pytest.raises(ValueError, match=r"/6 is damaged .*Delete that folder"):
                checkpoints.restore(folder, STATE, identity={})


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("on the host"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes"),
        PermissionError("not yours"),
        ZeroDivisionError("a mistake of ours"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_whatever_else_goes_wrong_is_raised_as_it_is(tmp_path, error, monkeypatch):
    """Where Orbax puts what it has read on the device; it wraps what is raised there."""
    checkpoints.save(tmp_path, 6, STATE, identity={}, position=None)
    put, raised = jax.device_put, []

    def fail(*args, **options):
        read = any(
            "async_deserialize" in f.name or "_read_" in f.name for f in traceback.extract_stack()
        )
        if read and not raised:  # once: the files are sound
            raised.append(error)
            raise error
        return put(*args, **options)

    monkeypatch.setattr(jax, "device_put", fail)
    with pytest.raises(type(error), match=str(error)):
        checkpoints.restore(tmp_path, STATE, identity={})
    assert raised
    _, back, _ = checkpoints.restore(tmp_path, STATE, identity={})
    chex.assert_trees_all_equal(back, STATE)


def test_a_checkpoint_of_version_0_1_0_says_that_it_is(tmp_path):
    record = {"identity": {"base": "b"}, "leaves": {}, "position": None}
    with checkpoints._checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, STATE, custom_metadata=record)
    with pytest.raises(
        ValueError, match=r"another version of lora_jax \(0\.1\.0.*Adapters that it"
    ):
        checkpoints.restore(tmp_path, STATE, identity={"base": "b"})


def test_a_base_of_its_own_is_part_of_a_checkpoint(tmp_path):
    params = {"q_proj": cases.normal(0, 8, 6)}
    base = lora.quantize(params, "nf4", block_size=8)
    _, plain = lora.lora_transform(base, lora.LoRA(rank=2), key=jax.random.key(0))
    _, owned = lora.loftq_start(params, base, plain)
    for name, delta in {"owned": owned, "plain": plain}.items():
        checkpoints.save(tmp_path / name, 1, {"delta": delta}, identity={}, position=None)
    _, back, _ = checkpoints.restore(tmp_path / "owned", {"delta": owned}, identity={})
    assert back["delta"]["q_proj"].own_base == "loftq"
    for folder, like in (("owned", plain), ("plain", owned)):
        with pytest.raises(ValueError, match="another run: delta/q_proj/own_base is"):
            checkpoints.restore(tmp_path / folder, {"delta": like}, identity={})
