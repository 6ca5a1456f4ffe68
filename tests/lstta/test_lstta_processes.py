"""Data-parallel training of towers in lockstep: two processes give the gradients of one."""

import os

import torch
from devices import free_port, three_towers
from torch.nn.parallel import DistributedDataParallel


def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(4, 4, 3, 16, 16, generator=generator),
        "frame_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        "input_values": torch.randn(4, 32, 16, generator=generator),
        "input_ids": torch.randint(3, 50, (4, 6), generator=generator),
        "labels": torch.tensor([0, 1, 2, 0]),
    }


def gradients(model, inputs):
    """One step's gradients, twice, as a second one shows what the first left behind."""
    for _ in range(2):
        model.zero_grad()
        model(**inputs).loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}


def work(rank, folder, port):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    rows = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch().items()}
    torch.save(gradients(DistributedDataParallel(three_towers().eval()), rows), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    """DDP averages over the processes what each found in its half of the batch."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(work, (tmp_path, free_port()), nprocs=2)
    expected = gradients(three_towers().eval(), batch())
    for rank in range(2):
        actual = torch.load(tmp_path / f"{rank}.pt")
        assert actual.keys() == expected.keys()
        assert all(".lstta_" in name or "modules_to_save" in name for name in actual)
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
