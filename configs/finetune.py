"""One adapter from a file of chats: the recipe of experiments/finetune.py, over any model.

What is None here follows from the data and the machine, and is shown before training starts; what
is given, here or on the command line, stays. A model's own file may start from this one.

Command:  python experiments/finetune.py --config.data.path=chats.jsonl
          --config.model.source=FOLDER takes another model than SmolLM2-135M-Instruct
Hardware: 2 cores of an AMD EPYC, busy with other work, no accelerator
Time:     189 s for 40 chats (jax 0.10.2)
Result:   validation loss 4.940 untuned, 1.734 tuned: experiments/README.md
"""

from ml_collections import ConfigDict, config_dict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = ""  # the model's
    # None: float32 on a CPU; bfloat16 elsewhere, as models are published. The delta is float32.
    config.model.dtype = config_dict.placeholder(str)
    config.data.source = "jsonl"
    # None: the smallest multiple of 128, by which kernels tile, that holds 99 % of the examples.
    config.data.seq_len = config_dict.placeholder(int)
    # None: rows for 8 examples, or for fewer where an epoch would have less than 10 steps: LoRA
    # loses more by large batches than full fine-tuning ("LoRA Without Regret", 2025).
    config.data.batch_size = config_dict.placeholder(int)
    # A tenth is held out by data.seed, at least 4 examples and at most validation_examples, which
    # every validation reads. data.validation_path gives others.
    config.data.validation_share = 0.1
    config.data.validation_examples = 64
    # Beyond about 8, rank changes little on data of this size (Hu et al. 2021, section 7.2); 16
    # leaves room and costs 0.5 % of an 8B model.
    config.lora.rank = 16
    # All linear layers beat attention alone at equal parameters (QLoRA 2023, figure 2).
    config.lora.targets = "all-linear"
    config.lora.method.alpha = 32.0  # twice the rank: the scale that the rate below is meant for
    # None: 0.1 below 1,000 examples, 0.05 below 10,000, as QLoRA's for small and large models; 0
    # from there, where one pass repeats nothing.
    config.lora.method.dropout = config_dict.placeholder(float)
    # One of the two; both None: 3 epochs below 1,000 examples, 2 below 10,000, 1 from there. More
    # of them memorise; the best validation is what is kept.
    config.train.steps = config_dict.placeholder(int)
    config.train.epochs = config_dict.placeholder(float)
    # None: 2e-4 as QLoRA up to 13B parameters and 1e-4 above, about ten times what full fine-tuning
    # takes; below 1B 1e-3: of SmolLM2-135M and 40 chats, 54 steps at 2e-4 left a validation loss of
    # 2.174, at 1e-3 one of 1.734 (one seed).
    config.train.learning_rate = config_dict.placeholder(float)
    config.train.schedule = "cosine"  # ends at 0, so that the last steps settle
    # None: a twentieth of the steps, at most 100: Adam's second moments are too small at first.
    config.train.warmup_steps = config_dict.placeholder(int)
    # None: an eighth of the steps; checkpoints at the same steps, at least every 200.
    config.train.eval_every = config_dict.placeholder(int)
    config.train.checkpoint_every = config_dict.placeholder(int)
    config.train.patience = 3  # of the eight validations; the best state is kept
    config.samples.prompts = 3
    config.samples.max_new_tokens = 60
    return config
