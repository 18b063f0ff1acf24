"""The other methods that PEFT and we both compute, with values drawn by parameter name."""

import zlib

import numpy as np
import peft_cases
import small_llamas

TOKENS = small_llamas.TOKENS
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
LM = {"task_type": "CAUSAL_LM"}
# An epsilon that keeps Adam from making steps of a decomposition's last bits.
OWN_START = {"own_start": True, "eps": 1e-3}

# PEFT's configuration class, its arguments, and what else the case wants. Those that start from the
# weights are compared without signs, which a decomposition leaves open.
CASES = {
    "dora": {"config": ("LoraConfig", LORA | {"use_dora": True})},
    "ia3": {"config": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"],
                                     "feedforward_modules": ["down_proj"]})},
    "vera": {"config": ("VeraConfig", {"r": 6, "target_modules": ["k_proj", "down_proj"]})},
    "adalora": {"config": ("AdaLoraConfig", {"init_r": 6, "target_r": 3, "lora_alpha": 9,
                "total_step": 50, "tinit": 5, "tfinal": 8, "deltaT": 3, "orth_reg_weight": 0.3,
                "task_type": "CAUSAL_LM",  # without which PEFT drops the orthogonality term
                "target_modules": ["q_proj", "down_proj"]}), "steps": 50},
    "prompt": {"config": ("PromptTuningConfig", {"num_virtual_tokens": 5, **LM})},
    "prefix": {"config": ("PrefixTuningConfig", {"num_virtual_tokens": 5, **LM})},
    "prefix_mlp": {"config": ("PrefixTuningConfig", {"num_virtual_tokens": 5, **LM,
                   "prefix_projection": True, "encoder_hidden_size": 12})},
    "loraplus": {"config": ("LoraConfig", LORA), "optimizer": "loraplus"},
    "pissa": {"config": ("LoraConfig", LORA | {"init_lora_weights": "pissa"}), **OWN_START},
    "olora": {"config": ("LoraConfig", LORA | {"init_lora_weights": "olora"}), **OWN_START},
    "lorafa": {"config": ("LoraConfig", LORA), "optimizer": "lorafa"},
}  # fmt: skip
B_RATIO = 4.0  # of LoRA+
NO_EPS = 1e-12  # LoRA-FA's Adam adds its epsilon before it corrects its bias, unlike others
MODEL, STEPS = "llama3_1", 5
assert peft_cases.TOKENS is TOKENS


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The starting value of the parameter that PEFT calls `name`, in its shape."""
    words = np.random.Philox(zlib.crc32(name.encode()))
    raw = words.random_raw(int(np.prod(shape))).reshape(shape)
    unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    near_one = "magnitude" in name or "ia3_l" in name
    return np.float32(near_one) + unit * np.float32(0.2)
