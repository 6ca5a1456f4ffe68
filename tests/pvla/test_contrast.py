"""Batch negatives and weights of words in the loss, by loops over pairs."""

import pytest
import torch
import torch.nn.functional as F

from peft_read import PvlaLoss
from peft_read.pvla.contrast import same_states, same_videos
from peft_read.pvla.naive import naive_partial_transport


REG, TEMPERATURE = 0.2, 0.3


def make_states(batch=4, frames=6, words=5, dim=8):
    """States in float64, of videos and sentences of several lengths."""
    generator = torch.Generator().manual_seed(0)
    video, text = (
        torch.randn(batch, n, dim, generator=generator, dtype=torch.float64).requires_grad_() for n in (frames, words)
    )
    frame_mask = torch.arange(frames) < torch.tensor([[6], [3], [5], [4]])[:batch]
    word_mask = torch.arange(words) < torch.tensor([[5], [4], [2], [3]])[:batch]
    return video, text, frame_mask, word_mask


def distance(video, words, mass=0.5, weights=None):
    """Of one video to one sentence, by the definition; the gradient is the plan's."""
    cost = 1 - F.normalize(video, dim=-1) @ F.normalize(words, dim=-1).T
    share = 1 / min(cost.shape)
    rows = torch.full(cost.shape[:1], share, dtype=cost.dtype)
    columns = torch.full(cost.shape[1:], share, dtype=cost.dtype) * (1 if weights is None else weights)
    total = mass * torch.minimum(rows.sum(), columns.sum())
    plan = naive_partial_transport(cost.detach(), rows, columns, total, REG, n_iter=800)
    return (plan * cost).sum() / total


def contrast_by_hand(video, words, frame_mask, word_mask, left_out=()):
    """InfoNCE over all pairs, one after the other."""
    rows = range(len(video))
    found = {
        (i, j): distance(video[i][frame_mask[i]], words[j][word_mask[j]])
        for i in rows
        for j in rows
        if (i, j) not in left_out
    }
    losses = []
    for i in rows:
        for pick in (lambda k, i=i: (i, k), lambda k, i=i: (k, i)):
            scores = torch.stack([-found[pick(k)] / TEMPERATURE for k in rows if pick(k) in found])
            own = [k for k in rows if pick(k) in found].index(i)
            losses.append(-scores.log_softmax(0)[own])
    return torch.stack(losses).mean()


def contrastive(**options):
    return PvlaLoss(reg=REG, n_iter=400, negatives=True, temperature=TEMPERATURE, **options)


def assert_same_loss_and_gradient(found, expected, states):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    grads = [torch.autograd.grad(loss, states, retain_graph=True) for loss in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_negatives_are_all_other_pairs_of_the_batch():
    """Loss and gradient are those of a loop over pairs; details are of the own ones."""
    video, words, *masks = make_states()
    loss = contrastive()
    assert_same_loss_and_gradient(loss(video, words, *masks), contrast_by_hand(video, words, *masks), [video, words])
    details = loss.details(video, words, *masks)
    alone = loss.without_negatives().details(video, words, *masks)
    for name in ("distance", "plan", "residual", "valid"):
        torch.testing.assert_close(getattr(details, name), getattr(alone, name), rtol=1e-6, atol=1e-8)


def test_the_same_words_in_another_order_are_no_negative():
    """Two captions of one content must not be told apart."""
    video, words, frame_mask, _ = make_states()
    word_mask = torch.ones(4, 5, dtype=torch.bool)
    with torch.no_grad():
        words[2] = words[0].flip(0)
    expected = contrast_by_hand(video, words, frame_mask, word_mask, left_out={(0, 2), (2, 0)})
    assert_same_loss_and_gradient(contrastive()(video, words, frame_mask, word_mask), expected, [video, words])


def test_ids_tell_the_same_words_where_states_differ():
    """Dropout gives one sentence other states each time; sentences of other words may have the same states."""
    video, words, frame_mask, word_mask = make_states()
    ids = torch.tensor([[7, 8, 9, 3, 3, 0], [3, 5, 7, 8, 1, 1], [2, 0, 4, 4, 4, 4], [5, 8, 7, 3, 6, 6]])
    counts = torch.arange(6) < torch.tensor([[5], [4], [2], [4]])  # what doesn't count may be anything
    expected = contrast_by_hand(video, words, frame_mask, word_mask, left_out={(1, 3), (3, 1)})
    for mask in (counts, counts * 0.5):
        found = contrastive().details(video, words, frame_mask, word_mask, tokens=(ids, mask)).loss.mean()
        assert_same_loss_and_gradient(found, expected, [video, words])
    with torch.no_grad():
        words[2] = words[0]
    expected = contrast_by_hand(video, words, frame_mask, word_mask)
    found = contrastive().details(video, words, frame_mask, word_mask, tokens=(ids, None)).loss.mean()
    assert_same_loss_and_gradient(found, expected, [video, words])


def test_the_same_video_is_no_negative():
    """Nor are its other sentences; the same frames in another order are another video."""
    video, words, frame_mask, word_mask = make_states()
    frame_mask[2] = frame_mask[0]
    with torch.no_grad():
        video[2], video[3, 4:] = video[0], 1e3  # beyond the fourth there is padding
        video[1] = video[0]  # of which three frames are valid
    expected = contrast_by_hand(video, words, frame_mask, word_mask, left_out={(0, 2), (2, 0)})
    assert_same_loss_and_gradient(contrastive()(video, words, frame_mask, word_mask), expected, [video, words])
    with torch.no_grad():
        video[2] = video[0].flip(0)
    expected = contrast_by_hand(video, words, frame_mask, word_mask)
    assert_same_loss_and_gradient(contrastive()(video, words, frame_mask, word_mask), expected, [video, words])


def test_videos_of_very_different_lengths():
    """Short ones beside long ones, with much in common, are told from each other; so are ABBA and BAAB."""
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(8, 600, 16, generator=generator) + 3 * torch.nn.functional.normalize(torch.ones(16), dim=0) * 4
    lengths = torch.tensor([10] * 4 + [600] * 4)
    mask = torch.arange(600) < lengths[:, None]
    assert torch.equal(same_videos(video, mask, slice(0, 8)), torch.eye(8, dtype=torch.bool))
    a, b = torch.randn(2, 16, generator=generator)
    orders = torch.stack([torch.stack([a, b, b, a]), torch.stack([b, a, a, b]), torch.stack([a, b, b, a])])
    found = same_videos(orders, torch.ones(3, 4, dtype=torch.bool), slice(0, 2))
    assert found.tolist() == [[True, False, True], [False, True, False]]


@pytest.mark.parametrize("length", [4, 60, 512])
@pytest.mark.parametrize("shared", [0.0, 1.0, 50.0])
def test_states_tell_the_same_words(length, shared):
    """Whatever all words have in common; in any order, as often, up to rounding, and not where one of many differs."""
    words = torch.randn(7, length, 16, generator=torch.Generator().manual_seed(0)) * 0.02 + shared
    words[1:6] = words[0]
    words[1] = words[0].flip(0)
    words[2, 3] = words[6, 3]  # another word
    words[3, 1] = words[3, 2]  # as many words, but one twice
    words[4] += (words[4] - shared) * torch.randn(length, 16) * 1e-6
    mask = torch.ones(7, length)
    mask[5, -1] = 0  # one word less
    expected = torch.eye(7, dtype=torch.bool)
    for one in (0, 1, 4):
        expected[one, [0, 1, 4]] = True
    assert torch.equal(same_states(words, mask, words, mask), expected)
    assert torch.equal(same_states(words, mask, words[2:4], mask[2:4]), expected[2:4])


def test_a_sample_without_words_is_no_negative():
    """It has no loss, and the others' is as without it; nothing valid is a loss of 0."""
    video, words, frame_mask, word_mask = make_states()
    empty = word_mask.clone()
    empty[1] = False
    rest = [0, 2, 3]
    expected = contrast_by_hand(video[rest], words[rest], frame_mask[rest], word_mask[rest])
    loss = contrastive()
    assert_same_loss_and_gradient(loss(video, words, frame_mask, empty), expected, [video, words])
    nothing = loss(video, words, frame_mask, torch.zeros_like(empty))
    assert nothing == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(nothing, [video, words]))


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
def test_descending_tells_pairs_apart(cost):
    """Own pairs come nearer than others, which the distance alone doesn't bring about."""
    video, words, *masks = make_states()
    video, words = (torch.nn.Parameter(x.detach().float()) for x in (video, words))
    loss = PvlaLoss(negatives=True, cost=cost)
    optimizer = torch.optim.Adam([video, words], lr=0.05)
    first = loss(video, words, *masks).detach()
    for _ in range(60):
        optimizer.zero_grad()
        loss(video, words, *masks).backward()
        optimizer.step()
    assert loss(video, words, *masks) < first / 4
    plain = loss.without_negatives()
    other = plain.details(video, words.roll(1, 0), masks[0], masks[1].roll(1, 0)).distance
    assert (other > plain.details(video, words, *masks).distance + 0.1).all()


@pytest.mark.parametrize("mass", [0.5, 1.0])
def test_weights_are_shares_of_a_words_capacity(mass):
    """Loss, plan and gradient by the definition, of words that may carry less, or nothing."""
    video, words, frame_mask, word_mask = make_states()
    weights = word_mask * torch.tensor([1.0, 0.5, 0.0, 0.25, 1.0], dtype=torch.float64)
    weights[2] = torch.tensor([0, 2.0, 0, 0, 0])
    loss = PvlaLoss(mass, REG, 400)
    expected = torch.stack(
        [distance(video[i][frame_mask[i]], words[i][w > 0], mass, w[w > 0]) for i, w in enumerate(weights)]
    ).mean()
    assert_same_loss_and_gradient(loss(video, words, frame_mask, weights), expected, [video, words])
    plan = loss.details(video, words, frame_mask, weights).plan
    torch.testing.assert_close(plan.sum((1, 2)), torch.ones(4, dtype=plan.dtype))
    assert plan.sum(1)[weights == 0].eq(0).all()


def test_a_mask_is_weights_of_0_and_1():
    """Whether it is given as bools, integers or floats."""
    video, words, frame_mask, word_mask = make_states()
    for loss in (PvlaLoss(), contrastive()):
        found = [loss(video, words, frame_mask, mask) for mask in (word_mask, word_mask.long(), word_mask.double())]
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
        torch.testing.assert_close(found[2], found[0])
    with pytest.raises(ValueError, match="word_mask has negative"):
        PvlaLoss()(video, words, frame_mask, -word_mask.double())
    with pytest.raises(ValueError, match="temperature=0: expected a positive"):
        PvlaLoss(negatives=True, temperature=0)
