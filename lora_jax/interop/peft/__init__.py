"""Reads and writes adapters of Hugging Face PEFT: `names` maps our leaves to its modules, `codecs`
lists the methods, one file each, `files` reads and writes a folder."""

from lora_jax.interop.peft.card import model_card as model_card
from lora_jax.interop.peft.codecs import CODECS as CODECS
from lora_jax.interop.peft.files import load_adapter as load_adapter
from lora_jax.interop.peft.files import save_adapter as save_adapter
from lora_jax.interop.peft.ia3 import scale_biases as scale_biases
from lora_jax.interop.peft.names import model_names as model_names
