"""`y = x @ dequant(w)` for a weight in NF4."""

from lora_jax.kernels.nf4_matmul.reference import nf4_matmul as nf4_matmul
