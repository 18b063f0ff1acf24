"""SmolLM2-135M-Instruct and rewards by rule: what experiments/reinforce.py starts from.

Command:  python experiments/reinforce.py
Hardware: 2 cores of an AMD EPYC, busy with other work, no accelerator
Time:     767 s, 461 s of CPU time (jax 0.10.2)
Result:   mean reward 0.201 untuned, 0.417 at rank 1: experiments/README.md
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
