"""The loss of PVLA: what it measures, on which samples, and its gradient down to the states."""

import pytest
import torch
import torch.nn.functional as F
from transport_oracles import central_differences, regularised_value

from peft_read.pvla.loss import PvlaLoss
from peft_read.pvla.transport import partial_transport


def make_states(frames=7, words=5, dim=6, batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, n, dim, generator=generator, dtype=dtype) for n in (frames, words))


def make_masks(video, words):
    """Lengths from the whole down to 1; valid places in the middle of the words, and a last sample without a word."""
    frame_mask = torch.arange(video.shape[1]) < torch.tensor([[7], [4], [1], [6]])[: len(video)]
    word_mask = (torch.arange(words.shape[1]) - 2).abs() < torch.tensor([[3], [2], [1], [0]])[: len(words)]
    return frame_mask, word_mask


def pairwise(x, y, cost):
    """Costs of the points of one sample, by torch's functions of pairs."""
    if cost == "cosine":
        return 1 - F.cosine_similarity(x[:, None], y[None], dim=-1)
    return (x[:, None] - y[None]).square().sum(-1)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("marginals", ["unit", "uniform"])
@pytest.mark.parametrize("mass", [0.3, 1.0])
def test_loss_is_the_mean_of_the_samples_distances(cost, marginals, mass):
    """Each worked out alone, of its valid points; a sample without any doesn't count."""
    video, words = make_states(batch=4)
    frame_mask, word_mask = make_masks(video, words)
    loss = PvlaLoss(mass, 0.2, 300, cost, marginals)
    details = loss.details(video, words, frame_mask, word_mask)
    distances = []
    for i in range(3):
        costs = pairwise(video[i][frame_mask[i]], words[i][word_mask[i]], cost)[None]
        reg = 0.2 * (costs.mean().item() if cost == "sqeuclidean" else 1)
        found = partial_transport(costs, mass, reg, marginals=marginals, n_iter=300)
        distances.append(found.cost[0] / mass)
        plan = details.plan[i][frame_mask[i]][:, word_mask[i]]
        torch.testing.assert_close(plan, found.plan[0] / mass, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(details.plan[i].sum(), plan.sum())
        torch.testing.assert_close(plan.sum(), torch.ones_like(plan.sum()))
    torch.testing.assert_close(details.distance[:3], torch.stack(distances), rtol=1e-5, atol=1e-6)
    assert details.distance[3] == 0
    assert details.plan[3].eq(0).all()
    assert details.valid.tolist() == [True, True, True, False]
    assert details.residual.max() < 1e-6
    expected = torch.stack(distances).mean()
    torch.testing.assert_close(loss(video, words, frame_mask, word_mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("garbage", [1e30, torch.inf, torch.nan])
def test_padding_takes_no_part(cost, garbage):
    """Whatever lies in it, and it gets no gradient."""
    video, words = make_states(batch=4)
    frame_mask, word_mask = make_masks(video, words)
    results = []
    for fill in (0.0, garbage):
        states = [
            x.masked_fill(~mask[..., None], fill).requires_grad_()
            for x, mask in ((video, frame_mask), (words, word_mask))
        ]
        loss = PvlaLoss(cost=cost)(*states, frame_mask, word_mask)
        results.append((loss, *torch.autograd.grad(loss, states)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    _, video_gradient, word_gradient = results[0]
    assert video_gradient[~frame_mask].eq(0).all()
    assert word_gradient[~word_mask].eq(0).all()
    assert video_gradient[0].ne(0).any(-1).any()
    assert video_gradient[3].eq(0).all()


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
def test_a_bad_state_shows_in_its_sample_only(cost):
    """The others' distances and gradients don't differ in a bit."""
    video, words = make_states()
    results = []
    for bad in (0.0, torch.nan):
        states = [(video + torch.tensor([0.0, bad, 0.0], dtype=video.dtype)[:, None, None]).requires_grad_(), words]
        distance = PvlaLoss(cost=cost).details(*states).distance
        results.append((distance, torch.autograd.grad(distance.sum(), states[0])[0]))
    (clean, clean_gradient), (distance, gradient) = results
    assert distance[1].isnan()
    assert gradient[1].isnan().all()
    assert torch.equal(distance[[0, 2]], clean[[0, 2]])
    assert torch.equal(gradient[[0, 2]], clean_gradient[[0, 2]])


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
def test_nothing_valid_is_no_loss(cost):
    """Exactly 0, with gradients of 0: a batch of such samples must not break a step."""
    video, words = (x.requires_grad_() for x in make_states())
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    loss = PvlaLoss(cost=cost)(video, words, None, nothing)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (video, words)):
        assert gradient.eq(0).all()


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["zero vectors", "one zero vector", "identical points", "equal up to rounding"])
def test_degenerate_states_have_finite_gradients(cost, dtype, kind):
    """A state may be 0, and states may be one another's."""
    video, words = make_states(dtype=torch.float32)
    if kind == "zero vectors":
        video, words = torch.zeros_like(video), torch.zeros_like(words)
    elif kind == "one zero vector":
        video[:, 2] = 0
    else:
        video[:] = words[:] = words[:, :1].clone().mul(100)
        video += 1e-6 * torch.arange(7)[:, None] * (kind == "equal up to rounding")
    video, words = video.to(dtype).requires_grad_(), words.to(dtype).requires_grad_()
    details = PvlaLoss(cost=cost).details(video, words)
    details.distance.sum().backward()
    assert all(x.isfinite().all() for x in details)
    torch.testing.assert_close(details.plan.sum((1, 2)), torch.ones(3))
    for x in (video, words):
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() < 1e4
    if kind == "identical points":
        assert details.distance.abs().max() < 1e-2 * video[0, 0].square().sum()
        assert details.distance.abs().max() < 1e-5 or cost == "sqeuclidean"


def test_identical_points_are_at_no_distance():
    """The squared distances of points that are one are 0 but for the rounding of their squares."""
    points = make_states(dtype=torch.float32)[0][:, :1].expand(3, 7, 6)
    for cost in ("cosine", "sqeuclidean"):
        details = PvlaLoss(cost=cost).details(points, points[:, :5])
        torch.testing.assert_close(details.distance, torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 10.0, 1000.0])
def test_scale_of_the_states_does_not_matter_to_the_plan(scale):
    """With squared distances reg is relative to their mean, so the distance grows by the square."""
    video, words = make_states()
    plain, scaled = (PvlaLoss(cost="sqeuclidean").details(video * x, words * x) for x in (1, scale))
    torch.testing.assert_close(scaled.plan, plain.plan, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(scaled.distance, plain.distance * scale**2)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
def test_half_precision_is_computed_in_float32(cost):
    """As if the states had been given so, under autocast as well."""
    video, words = (x.to(torch.bfloat16).requires_grad_() for x in make_states())
    expected = PvlaLoss(cost=cost)(video.float(), words.float())
    found = PvlaLoss(cost=cost)(video, words)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PvlaLoss(cost=cost)(video, words), expected)
        found = PvlaLoss(cost=cost)(video, words)
    for gradient in torch.autograd.grad(found, (video, words)):
        assert gradient.dtype == torch.bfloat16
        assert gradient.ne(0).any()


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("mass", [0.3, 0.5, 1.0])
def test_gradient_is_that_of_the_regularised_value(cost, mass):
    """Central differences through the costs down to the states, of the minimised value over the mass."""
    video, words = (x.requires_grad_() for x in make_states(4, 3, 3, 2))
    details = PvlaLoss(mass, 0.2, 300, cost).details(video, words)
    assert details.residual.max() < 1e-9
    details.distance.sum().backward()
    for i in range(2):
        x, y = video[i].detach(), words[i].detach()
        reg = 0.2 * (pairwise(x, y, cost).mean().item() if cost == "sqeuclidean" else 1)

        def value(costs, reg=reg):
            return regularised_value(partial_transport(costs, mass, reg, n_iter=300).plan, costs, reg) / mass

        def of_frames(frames, y=y):
            return value(torch.stack([pairwise(x, y, cost) for x in frames]))

        def of_words(words, x=x):
            return value(torch.stack([pairwise(x, y, cost) for y in words]))

        for found, function, states in ((video.grad, of_frames, x), (words.grad, of_words, y)):
            torch.testing.assert_close(
                found[i : i + 1], central_differences(function, states[None]), rtol=1e-4, atol=2e-6
            )


def test_descending_brings_pairs_together():
    """Which is what the loss is for."""
    video, words = (torch.nn.Parameter(x) for x in make_states(dtype=torch.float32))
    loss, optimizer = PvlaLoss(), torch.optim.SGD([video, words], lr=3.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(loss(video, words))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize(
    ("video", "words", "message"),
    [
        ((3, 7, 6), (3, 5, 4), "Video states have 6 features, words 4: distances need a common space. Project one"),
        ((3, 7, 6), (2, 5, 6), "3 videos but 2 sentences; expected one sentence for each video"),
        ((7, 6), (3, 5, 6), r"video has shape \(7, 6\); expected \(batch, frames, dim\)"),
        ((3, 7, 6), (3, 6), r"words has shape \(3, 6\); expected \(batch, words, dim\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(video, words, message):
    """With what came and what to do."""
    with pytest.raises(ValueError, match=message):
        PvlaLoss()(torch.rand(video), torch.rand(words))


@pytest.mark.parametrize(
    "masks", [{"frame_mask": torch.ones(3, 5)}, {"frame_mask": torch.ones(3, 1)}, {"word_mask": torch.ones(2, 5)}]
)
def test_masks_that_do_not_fit_are_refused(masks):
    """By their names."""
    (name, mask), (video, words) = next(iter(masks.items())), make_states()
    with pytest.raises(ValueError, match=rf"{name} has shape \({len(mask)}, {mask.shape[1]}\); the (video|words) ha"):
        PvlaLoss()(video, words, **masks)


@pytest.mark.parametrize("odd", [0.5, 2.0, -1.0, float("nan")])
def test_a_frame_is_valid_or_not(odd):
    """A frame mask is 0 and 1, of whatever type; frames have no weights."""
    video, words = make_states()
    frame_mask, _ = make_masks(video, words)
    for dtype in (torch.long, torch.float16, torch.float64):
        found = PvlaLoss()(video, words, frame_mask.to(dtype))
        torch.testing.assert_close(found, PvlaLoss()(video, words, frame_mask), rtol=0, atol=0)
    weights = frame_mask.double()
    weights[0, 1] = odd
    with pytest.raises(ValueError, match=r"frame_mask has values other than 0 and 1.*Only words have weights"):
        PvlaLoss()(video, words, weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 0}, r"mass=0: expected a share of the mass in \(0, 1\]"),
        ({"mass": 1.5}, "mass=1.5"),
        ({"mass": (0.25, 0.5)}, r"mass=\(0.25, 0.5\): expected a share of the mass"),
        ({"reg": 0}, "reg=0: expected a positive number"),
        ({"n_iter": 0}, "n_iter=0: expected at least 1"),
        ({"cost": "euclidean"}, "cost='euclidean': expected one of 'cosine', 'sqeuclidean'"),
        ({"marginals": "equal"}, "marginals='equal': expected one of 'unit', 'uniform'"),
    ],
)
def test_bad_options_are_refused(options, message):
    """When the loss is made, not when it is first computed."""
    with pytest.raises(ValueError, match=message):
        PvlaLoss(**options)


def test_repr_names_the_options():
    """As a module of a printed model."""
    assert repr(PvlaLoss()) == "PvlaLoss(mass=0.5, reg=0.05, n_iter=50, cost='cosine', marginals='unit')"
    assert repr(PvlaLoss(negatives=True)).endswith("marginals='unit', negatives=True, temperature=0.1)")
