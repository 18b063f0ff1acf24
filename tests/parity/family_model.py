"""What PEFT computes of a case of the family, for the golden file and for the live test."""

import family_cases
import numpy as np
import peft
import peft.optimizers.lorafa
import small_llamas
import torch
import transformers


def base() -> torch.nn.Module:
    values = small_llamas.VARIANTS[family_cases.MODEL]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).float()
    weights = {k: torch.from_numpy(v) for k, v in small_llamas.draw_weights(values).items()}
    model.load_state_dict(weights, strict=False)
    return model


def adapted(case: dict) -> torch.nn.Module:
    kind, arguments = case["config"]
    model = peft.get_peft_model(base(), getattr(peft, kind)(**arguments))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if hasattr(model.base_model, "vera_A"):
        trained["base_model.vera_A.default"] = model.base_model.vera_A["default"]
        trained["base_model.vera_B.default"] = model.base_model.vera_B["default"]
    for name, value in trained.items() if "own_start" not in case else ():
        value.data.copy_(torch.from_numpy(family_cases.draw(name, tuple(value.shape))))
    return model


def optimizer_of(model: torch.nn.Module, case: dict) -> torch.optim.Optimizer:
    rate, decay = family_cases.LEARNING_RATE, family_cases.WEIGHT_DECAY
    kind = case.get("optimizer")
    if kind == "loraplus":
        return peft.optimizers.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=family_cases.B_RATIO,
            loraplus_weight_decay=decay,
        )  # fmt: skip
    if kind == "lorafa":
        # Where bf16 is at hand PEFT rounds the projected gradient to it: not here.
        peft.optimizers.lorafa.is_bf16_available = lambda *args: False
        rank, alpha = case["config"][1]["r"], case["config"][1]["lora_alpha"]
        optimizer = peft.optimizers.create_lorafa_optimizer(
            model, r=rank, lora_alpha=alpha, lr=rate, weight_decay=decay
        )
        optimizer.param_groups[0]["eps"] = family_cases.NO_EPS
        return optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=decay, eps=case.get("eps", 1e-8))


def compute(name: str) -> dict[str, np.ndarray]:
    """Logits, loss, and per trained parameter its gradient and what the optimizer makes of it."""
    case = family_cases.CASES[name]
    model = adapted(case)
    optimizer = optimizer_of(model, case)
    tokens, found = torch.from_numpy(family_cases.TOKENS), {}
    for step in range(case.get("steps", family_cases.STEPS)):
        optimizer.zero_grad()
        output = model(tokens, labels=tokens)
        logits = output.logits[:, -tokens.shape[1] :]
        loss = output.loss
        if hasattr(model, "prompt_encoder"):  # PEFT's own loss counts the prompt's prediction too
            predicted = logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(predicted, tokens[:, 1:].flatten())
        loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if step == 0:
            found |= {"logits": logits, "loss": loss}
            found |= {f"{n}/grad": p.grad.clone() for n, p in trained.items()}
        optimizer.step()
        if case["config"][0] == "AdaLoraConfig":
            model.base_model.update_and_allocate(step + 1)
    for module, mask in (getattr(model.peft_config["default"], "rank_pattern", None) or {}).items():
        found[f"base_model.model.{module}/mask"] = torch.tensor(mask)
    found |= {f"{n}/after": p for n, p in trained.items()}
    if "own_start" in case:
        found = {k: v.abs() if "/" in k else v for k, v in found.items()}
    return {key: value.detach().numpy().astype(np.float32) for key, value in found.items()}
