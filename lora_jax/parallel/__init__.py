"""Training on many devices: meshes, shardings over them, and the ways to run a step."""

from lora_jax.parallel.mesh import make_mesh as make_mesh
from lora_jax.parallel.modes import MODES as MODES
from lora_jax.parallel.modes import mesh_of as mesh_of
from lora_jax.parallel.modes import on_mesh as on_mesh
from lora_jax.parallel.modes import replicated as replicated
from lora_jax.parallel.modes import row_of as row_of
from lora_jax.parallel.rules import Rules as Rules
from lora_jax.parallel.rules import match_specs as match_specs
from lora_jax.parallel.rules import spec_of as spec_of
from lora_jax.parallel.sharded import over_mesh as over_mesh
from lora_jax.parallel.sharded_quantize import quantized_in_parts as quantized_in_parts
from lora_jax.parallel.shardings import base_shardings as base_shardings
from lora_jax.parallel.shardings import batch_sharding as batch_sharding
from lora_jax.parallel.shardings import delta_shardings as delta_shardings
from lora_jax.parallel.shardings import leaf_sharding as leaf_sharding
from lora_jax.parallel.shardings import require_divisible as require_divisible
from lora_jax.parallel.shardings import state_shardings as state_shardings
