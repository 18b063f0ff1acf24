"""What trl computes of a case, for the golden file and for the live test."""

import collections
import tempfile
import types

import datasets
import numpy as np
import peft
import peft_cases
import small_llamas
import tokenizers
import torch
import transformers
import trl
import trl_cases
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import nanstd


def compute(name: str) -> dict[str, np.ndarray]:
    """The loss of each step, the gradients of A and B at the first, and A and B after the last."""
    case = trl_cases.CASES[name]
    model, factors = _model()
    run = _by_trainer if name in ("dpo", "dpo_norm", "ipo", "kto") else _by_loss
    losses, first = run(name, case, model, factors)
    found = {"losses": np.array(losses, np.float32), **first}
    for module, pair in factors.items():
        for letter, value in zip("ab", pair, strict=True):
            found[f"{module}/after_{letter}"] = value.detach().numpy()
    return found


def advantages(rewards: np.ndarray, *, scale: bool) -> np.ndarray:
    """By trl's mean and deviation of groups that may lack rewards."""
    grouped = torch.from_numpy(rewards)
    centred = grouped - torch.nanmean(grouped, dim=1, keepdim=True)
    if scale:
        centred /= nanstd(grouped, dim=1, keepdim=True) + 1e-4
    return torch.nan_to_num(centred, nan=0.0).numpy()


def grpo(arrays: dict[str, np.ndarray], *, dr: bool) -> tuple[float, np.ndarray]:
    """The loss of given tensors and its gradient by the policy's log-probabilities."""
    given = {key: torch.tensor(value) for key, value in arrays.items()}
    policy = given["policy"].requires_grad_()
    self = types.SimpleNamespace(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=float(arrays["beta"]),
        loss_type="dr_grpo" if dr else "grpo",
        epsilon_low=0.2,
        epsilon_high=0.25,
        max_completion_length=policy.shape[1],
        current_gradient_accumulation_steps=1,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False),
        model=types.SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            policy,
            torch.zeros(policy.shape),
            None,
        ),
        accelerator=types.SimpleNamespace(
            reduce=lambda x, reduction: x, gather=lambda x: x, sync_gradients=True
        ),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros((len(policy), 1), dtype=torch.long),
        "prompt_mask": torch.ones((len(policy), 1), dtype=torch.long),
        "completion_ids": torch.zeros(policy.shape, dtype=torch.long),
        "completion_mask": given["mask"].int(),
        "advantages": given["advantages"],
        "old_per_token_logps": given["sampler"],
        "ref_per_token_logps": given["reference"],
    }
    loss = trl.GRPOTrainer._compute_loss(self, None, inputs)
    loss.backward()
    return float(loss.detach()), policy.grad.numpy()


def _model():
    values = small_llamas.VARIANTS[trl_cases.MODEL]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).float()
    weights = {k: torch.from_numpy(v) for k, v in small_llamas.draw_weights(values).items()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    adapter = trl_cases.ADAPTER
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=adapter["rank"], lora_alpha=adapter["alpha"], lora_dropout=0.0,
            target_modules=adapter["targets"],
        ),
    )  # fmt: skip
    factors = {}
    for module, (a, b) in peft_cases.adapters(adapter).items():
        layer = model.get_submodule(f"base_model.model.{module}")
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for parameter, value in zip(pair, (a, b), strict=True):
            parameter.data.copy_(torch.from_numpy(value))
        factors[module] = pair
    return model, factors


def _tokenizer():
    words = {str(i): i for i in range(trl_cases.VOCABULARY)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    eos = str(trl_cases.EOS)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=eos, padding_side="left"
    )


def _text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def _gradients(factors) -> dict[str, np.ndarray]:
    return {
        f"{module}/grad_{letter}": value.grad.numpy().copy()
        for module, pair in factors.items()
        for letter, value in zip("ab", pair, strict=True)
    }


class _First(transformers.TrainerCallback):
    def __init__(self, factors):
        self.factors, self.found = factors, {}

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.found = self.found or _gradients(self.factors)


def _by_trainer(loss, case, model, factors):
    kto = loss == "kto"
    rows = trl_cases.judged() if kto else trl_cases.pairs()
    columns = ("prompt", "completion") if kto else ("prompt", "chosen", "rejected")
    texts = [
        {key: _text(row[key]) + " " * (key == "prompt") for key in columns}
        | ({"label": row["label"]} if kto else {})
        for row in rows
    ]
    settings = dict(case)
    if not kto:
        settings["loss_type"] = [{"dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "ipo": "ipo"}[loss]]
    config, trainer_class = (
        (trl.KTOConfig, trl.KTOTrainer) if kto else (trl.DPOConfig, trl.DPOTrainer)
    )
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            output_dir=folder, max_steps=trl_cases.STEPS, learning_rate=trl_cases.LEARNING_RATE,
            per_device_train_batch_size=trl_cases.ROWS, optim="sgd", lr_scheduler_type="constant",
            max_grad_norm=0.0, train_sampling_strategy="sequential", use_cpu=True, bf16=False,
            report_to="none", save_strategy="no", logging_steps=1, logging_first_step=True,
            gradient_checkpointing=False, disable_tqdm=True, max_length=None, **settings,
        )  # fmt: skip
        first = _First(factors)
        trainer = trainer_class(
            model=model, args=args, train_dataset=datasets.Dataset.from_list(texts),
            processing_class=_tokenizer(), callbacks=[first],
        )  # fmt: skip
        trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return losses, first.found


def _by_loss(loss, case, model, factors):
    """What trl's trainers lack, by its own functions of log-probabilities: SimPO and ORPO without
    its other terms, and DPO with smoothed labels, whose reference is the first policy."""
    optimizer = torch.optim.SGD([x for pair in factors.values() for x in pair], lr=0.05)
    losses, first = [], {}
    rows = trl_cases.pairs()
    reference = {
        side: torch.stack([_log_prob(model, row, side, mean=False).detach() for row in rows])
        for side in ("chosen", "rejected")
    }
    for step in range(trl_cases.STEPS):
        at = slice(step * trl_cases.ROWS, (step + 1) * trl_cases.ROWS)
        chosen, rejected = (
            torch.stack([_log_prob(model, row, side, mean=loss != "dpo_smoothed")
                         for row in rows[at]])
            for side in ("chosen", "rejected")
        )  # fmt: skip
        if loss == "dpo_smoothed":
            chosen, rejected = (
                chosen - reference["chosen"][at],
                rejected - reference["rejected"][at],
            )
        self = types.SimpleNamespace(
            beta=case["beta"], simpo_gamma=case.get("gamma"), alpha=0.0,
            loss_type="simpo" if loss == "simpo" else "sigmoid",
            label_smoothing=case.get("label_smoothing", 0.0),
            accelerator=types.SimpleNamespace(device="cpu"),
        )  # fmt: skip
        if loss == "orpo":
            value = (-chosen - ORPOTrainer.odds_ratio_loss(self, chosen, rejected)[0]).mean()
        else:
            value = CPOTrainer.cpo_loss(self, chosen, rejected)[0].mean()
        optimizer.zero_grad()
        value.backward()
        first = first or _gradients(factors)
        optimizer.step()
        losses.append(float(value.detach()))
    return losses, first


def _log_prob(model, row, side, *, mean: bool) -> torch.Tensor:
    ids = torch.tensor([row["prompt"] + row[side]])
    labels = ids.clone()
    labels[:, : len(row["prompt"])] = -100
    return CPOTrainer.get_batch_logps(model(ids).logits, labels, average_log_prob=mean)[0]
