"""Every source of states: what the Trainer logs and what it makes of the weights, against one step by hand."""

import pytest
import torch
from alignment import CASES, step_by_hand, steps_logged, trainer_of, weights


WEIGHT = 0.7


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_one_by_hand(name, tmp_path):
    """Task and alignment as computed from a plain forward, POT agreeing, and their gradient in READ's weights."""
    case = CASES[name]
    model = case.model()
    task, aligned, by_pot, after = step_by_hand(case, model, case.data(), WEIGHT)
    without = step_by_hand(case, model, case.data(), 0.0)[-1]
    trainer = trainer_of(case, model, tmp_path, pvla_weight=WEIGHT)
    trainer.train()
    (log,) = steps_logged(trainer)
    assert float(aligned) == pytest.approx(by_pot, abs=1e-4)
    assert log["task_loss"] == pytest.approx(float(task), abs=1e-5)
    assert log["pvla_loss"] == pytest.approx(by_pot, abs=1e-4)
    assert log["loss"] == pytest.approx(log["task_loss"] + WEIGHT * log["pvla_loss"], abs=1e-5)
    for parameter, value in weights(model).items():
        torch.testing.assert_close(
            value, after[parameter], rtol=1e-3, atol=1e-6, msg=lambda m, p=parameter: f"{p}: {m}"
        )
    moved = {n for n in after if ".read_" in n and not torch.allclose(after[n], without[n], rtol=0, atol=1e-5)}
    assert moved, "the alignment changes no adapter"
