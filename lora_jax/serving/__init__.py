"""Serving many adapters over one base."""

from lora_jax.serving.bank import Bank as Bank
from lora_jax.serving.bank import Packed as Packed
from lora_jax.serving.bank import Place as Place
from lora_jax.serving.bank import Rows as Rows
from lora_jax.serving.bank import drop as drop
from lora_jax.serving.bank import make_bank as make_bank
from lora_jax.serving.bank import pack as pack
from lora_jax.serving.bank import put as put
from lora_jax.serving.bank import rows_of as rows_of
from lora_jax.serving.normal_form import NormalForm as NormalForm
from lora_jax.serving.normal_form import normal_form as normal_form
from lora_jax.serving.pool import BankFull as BankFull
from lora_jax.serving.pool import Lease as Lease
from lora_jax.serving.pool import Pool as Pool
from lora_jax.serving.served import Served as Served
from lora_jax.serving.served import bind as bind
