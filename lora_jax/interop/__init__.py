"""Models, tokenizers and adapters in other projects' formats."""

from lora_jax.interop.export_gguf import save_gguf as save_gguf
from lora_jax.interop.export_huggingface import save_huggingface as save_huggingface
from lora_jax.interop.gguf import load_gguf as load_gguf
from lora_jax.interop.huggingface import load_huggingface as load_huggingface
from lora_jax.interop.model import Pretrained as Pretrained
from lora_jax.interop.placing import Place as Place
from lora_jax.interop.placing import StoredLeaf as StoredLeaf
from lora_jax.interop.placing import on_device as on_device
from lora_jax.interop.placing import quantized as quantized
from lora_jax.interop.placing import sharded as sharded
from lora_jax.interop.pretrained import load as load
