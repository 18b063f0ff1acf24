"""LoRA as a JAX transform: a frozen base, a small delta, and pure functions between them."""

from lora_jax.adapt import adapt as adapt
from lora_jax.adapt import infer_layouts as infer_layouts
from lora_jax.describe import Description as Description
from lora_jax.describe import describe as describe
from lora_jax.layouts import Layout as Layout
from lora_jax.masks import mask_optimizer as mask_optimizer
from lora_jax.masks import trainable_mask as trainable_mask
from lora_jax.methods import Full as Full
from lora_jax.methods import LoRA as LoRA
from lora_jax.quant import NF4 as NF4
from lora_jax.quant import dequantize as dequantize
from lora_jax.quant import quantize as quantize
from lora_jax.stacking import stack as stack
from lora_jax.stacking import unstack as unstack
from lora_jax.transform import bind as bind
from lora_jax.transform import lora_transform as lora_transform
from lora_jax.transform import merge as merge
from lora_jax.transform import unmerge as unmerge
from lora_jax.version import __version__ as __version__
from lora_jax.weights import Adapted as Adapted
from lora_jax.weights import Weight as Weight
from lora_jax.weights import embed as embed
from lora_jax.weights import linear as linear
