"""A budget of memory: alpha is moved until a layer holds that many memories for each stream (our choice).

The paper weighs the span loss by a fixed alpha, and what is then held differs by task, size and seed. Here held_t, the
`memory/held` of update t, is kept at the budget by dual ascent with a proportional and a derivative term:

    e_t     = log(held_t / budget), smoothed
    p_t     = e_t + 24 min(0, change of e per update)      where e will be in 24 updates, if it falls
    alpha_t = alpha exp(z_t) max(0, 1 + 20 p_t)
    z_t+1   = z_t + 0.04 e_t lr_multiplier_t               three times as fast where e_t < 0

Spans shrink within tens of updates, but they grow only as fast as the task finds a use for them. So a fall is braked
ahead of time, and 5 % below the budget alpha is 0: a budget is an upper bound, and nothing makes spans reach it.
Here p_t and e_t are kept within [-1, 0.5], and exp(z_t) within a factor of 100. While e does not change at all, no
memory is on its ramp, as where a curriculum's episodes are still short: alpha acts on nothing, and z_t stands still.
The three terms are those of Stooke et al. 2020, Responsive Safety in Reinforcement Learning by PID Lagrangian Methods.
"""

import math
from dataclasses import dataclass

GAIN = 20  # of alpha, by p_t
RATE, FALL = 0.04, 3  # of z_t, per update; how much faster it falls
FAST, SLOW = 2, 8  # updates: horizons of the moving averages of e, whose difference is 6 times its change per update
BRAKE = 4  # times that difference
LOWEST, HIGHEST = -1.0, 0.5  # of p_t and e_t
STILL = 1e-6  # of e: a smaller change is none
LIMIT = math.log(100)  # of z_t


@dataclass
class MemoryBudget:
    """The state of the controller.

    Args:
        budget: Memories that a layer may hold for each stream, the mean over layers and streams.
        fast, slow: Moving averages of e (None: nothing is measured yet).
        z: The logarithm of the dual variable, as a multiple of the config's alpha.
    """

    budget: float
    fast: float | None = None
    slow: float = 0.0
    z: float = 0.0

    @property
    def scale(self) -> float:
        """alpha_t as a multiple of the config's alpha."""
        return math.exp(self.z) * max(0.0, 1 + GAIN * self.expected_error())

    def expected_error(self) -> float:
        """p_t, 0 before the first measurement."""
        if self.fast is None:
            return 0.0
        return clamp(self.fast + BRAKE * min(0.0, self.fast - self.slow), LOWEST, HIGHEST)

    def step(self, held: float, lr_multiplier: float) -> None:
        """Move alpha by what was held in one update."""
        error = math.log(max(held, 1e-9) / self.budget)
        if self.fast is None:
            self.fast = self.slow = error
        has_grip = abs(error - self.fast) > STILL
        self.fast += (error - self.fast) / FAST
        self.slow += (error - self.slow) / SLOW
        if has_grip:
            rate = RATE * lr_multiplier * (1 if self.fast > 0 else FALL)
            self.z = clamp(self.z + rate * clamp(self.fast, LOWEST, HIGHEST), -LIMIT, LIMIT)


def clamp(value: float, lowest: float, highest: float) -> float:
    return min(max(value, lowest), highest)
