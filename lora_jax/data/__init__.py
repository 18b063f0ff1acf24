"""Sources of conversations, chat templates, and batches for training and evaluation."""

from lora_jax.data.batches import EncodedSource as EncodedSource
from lora_jax.data.batches import count_batches as count_batches
from lora_jax.data.batches import encode_records as encode_records
from lora_jax.data.batches import encode_source as encode_source
from lora_jax.data.batches import eval_batches as eval_batches
from lora_jax.data.batches import fitting as fitting
from lora_jax.data.batches import train_batches as train_batches
from lora_jax.data.chat import render as render
from lora_jax.data.encode import Encoded as Encoded
from lora_jax.data.encode import encode as encode
from lora_jax.data.encode import render_messages as render_messages
from lora_jax.data.jsonl import HeldOut as HeldOut
from lora_jax.data.packing import Batch as Batch
from lora_jax.data.packing import Example as Example
from lora_jax.data.pairs import EncodedPairs as EncodedPairs
from lora_jax.data.pairs import encode_judged as encode_judged
from lora_jax.data.pairs import encode_pairs as encode_pairs
from lora_jax.data.records import Record as Record
from lora_jax.data.sources import default_cache_dir as default_cache_dir
from lora_jax.data.sources import load_source as load_source
from lora_jax.data.tokenizer import PLAIN as PLAIN
from lora_jax.data.tokenizer import Tokenizer as Tokenizer
from lora_jax.data.tokenizer import byte_tokenizer as byte_tokenizer
