"""Distributions of actions agree with torch.distributions, and sample what they say."""

import pytest
import torch
from assertions import assert_equal
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Independent, Normal
from torch.nn.functional import softplus

from expire_span.runner.objectives.actor_critic import ActionSampler
from expire_span.tasks.actions import Categorical, Gaussian, MultiCategorical


@pytest.fixture
def outputs():
    return torch.randn(2, 3, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def test_categorical_equals_that_of_torch(outputs):
    ours, theirs = Categorical(outputs), TorchCategorical(logits=outputs)
    action = theirs.sample()
    assert_equal("log prob", ours.log_prob(action), theirs.log_prob(action))
    assert_equal("entropy", ours.entropy(), theirs.entropy())


def test_several_choices_are_independent_categoricals(outputs):
    ours = MultiCategorical(outputs, [2, 4])
    theirs = [TorchCategorical(logits=outputs[..., :2]), TorchCategorical(logits=outputs[..., 2:])]
    action = torch.stack([each.sample() for each in theirs], -1)
    log_prob = sum(each.log_prob(part) for each, part in zip(theirs, action.unbind(-1), strict=True))
    assert_equal("log prob", ours.log_prob(action), log_prob)
    assert_equal("entropy", ours.entropy(), sum(each.entropy() for each in theirs))


def test_gaussian_equals_that_of_torch(outputs):
    ours = Gaussian(outputs)
    theirs = Independent(Normal(outputs[..., :3], softplus(outputs[..., 3:]) + 1e-3), 1)
    action = theirs.sample()
    assert_equal("log prob", ours.log_prob(action), theirs.log_prob(action))
    assert_equal("entropy", ours.entropy(), theirs.entropy())


@pytest.mark.parametrize("distribution", [Categorical, lambda x: MultiCategorical(x, [2, 4]), Gaussian])
def test_samples_have_the_entropy_that_the_distribution_gives(distribution):
    row = torch.randn(1, 6, generator=torch.Generator().manual_seed(1))
    policy = distribution(row.expand(20_000, -1))
    sampler = ActionSampler(torch.Generator().manual_seed(2), slice(0, 20_000), 20_000)
    surprise = -policy.log_prob(policy.sample(sampler))
    assert surprise.mean().item() == pytest.approx(policy.entropy()[0].item(), abs=0.05)


@pytest.mark.parametrize("distribution", [Categorical, lambda x: MultiCategorical(x, [2, 4]), Gaussian])
def test_ranks_draw_together_what_one_process_draws(distribution):
    rows = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    drawn = [
        distribution(rows[part]).sample(ActionSampler(torch.Generator().manual_seed(2), part, 6))
        for part in (slice(0, 6), slice(0, 2), slice(2, 6))
    ]
    assert torch.equal(drawn[0], torch.cat(drawn[1:]))
