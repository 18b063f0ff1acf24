"""Many adapters over one base: a bank on the device, an engine for many requests at once, and a
server of OpenAI's API."""

from lora_jax.serving.adapters import BankFull as BankFull
from lora_jax.serving.adapters import Lease as Lease
from lora_jax.serving.bank import Bank as Bank
from lora_jax.serving.bank import Place as Place
from lora_jax.serving.bank import Rows as Rows
from lora_jax.serving.bank import make_bank as make_bank
from lora_jax.serving.bank import rows_of as rows_of
from lora_jax.serving.bank import shardings as shardings
from lora_jax.serving.engine import Engine as Engine
from lora_jax.serving.normal_form import NormalForm as NormalForm
from lora_jax.serving.normal_form import normal_form as normal_form
from lora_jax.serving.packing import Packed as Packed
from lora_jax.serving.packing import drop as drop
from lora_jax.serving.packing import pack as pack
from lora_jax.serving.packing import put as put
from lora_jax.serving.pool import Pool as Pool
from lora_jax.serving.request import Event as Event
from lora_jax.serving.request import Refused as Refused
from lora_jax.serving.request import Request as Request
from lora_jax.serving.request import Sampling as Sampling
from lora_jax.serving.request import TokenLogprobs as TokenLogprobs
from lora_jax.serving.served import Served as Served
from lora_jax.serving.served import bind as bind
