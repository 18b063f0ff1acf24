"""Llama-3-70B in 4 bits: the rank sweep over several hosts, by fsdp.

Command:  hf auth login && hf download meta-llama/Meta-Llama-3-70B-Instruct
          python experiments/rank_sweep.py --config=configs/llama70b.py
          (--plan prints parameters and memory, and needs no weights)
Hardware: compiled for TPU v5e 8x8 and v6e 4x4, not measured:
          python scripts/plan.py --config=configs/llama70b.py --topology=v5e:8x8
"""

from ml_collections import ConfigDict

from configs import llama8b


def get_config() -> ConfigDict:
    config = llama8b.get_config()
    config.name = "llama70b"
    config.model.source = "meta-llama/Meta-Llama-3-70B-Instruct"
    config.model.shape = "llama-3-70b"
    config.base.quantize = "nf4"
    config.data.batch_size = 64  # a row for each chip of v5e 8x8
    config.train.learning_rate = 1e-4
    config.sweep.ranks = (1, 4, 16)
    return config
