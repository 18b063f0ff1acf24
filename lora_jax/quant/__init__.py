"""Quantised weights: formats, double quantisation, and conversion from and to bitsandbytes."""

from lora_jax.quant.bitsandbytes import from_bitsandbytes as from_bitsandbytes
from lora_jax.quant.bitsandbytes import to_bitsandbytes as to_bitsandbytes
from lora_jax.quant.blockwise import E2M1 as E2M1
from lora_jax.quant.blockwise import FP4 as FP4
from lora_jax.quant.blockwise import NF4 as NF4
from lora_jax.quant.blockwise import Blockwise as Blockwise
from lora_jax.quant.blockwise import Int4 as Int4
from lora_jax.quant.blockwise import Int8 as Int8
from lora_jax.quant.double import DoubleQuantized as DoubleQuantized
from lora_jax.quant.formats import FORMATS as FORMATS
from lora_jax.quant.mxfp4 import MXFP4 as MXFP4
from lora_jax.quant.quantize import dequantize as dequantize
from lora_jax.quant.quantize import quantize as quantize
from lora_jax.quant.quantize import quantizer as quantizer
from lora_jax.quant.quantized import Quantized as Quantized
