"""Index arithmetic for packed rows: sample b owns rows offsets[p, b] to offsets[p, b + 1] of each part p."""

import torch
from torch import Tensor

NEVER = 2**40  # timesteps; as an age, no span reaches it, and as a minimum distance, no query does


def sample_index(offsets: Tensor, total: int) -> Tensor:
    """Return the sample that each of the `total` packed rows belongs to.

    Args:
        offsets: (B + 1,) or (parts, B + 1) int64.
        total: N, the number of rows; known to the host, so that it need not wait for the device.

    Returns:
        (N,) int64.
    """
    lengths = offsets.diff()  # (B,) or (parts, B)
    samples = torch.arange(lengths.shape[-1], device=offsets.device).expand_as(lengths)
    return torch.repeat_interleave(samples.flatten(), lengths.flatten(), output_size=total)


def interleave_by_sample(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Find the order of rows in which the parts of each sample follow one another.

    Args:
        offsets: (parts, B + 1) int64.
        total: N, the number of rows.

    Returns:
        The order (N,), to index rows with, and the offsets (B + 1,) of the samples in it.
    """
    lengths = offsets.diff().T.flatten()  # (B parts,): rows of each part of sample 0, then of sample 1, ...
    ends = lengths.cumsum(0)
    shift = offsets[:, :-1].T.flatten() - (ends - lengths)  # (B parts,): from the new row number to the present one
    order = torch.arange(total, device=offsets.device)
    order = order + torch.repeat_interleave(shift, lengths, output_size=total)
    return order, torch.cat([ends.new_zeros(1), ends[len(offsets) - 1 :: len(offsets)]])
