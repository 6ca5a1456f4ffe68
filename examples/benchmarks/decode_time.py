"""What a generated token costs with READ: time per token as ratios to the plain bottleneck adapter and to the base.

    python examples/benchmarks/decode_time.py

A Llama-shaped decoder with random weights in float32 generates greedily from a prompt, with its KV cache; `--device
cuda --base Llama-1B --dtype bfloat16` is for GPUs. All variants take turns in one process; a ratio is the median over
the rounds of the time over that of the plain bottleneck, or of the base model, in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_read


BASE, BASELINE = "base model", "bottleneck (READ, cell='none')"
VARIANTS: dict[str, PeftConfig | None] = {
    BASE: None,
    BASELINE: peft_read.ReadConfig(r=16, cell="none"),
    "READ, cell='rnn'": peft_read.ReadConfig(r=16, cell="rnn"),
    "READ, cell='gru'": peft_read.ReadConfig(r=16, cell="gru"),
    "READ, cell='lstm'": peft_read.ReadConfig(r=16, cell="lstm"),
}


SHAPES = {
    "Llama": {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12},
    "Llama-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def make_model(config: PeftConfig | None, args: argparse.Namespace) -> torch.nn.Module:
    """The decoder, with an adapter or without."""
    torch.manual_seed(0)
    shape = LlamaConfig(num_hidden_layers=args.layers, vocab_size=8192, eos_token_id=None, **SHAPES[args.base])
    with torch.device(args.device):
        model = LlamaForCausalLM(shape).to(getattr(torch, args.dtype))
    return (model if config is None else get_peft_model(model, config)).to(args.device).eval()


@torch.inference_mode()
def seconds_per_token(model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> float:
    """Time of one decoding step, after the prompt has filled the cache."""
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    step = prompt[:, :1]
    start = now(prompt.device)
    for _ in range(tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        step = output.logits[:, -1:].argmax(-1)
    return (now(prompt.device) - start) / tokens


def now(device: torch.device) -> float:
    """The time at which all work given to a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Measure every variant at each batch size and print a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="Llama", choices=SHAPES, help="whose blocks")
    parser.add_argument("--dtype", default="float32", help="of the base's weights, as torch calls it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated in a round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that are timed")
    args = parser.parse_args()
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}; {args.layers} blocks of {args.base} in {args.dtype}, r = 16")
    models = {variant: make_model(config, args) for variant, config in VARIANTS.items()}
    for batch in (1, 8):
        prompt = torch.randint(0, 8192, (batch, args.prompt), device=args.device)
        for model in models.values():
            seconds_per_token(model, prompt, 4)
        rounds = [
            {variant: seconds_per_token(model, prompt, args.tokens) for variant, model in models.items()}
            for _ in range(args.rounds)
        ]
        print(f"\nBatch {batch}\n")
        print("| model | tokens per second | time per token | spread | over the base | spread |")
        print("|---|---|---|---|---|---|")
        for variant in VARIANTS:
            speed = batch / statistics.median(r[variant] for r in rounds)
            shown = []
            for reference in (BASELINE, BASE):
                ratios = [r[variant] / r[reference] for r in rounds]
                shown.append(f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}")
            print(f"| {variant} | {speed:.0f} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
