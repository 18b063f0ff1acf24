"""What PEFT computes of a case, for the golden file and for the live test."""

import numpy as np
import peft
import peft_cases
import small_llamas
import torch
import transformers


def compute(name: str) -> dict[str, np.ndarray]:
    """Logits, loss, and per module the gradients and what AdamW makes of A and B."""
    case = peft_cases.CASES[name]
    values = small_llamas.VARIANTS[case["model"]]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).float()
    weights = {k: torch.from_numpy(v) for k, v in small_llamas.draw_weights(values).items()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=case["rank"], lora_alpha=case["alpha"], use_rslora=case["rslora"],
            target_modules=case["targets"], lora_dropout=0.0,
        ),
    )  # fmt: skip
    factors = {}
    for module, (a, b) in peft_cases.adapters(case).items():
        layer = model.get_submodule(f"base_model.model.{module}")
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for parameter, value in zip(pair, (a, b), strict=True):
            parameter.data.copy_(torch.from_numpy(value))
        factors[module] = pair
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(factors)
    optimizer = torch.optim.AdamW(
        trained, lr=peft_cases.LEARNING_RATE, weight_decay=peft_cases.WEIGHT_DECAY
    )
    tokens = torch.from_numpy(peft_cases.TOKENS)
    found = {}
    for step in range(peft_cases.STEPS):
        optimizer.zero_grad()
        output = model(tokens, labels=tokens)
        output.loss.backward()
        if step == 0:
            found |= {"logits": output.logits, "loss": output.loss}
            for module, (a, b) in factors.items():
                found |= {f"{module}/grad_a": a.grad.clone(), f"{module}/grad_b": b.grad.clone()}
        optimizer.step()
    for module, (a, b) in factors.items():
        found |= {f"{module}/after_a": a, f"{module}/after_b": b}
    return {key: value.detach().numpy().astype(np.float32) for key, value in found.items()}
