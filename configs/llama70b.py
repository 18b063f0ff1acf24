"""Llama-3-70B: the rank sweep over several hosts.

Command:  hf auth login && hf download meta-llama/Meta-Llama-3-70B-Instruct
          python experiments/rank_sweep.py --config=configs/llama70b.py
          (--plan prints parameters and memory, and needs no weights)
Hardware: not measured yet; --plan says what has to fit
"""

from ml_collections import ConfigDict

from configs import llama8b


def get_config() -> ConfigDict:
    config = llama8b.get_config()
    config.name = "llama70b"
    config.model.source = "meta-llama/Meta-Llama-3-70B-Instruct"
    config.model.shape = "llama-3-70b"
    config.train.learning_rate = 1e-4
    return config
