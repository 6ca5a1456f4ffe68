"""What a training step costs with READ, next to its peers: time and peak memory as ratios to the plain bottleneck.

    python examples/benchmarks/step_time.py

Both models have the blocks of a common base (BERT-base; a Llama of the same width), frozen, in float32 with random
weights; `--base Llama-1B --dtype bfloat16` is for GPUs. All variants take turns step by step in one process; a ratio
is the median over the rounds of the step's time over that of the plain bottleneck in the same round. Peak memory is
that of a process of its own on CPU; on a GPU what CUDA has allocated at most for a variant's model and its steps.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import peft_read


BASELINE = "bottleneck (READ, cell='none')"
VARIANTS: dict[str, Callable[[int], PeftConfig] | None] = {
    "frozen + head": None,
    "LoRA (q, v)": lambda r: LoraConfig(r=r, target_modules=["query", "value", "q_proj", "v_proj"]),
    BASELINE: lambda r: peft_read.ReadConfig(r=r, cell="none"),
    "READ, cell='rnn'": lambda r: peft_read.ReadConfig(r=r, cell="rnn"),
    "READ, cell='gru'": lambda r: peft_read.ReadConfig(r=r, cell="gru"),
    "READ, cell='lstm'": lambda r: peft_read.ReadConfig(r=r, cell="lstm"),
}
BASES: dict[str, Callable[[int], nn.Module]] = {
    "BERT-base": lambda layers: BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False),
    "Llama": lambda layers: make_llama(layers, hidden_size=768, intermediate_size=2048, num_attention_heads=12),
    "Llama-1B": lambda layers: make_llama(
        layers, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8
    ),
}


def make_llama(layers: int, **shape: int) -> nn.Module:
    """A Llama of BERT's vocabulary."""
    return LlamaModel(LlamaConfig(num_hidden_layers=layers, vocab_size=30522, use_cache=False, **shape))


class Step:
    """One training step of a variant: forward, backward, AdamW."""

    def __init__(self, base: str, variant: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with self.device:  # random weights take a GPU no time
            model = BASES[base](args.layers).to(getattr(torch, args.dtype))
            self.head = nn.Linear(model.config.hidden_size, 2)
        make_config = VARIANTS[variant]
        self.model = model.requires_grad_(False) if make_config is None else get_peft_model(model, make_config(args.r))
        self.model.to(self.device).train()
        trained = [p for p in (*self.model.parameters(), *self.head.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-3)
        if args.compile:
            torch._dynamo.config.recompile_limit = 64  # the variants share their code
            self.model.compile()
        self.ids = torch.randint(0, 30522, (args.batch, args.length), device=self.device)

    def __call__(self) -> float:
        """Run it once; the seconds that it took."""
        start = time.perf_counter()
        loss = self.head(self.model(input_ids=self.ids).last_hidden_state.float()).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def memory_of_processes(base: str, args: argparse.Namespace) -> dict[str, float]:
    """MiB that a process of its own needs at most for two steps of each variant."""
    # A process counts what the one that has started it held by then. So this comes before any step is built here.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return {variant: pool.submit(memory_of_process, base, variant, args).result() for variant in args.variants}


def memory_of_process(base: str, variant: str, args: argparse.Namespace) -> float:
    """MiB that this process has needed at most after two steps."""
    step = Step(base, variant, args)
    step()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def memory_on_gpu(make_step: Callable[[], Step]) -> tuple[Step, float]:
    """A step that has run twice, and the MiB that CUDA has allocated for it at most."""
    before = torch.cuda.memory_allocated()  # by the variants that are there already
    step = make_step()
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    return step, (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    """Measure every variant in both models and print a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a batch")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model")
    parser.add_argument("--r", type=int, default=16, help="width of the adapters")
    parser.add_argument("--base", nargs="+", default=["BERT-base", "Llama"], choices=BASES, help="whose blocks")
    parser.add_argument("--dtype", default="float32", help="of the base's weights, as torch calls it")
    parser.add_argument("--compile", action="store_true", help="compile every variant's model")
    parser.add_argument("--rounds", type=int, default=7, help="steps of every variant that are timed")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="what to measure")
    args = parser.parse_args()
    args.variants = [variant for variant in VARIANTS if variant == BASELINE or variant in args.variants]
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}; {args.layers} blocks, batch {args.batch}, r = {args.r}")
    for base in args.base:
        steps: dict[str, Step] = {}
        memory = {} if torch.cuda.is_available() else memory_of_processes(base, args)
        for variant in args.variants:
            if torch.cuda.is_available():
                steps[variant], memory[variant] = memory_on_gpu(partial(Step, base, variant, args))
            else:
                steps[variant] = Step(base, variant, args)
                steps[variant]()
        rounds = [{variant: step() for variant, step in steps.items()} for _ in range(args.rounds)]
        seconds = statistics.median(r[BASELINE] for r in rounds)
        print(f"\n{base}-shaped, L = {args.length}: bottleneck {seconds:.3f} s a step, {memory[BASELINE]:.0f} MiB\n")
        print("| method | step time | spread | peak memory |\n|---|---|---|---|")
        for variant in args.variants:
            ratios = [r[variant] / r[BASELINE] for r in rounds]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            memory_ratio = memory[variant] / memory[BASELINE]
            print(f"| {variant} | {statistics.median(ratios):.2f} | {spread} | {memory_ratio:.2f} |")


if __name__ == "__main__":
    main()
