"""Data-parallel training with PVLA: two processes and the Trainer's defaults give the numbers of one process."""

import warnings
from dataclasses import replace

import pytest
import torch
from alignment import CASES, CAUSAL, steps_logged, trainer_of, weights
from alignment_batches import marked, pictured, some_pictured, spoken, told
from alignment_inputs import MODELS, mean_over_frames, watched
from devices import free_port, join
from fresh import run_ranks


PICTURED = replace(MODELS["llava"], collator=some_pictured)
OWN = replace(MODELS["own model"], arguments={"compute_loss_func": mean_over_frames})


def repeated():
    """The last sentence of four is the first once more, which lies on the other of two processes."""
    data = watched(16)
    for first, last in zip(data[::4], data[3::4], strict=True):
        last.update({name: first[name] for name in ("input_ids", "word_mask")})
    return data


def half_pictured():
    return [pictured(16)[row] if row % 4 < 2 else example for row, example in enumerate(told(16))]


# Global batches of 8 in two accumulated steps; the third row holds no video, the last evaluated batch isn't full.
RUNS = {
    "classifier": (CASES["text encoder"], lambda: marked(16, videos="some"), {"pvla_weight": 0.7}),
    "causal": (CAUSAL, lambda: spoken(16), {"pvla_weight": 0.7}),
    # Sentences and videos of other lengths on each process, with the negatives of both.
    "negatives": (OWN, repeated, {"pvla_negatives": True, "pvla_weight": 0.7}),
    "pairs": (
        replace(OWN, arguments=OWN.arguments | {"pairs_dataset": watched(20, labels=False)}),
        lambda: watched(16),
        {"pvla_negatives": True, "pvla_weight": 0.7},
    ),
    # All samples of the second process are text alone.
    "half": (PICTURED, half_pictured, {"pvla_negatives": True, "pvla_weight": 0.7, "pvla_health_steps": 1}),
    "share of half": (PICTURED, half_pictured, {"pvla_gradient_share": 0.2, "pvla_health_steps": 1}),
    "share": (CASES["text encoder"], lambda: marked(16), {"pvla_gradient_share": 0.2, "pvla_health_steps": 1}),
}


def run(name, folder, processes):
    """Logs, weights and evaluation of a run of two steps, by one of the processes."""
    case, data, options = RUNS[name]
    data = data()
    # As many labels in each: over devices the Trainer weighs samples by them in evaluation.
    evaluated = [row | {"labels": data[3]["labels"]} for row in data[3:10]]
    batch, options = 4 // processes, {"per_device_eval_batch_size": 1} | options
    if case.options.get("pvla_states") == "inputs":  # the collator takes all columns; the contrast is a batch's
        evaluated = data[3:11]
        options |= {"remove_unused_columns": False, "pvla_pairs_batch_size": 6 // processes}
        options |= {"per_device_eval_batch_size": batch}
    trainer = trainer_of(
        case,
        case.model(),
        folder / f"{name}-{processes}",
        data,
        evaluated,
        batch,
        gradient_accumulation_steps=2,
        pvla_plot_plans=True,
        **options,
    )
    trainer.train()
    return {"logs": steps_logged(trainer), "weights": weights(trainer.model), "metrics": trainer.evaluate()}


def work(rank, folder, port):
    warnings.simplefilter("ignore")
    join(rank, port)
    torch.save({name: run(name, folder, 2) for name in RUNS}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks(work, folder, free_port())
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ["classifier", "causal", "negatives", "pairs", "half"])
def test_two_processes_are_one(name, processes, tmp_path):
    """Losses of each step, weights after them and means over the evaluated samples."""
    expected = run(name, tmp_path, 1)
    for found in (rank[name] for rank in processes[1]):
        for log, other in zip(found["logs"], expected["logs"], strict=True):
            for part in ("loss", "task_loss", "pvla_loss", "grad_norm"):
                assert log[part] == pytest.approx(other[part], abs=1e-5), part
        for parameter, value in found["weights"].items():
            torch.testing.assert_close(value, expected["weights"][parameter], rtol=0, atol=1e-5)
        for part in ("eval_loss", "eval_task_loss", "eval_pvla_loss"):
            assert found["metrics"][part] == pytest.approx(expected["metrics"][part], abs=1e-5)


@pytest.mark.parametrize("name", ["share", "share of half"])
def test_processes_share_a_weight(name, processes):
    """The measured weight is one for all, so their adapters stay equal."""
    first, second = (rank[name] for rank in processes[1])
    assert [log["pvla_weight"] for log in first["logs"]] == [log["pvla_weight"] for log in second["logs"]]
    assert first["logs"][0]["pvla_gradient_share"] == pytest.approx(0.2, rel=1e-3)
    for parameter, value in first["weights"].items():
        assert torch.equal(value, second["weights"][parameter])


def test_one_process_draws(processes):
    folder = processes[0] / "classifier-2" / "pvla_plans"
    assert [path.name for path in folder.iterdir()] == ["eval-step-2.png"]
