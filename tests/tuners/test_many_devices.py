"""Training by two processes, sharded or not: the losses, files and predictions of one process."""

import warnings

import devices
import pytest
import torch
import yaml
from devices import EPOCH, HEADS, SAVED, STEPS, Kill, run, same_predictions
from fresh import run_ranks, server


RUNS = [("read", "ddp"), ("read", "fsdp2"), ("read", "fsdp1"), ("lstta", "ddp"), ("lstta", "fsdp2")]
RUNS += [("generation", "ddp"), ("generation", "fsdp2"), ("choice", "ddp"), ("retrieval", "ddp")]


def train(rank, folder, port):
    warnings.simplefilter("ignore")
    devices.join(rank, port)
    found = {}
    for name, strategy in RUNS:
        found[name, strategy] = run(name, folder / f"{name}-{strategy}", 2, strategy)
    for strategy in ("ddp", "fsdp2"):
        found["resumed", strategy] = run("read", folder / f"killed-{strategy}", 2, strategy, resume=True)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def train_until_killed(rank, folder, port, strategy):
    warnings.simplefilter("ignore")
    devices.join(rank, port)
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    run("read", folder / f"killed-{strategy}", 2, strategy, callback=Kill() if rank == 0 else None, **saving)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def found(folder):
    """What each of two processes found in the runs, those included that were killed before."""
    for strategy in ("ddp", "fsdp2"):
        port = devices.free_port()
        workers = [server().Process(target=train_until_killed, args=(r, folder, port, strategy)) for r in range(2)]
        for worker in workers:
            worker.start()
        workers[0].join()
        workers[1].kill()
        workers[1].join()
        assert workers[0].exitcode == -9
        assert [path.name for path in (folder / f"killed-{strategy}").glob("checkpoint-*")] == [f"checkpoint-{SAVED}"]
    run_ranks(train, folder, devices.free_port())
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def expected(folder):
    """What one process finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: run(name, folder / f"{name}-1") for name in dict(RUNS)}


@pytest.mark.parametrize(("name", "strategy"), [*RUNS, ("resumed", "ddp"), ("resumed", "fsdp2")])
def test_two_processes_are_one(name, strategy, found, expected):
    """The losses of each step, the weights saved after them, and predictions for any number of examples, each once."""
    one = expected.get(name, expected["read"])
    parts = ("loss", "grad_norm") if name in HEADS else ("loss", "task_loss", "pvla_loss", "grad_norm")
    assert sum(log["loss"] for log in one.logs[-EPOCH:]) < sum(log["loss"] for log in one.logs[:EPOCH])
    for each in (rank[name, strategy] for rank in found):
        assert each.trained == (STEPS - SAVED if name == "resumed" else STEPS)
        assert [log["step"] for log in each.logs] == list(range(1, STEPS + 1))
        for log, other in zip(each.logs, one.logs, strict=True):
            for part in parts:
                assert log[part] == pytest.approx(other[part], abs=1e-4), (log["step"], part)
        if strategy != "fsdp1":
            assert each.saved.keys() == one.saved.keys()
            for parameter, value in each.saved.items():
                torch.testing.assert_close(value, one.saved[parameter], rtol=0, atol=1e-5, msg=parameter)
        same_predictions(name, each, one)


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("read", {"PeftModel", "BertLayer", "Embedding"}),
        ("lstta", {"PeftModel", "ViTLayer", "ASTLayer", "BertLayer", "ViTEmbeddings", "ASTEmbeddings", "Embedding"}),
    ],
)
def test_what_is_sharded(name, units, found):
    """Every weight, block by block, by Accelerate's own wrapping and without a setting of the user's."""
    for each in (rank[name, "fsdp2"] for rank in found):
        assert each.units == units
    for parameter, (_, size) in found[0][name, "fsdp2"].held.items():
        assert sum(rank[name, "fsdp2"].held[parameter][0] for rank in found) == size, parameter
    assert any(".read_" in name or ".lstta_" in name for name in found[0][name, "fsdp2"].held)


def test_fsdp1_flattens_adapters_apart(found):
    """Trained and frozen weights can't share a flat tensor, so the recurrence is a unit of its own, as linears are."""
    assert found[0]["read", "fsdp1"].units == {"PeftModel", "BertLayer", "Linear", "Recurrence"}


@pytest.mark.parametrize("configuration", ["ddp", "fsdp2", "zero2", "zero3"])
def test_configurations_are_accelerate_s(configuration):
    """Accelerate knows every field, and starts what the name says; on several machines by torchrun, without ssh."""
    arguments = devices.launch_arguments(configuration, "--num_machines", "2")
    assert arguments.multi_gpu == (configuration == "ddp")
    assert arguments.use_fsdp == (configuration == "fsdp2")
    assert arguments.use_deepspeed == configuration.startswith("zero")
    known = vars(arguments).keys()
    for name in yaml.safe_load((devices.CONFIGURATIONS / f"{configuration}.yaml").read_text()).get("fsdp_config", {}):
        assert name in known
    if arguments.use_deepspeed:
        assert arguments.zero_stage == int(configuration[-1])
        assert arguments.deepspeed_multinode_launcher == "standard"
