"""The parts of a training run, each usable by itself.

What needs `lora_jax.data` beside is imported by its module: `training.stored_reference`,
`training.rollouts` and `training.reinforce`.
"""

from lora_jax.training import optimizers as optimizers
from lora_jax.training.losses import LOSSES as LOSSES
from lora_jax.training.losses.dpo import dpo_loss as dpo_loss
from lora_jax.training.losses.dpo import dpo_norm_loss as dpo_norm_loss
from lora_jax.training.losses.dpo import ipo_loss as ipo_loss
from lora_jax.training.losses.fields import Field as Field
from lora_jax.training.losses.grpo import dr_grpo_loss as dr_grpo_loss
from lora_jax.training.losses.grpo import grpo_loss as grpo_loss
from lora_jax.training.losses.kto import kto_loss as kto_loss
from lora_jax.training.losses.loss import Loss as Loss
from lora_jax.training.losses.loss import LossSum as LossSum
from lora_jax.training.losses.next_token import next_token_batch as next_token_batch
from lora_jax.training.losses.next_token import next_token_loss as next_token_loss
from lora_jax.training.losses.orpo import orpo_loss as orpo_loss
from lora_jax.training.losses.simpo import simpo_loss as simpo_loss
from lora_jax.training.losses.target_log_probs import target_log_probs as target_log_probs
from lora_jax.training.losses.token_losses import token_losses as token_losses
from lora_jax.training.muon import muon as muon
from lora_jax.training.optimizers import adamw as adamw
from lora_jax.training.optimizers import optimizer as optimizer
from lora_jax.training.optimizers import paged as paged
from lora_jax.training.policy import group_advantages as group_advantages
from lora_jax.training.step import TrainState as TrainState
from lora_jax.training.step import TrainStep as TrainStep
from lora_jax.training.step import init_state as init_state
from lora_jax.training.step import train_step as train_step
