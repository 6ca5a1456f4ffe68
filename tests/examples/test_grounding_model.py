"""The grounding model with span heads: padding, PVLA's masks, the losses by hand, and what is predicted."""

from itertools import permutations

import numpy as np
import pytest
import torch
from grounding.files import Sample
from grounding.losses import generalised_overlap, saliency_loss, span_loss
from grounding.modeling import MomentConfig, MomentModel, sine_positions
from grounding.training import LABELS, MomentCollator, predict
from peft import get_peft_model

from peft_read import PvlaTrainer, PvlaTrainingArguments, ReadConfig, describe_tokens


SMALL = {"video_size": 6, "text_size": 5, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def some_samples(labels=True):
    """Three sentences about videos of other lengths, with several moments, one, and none known."""
    rng = np.random.default_rng(0)
    samples = []
    for name, (clips, tokens, spans) in enumerate(
        ((5, 4, [[0.3, 0.2], [0.8, 0.1]]), (3, 2, [[0.5, 0.5]]), (1, 1, None))
    ):
        samples.append(
            Sample(
                name,
                f"f:{name}",
                rng.normal(size=(clips, 6)).astype(np.float32),
                2.0 * clips,
                rng.normal(size=(tokens, 5)).astype(np.float32),
                np.array(spans, dtype=np.float32) if labels and spans else None,
                rng.random(clips).astype(np.float32) if labels else None,
            )
        )
    return samples


def without_masks(batch):
    return {name: value for name, value in batch.items() if not name.endswith("token_mask")}


def small_model(**fields):
    torch.manual_seed(0)
    return MomentModel(MomentConfig(**(SMALL | fields))).eval()


@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_padding_never_changes_a_prediction(cell):
    """Sentences and videos of other lengths in one batch are as they are alone, READ in every block."""
    model = get_peft_model(small_model(), ReadConfig(r=4, cell=cell, init_weights=False)).eval()
    assert len(model.targeted_module_names) == 4
    samples = some_samples(labels=False)
    together = model(**without_masks(MomentCollator()(samples)))
    for row, sample in enumerate(samples):
        alone = model(**without_masks(MomentCollator()([sample])))
        assert torch.allclose(together.saliency[row, : len(sample.video)], alone.saliency[0], atol=1e-5)
        assert torch.allclose(together.spans[row], alone.spans[0], atol=1e-5)
        assert torch.allclose(together.span_scores[row], alone.span_scores[0], atol=1e-5)


def test_the_recurrence_sees_the_sentence_first_and_then_time():
    """What READ adds to a clip depends on the words and on earlier clips; without a sentence, on these alone."""
    model = get_peft_model(
        small_model(), ReadConfig(r=4, target_modules=["encoder.layers.0.mlp.fc2"], init_weights=False)
    )
    layer = model.base_model.model.encoder.layers[0].mlp.fc2
    inputs = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.eval()(**without_masks(MomentCollator()(some_samples(labels=False)[:1])))
    changed = inputs[0].clone()
    changed[:, 4 + 2] += 1.0  # the third clip, behind four words
    with torch.no_grad(), describe_tokens():
        before, after = (layer(x) - layer.base_layer(x) for x in (inputs[0], changed))
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-4)
    assert small_model(text_size=None)(torch.randn(1, 3, 6), torch.ones(1, 3)).saliency.shape == (1, 3)
    with pytest.raises(ValueError, match="text_size=5, but was called without text_features"):
        small_model()(torch.randn(1, 3, 6), torch.ones(1, 3))


def test_token_masks_are_those_of_the_sequence():
    """At the masked positions the encoder sees the projected words and clips."""
    model, given = small_model(), {}
    model.encoder.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    samples = some_samples()
    batch = MomentCollator()(samples)
    model(**without_masks(batch))
    for row, sample in enumerate(samples):
        states = given["inputs_embeds"][row]
        clips, words = torch.from_numpy(np.asarray(sample.video)), torch.from_numpy(sample.text)
        assert torch.allclose(states[batch["video_token_mask"][row]], model.video_projection(clips), atol=1e-5)
        assert torch.allclose(states[batch["text_token_mask"][row]], model.text_projection(words), atol=1e-5)


def test_positions_are_relative_to_the_valid_clips():
    """Words have none, padding moves none, and the last clip is at one full turn."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    positions = sine_positions(mask, 8)
    assert torch.allclose(positions[:1, :3], sine_positions(mask[:1, :3], 8))
    assert positions[1, 3, :2].tolist() == pytest.approx([0, 1], abs=1e-5)
    assert positions[1, 1, :2].tolist() == pytest.approx([0, -1], abs=1e-5)


def slow_overlap(one, other):
    (start, end), (low, high) = ((c - w / 2, c + w / 2) for c, w in (one, other))
    common, hull = max(0, min(end, high) - max(start, low)), max(end, high) - min(start, low)
    either = (end - start) + (high - low) - common
    return common / either - (hull - either) / hull


def test_generalised_overlap_by_hand():
    """Equal, touching, apart; and random ones against a slow one."""
    pairs = torch.tensor([[[0.5, 0.2], [0.5, 0.2]], [[0.1, 0.2], [0.3, 0.2]], [[0.1, 0.2], [0.9, 0.2]]])
    assert generalised_overlap(pairs[:, 0], pairs[:, 1]).tolist() == pytest.approx([1, 0, -0.6], abs=1e-6)
    rows = torch.rand(20, 2, 2)
    expected = [slow_overlap(*row) for row in rows.tolist()]
    assert generalised_overlap(rows[:, 0], rows[:, 1]).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_loss_of_moments_is_that_of_the_cheapest_assignment():
    """All assignments of moments to slots tried by hand; a sample without moments has slots without any."""
    torch.manual_seed(0)
    spans, scores = torch.rand(2, 4, 2), torch.randn(2, 4, 2)
    labels = torch.tensor([[[0.3, 0.2], [0.8, 0.1], [0.5, 0.9]], [[-1, -1]] * 3])
    probability = scores.softmax(-1)

    def cost(slot, moment):
        one, other = spans[0, slot].tolist(), labels[0, moment].tolist()
        distance = sum(abs(a - b) for a, b in zip(one, other, strict=True))
        return 10 * distance - slow_overlap(one, other) - 4 * probability[0, slot, 0].item()

    best = min(permutations(range(4), 3), key=lambda slots: sum(cost(slot, m) for m, slot in enumerate(slots)))
    distances = [
        abs(a - b)
        for m, s in enumerate(best)
        for a, b in zip(spans[0, s].tolist(), labels[0, m].tolist(), strict=True)
    ]
    overlaps = [slow_overlap(spans[0, s].tolist(), labels[0, m].tolist()) for m, s in enumerate(best)]
    logs = scores.log_softmax(-1)
    labels_cost = [-logs[0, s, 0].item() if s in best else -0.1 * logs[0, s, 1].item() for s in range(4)]
    labels_cost += [-0.1 * logs[1, s, 1].item() for s in range(4)]
    expected = 10 * np.mean(distances) + np.mean([1 - o for o in overlaps]) + 4 * np.mean(labels_cost)
    assert span_loss(spans, scores, labels).item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_saliency_counts_what_is_known():
    """A soft label's cross-entropy; padding and unknown clips have no part."""
    logits, labels = (
        torch.tensor([[0.3, -2.0, 9.0], [1.0, 9.0, 9.0]]),
        torch.tensor([[0.25, 1.0, -1.0], [0.0, -1.0, -1.0]]),
    )
    p = logits.sigmoid()
    parts = [0.25 * p[0, 0].log() + 0.75 * (1 - p[0, 0]).log(), p[0, 1].log(), (1 - p[1, 0]).log()]
    assert saliency_loss(logits, labels).item() == pytest.approx(-sum(parts).item() / 3, rel=1e-5)
    assert saliency_loss(logits, torch.full_like(labels, -1.0)) == 0


def test_trained_by_pvla_trainer(tmp_path):
    """The task's loss falls, beside the alignment's; predictions are windows in seconds."""
    model = get_peft_model(small_model(), ReadConfig(r=4, cell="gru", modules_to_save=["saliency_head", "span_head"]))
    arguments = PvlaTrainingArguments(
        str(tmp_path),
        max_steps=30,
        learning_rate=1e-2,
        logging_steps=10,
        pvla_weight=0.1,
        pvla_states="all_blocks",
        report_to="none",
        remove_unused_columns=False,
        label_names=LABELS,
        dataloader_pin_memory=False,
    )
    trainer = PvlaTrainer(model, arguments, MomentCollator(), some_samples()[:2])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert logged[-1]["task_loss"] < logged[0]["task_loss"]
    assert all(entry["pvla_loss"] > 0 for entry in logged)
    predictions = predict(trainer, some_samples())
    assert [len(each.saliency) for each in predictions] == [5, 3, 1]
    for sample, each in zip(some_samples(), predictions, strict=True):
        assert each.windows.shape == (10, 3)
        assert (np.diff(each.windows[:, 2]) <= 0).all()
        assert each.windows[:, :2].min() >= 0
        assert each.windows[:, :2].max() <= sample.seconds
        with torch.no_grad():
            alone = model.eval()(**without_masks(MomentCollator()([sample])))
        assert np.allclose(each.saliency, alone.saliency[0].sigmoid(), atol=1e-5)


def test_a_saved_model_loads(tmp_path):
    """As any of transformers' models; without slots there is no decoder."""
    model = small_model(num_slots=0)
    model.save_pretrained(tmp_path)
    assert not hasattr(model, "decoder")
    again = MomentModel.from_pretrained(tmp_path).eval()
    batch = without_masks(MomentCollator()(some_samples(labels=False)))
    assert torch.equal(again(**batch).saliency, model(**batch).saliency)
