"""SmolLM2-135M-Instruct and the generated preferences: what experiments/preference.py starts from.

Command:  python experiments/preference.py
Hardware: 2 cores of an AMD EPYC, busy with other work, no accelerator
Time:     1634 s, 430 s of CPU time (jax 0.10.2)
Result:   win rate 0.938 by supervised tuning, 0.854 by DPO: experiments/README.md
"""

from ml_collections import ConfigDict

from configs import smollm2_135m


def get_config() -> ConfigDict:
    config = smollm2_135m.get_config()
    config.data.source = "preferences"
    config.data.batch_size = 1  # of about three pairs
    config.data.validation_examples = 24
    config.train.steps = 24
    config.train.warmup_steps = 2
    config.train.learning_rate = 1e-3
    config.train.eval_every = 24
    config.train.checkpoint_every = 12
    config.samples.max_new_tokens = 56  # an answer of the corpus takes up to 54
    return config
