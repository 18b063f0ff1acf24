"""SmolLM2-135M-Instruct, a true pretrained Llama that two CPU cores can fine-tune. The default.

Command:  python experiments/rank_sweep.py
Hardware: 2 cores of an AMD EPYC without AVX-512, no accelerator
Time:     209 s, the model's download included (jax 0.10.2)
Result:   validation loss 2.293 untuned; 1.117, 1.111, 1.128, 1.124 at ranks 1, 4, 16, 64
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "smollm2_135m"
    return config
