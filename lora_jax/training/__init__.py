"""The parts of a training run, each usable by itself."""

from lora_jax.training import optimizers as optimizers
from lora_jax.training.loss import token_losses as token_losses
from lora_jax.training.muon import muon as muon
from lora_jax.training.optimizers import adamw as adamw
from lora_jax.training.optimizers import optimizer as optimizer
from lora_jax.training.optimizers import paged as paged
from lora_jax.training.step import LossSum as LossSum
from lora_jax.training.step import TrainState as TrainState
from lora_jax.training.step import TrainStep as TrainStep
from lora_jax.training.step import init_state as init_state
from lora_jax.training.step import llama_loss as llama_loss
from lora_jax.training.step import train_step as train_step
