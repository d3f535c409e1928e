"""From the last hidden state to an answer: all classes at once, or, for very many words, the frequent ones first."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding


def at_least_float32(scores: Tensor) -> Tensor:
    """bfloat16 is too coarse for probabilities."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def exact(like: Tensor) -> torch.autocast:
    """Without autocast, whose mixed numbers torch's adaptive softmax does not take."""
    return torch.autocast(like.device.type, enabled=False)


class Softmax(nn.Linear):
    """A score for every class: (..., d) -> (..., classes)."""

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target: scores (n, classes), targets (n,) -> (n,)."""
        return cross_entropy(at_least_float32(scores), targets, reduction="none")

    def log_p(self, scores: Tensor) -> Tensor:
        """(..., classes) -> (..., classes): the logarithm of each one's probability."""
        return at_least_float32(scores).log_softmax(-1)

    def best(self, scores: Tensor) -> Tensor:
        """The class with the highest score: (..., classes) -> (...)."""
        return scores.argmax(-1)


class AdaptiveSoftmax(nn.Module):
    """Adaptive softmax (Grave et al. 2017) with adaptive input embeddings (Baevski and Auli 2019), tied.

    Words are numbered by frequency, the most frequent first. Those from each cutoff on have embeddings four times
    smaller than those before it, projected to d; weights and projections are shared between input and output.
    """

    def __init__(self, hidden_size: int, vocabulary: int, cutoffs: Sequence[int]):
        super().__init__()
        self.cutoffs = [0, *cutoffs, vocabulary]
        if sorted(set(self.cutoffs)) != self.cutoffs or hidden_size < 4 ** len(cutoffs):
            raise ValueError(
                f"transformer.cutoffs must rise from above 0 to below the {vocabulary} words, and be so few that "
                f"transformer.hidden_size={hidden_size} can be divided by 4 for each; got {list(cutoffs)}"
            )
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(hidden_size, vocabulary, list(cutoffs), div_value=4.0)

    def forward(self, hidden: Tensor) -> Tensor:
        """The hidden states as they are: the scores of all words would not fit into memory."""
        return hidden

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target: hidden (n, d), targets (n,) -> (n,)."""
        with exact(hidden):
            return -self.softmax(at_least_float32(hidden), targets).output

    def log_p(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., vocabulary): the logarithm of each word's probability."""
        with exact(hidden):
            return self.softmax.log_prob(at_least_float32(hidden.flatten(0, -2))).unflatten(0, hidden.shape[:-1])

    def best(self, hidden: Tensor) -> Tensor:
        """The most probable word: (..., d) -> (...)."""
        with exact(hidden):
            return self.softmax.predict(at_least_float32(hidden.flatten(0, -2))).view(hidden.shape[:-1])

    def embed(self, tokens: Tensor) -> Tensor:
        """(...) -> (..., d), of the size that LayerNorm leaves behind."""
        size = self.softmax.in_features
        embedded = self.softmax.head.weight.new_zeros(*tokens.shape, size)
        for number, (low, high) in enumerate(zip(self.cutoffs, self.cutoffs[1:], strict=False)):
            inside = (tokens >= low) & (tokens < high)
            if number == 0:
                rows = embedding(tokens[inside], self.softmax.head.weight)
            else:
                project, words = cast(Sequence[nn.Linear], self.softmax.tail[number - 1])
                rows = embedding(tokens[inside] - low, words.weight) @ project.weight  # (n, small) @ (small, d)
            embedded = embedded.masked_scatter(inside[..., None], rows.to(embedded.dtype))
        return embedded * size**0.5
