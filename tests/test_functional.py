"""The equations against float64 references written from the paper, and cases worked out by hand."""

import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prt_hf import NonFiniteRewardError
from prt_hf.errors import PRTValueError
from prt_hf.functional import check_finite, combine, prt_loss, prt_statistics, reward_entropy
from prt_hf.networks import lm_head
from prt_hf.networks.lm_head import Projection
from prt_hf.training.fused_loss import fused_prt_loss, fused_prt_statistics


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
        "backbone_loss": -log_pt.gather(-1, chosen[..., None])[..., 0],
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


# Without whole logits


def projections(
    n=7,
    columns=11,
    width=6,
    *,
    pieces=1,
    softcaps=(None, None),
    biases=(False, False),
    shared=False,
    trained=False,
    dtype=torch.float32,
    seed=0,
):
    """Of a backbone and a reward, labels, and the reward's leaves by name; `shared`: one head, the very same tensor."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    widths = [width, 3][:pieces]
    made = [
        Projection(
            tuple(random(n, w) for w in widths),
            tuple(random(columns, w) for w in widths),
            random(columns) if has_bias else None,
            softcap,
        )
        for has_bias, softcap in zip(biases, softcaps, strict=True)
    ]
    backbone, reward = made
    if shared:
        reward = reward._replace(weights=(backbone.weights[0], *reward.weights[1:]))
    leaves = {f"hidden {index}": value.requires_grad_() for index, value in enumerate(reward.hidden)}
    if trained and not shared:
        leaves["weight 0"] = reward.weights[0].requires_grad_()
    if trained:
        leaves |= {f"weight {index}": value.requires_grad_() for index, value in enumerate(reward.weights[1:], 1)}
        leaves |= {} if reward.bias is None else {"bias": reward.bias.requires_grad_()}
    return backbone, reward, torch.randint(0, columns, (n,), generator=generator), leaves


def in_float64(projection):
    """A copy with leaves of its own."""

    def copy(value):
        return value.detach().double().requires_grad_(value.requires_grad)

    bias = None if projection.bias is None else copy(projection.bias)
    return projection._replace(
        hidden=tuple(map(copy, projection.hidden)), weights=tuple(map(copy, projection.weights)), bias=bias
    )


def naive_logits(projection):
    """As the docstring of `Projection` defines them, with gradients."""
    logits = sum(h @ w.T for h, w in zip(projection.hidden, projection.weights, strict=True))
    logits = logits if projection.bias is None else logits + projection.bias
    return logits if projection.softcap is None else projection.softcap * torch.tanh(logits / projection.softcap)


def leaves_of(projection):
    values = (*projection.hidden, *projection.weights, *(() if projection.bias is None else (projection.bias,)))
    return [value for value in values if value.requires_grad]


def reference_of(backbone, reward, labels, **kwargs):
    """Loss and gradients in float64, by autograd, from whole logits."""
    backbone, reward = in_float64(backbone), in_float64(reward)
    loss = reference_loss(naive_logits(backbone).detach(), naive_logits(reward), labels, **kwargs)
    return loss, torch.autograd.grad(loss, leaves_of(reward))


@pytest.mark.parametrize("softcaps", list(product([None, 2.0], [None, 3.0])))
@pytest.mark.parametrize("biases", list(product([False, True], [False, True])))
def test_fused_loss_and_gradients_equal_the_reference(softcaps, biases):
    for pieces, shared, trained, kl_coef, entropy_coef in product(
        [1, 2], [False, True], [False, True], [1.0, 0.5], [0.0, 0.1]
    ):
        items = 9 if trained else None
        case = {"pieces": pieces, "shared": shared, "trained": trained}
        backbone, reward, labels, leaves = projections(4, **case, softcaps=softcaps, biases=biases)
        coefficients = {"kl_coef": kl_coef, "entropy_coef": entropy_coef}
        expected, gradients = reference_of(backbone, reward, labels, **coefficients, items=items)
        actual = fused_prt_loss(backbone, reward, labels, **coefficients, num_items_in_batch=items)
        assert actual.item() == pytest.approx(expected.item(), rel=2e-6, abs=2e-6), (case, coefficients)
        assert len(gradients) == len(leaves)
        for name, value, gradient in zip(leaves, torch.autograd.grad(actual, leaves.values()), gradients, strict=True):
            assert torch.allclose(value.double(), gradient, atol=3e-6, rtol=1e-5), (name, case, coefficients)


def test_a_shared_head_that_is_trained_moves_with_the_reward_alone():
    """One tensor is both heads', but no gradient reaches it through the backbone's logits."""
    backbone, reward, labels, _ = projections(shared=True)
    reward.weights[0].requires_grad_()
    expected, gradients = reference_of(backbone, reward, labels)
    actual = fused_prt_loss(backbone, reward, labels)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    found = torch.autograd.grad(actual, leaves_of(reward))
    for value, gradient in zip(found, gradients, strict=True):
        torch.testing.assert_close(value.double(), gradient, atol=3e-6, rtol=1e-5)


def test_nothing_flows_into_the_backbone():
    backbone, reward, labels, _ = projections(softcaps=(2.0, None))
    given = [*backbone.hidden, *backbone.weights]
    for value in given:
        value.requires_grad_()
    fused_prt_loss(backbone, reward, labels, entropy_coef=0.1).backward()
    assert all(value.grad is None for value in given) and reward.hidden[0].grad.any()


@pytest.mark.parametrize("softcaps", list(product([None, 2.0], [None, 3.0])))
@pytest.mark.parametrize("pieces", [1, 2])
def test_logits_of_a_projection_equal_their_definition(softcaps, pieces):
    for projection in projections(pieces=pieces, softcaps=softcaps, biases=(True, False))[:2]:
        assert projection.shape == (7, 11)
        expected = naive_logits(in_float64(projection))
        torch.testing.assert_close(projection.logits().double(), expected, atol=1e-5, rtol=1e-5)
        memory = torch.full((7, 11), math.nan)
        assert projection.logits(out=memory).data_ptr() == memory.data_ptr()
        torch.testing.assert_close(memory, projection.logits())
        part = slice(2, 5)
        torch.testing.assert_close(projection.at(part).logits().double(), expected[part], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kl_coef", [1.0, 0.5])
def test_fused_statistics_equal_those_of_whole_logits(kl_coef, monkeypatch):
    backbone, reward, labels, _ = projections(pieces=2, softcaps=(2.0, 3.0), biases=(True, True))
    whole = [naive_logits(in_float64(projection)) for projection in (backbone, reward)]
    expected = prt_statistics(*whole, labels, kl_coef=kl_coef)
    for held in (10**6, 3 * 11, 1):
        monkeypatch.setattr(lm_head, "_CHUNK_ON_CPU", held)
        actual = fused_prt_statistics(backbone, reward, labels, kl_coef=kl_coef)
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-5, msg=name)
    nothing = fused_prt_statistics(backbone.at(slice(0)), reward.at(slice(0)), labels[:0])
    assert nothing.keys() == expected.keys() and all(value.shape == (0,) for value in nothing.values())


@pytest.mark.parametrize("held", [1, 11, 3 * 11, 4 * 11 + 5, 7 * 11])
@pytest.mark.parametrize(("softcaps", "entropy_coef"), [((None, None), 0.0), ((2.0, 3.0), 0.1)])
def test_chunks_do_not_change_the_result(held, softcaps, entropy_coef, monkeypatch):
    case = {"pieces": 2, "softcaps": softcaps, "biases": (True, True), "trained": True}

    def run():
        backbone, reward, labels, leaves = projections(**case)
        loss = fused_prt_loss(backbone, reward, labels, kl_coef=0.5, entropy_coef=entropy_coef)
        return reward.chunks(), [loss, *torch.autograd.grad(loss, leaves.values())]

    chunks, whole = run()
    assert chunks == [slice(0, 7)]
    monkeypatch.setattr(lm_head, "_CHUNK_ON_CPU", held)
    chunks, found = run()
    rows = max(1, held // 11)
    assert [part.stop - part.start for part in chunks] == [rows] * (7 // rows) + ([7 % rows] if 7 % rows else [])
    assert len(found) == 6  # loss, two of hidden, two of weights, bias
    for value, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(value, expected, atol=2e-6, rtol=1e-5)


def root_mean_square(values):
    return torch.cat([torch.as_tensor(value).double().flatten() for value in values]).square().mean().sqrt().item()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_bfloat16_errs_no_more_than_whole_logits_in_bfloat16(autocast, shared, softcap):
    """Root mean square over 6 x 64 positions and their gradients: at most 1.25 times the naive path's (0.5 to 0.9 times
    were found). Six mean losses are too few for that: independent errors of 64 positions average out to 1/8 of one."""
    fused_errors, naive_errors = {}, {}
    for seed in range(6):
        case = projections(
            64,
            300,
            32,
            pieces=2,
            shared=shared,
            trained=True,
            biases=(True, True),
            softcaps=(None, softcap),
            dtype=torch.float32 if autocast else torch.bfloat16,
            seed=seed,
        )
        backbone, reward, labels, leaves = case
        expected, gradients = reference_of(backbone, reward, labels, kl_coef=2.0)
        position_losses = -combine(*(naive_logits(in_float64(p)) for p in (backbone, reward)), 0.5).gather(
            1, labels[:, None]
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fused = fused_prt_loss(backbone, reward, labels, kl_coef=2.0)
            fused_positions = fused_prt_statistics(backbone, reward, labels, kl_coef=2.0)["loss"]
            naive_pair = [naive_logits(projection) for projection in (backbone, reward)]
            naive = prt_loss(*naive_pair, labels, kl_coef=2.0)
            naive_positions = prt_statistics(*naive_pair, labels, kl_coef=2.0)["loss"]
        for errors, loss, positions in (
            (fused_errors, fused, fused_positions),
            (naive_errors, naive, naive_positions),
        ):
            errors.setdefault("loss of a position", []).append(positions - position_losses[:, 0])
            errors.setdefault("mean loss", []).append(loss.double() - expected)
            for name, found, right in zip(leaves, torch.autograd.grad(loss, leaves.values()), gradients, strict=True):
                errors.setdefault(name, []).append(found.double() - right)
    mean_errors = fused_errors.pop("mean loss")
    assert 0 < root_mean_square(mean_errors) <= root_mean_square(naive_errors["loss of a position"]) / 4
    for name, errors in fused_errors.items():
        assert 0 < root_mean_square(errors) <= 1.25 * root_mean_square(naive_errors[name]), name


def test_hidden_states_take_the_precision_of_the_head():
    """Stored ones, or those behind a last norm that is kept in float32; the gradient comes back in theirs."""
    backbone, reward, labels, leaves = projections(pieces=2)
    half = [each._replace(weights=tuple(weight.bfloat16() for weight in each.weights)) for each in (backbone, reward)]
    with torch.no_grad():
        rounded = [each._replace(hidden=tuple(hidden.bfloat16() for hidden in each.hidden)) for each in half]
    loss = fused_prt_loss(*half, labels)
    assert torch.equal(loss, fused_prt_loss(*rounded, labels))
    assert all(value.dtype == torch.float32 for value in torch.autograd.grad(loss, leaves.values()))
    statistics, expected = (fused_prt_statistics(*each, labels) for each in (half, rounded))
    assert all(torch.equal(statistics[name], expected[name]) for name in expected)


def test_no_supervised_position_in_a_fused_micro_batch():
    backbone, reward, labels, leaves = projections(0, pieces=2, trained=True, biases=(True, True))
    with pytest.raises(PRTValueError, match="every label is ignored"):
        fused_prt_loss(backbone, reward, labels)
    loss = fused_prt_loss(backbone, reward, labels, num_items_in_batch=5)
    loss.backward()
    assert loss.item() == 0
    for name, value in leaves.items():
        assert value.grad.shape == value.shape and not value.grad.any(), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("softcaps", [(None, None), (2.0, None)])
@pytest.mark.parametrize("held", [10**6, 2 * 11])
def test_non_finite_fused_rewards_are_named(value, softcaps, held, monkeypatch):
    """By their place among all positions, in whatever chunk they are found."""
    monkeypatch.setattr(lm_head, "_CHUNK_ON_CPU", held)
    backbone, reward, labels, _ = projections(softcaps=softcaps, biases=(False, True))
    assert torch.isfinite(fused_prt_loss(backbone, reward, labels))
    bias = reward.bias.clone()
    bias[5] = value
    with pytest.raises(NonFiniteRewardError, match=rf"{value} at position \(0,\), token or label id 5"):
        fused_prt_loss(backbone, reward._replace(bias=bias), labels)
    with torch.no_grad():
        reward.hidden[0][4] = math.nan
    with pytest.raises(NonFiniteRewardError, match=r"(?s)11 values.*nan at position \(4,\), token or label id 0"):
        fused_prt_loss(backbone, reward, labels)


def test_shapes_of_projections_must_agree():
    backbone, reward, labels, _ = projections()
    narrow = backbone._replace(weights=(backbone.weights[0][:10],))
    with pytest.raises(PRTValueError, match="(?s)backbone logits with 11 columns.*found: 10"):
        fused_prt_loss(narrow, reward, labels)
    with pytest.raises(PRTValueError, match=r"(?s)labels of shape \(7,\).*found: \(5,\)"):
        fused_prt_loss(backbone, reward, labels[:5])


def test_backward_twice_gives_the_same():
    """The gradient was computed in the forward pass: using it must not use it up."""
    backbone, reward, labels, leaves = projections(pieces=2, trained=True, biases=(False, True))
    loss = fused_prt_loss(backbone, reward, labels)
    first, second, scaled = (
        torch.autograd.grad(factor * loss, leaves.values(), retain_graph=True) for factor in (1, 1, -3)
    )
    for one, two, three in zip(first, second, scaled, strict=True):
        assert one.any() and torch.equal(one, two)
        torch.testing.assert_close(three, -3 * one)


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return output


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_logits_are_never_made(entropy_coef, dtype, monkeypatch):
    """Neither forward nor backward; the largest tensor is a chunk of them, 8 of 64 positions."""
    n, columns = 64, 500
    monkeypatch.setattr(lm_head, "_CHUNK_ON_CPU", 8 * columns)
    backbone, reward, labels, _ = projections(
        n, columns, 4, pieces=2, trained=True, biases=(True, True), softcaps=(2.0, 3.0), dtype=dtype
    )
    with Sizes() as whole:
        prt_loss(backbone.logits(), naive_logits(reward), labels, entropy_coef=entropy_coef).backward()
    assert whole.largest == n * columns
    with Sizes() as forward:
        loss = fused_prt_loss(backbone, reward, labels, entropy_coef=entropy_coef)
    with Sizes() as backward:
        loss.backward()
    with Sizes() as statistics:
        fused_prt_statistics(backbone, reward, labels)
    assert forward.largest == statistics.largest == 8 * columns
    assert backward.largest == columns * 4  # the gradient of the weights
