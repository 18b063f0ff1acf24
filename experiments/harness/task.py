"""What a file of chats asks for: the settings that follow from it, before any weight is read."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness import devices, plan, setup
from experiments.harness.arms import Arm
from experiments.harness.encoding import encode_conversations
from experiments.harness.losses import encode_of
from experiments.harness.shared import Examples
from lora_jax import data
from lora_jax.interop import Pretrained
from lora_jax.weights import is_weight

TILE = 128  # positions by which attention kernels work
HELD = 0.99  # the share of examples that a row must be able to hold
CHATS_A_STEP, STEPS_AN_EPOCH = 8, 10
# Up to how many examples: epochs and dropout. Small data are seen again, and held against.
BY_SIZE = ((1_000, 3.0, 0.1), (10_000, 2.0, 0.05), (math.inf, 1.0, 0.0))
RATES = ((1e9, 1e-3), (20e9, 2e-4), (math.inf, 1e-4))  # below so many parameters
VALIDATIONS, LONGEST_GAP = 8, 200
WARM_UP, LONGEST_WARM_UP = 0.05, 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A fine-tuning run before it starts.

    Attributes:
      config: with every setting filled in.
      model: with the shapes of its params for the params.
      examples: both splits, as tokens.
      lengths: those of all training examples, in tokens.
      arm: what trains.
      counts: of the trained parameters.
    """

    config: ConfigDict
    model: Pretrained
    examples: Examples
    lengths: np.ndarray
    arm: Arm
    counts: lora.Description

    @property
    def epochs(self) -> float:
        """How often the steps go through the examples; what was asked for, where that was."""
        config = self.config
        if config.train.epochs is not None:
            return config.train.epochs
        return config.train.steps / _batches(config, self.examples.train, self.model, 1.0)


def settled(config: ConfigDict) -> Task:
    """The task that a config and its data are.

    Raises:
      ValueError, FileNotFoundError: for anything that is wrong with the settings or the data, as
        far as that can be told without the model's weights.
    """
    _require_recipe(config)
    config = config.copy_and_resolve_references()
    if config.model.dtype is None:
        config.model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    train, validation = (setup.records(config, split) for split in ("train", "validation"))
    model = setup.model_without_weights(config)
    config.name = config.name or model.name
    if model.tokenizer.chat_template is None:
        raise ValueError(
            f"{model.name} has no chat template, through which every example goes: put a "
            "chat_template.jinja into its folder, such as its instruct sibling's."
        )
    encoded = data.encode_records(train, model.tokenizer)
    lengths = np.array([len(example["tokens"]) for example in encoded])
    _fill_rows(config, lengths, model)
    checked = validation[: config.data.validation_examples]
    examples = Examples(
        train=_fitting(config, encoded, "training"),
        validation=_fitting(config, data.encode_records(checked, model.tokenizer), "validation"),
    )
    _fill_schedule(config, examples.train, model)
    arm = _arm(config)
    counts = plan.describe_arm(model.params, arm.method, arm.targets)
    return Task(
        config=config, model=model, examples=examples, lengths=lengths, arm=arm, counts=counts
    )


def _require_recipe(config: ConfigDict) -> None:
    if "epochs" not in config.train or "rank" not in config.lora:
        raise ValueError(
            "--config: expected a file that starts from configs/finetune.py, which says what "
            "follows from the data. Another model is --config.model.source=FOLDER."
        )
    if encode_of(config) is not encode_conversations:
        raise ValueError(
            f"config.train.loss={config.train.loss!r} learns from pairs of answers, and this from "
            "chats: experiments/rank_sweep.py takes it, with --config.data.source=preferences or a "
            "JSONL file of prompt, chosen and rejected."
        )
    steps, epochs = config.train.steps, config.train.epochs
    if steps is not None and epochs is not None:
        raise ValueError(
            f"config.train.steps={steps} and config.train.epochs={epochs:g} are both given: each "
            "says how long to train. Leave one out."
        )
    if steps is not None and steps < 1:
        raise ValueError(f"config.train.steps={steps}: expected at least 1.")
    if epochs is not None and not 0 < epochs < math.inf:
        raise ValueError(f"config.train.epochs={epochs:g}: expected a number above 0.")
    if config.data.batch_size is not None and config.data.batch_size < 1:
        raise ValueError(f"config.data.batch_size={config.data.batch_size}: expected at least 1.")
    if config.data.source == "jsonl" and not config.data.path:
        raise ValueError(
            'no data: give --config.data.path=chats.jsonl, whose lines are {"messages": [...]} '
            'or {"prompt": ..., "response": ...}. --config.data.source=restaurants tries it on '
            "generated ones."
        )


def _fill_rows(config: ConfigDict, lengths: np.ndarray, model: Pretrained) -> None:
    """How long rows are, and how many make a step."""
    settings, context = config.data, model.config.context_length
    if settings.seq_len is None:
        needed = int(np.quantile(lengths, HELD, method="higher"))
        settings.seq_len = min(TILE * math.ceil(needed / TILE), context)
    setup.require_context(config, model)
    if settings.batch_size is None:
        chats = min(max(len(lengths) // STEPS_AN_EPOCH, 1), CHATS_A_STEP)
        a_row = max(1.0, settings.seq_len / lengths.mean()) if settings.pack else 1.0
        unit = devices.rows_unit(config)
        settings.batch_size = unit * max(1, round(chats / a_row / unit))


def _fitting(config: ConfigDict, encoded: list[data.Example], name: str) -> data.EncodedSource:
    try:
        return data.fitting(encoded, config.data.seq_len)
    except ValueError as error:
        raise ValueError(
            f"the {name} examples: {error} The option is --config.data.seq_len, up to the model's "
            "context; longer chats must be cut into several."
        ) from None


def _fill_schedule(config: ConfigDict, train: data.EncodedSource, model: Pretrained) -> None:
    settings = config.train
    epochs, dropout = next(rest for below, *rest in BY_SIZE if len(train.examples) < below)
    if settings.steps is None:
        settings.epochs = epochs if settings.epochs is None else settings.epochs
        settings.steps = _batches(config, train, model, settings.epochs)
    if settings.learning_rate is None:
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(model.params, is_leaf=is_weight))
        settings.learning_rate = next(rate for below, rate in RATES if size < below)
    if config.lora.method.dropout is None:
        config.lora.method.dropout = dropout
    gap = math.ceil(settings.steps / VALIDATIONS)
    warm_up = min(math.ceil(WARM_UP * settings.steps), LONGEST_WARM_UP, settings.steps - 1)
    filled = {
        "warmup_steps": warm_up, "eval_every": gap, "checkpoint_every": min(gap, LONGEST_GAP)
    }  # fmt: skip
    for name, value in filled.items():
        settings[name] = value if settings[name] is None else settings[name]


def _batches(
    config: ConfigDict, train: data.EncodedSource, model: Pretrained, epochs: float
) -> int:
    settings = config.data
    return data.count_batches(
        train,
        model.tokenizer,
        epochs=epochs,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        seed=settings.seed,
        pack=settings.pack,
    )


def _arm(config: ConfigDict) -> Arm:
    """Named as the file is: the name by which the adapter is served."""
    path = config.data.path
    name = Path(path).expanduser().resolve().stem if path else config.data.source
    return Arm(
        name=name,
        rank=config.lora.rank,
        targets=config.lora.targets,
        method=lora.LoRA(rank=config.lora.rank, **config.lora.method),
        learning_rate=config.train.learning_rate,
        seed=config.sweep.seeds[0],
    )
