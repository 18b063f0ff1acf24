"""Llama-3-8B: the rank sweep at the size of the papers, over all devices by fsdp.

Command:  hf auth login && hf download meta-llama/Meta-Llama-3-8B-Instruct
          python experiments/rank_sweep.py --config=configs/llama8b.py
          (--plan prints parameters and memory, and needs no weights)
Hardware: compiled for TPU v5e 4x4, not measured:
          python scripts/plan.py --config=configs/llama8b.py --topology=v5e:4x4
          On one v5e chip: --config.base.quantize=nf4 --config.data.batch_size=1
          --config.data.seq_len=4096 --config.sweep.ranks="(16,)"
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "llama8b"
    config.model.source = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.model.shape = "llama-3-8b"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.batch_size = 16
    config.data.seq_len = 1024
    config.data.validation_examples = 400
    config.train.steps = 500
    config.train.warmup_steps = 25
    config.train.learning_rate = 2e-4
    config.train.eval_every = 50
    config.train.checkpoint_every = 100
    config.train.log_every = 10
    config.parallel.mode = "fsdp"
    config.sweep.ranks = (1, 4, 16, 64)
    config.sweep.mode = "in_turn"  # a step of one arm fills the devices
    config.ablation.rank = 16
    return config
