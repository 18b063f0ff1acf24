"""A two-layer Llama with random weights and a byte tokenizer: seconds, for trying things out.

Command:  python experiments/rank_sweep.py --config=configs/tiny.py
Hardware: a CPU core; its losses mean nothing
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "tiny"
    config.model.source = "random"
    config.model.shape = "tiny"
    config.data.batch_size = 2
    config.data.seq_len = 512
    config.data.validation_examples = 8
    config.train.steps = 20
    config.train.eval_every = 10
    config.train.checkpoint_every = 5
    config.train.learning_rate = 1e-2
    config.sweep.ranks = (1, 4)
    config.ablation.rank = 2
    config.samples.max_new_tokens = 16
    return config
