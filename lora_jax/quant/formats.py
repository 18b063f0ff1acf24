"""The formats by name. A new one is a subclass of `Quantized` in a file of its own, and a line
here."""

from lora_jax.quant.blockwise import E2M1, FP4, NF4, Int4, Int8
from lora_jax.quant.mxfp4 import MXFP4
from lora_jax.quant.quantized import Quantized

FORMATS: dict[str, type[Quantized]] = {
    "nf4": NF4,
    "fp4": FP4,
    "e2m1": E2M1,
    "int4": Int4,
    "int8": Int8,
    "mxfp4": MXFP4,
}
