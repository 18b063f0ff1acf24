"""SmolLM2-135M-Instruct, a true pretrained Llama that two CPU cores can fine-tune. The default.

Command:  python experiments/rank_sweep.py
Hardware: 2 CPU cores, 4 GiB of memory, 0.7 GB of disk
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "smollm2_135m"
    return config
