"""An ablation of Expire-Span: the span loss is taken on the tokens of the current block (section 4.2)."""

from torch import Tensor

from .expire_span import ExpireSpan


class BlockLoss(ExpireSpan):
    """Expire-Span whose loss is taken when a memory is made, and not when it fades.

    The section says of it: "this empirically results in poor performance", as the loss that shortens a span and the
    gradient that lengthens it then come at different times.

        loss = alpha / T * sum of e_i over the T tokens i of the block, averaged over the batch
    """

    def loss(self, span: Tensor, nearest: Tensor, farthest: Tensor, batch_size: int, block_size: int) -> Tensor:
        """As `Mechanism.loss`."""
        # The newest memory from before the block looks the same where its episode ends within the block: one in T.
        is_new = (nearest == 1) & (farthest < block_size)  # (N,)
        return self.alpha / (block_size * batch_size) * span.squeeze(-1)[is_new].sum()
