"""Data-parallel training of towers in lockstep: two processes give the gradients of one."""

import os
import socket

import torch
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import ASTConfig, ASTModel, BertConfig, BertModel, ViTConfig, ViTModel

from peft_read import LsttaConfig, TrimodalForSequenceClassification


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def adapted_model():
    torch.manual_seed(0)
    model = TrimodalForSequenceClassification.from_pretrained_towers(
        vision=ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES)),
        audio=ASTModel(ASTConfig(num_mel_bins=16, max_length=32, **SIZES)),
        text=BertModel(BertConfig(vocab_size=50, **SIZES)),
        num_labels=3,
        projection_dim=16,
    )
    config = LsttaConfig(r=8, num_heads=2, window=2, init_weights=False, modules_to_save=["classifier", "fusion"])
    return get_peft_model(model, config).eval()


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
    torch.save(gradients(DistributedDataParallel(adapted_model()), rows), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    """DDP averages over the processes what each found in its half of the batch."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (tmp_path, port), nprocs=2)
    expected = gradients(adapted_model(), batch())
    for rank in range(2):
        actual = torch.load(tmp_path / f"{rank}.pt")
        assert actual.keys() == expected.keys()
        assert all(".lstta_" in name or "modules_to_save" in name for name in actual)
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
