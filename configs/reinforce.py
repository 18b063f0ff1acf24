"""SmolLM2-135M-Instruct and rewards by rule: what experiments/reinforce.py starts from.

Command:  python experiments/reinforce.py
Hardware: 2 CPU cores, no accelerator
"""

from ml_collections import ConfigDict

from configs import smollm2_135m


def get_config() -> ConfigDict:
    config = smollm2_135m.get_config()
    config.sweep.ranks = (1,)
    config.train.loss = "grpo"
    config.train.steps = 16
    config.train.warmup_steps = 2
    config.train.schedule = "constant"
    config.train.learning_rate = 1e-3
    config.train.eval_every = 8
    config.train.checkpoint_every = 4
    config.data.validation_examples = 8  # prompts, of 32 that are held out; measures take all
    config.samples.max_new_tokens = 4
    return config
