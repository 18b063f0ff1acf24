"""Models, tokenizers and adapters in other projects' formats."""

from lora_jax.interop.digest import Digest as Digest
from lora_jax.interop.digest import check_digest as check_digest
from lora_jax.interop.digest import digest_of as digest_of
from lora_jax.interop.digest import observed as observed
from lora_jax.interop.export_gguf import save_gguf as save_gguf
from lora_jax.interop.export_huggingface import save_huggingface as save_huggingface
from lora_jax.interop.forward import Forward as Forward
from lora_jax.interop.forward import ModelForward as ModelForward
from lora_jax.interop.gguf import load_gguf as load_gguf
from lora_jax.interop.huggingface import load_huggingface as load_huggingface
from lora_jax.interop.model import Pretrained as Pretrained
from lora_jax.interop.placing import Place as Place
from lora_jax.interop.placing import StoredLeaf as StoredLeaf
from lora_jax.interop.placing import on_device as on_device
from lora_jax.interop.placing import quantized as quantized
from lora_jax.interop.placing import shapes_alone as shapes_alone
from lora_jax.interop.placing import sharded as sharded
from lora_jax.interop.pretrained import load as load
from lora_jax.interop.stored import read_digest as read_digest
from lora_jax.interop.stored import stored_formats as stored_formats
from lora_jax.interop.verify import Report as Report
from lora_jax.interop.verify import verify as verify
