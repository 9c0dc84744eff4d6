"""The equations against float64 references written from the paper, and cases worked out by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from prt_hf import NonFiniteRewardError
from prt_hf.errors import PRTValueError
from prt_hf.functional import check_finite, combine, prt_loss, prt_statistics, reward_entropy


def random_case(dtype=torch.float32, rows=6, columns=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    backbone, reward = (3 * torch.randn(rows, columns, generator=generator) for _ in range(2))
    labels = torch.randint(0, columns, (rows,), generator=generator)
    labels[::3] = -100
    return backbone.to(dtype), reward.to(dtype), labels


def reference_loss(backbone, reward, labels, kl_coef=1.0, entropy_coef=0.0, items=None):
    """Eq. 7 and 12, position by position, in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, r, y in zip(backbone.double(), reward.double(), labels.tolist(), strict=True):
        if y == -100:
            continue
        pi = b.softmax(0) * (r / kl_coef).exp()
        rho = r.softmax(0)
        total = total - (pi[y] / pi.sum()).log() - entropy_coef * -(rho * rho.log()).sum()
        count += 1
    return total / (items or count)


def test_combine_by_hand():
    # pi_pt = (1/2, 1/4, 1/4), e^r = (1, 2, 4): pi_theta is proportional to (2, 2, 4).
    backbone = torch.tensor([0.5, 0.25, 0.25]).log()
    reward = torch.tensor([1.0, 2.0, 4.0]).log()
    torch.testing.assert_close(combine(backbone, reward).exp(), torch.tensor([0.25, 0.25, 0.5]))
    # at strength 2, e^(2 r) = (1, 4, 16): proportional to (2, 4, 16)
    torch.testing.assert_close(combine(backbone, reward, 2.0).exp(), torch.tensor([1 / 11, 2 / 11, 8 / 11]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_combine_equals_its_definition(dtype):
    backbone, reward, _ = random_case(dtype)
    expected = (backbone.double().log_softmax(-1) + 0.7 * reward.double()).log_softmax(-1)
    actual = combine(backbone, reward, 0.7)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=1e-6)


def test_zero_reward_or_strength_is_the_backbone():
    backbone, reward, _ = random_case()
    torch.testing.assert_close(combine(backbone, torch.zeros_like(reward)), backbone.log_softmax(-1))
    torch.testing.assert_close(combine(backbone, reward, 0.0), backbone.log_softmax(-1))


def test_what_the_backbone_rules_out_stays_out():
    backbone, reward, _ = random_case()
    backbone[:, 3] = -torch.inf
    log_probs = combine(backbone, reward)
    assert (log_probs[:, 3] == -torch.inf).all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(backbone)))


def test_strength_per_row():
    backbone, reward, _ = random_case(rows=2)
    both = combine(backbone, reward, torch.tensor([[0.0], [2.0]]))
    torch.testing.assert_close(both[0], combine(backbone[0], reward[0], 0.0))
    torch.testing.assert_close(both[1], combine(backbone[1], reward[1], 2.0))


def test_a_constant_per_context_does_not_matter():
    """Prop. 3.1: r is defined up to a constant."""
    backbone, reward, labels = random_case()
    shifted = reward + torch.arange(len(reward))[:, None]
    torch.testing.assert_close(combine(backbone, shifted), combine(backbone, reward))
    statistics, others = (prt_statistics(backbone, r, labels) for r in (reward, shifted))
    for name in statistics:
        torch.testing.assert_close(others[name], statistics[name], atol=1e-5, rtol=1e-5)


def test_loss_by_hand():
    # Two positions; the first is ignored. pi_theta = (1/4, 1/4, 1/2) as above.
    backbone = torch.tensor([0.5, 0.25, 0.25]).log().repeat(2, 1)
    reward = torch.tensor([1.0, 2.0, 4.0]).log().repeat(2, 1)
    labels = torch.tensor([-100, 2])
    assert prt_loss(backbone, reward, labels).item() == pytest.approx(math.log(2))
    # rho = (1, 2, 4) / 7
    entropy = -sum(p / 7 * math.log(p / 7) for p in (1, 2, 4))
    assert reward_entropy(reward)[1].item() == pytest.approx(entropy)
    assert prt_loss(backbone, reward, labels, entropy_coef=0.1).item() == pytest.approx(math.log(2) - 0.1 * entropy)
    assert prt_loss(backbone, reward, labels, num_items_in_batch=4).item() == pytest.approx(math.log(2) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kl_coef", "entropy_coef", "items"), [(1.0, 0.0, None), (0.5, 0.01, None), (2.0, 0.1, 9)])
def test_loss_and_gradient_equal_the_reference(dtype, kl_coef, entropy_coef, items):
    backbone, reward, labels = random_case(dtype)
    kwargs = {"kl_coef": kl_coef, "entropy_coef": entropy_coef}
    reference = reward.double().requires_grad_()
    expected = reference_loss(backbone, reference, labels, **kwargs, items=items)
    expected.backward()
    reward.requires_grad_()
    actual = prt_loss(backbone.requires_grad_(), reward, labels, **kwargs, num_items_in_batch=items)
    actual.backward()
    assert actual.item() == pytest.approx(expected.item(), abs=2e-6)
    # in half precision the gradient itself is rounded: one unit in the last place of the largest entry
    tolerance = torch.finfo(dtype).eps * reference.grad.abs().max().item() if dtype != torch.float32 else 1e-6
    torch.testing.assert_close(reward.grad.double(), reference.grad, atol=tolerance, rtol=0)
    assert backbone.grad is None, "the backbone is frozen"


def test_zero_reward_gives_the_backbone_loss():
    backbone, reward, labels = random_case()
    assert prt_loss(backbone, torch.zeros_like(reward), labels).item() == pytest.approx(
        F.cross_entropy(backbone, labels).item()
    )


def test_micro_batches_add_up():
    backbone, reward, labels = random_case(rows=9)
    items = int((labels != -100).sum())
    parts = [prt_loss(backbone[s], reward[s], labels[s], num_items_in_batch=items) for s in (slice(0, 2), slice(2, 9))]
    assert sum(parts).item() == pytest.approx(prt_loss(backbone, reward, labels).item())


def test_no_supervised_position():
    backbone, reward, labels = random_case()
    ignored = torch.full_like(labels, -100)
    with pytest.raises(PRTValueError, match="every label is ignored"):
        prt_loss(backbone, reward, ignored)
    reward.requires_grad_()
    loss = prt_loss(backbone, reward, ignored, num_items_in_batch=5)  # the step's other micro-batches have some
    loss.backward()
    assert loss.item() == 0 and not reward.grad.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_rewards_are_named(value):
    backbone, reward, labels = random_case()
    reward[2, 5] = value
    with pytest.raises(NonFiniteRewardError, match=rf"(?s)1 values.*{value} at position \(2,\), token or label id 5"):
        check_finite(reward)
    for use in (lambda: combine(backbone, reward), lambda: prt_loss(backbone, reward, labels)):
        with pytest.raises(FloatingPointError):
            use()
    reward[2] = 0.0
    reward[0, 5] = value  # an ignored position takes no part
    assert torch.isfinite(prt_loss(backbone, reward, labels))


def test_shapes_must_agree():
    backbone, reward, labels = random_case()
    with pytest.raises(PRTValueError, match="backbone logits with 11 columns"):
        combine(backbone[:, :10], reward)
    with pytest.raises(PRTValueError, match=r"labels of shape \(6,\)"):
        prt_loss(backbone, reward, labels[:5])


def test_statistics_equal_their_definitions():
    backbone, reward, labels = random_case(rows=8)
    backbone, reward, labels = backbone.view(2, 4, -1), reward.view(2, 4, -1), labels.view(2, 4)
    statistics = prt_statistics(backbone, reward, labels, kl_coef=0.5)
    keep = labels != -100
    log_pi = combine(backbone, reward, 2.0).double()
    log_pt = backbone.double().log_softmax(-1)
    chosen = labels.clamp(min=0)
    expected = {
        "count": torch.ones(2, 4),
        "loss": -log_pi.gather(-1, chosen[..., None])[..., 0],
        "accuracy": log_pi.argmax(-1) == chosen,
        "reward_accuracy": reward.argmax(-1) == chosen,
        "reward_entropy": torch.distributions.Categorical(logits=reward.double()).entropy(),
        "reward_abs": (reward - reward.mean(-1, keepdim=True)).abs().mean(-1),
        "kl": (log_pi.exp() * (log_pi - log_pt)).sum(-1),
    }
    assert set(statistics) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(statistics[name].double(), value.double() * keep, atol=1e-5, rtol=1e-5, msg=name)


def test_kl_where_the_backbone_rules_tokens_out():
    backbone, reward, labels = random_case()
    backbone[:, 3] = -torch.inf
    labels[labels == 3] = 4
    others = [i for i in range(11) if i != 3]
    kept = prt_statistics(backbone[:, others], reward[:, others], torch.where(labels > 3, labels - 1, labels))
    torch.testing.assert_close(prt_statistics(backbone, reward, labels)["kl"], kept["kl"])
