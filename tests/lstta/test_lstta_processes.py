"""Data-parallel training of towers in lockstep: two processes give the gradients of one, with every head."""

import os

import torch
from devices import HEADS, free_port
from fresh import run_ranks
from torch.nn.parallel import DistributedDataParallel


def batch(name):
    generator = torch.Generator().manual_seed(1)
    clips = {
        "pixel_values": torch.randn(4, 4, 3, 16, 16, generator=generator),
        "frame_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        "input_values": torch.randn(4, 32, 16, generator=generator),
    }
    if name == "choice":
        ids = torch.randint(3, 50, (4, 3, 6), generator=generator)
        return clips | {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])}
    ids = torch.randint(3, 50, (4, 6), generator=generator)
    labels = {"lstta": torch.tensor([0, 1, 2, 0]), "generation": ids[:, :3].clone(), "retrieval": None}[name]
    return clips | {"input_ids": ids} | ({} if labels is None else {"labels": labels})


def halves(name):
    return [{key: value[rows] for key, value in batch(name).items()} for rows in (slice(0, 2), slice(2, 4))]


def gradients(model, inputs):
    """One step's gradients of the mean loss, twice, as a second one shows what the first left behind."""
    for _ in range(2):
        model.zero_grad()
        (sum(model(**each).loss for each in inputs) / len(inputs)).backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}


def work(rank, folder, port):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    found = {}
    for name, make in HEADS.items():
        # What the last meeting tells pictures and sound, no word that is written can depend on.
        model = DistributedDataParallel(make().eval(), find_unused_parameters=name == "generation")
        found[name] = gradients(model, [halves(name)[rank]])
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    """DDP averages over the processes what each found in its half of the batch; pairs are compared within a half."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_ranks(work, tmp_path, free_port())
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, make in HEADS.items():
        inputs = halves(name) if name == "retrieval" else [batch(name)]
        expected = gradients(make().eval(), inputs)
        for actual in (each[name] for each in both):
            assert actual.keys() == expected.keys()
            assert all(".lstta_" in key or "modules_to_save" in key for key in actual)
            unused = {key for key, gradient in expected.items() if gradient is None}
            assert all(name == "generation" and "_model.layers.1.lstta_adapter" in key for key in unused), unused
            for key, gradient in expected.items():
                if key in unused:
                    continue
                assert gradient.abs().max() > 0, (name, key)
                torch.testing.assert_close(actual[key], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
