"""From the last hidden state to predictions: a linear layer over the classes, or an adaptive softmax over words."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

from .checks import check_integers


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert bfloat16 and float16 to float32: they are too coarse for probabilities."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Return a context without autocast, on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


class LinearHead(nn.Linear):
    """A logit for every class: (..., d) -> (..., num_classes)."""

    def token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross-entropy of each target in nats: logits (n, num_classes), targets (n,) -> (n,)."""
        return cross_entropy(at_least_float32(logits), targets, reduction="none")

    def log_probs(self, logits: Tensor) -> Tensor:
        """Compute the log-probability of each class: (..., num_classes) -> (..., num_classes)."""
        return at_least_float32(logits).log_softmax(-1)

    def predict(self, logits: Tensor) -> Tensor:
        """Return the most likely class: (..., num_classes) -> (...)."""
        return logits.argmax(-1)


class AdaptiveSoftmax(nn.Module):
    """Adaptive softmax (Grave et al. 2017) tied to adaptive input embeddings (Baevski and Auli 2019; section A.2.4).

    Tokens are numbered by frequency, the most frequent first. From each cutoff on, embeddings are four times smaller
    than before it and projected to d; embeddings and projections are shared between input and output.

    Args:
        hidden_size: d.
        vocab_size: Number of tokens.
        cutoffs: Token ids at which the embeddings get smaller, in increasing order.
    """

    def __init__(self, hidden_size: int, vocab_size: int, cutoffs: Sequence[int]):
        super().__init__()
        for cutoff in cutoffs:
            check_integers(1, cutoffs=cutoff)
        self.boundaries = [0, *cutoffs, vocab_size]
        if sorted(set(self.boundaries)) != self.boundaries or hidden_size < 4 ** len(cutoffs):
            raise ValueError(
                f"cutoffs must increase from above 0 to below the {vocab_size} tokens, and be so few that "
                f"hidden_size={hidden_size} can be divided by 4 for each; got {list(cutoffs)}"
            )
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(hidden_size, vocab_size, list(cutoffs), div_value=4.0)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states in place of logits, because those of all tokens would not fit into memory."""
        return hidden

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross-entropy of each target in nats: hidden (n, d), targets (n,) -> (n,)."""
        with without_autocast(hidden):  # torch's adaptive softmax accepts no mixture of dtypes
            return -self.softmax(at_least_float32(hidden), targets).output

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Compute the log-probability of each token: (..., d) -> (..., vocab_size)."""
        with without_autocast(hidden):
            return self.softmax.log_prob(at_least_float32(hidden.flatten(0, -2))).unflatten(0, hidden.shape[:-1])

    def predict(self, hidden: Tensor) -> Tensor:
        """Return the most likely token: (..., d) -> (...)."""
        with without_autocast(hidden):
            return self.softmax.predict(at_least_float32(hidden.flatten(0, -2))).view(hidden.shape[:-1])

    def embed(self, tokens: Tensor) -> Tensor:
        """Return input embeddings: (...) -> (..., d), scaled by sqrt(d) to the size of normalized states."""
        size = self.softmax.in_features
        embedded = self.softmax.head.weight.new_zeros(*tokens.shape, size)
        for cluster, (low, high) in enumerate(zip(self.boundaries, self.boundaries[1:], strict=False)):
            in_cluster = (tokens >= low) & (tokens < high)
            if cluster == 0:
                rows = embedding(tokens[in_cluster], self.softmax.head.weight)  # (n, d)
            else:
                projection, words = cast(Sequence[nn.Linear], self.softmax.tail[cluster - 1])
                rows = embedding(tokens[in_cluster] - low, words.weight) @ projection.weight  # (n, small) @ (small, d)
            embedded = embedded.masked_scatter(in_cluster[..., None], rows.to(embedded.dtype))
        return embedded * size**0.5
