"""What LSTTA costs: next to frozen towers with a head and to full fine-tuning, and as clips grow longer.

    python examples/benchmarks/trimodal_step_time.py

The towers have the shapes of ViT-B/16, AST and BERT-base, in float32 with random weights. All variants take turns step
by step in one process; a ratio is the median over the rounds of the variant's time over that of its yardstick in the
same round. Peak memory is that of a process of its own on CPU, what CUDA allocated at most on a GPU. The second table
is one level's adapters alone, on clips of 8 to 512 frames.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import ASTConfig, ASTModel, BertConfig, BertModel, ViTConfig, ViTModel

from peft_read import LsttaConfig, TrimodalModel
from peft_read.lstta.adapter import LsttaAdapter
from peft_read.lstta.interaction import Stream, interact
from peft_read.lstta.windows import plan_windows


FROZEN, LSTTA, FULL = "frozen towers + head", "LSTTA + head", "full fine-tuning"
VARIANTS = (FROZEN, LSTTA, FULL)
WIDTH, CLASSES = 768, 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(run: Callable[[], object]) -> float:
    """How long it takes."""
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Until the GPU has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Variant:
    """A model with a head: its forward, and its training step with AdamW."""

    def __init__(self, variant: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        depth = {"num_hidden_layers": args.layers}
        model: nn.Module = TrimodalModel.from_pretrained_towers(
            vision=ViTModel(ViTConfig(**depth), add_pooling_layer=False),
            audio=ASTModel(ASTConfig(max_length=args.sound, **depth)),
            text=BertModel(BertConfig(**depth), add_pooling_layer=False),
        )
        if variant == LSTTA:
            model = get_peft_model(model, LsttaConfig(r=args.r, window=args.window))
        else:
            model.requires_grad_(variant == FULL)
        self.model = model.to(DEVICE).train()
        self.inputs = {
            "pixel_values": torch.randn(args.batch, args.frames, 3, 224, 224, device=DEVICE),
            "input_values": torch.randn(args.batch, args.sound, 128, device=DEVICE),
            "input_ids": torch.randint(1000, 30000, (args.batch, args.words), device=DEVICE),
            "attention_mask": torch.ones(args.batch, args.words, dtype=torch.long, device=DEVICE),
        }
        with torch.no_grad():
            self.head = nn.Linear(self.model(**self.inputs).pooler_output.shape[-1], CLASSES).to(DEVICE)
        trained = [p for p in (*self.model.parameters(), *self.head.parameters()) if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, 1e-4)

    def forward(self) -> Tensor:
        """A scalar of the logits."""
        return self.head(self.model(**self.inputs).pooler_output).square().mean()

    def evaluate(self) -> None:
        """A forward as at inference."""
        with torch.no_grad():
            self.forward()

    def step(self) -> None:
        """A training step."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak_memory(variant: str, args: argparse.Namespace) -> float:
    """MiB that a process needs at most for two steps."""
    each = Variant(variant, args)
    each.step()
    each.step()
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def compare_variants(args: argparse.Namespace) -> None:
    """The first table."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        memory = {name: pool.submit(peak_memory, name, args).result() for name in VARIANTS}
    variants = {name: Variant(name, args) for name in VARIANTS}
    forwards, steps = [], []
    for _ in range(args.rounds + 1):
        forwards.append({name: seconds(each.evaluate) for name, each in variants.items()})
        steps.append({name: seconds(each.step) for name, each in variants.items()})
    forwards, steps = forwards[1:], steps[1:]
    total = sum(p.numel() for p in variants[FROZEN].model.parameters())
    print(f"\nforward of {FROZEN}: {statistics.median(r[FROZEN] for r in forwards):.3f} s")
    print(f"step of {FULL}: {statistics.median(r[FULL] for r in steps):.3f} s\n")
    print(f"| method | trained | forward / {FROZEN} | step / {FULL} | peak memory (MiB) |\n|---|---|---|---|---|")
    for name in VARIANTS:
        forward = statistics.median(r[name] / r[FROZEN] for r in forwards)
        step = statistics.median(r[name] / r[FULL] for r in steps)
        share = 100 * variants[name].trained / total
        print(f"| {name} | {share:.2f} % | {forward:.3f} | {step:.3f} | {memory[name]:.0f} |")


@torch.no_grad()
def compare_lengths(args: argparse.Namespace) -> None:
    """The second table: 50 tokens and 6 steps of sound to a frame."""
    torch.manual_seed(0)
    config = LsttaConfig(r=args.r, window=args.window)
    adapters = {name: LsttaAdapter(WIDTH, config, name == "vision").to(DEVICE) for name in ("vision", "audio", "text")}
    judge = adapters["vision"].judge
    assert judge is not None
    print("\n| frames | level (ms) | per frame (ms) | the filter's share |\n|---|---|---|---|")
    for frames in args.lengths:
        hidden = {
            "vision": torch.randn(1, frames, 50, WIDTH, device=DEVICE),
            "audio": torch.randn(1, 6 * frames, 1, WIDTH, device=DEVICE),
            "text": torch.randn(1, args.words, WIDTH, device=DEVICE),
        }
        windows = plan_windows(
            {"vision": frames, "audio": 6 * frames},
            {},
            batch=1,
            window=config.window,
            num_audio_windows=config.num_audio_windows,
            device=DEVICE,
        )

        def streams(hidden: dict[str, Tensor] = hidden) -> dict[str, Stream]:
            projected = {name: adapters[name].project(x) for name, x in hidden.items()}
            return {name: Stream(None, x) if name == "text" else Stream(x, None) for name, x in projected.items()}

        def level(windows=windows, streams=streams) -> None:
            messages, _ = interact(streams(), windows, num_heads=config.num_heads, frame_filter=judge)
            for name, told in messages.items():
                adapters[name].change(told.untimed if told.timed is None else told.timed)

        projected = streams()

        def filter_alone(windows=windows, projected=projected) -> None:
            judge(projected, windows)

        level()
        whole = statistics.median(seconds(level) for _ in range(args.rounds))
        share = statistics.median(seconds(filter_alone) for _ in range(args.rounds)) / whole
        print(f"| {frames} | {1e3 * whole:.1f} | {1e3 * whole / frames:.3f} | {100 * share:.1f} % |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="clips in a batch")
    parser.add_argument("--frames", type=int, default=4, help="frames of a clip, 224 x 224 each")
    parser.add_argument("--sound", type=int, default=256, help="frames of a spectrogram with 128 bands")
    parser.add_argument("--words", type=int, default=32, help="tokens of a text")
    parser.add_argument("--layers", type=int, default=12, help="blocks of each tower")
    parser.add_argument("--r", type=int, default=64, help="width of the bottleneck")
    parser.add_argument("--window", type=int, default=4, help="frames in a window")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that are timed")
    parser.add_argument("--lengths", type=int, nargs="*", default=[8, 32, 128, 512], help="frames of the second table")
    args = parser.parse_args()
    hardware = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}; {args.layers} blocks, {args.frames} frames, r = {args.r}")
    compare_variants(args)
    compare_lengths(args)


if __name__ == "__main__":
    main()
