"""What `--budget` sets for each experiment: how much of it is run, and on what data.

"cpu" is the recorded run, on two cores without an accelerator; "gpu" the papers' size, for one H100
in half an hour. `--config.NAME=...` on the command line comes after it.
"""

from typing import Any

# One row of 256 tokens is four or five examples of E2E.
E2E = {
    "data.source": "e2e",
    "data.template": "plain",
    "data.batch_size": 1,
    "data.seq_len": 256,
    "data.validation_examples": 64,
}
CPU = {
    **E2E,
    "train.steps": 96,
    "train.warmup_steps": 8,
    "train.learning_rate": 2e-3,
    "train.eval_every": 48,
    "train.checkpoint_every": 48,
    "samples.prompts": 0,
}
# For many cells.
SHORT = {
    "train.steps": 48,
    "train.warmup_steps": 4,
    "train.eval_every": 24,
    "train.checkpoint_every": 48,
    "data.validation_examples": 32,
}
# One epoch of E2E's 42,061 examples.
GPU = {
    **CPU,
    "model.dtype": "bfloat16",
    "data.batch_size": 16,
    "data.validation_examples": 512,
    "train.steps": 600,
    "train.warmup_steps": 30,
    "train.learning_rate": 1e-3,
    "train.eval_every": 150,
    "train.checkpoint_every": 300,
    "train.log_every": 10,
}
RANKS = {"sweep.ranks": (8, 1, 2, 4, 16, 64, 256), "sweep.full": True, "study.save_full": True}

PREFERENCE = {
    "preference.losses": ("next_token", "dpo", "dpo_norm", "ipo", "kto", "simpo", "orpo"),
    "study.margin": 0.0,
    "data.validation_examples": 48,
    "samples.prompts": 0,
}

REINFORCE = {
    "sweep.ranks": (1, 8, 64),
    "sweep.full": True,
    "sweep.full_learning_rate": 2e-5,
    "reinforce.ia3": True,
    "data.validation_examples": 32,
    "study.margin": 0.0,
    "samples.prompts": 0,
}

BUDGETS: dict[str, dict[str, dict[str, Any]]] = {
    "rank_sweep": {"cpu": {**CPU, **RANKS}, "gpu": {**GPU, **RANKS}},
    "target_ablation": {"cpu": CPU, "gpu": GPU},
    "learning_rates": {
        "cpu": {**CPU, **SHORT, "sweep.ranks": (4, 16, 64)},
        "gpu": {**GPU, "sweep.ranks": (4, 16, 64, 256)},
    },
    # Losses of one search are of one kind, but their units differ: no run is given up.
    "preference": {
        "cpu": {**PREFERENCE, "train.steps": 48, "train.eval_every": 48},
        "gpu": {
            **PREFERENCE,
            "model.dtype": "bfloat16",
            "data.batch_size": 16,
            "data.validation_examples": 200,
            "train.steps": 200,
            "train.warmup_steps": 10,
            "train.eval_every": 100,
            "train.checkpoint_every": 100,
            "train.log_every": 10,
        },
    },
    "reinforce": {
        "cpu": {**REINFORCE, "train.steps": 32, "train.eval_every": 16},
        "gpu": {
            **REINFORCE,
            "model.dtype": "bfloat16",
            "reinforce.prompts": 32,
            "train.steps": 100,
            "train.eval_every": 50,
            "train.checkpoint_every": 50,
        },
    },
    # Of the arms that the rank sweep saved.
    "subspaces": {"cpu": CPU, "gpu": GPU},
    "e2e_scores": {"cpu": CPU, "gpu": GPU},
    # PEFT's own board runs 37 of its 63 entries at 1e-4.
    "methods": {
        "cpu": {**CPU, **SHORT, "methods.ranks": (4, 16), "methods.fixed_rate": 1e-4},
        "gpu": {**GPU, "methods.ranks": (4, 32), "methods.fixed_rate": 1e-4},
    },
}
