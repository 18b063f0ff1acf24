"""The comparison of saved arms, on a tiny model."""

import dataclasses
import json
import sys

import cases
import command
import jax
import numpy as np
import pytest
from absl import flags

import lora_jax as lora
from configs import tiny
from experiments import subspaces as script
from experiments.harness import full_updates, saved_arms, setup, subspace_report, subspaces
from experiments.harness.saved_arms import SavedArm
from lora_jax.interop import peft
from lora_jax.training.checkpoints import fingerprint


def lora_of(params, rank, seed):
    delta = lora.lora_transform(params, lora.LoRA(rank=rank), key=jax.random.key(seed))[1]
    return cases.moved(delta, seed + 1, size=0.5)


def full_of(params):
    delta = lora.lora_transform(params, lora.Full(), targets=".*", key=jax.random.key(0))[1]
    return cases.moved(delta, size=0.01)


@pytest.fixture
def model():
    jax.config.update("jax_disable_most_optimizations", True)
    return setup.load_model(tiny.get_config())


def write_run(folder, model):
    """The folder of a run of three LoRA arms and one of full fine-tuning."""
    arms = [("qv r4 seed 0", 4, 0), ("qv r4 seed 1", 4, 1), ("qv r8 seed 0", 8, 0)]
    for name, rank, seed in arms:
        peft.save_adapter(
            folder / "adapters" / name.replace(" ", "_"),
            lora_of(model.params, rank, seed),
            model.params,
            peft.model_names(model.config),
        )
    target = folder / full_updates.FOLDER / "full.safetensors"
    full_updates.save(target, full_of(model.params), fingerprint(model.params))
    rows = [
        {"name": name, "rank": rank, "seed": seed, "learning_rate": 1e-3, "val_loss": 1 + seed}
        for name, rank, seed in [*arms, ("full", None, 0)]
    ]
    (folder / "results.json").write_text(json.dumps({"arms": rows}))


@pytest.mark.slow
def test_a_comparison_of_saved_arms(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    command.write_talk(tmp_path)
    write_run(tmp_path / "run", model)
    (tmp_path / "text.txt").write_text("a text of another kind. " * 200)
    code, output = command.run(
        tmp_path,
        "subspaces",
        *command.QUICK[:4],
        "--runs=run",
        "--ranks=4,8",
        "--text=text.txt",
        "--threshold=0.95",
        "--factors=0.5,0",
        "--workdir=out",
    )
    assert code == 0, output
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["name"] for row in results["arms"]] == [
        "qv r4 seed 0", "qv r4 seed 1", "qv r8 seed 0", "full"
    ]  # fmt: skip
    assert results["arms"][3]["full"] and results["arms"][3]["rank_90"] > 4
    assert results["ranks"]["arms"] == ["qv r4 seed 0", "qv r8 seed 0"]
    assert results["seeds"]["arms"] == ["qv r4 seed 0", "qv r4 seed 1"]
    phi = np.array(results["ranks"]["targets"]["layers/attn/q_proj"]["other"])
    assert phi.shape == (4, 8) and (phi >= 0).all() and (phi <= 1).all()
    repaired = {arm["arm"]: arm["points"] for arm in results["restored"]}
    assert set(repaired) == {"qv r4 seed 0", "qv r8 seed 0", "full"}
    assert [point["factor"] for point in repaired["qv r8 seed 0"]] == [1, 0.5, 0]
    assert {"val_loss", "text_loss"} <= set(results["base"])
    assert (tmp_path / "out/subspaces.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "out/results.md").read_text()
    assert "| qv r8 seed 0 | 8 | 0.001 | 0 | 1.0000 |" in text and "Ranks: qv r4 seed 0" in text
    code, output = command.run(tmp_path, "subspaces", *command.QUICK[:4], "--runs=run",
                               "--workdir=out")  # fmt: skip
    assert code != 0 and "out holds another run, which differs in" in output


def test_a_full_update_returns_as_it_was(tmp_path, model):
    delta, path = full_of(model.params), tmp_path / "full.safetensors"
    full_updates.save(path, delta, fingerprint(model.params))
    cases.assert_close(full_updates.load(path, model.params), delta, rtol=0, atol=0)
    with pytest.raises(ValueError, match="exists already"):
        full_updates.save(path, delta, "")
    with pytest.raises(ValueError, match="a LoRANode, and this file holds Full alone"):
        full_updates.save(tmp_path / "x.safetensors", lora_of(model.params, 1, 0), "")
    other = jax.tree.map(lambda leaf: leaf + 1, model.params)
    with pytest.raises(ValueError, match="was made for another base: its fingerprint is"):
        full_updates.load(path, other)


ARMS = [
    SavedArm(name=f"r{rank} s{seed}", source=None, rank=rank, seed=seed, learning_rate=rate,
             val_loss=loss)
    for rank, seed, rate, loss in [(8, 0, 1e-3, 1.2), (8, 1, 2e-3, 1.0), (8, 1, 1e-3, 1.1),
                                   (64, 0, 1e-3, 1.0), (64, 2, 1e-3, 0.9)]
]  # fmt: skip


def test_pairs_are_of_one_seed_or_differ_in_it_alone():
    (one, other), _ = subspaces.two_ranks(ARMS, (8, 64))
    assert (one, other) == (ARMS[0], ARMS[3])
    (one, other), _ = subspaces.two_ranks(ARMS[1:], (8, 64))  # none of one seed: the best two
    assert (one.name, one.val_loss, other.seed) == ("r8 s1", 1.0, 2)
    assert subspaces.two_seeds(ARMS)[0] == (ARMS[3], ARMS[4])
    assert subspaces.two_seeds(ARMS[:3])[0] == (ARMS[0], ARMS[2])
    pair, missing = subspaces.two_ranks(ARMS, (4, 64))
    assert pair is None and "no arms of ranks 4 and 64; there are 8, 64: --ranks" in missing
    unknown = [dataclasses.replace(arm, seed=None) for arm in ARMS]
    assert subspaces.two_seeds(unknown) == (None, "no two arms that differ in their seed alone")


def test_findings_of_what_is_missing():
    row = {"name": "r8", "rank": 8, "full": False, "amplification": 2.0, "rank_90": 3.0,
           "intruders": 0.5}  # fmt: skip
    lines = subspace_report.findings(
        {
            "ranks": {"missing": "no ranks"},
            "seeds": {"missing": "no seeds"},
            "arms": [row],
            "settings": {"top": 10},
            "restored": [{"arm": "r8", "intruders": 0, "points": [{"factor": 1.0}]}],
        }
    )
    assert lines == [
        "Ranks: no ranks.",
        "Seeds: no seeds.",
        "Amplification: 2.00 at r = 8.",
        "Spectra: no full update beside a low-rank one.",
        "Intruders among the 10 leading directions, a matrix: r8 0.50.",
        "Repair: r8 has no intruder.",
    ]


def test_folders_without_arms(tmp_path):
    with pytest.raises(ValueError, match="expected --runs=FOLDER"):
        saved_arms.saved_arms([], "")
    with pytest.raises(ValueError, match="holds no adapter_config.json, no adapters/"):
        saved_arms.saved_arms([tmp_path], "")
    adapter = tmp_path / "adapters" / "one"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3}')
    assert saved_arms.saved_arms([adapter], "")[0].rank == 3
    with pytest.raises(ValueError, match="--arms='two' matches none of one"):
        saved_arms.saved_arms([tmp_path], "two")
    with pytest.raises(ValueError, match="is not a regular expression"):
        saved_arms.saved_arms([tmp_path], "(")
    with pytest.raises(ValueError, match="several arms are named 'one'"):
        saved_arms.saved_arms([tmp_path, adapter], "")


def test_flags_that_are_no_numbers():
    values = flags.FLAGS if flags.FLAGS.is_parsed() else flags.FLAGS(sys.argv[:1]) and flags.FLAGS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "ranks", ["8"])
        with pytest.raises(ValueError, match="--ranks=8: expected two"):
            script.settings()
        patch.setattr(values, "ranks", ["8", "many"])
        with pytest.raises(ValueError, match="take numbers by commas"):
            script.settings()
