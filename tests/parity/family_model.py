"""What PEFT computes of a case of the family, for the golden file and for the live test."""

import family_cases
import numpy as np
import peft
import small_llamas
import torch
import transformers


def adapted(case: dict) -> torch.nn.Module:
    values = small_llamas.VARIANTS[family_cases.MODEL]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).float()
    weights = {k: torch.from_numpy(v) for k, v in small_llamas.draw_weights(values).items()}
    model.load_state_dict(weights, strict=False)
    kind, arguments = case["config"]
    model = peft.get_peft_model(model, getattr(peft, kind)(**arguments))
    shared = {n: b for n, b in model.named_buffers() if "vera_" in n}
    for name, value in dict(model.named_parameters()).items() | shared.items():
        if value.requires_grad or name in shared:
            drawn = family_cases.draw(name, tuple(value.shape))
            value.data.copy_(torch.from_numpy(drawn))
    return model


def compute(name: str) -> dict[str, np.ndarray]:
    """Logits, loss, and per trained parameter its gradient and what the optimizer makes of it."""
    case = family_cases.CASES[name]
    model = adapted(case)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=family_cases.LEARNING_RATE,
        weight_decay=family_cases.WEIGHT_DECAY,
    )
    tokens, found = torch.from_numpy(family_cases.TOKENS), {}
    for step in range(family_cases.STEPS):
        optimizer.zero_grad()
        output = model(tokens, labels=tokens)
        output.loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if step == 0:
            found |= {"logits": output.logits, "loss": output.loss}
            found |= {f"{n}/grad": p.grad.clone() for n, p in trained.items()}
        optimizer.step()
    found |= {f"{n}/after": p for n, p in trained.items()}
    return {key: value.detach().numpy().astype(np.float32) for key, value in found.items()}
