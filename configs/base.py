"""Every setting with its meaning; a model's config changes what it must.

Any of them can be given on the command line: `--config.train.steps=20`.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.name = ""
    config.model = ConfigDict(
        {
            # "smollm2-135m", a .gguf file, a Hugging Face folder, a cached hub name, or "random".
            "source": "smollm2-135m",
            # What --plan, random weights and arms of equal parameters go by: a name in
            # lora_jax/models (a family's `shapes`).
            "shape": "smollm2-135m",
            "dtype": "float32",  # of the base and of all compute; deltas are float32
            # What the backward pass recomputes: none, elementwise, full; offload: as full, but the
            # layers' inputs wait in host memory.
            "remat": "elementwise",
            "attention": "auto",  # by platform; or xla, splash (TPU), cudnn (GPU)
        }
    )
    config.base = ConfigDict(
        {
            # none, or the format of all linear layers of the frozen base: a name in
            # lora_jax/quant/formats.py
            "quantize": "none",
            # Weights that share a scale, and whether a float32 scale is itself kept in 8 bits; what
            # is not given is the format's own: 64 and True for nf4.
            "block_size": config_dict.placeholder(int),
            "double_quant": config_dict.placeholder(bool),
        }
    )
    config.data = ConfigDict(
        {
            "source": "restaurants",  # restaurants, preferences, e2e, jsonl, tfds:NAME
            "path": "",  # the folder or file of e2e and jsonl
            "prompt_field": "",  # of a TFDS data set
            "response_field": "",
            "batch_size": 1,  # rows a step
            "seq_len": 256,  # tokens a row
            # "chat": the tokenizer's own. "plain": prompt, new line, response, end of text; no
            # system message.
            "template": "chat",
            "pack": True,  # several examples a row
            "seed": 0,  # of the order, which all arms share
            "validation_examples": 32,
            # Of a JSONL source without validation examples of its own: another file of them, or
            # the share that is held out by the seed, at most validation_examples; None: its last
            # 5 %.
            "validation_path": "",
            "validation_share": config_dict.placeholder(float),
        }
    )
    config.lora = ConfigDict(
        {
            "targets": "all-linear",
            "method": ConfigDict(  # what LoRA takes beside the rank
                {
                    "alpha": 16.0,
                    "scaling": "lora",  # alpha / r; "rslora": alpha / sqrt(r)
                    "dropout": 0.0,
                    "init": "kaiming",
                }
            ),
        }
    )
    config.train = ConfigDict(
        {
            "steps": 16,
            "loss": "next_token",  # a name in lora_jax/training/losses/__init__.py
            "optimizer": "adamw",  # adamw, muon, adafactor, sgd, lion
            "warmup_steps": 2,
            "schedule": "cosine",  # cosine, linear, constant
            "learning_rate": 3e-3,  # its peak
            "weight_decay": 0.0,
            "clip_norm": 1.0,  # of the trained part's gradient
            "optimizer_memory": "device",  # or pinned_host: moments stream from the host
            "accumulate": 1,  # micro-batches a step
            "eval_every": 16,
            "checkpoint_every": 8,
            "log_every": 1,
            # Validations without a new best before an arm stops; 0 never stops. With it every arm
            # ends, and is saved and sampled from, as it was at its best validation.
            "patience": 0,
        }
    )
    config.parallel = ConfigDict(
        {
            # How a step runs on the devices there are: single, pmap (the base on each, the batch
            # split), fsdp (the base split as well), tensor (products split), fsdp+tensor.
            "mode": "single",
            "tensor": 1,  # of fsdp+tensor: devices that share each product; fsdp takes the rest
            "sequence": 1,  # devices that share each row's positions
            "arms": 1,  # devices among which a batched sweep's arms are divided
        }
    )
    config.sweep = ConfigDict(
        {
            "ranks": (1, 4, 16, 64),
            "learning_rates": (),  # several make an arm each; empty: train.learning_rate
            "seeds": (0,),  # of the initialisation and of dropout
            "mode": "auto",  # batched, in_turn; auto: in_turn on a CPU, batched elsewhere
            "full": False,  # adds full fine-tuning as an arm
            "full_learning_rate": 2e-4,
        }
    )
    config.ablation = ConfigDict(
        {
            "targets": ("qv", "attention", "mlp", "all-linear"),
            "rank": 8,  # of every arm at equal rank; of all-linear at equal parameters
        }
    )
    config.methods = ConfigDict(
        {
            "names": (),  # those to compare; empty: all that experiments/methods.py lists
            "ranks": (8,),  # of LoRA, whose trainable parameters are the budgets
            "fixed_rate": 0.0,  # above 0: every method again at this learning rate
        }
    )
    # Of a study, which --budget starts: experiments/harness/study/search.py has the rules.
    config.study = ConfigDict(
        {
            "factor": 2.0,  # between neighbouring learning rates
            "most": 8,  # rates that a cell may try
            "margin": 0.05,  # nats above the cell's best run at which another is given up; 0: never
            "seeds": (0, 1, 2),  # of initialisation, dropout and data; the first searches
            # A text file on whose beginning each run's loss is taken too: what it forgets.
            "other_text": "",
            # Whether full fine-tuning's updates are saved, for subspaces.py: each is as large as
            # the model in float32.
            "save_full": False,
            "cells": (),  # names of those to run; empty: all
        }
    )
    config.preference = ConfigDict(
        {
            # Names of lora_jax/training/losses: what experiments/preference.py compares.
            "losses": ("next_token", "dpo"),
            "rank": 8,
        }
    )
    config.reinforce = ConfigDict(
        {
            "prompts": 4,  # a step
            "group": 8,  # answers to each
            "new_tokens": 4,  # of an answer at most
            "temperature": 1.0,
            "updates": 1,  # on the same answers
            "kl": 0.0,  # the weight of the divergence from the base
            # What a reward that raises or is no number does: stop ends the run, skip leaves the
            # answer out; the example is named.
            "on_error": "stop",
            "ia3": False,  # adds IA3 on the values of attention as an arm
        }
    )
    config.samples = ConfigDict({"prompts": 2, "max_new_tokens": 40})
    return config
