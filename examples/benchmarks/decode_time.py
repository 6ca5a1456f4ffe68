"""What a generated token costs with READ: time per token as ratios to the plain bottleneck adapter.

    python examples/benchmarks/decode_time.py

A Llama-shaped decoder with random weights in float32 generates greedily from a prompt, with its KV cache. All variants
take turns in one process; a ratio is the median over the rounds of the time over that of the plain bottleneck in the
same round.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_read


BASELINE = "bottleneck (READ, cell='none')"
VARIANTS: dict[str, PeftConfig | None] = {
    "base model": None,
    BASELINE: peft_read.ReadConfig(r=16, cell="none"),
    "READ, cell='rnn'": peft_read.ReadConfig(r=16, cell="rnn"),
    "READ, cell='gru'": peft_read.ReadConfig(r=16, cell="gru"),
    "READ, cell='lstm'": peft_read.ReadConfig(r=16, cell="lstm"),
}


def make_model(config: PeftConfig | None, args: argparse.Namespace) -> torch.nn.Module:
    """The decoder, with an adapter or without."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_attention_heads=12,
        num_hidden_layers=args.layers,
        vocab_size=8192,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(shape)
    return (model if config is None else get_peft_model(model, config)).eval()


@torch.inference_mode()
def seconds_per_token(model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> float:
    """Time of one decoding step, after the prompt has filled the cache."""
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    step = prompt[:, :1]
    start = time.perf_counter()
    for _ in range(tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        step = output.logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start) / tokens


def main() -> None:
    """Measure every variant at each batch size and print a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated in a round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that are timed")
    args = parser.parse_args()
    print(
        f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}; {args.layers} blocks of width 768, r = 16"
    )
    models = {variant: make_model(config, args) for variant, config in VARIANTS.items()}
    for batch in (1, 8):
        prompt = torch.randint(0, 8192, (batch, args.prompt))
        for model in models.values():
            seconds_per_token(model, prompt, 4)
        rounds = [
            {variant: seconds_per_token(model, prompt, args.tokens) for variant, model in models.items()}
            for _ in range(args.rounds)
        ]
        print(f"\nBatch {batch}\n\n| model | tokens per second | time per token | spread |\n|---|---|---|---|")
        for variant in VARIANTS:
            ratios = [r[variant] / r[BASELINE] for r in rounds]
            speed = batch / statistics.median(r[variant] for r in rounds)
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"| {variant} | {speed:.0f} | {statistics.median(ratios):.2f} | {spread} |")


if __name__ == "__main__":
    main()
