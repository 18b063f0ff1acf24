"""The peers' logits, and how far ours are from them."""

import numpy as np
import torch


def their_logits(model, tokens):
    """Of the tokens, without what a prompt puts in front."""
    model.eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits[:, -tokens.shape[1] :].numpy()


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()
