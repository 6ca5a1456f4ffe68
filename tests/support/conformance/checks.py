"""What READ promises on any model of transformers: one function per promise, each takes the name of a family."""

import inspect
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.target_census import last_in_blocks
from helpers import adapter_parameters, strengthen
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_read import ReadConfig, find_feed_forward_outputs

from .families import FAMILIES, Family, base_model
from .inputs import Row, collate, samples, with_positions


STATES = ("last_hidden_state", "logits", "encoder_last_hidden_state")
TOWERS = ("text_model_output", "vision_model_output", "mit_output")
NEW_TOKENS = 5
PADDING_TOLERANCE, CACHE_TOLERANCE = 1e-4, 1e-5


def config() -> ReadConfig:
    """READ with the targets that it finds by itself."""
    return ReadConfig(r=4, cell="gru")


def adapted(family: str, *, mended: bool = False) -> PeftModel:
    """The family's model with an adapter in which errors can't hide; `mended` as in `base_model`."""
    return strengthen(get_peft_model(base_model(family, mended=mended), config())).eval()


def batch_of(family: str, rows: list[Row], side: str = "right") -> Row:
    """The rows as one batch; with positions, where the model takes them and doesn't derive them from the tokens."""
    known = FAMILIES[family]
    batch = collate(rows, side)
    takes_positions = "position_ids" in inspect.signature(known.model_class.forward).parameters
    return with_positions(batch) if known.inputs in ("text", "dual", "dual_video") and takes_positions else batch


def states(model: nn.Module, batch: Row) -> dict[str, Tensor]:
    """What a model gives for each token, by the name of the output."""
    output = model(**batch)
    found = {name: output[name] for name in STATES if output.get(name) is not None}
    for tower in TOWERS:
        if output.get(tower) is not None:
            found[tower] = output[tower].last_hidden_state
    assert found, f"no states among {list(output)}"
    return found


@torch.no_grad()
def result(model: nn.Module, batch: Row) -> dict[str, Tensor]:
    return states(model, batch)


def check_targets(family: str) -> None:
    """READ finds the expected number of modules by itself, none of them inside attention, and they end their blocks.

    The latter holds for those that aren't adapted by default, too, where the inputs reach them.
    """
    model, batch = base_model(family), batch_of(family, samples(FAMILIES[family].inputs))
    targets = get_peft_model(base_model(family), config()).targeted_module_names
    assert len(targets) == FAMILIES[family].targets, sorted(targets)
    assert not [name for name in targets if "attention" in name or "attn" in name], sorted(targets)
    last = last_in_blocks(model, find_feed_forward_outputs(model), batch)
    assert set(targets) <= set(last), sorted(set(targets) - set(last))
    assert not (others := {name: end for name, end in last.items() if name != end}), others


def check_identity(family: str) -> None:
    """An adapter that hasn't been trained changes no bit."""
    batch = batch_of(family, samples(FAMILIES[family].inputs))
    expected = result(base_model(family), batch)
    _assert_same(result(get_peft_model(base_model(family), config()).eval(), batch), expected)


def check_training(family: str) -> None:
    """Two steps change every weight of the adapter (its inner ones from the second on), and nothing else."""
    torch.manual_seed(0)
    model = get_peft_model(base_model(family), config()).train()
    batch = batch_of(family, samples(FAMILIES[family].inputs))
    adapter = adapter_parameters(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        _loss(states(model, batch)).backward()
        optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == set(adapter), sorted(changed ^ set(adapter))


def check_save_load(family: str) -> None:
    """Saved and loaded into a fresh model with the same base weights, an adapter gives the same bits."""
    batch = batch_of(family, samples(FAMILIES[family].inputs))
    model = adapted(family)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base_model(family), folder).eval()
    _assert_same(result(loaded, batch), result(model, batch))


def check_disable(family: str) -> None:
    """With its adapters disabled a model gives the base's bits; enabled, it doesn't."""
    batch = batch_of(family, samples(FAMILIES[family].inputs))
    model, expected = adapted(family), result(base_model(family), batch)
    with model.disable_adapter():
        _assert_same(result(model, batch), expected)
    enabled = result(model, batch)
    assert any(not torch.allclose(enabled[name], expected[name], atol=1e-2) for name in expected)


def check_padding(family: str, model: nn.Module | None = None) -> None:
    """A sample gives the same alone and in a padded batch, on each side on which the base model keeps to that."""
    model, base = model or adapted(family, mended=True), base_model(family, mended=True)
    for side in ("left", "right"):
        of_base = _padding_error(family, base, side)
        if side not in FAMILIES[family].paddings:
            assert of_base > PADDING_TOLERANCE, f"the base keeps to it on the {side}: {of_base:.1e}"
            continue
        assert of_base <= PADDING_TOLERANCE, f"the base itself is off by {of_base:.1e} on the {side}"
        error = _padding_error(family, model, side)
        assert error <= PADDING_TOLERANCE, f"off by {error:.1e} on the {side}, the base by {of_base:.1e}"


def check_batch(family: str) -> None:
    """Without any mask, samples of one length give in a batch what they give alone."""
    of_base = _batch_error(family, base_model(family))
    assert of_base <= PADDING_TOLERANCE, f"the base itself is off by {of_base:.1e}"
    error = _batch_error(family, adapted(family))
    assert error <= PADDING_TOLERANCE, f"off by {error:.1e}, the base by {of_base:.1e}"


def check_generation(family: str, model: nn.Module | None = None) -> None:
    """Greedy generation with a cache gives the logits that it gives without."""
    known, model = FAMILIES[family], model or adapted(family, mended=True)
    side = "left" if known.paddings and "left" in known.paddings else "right"
    rows = samples(known.inputs)
    batch = collate(rows if known.paddings else rows[:1], side)
    prompt = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
    cached = _generate(model, prompt, use_cache=True)
    if known.generates == "forward":
        logits = _logits_of_forward(model, prompt, cached.sequences)
    else:
        uncached = _generate(model, prompt, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
        logits = torch.stack(uncached.logits, dim=1)
    error = _relative_error(torch.stack(cached.logits, dim=1), logits)
    assert error <= CACHE_TOLERANCE, f"logits are off by {error:.1e}"


CHECKS: dict[str, tuple[Callable[..., None], Callable[[Family], bool]]] = {
    "default targets": (check_targets, lambda family: True),
    "identity": (check_identity, lambda family: True),
    "training": (check_training, lambda family: True),
    "save/load": (check_save_load, lambda family: True),
    "batch": (check_batch, lambda family: True),
    "padding": (check_padding, lambda family: family.paddings is not None),
    "generation": (check_generation, lambda family: family.generates is not None),
    "disable": (check_disable, lambda family: True),
}


def outcome(family: str, check: str) -> Exception | None:
    """What stopped a check on a family; None if it passed."""
    torch.manual_seed(0)
    try:
        CHECKS[check][0](family)
    except Exception as error:
        return error
    return None


def applicable() -> Iterator[tuple[str, str]]:
    """All families, each with the checks that apply to it."""
    for family, known in FAMILIES.items():
        yield from ((family, check) for check, (_, applies) in CHECKS.items() if applies(known))


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        difference = (actual[name] - expected[name]).abs().max()
        assert torch.equal(actual[name], expected[name]), f"{name} differs by {difference:.1e}"


def _loss(given: dict[str, Tensor]) -> Tensor:
    """A scalar that depends on every feature of every token, each by another weight."""
    flat = torch.cat([value.flatten() for value in given.values()])
    return (flat * torch.randn(flat.shape, generator=torch.Generator().manual_seed(3))).mean()


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to entries that are large."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def _padding_error(family: str, model: nn.Module, side: str) -> float:
    rows = samples(FAMILIES[family].inputs)
    alone = [batch_of(family, [row]) for row in rows]
    return _difference(model, batch_of(family, rows, side), alone)


def _batch_error(family: str, model: nn.Module) -> float:
    rows = samples(FAMILIES[family].inputs, of_one_length=True)
    rows = [{name: value for name, value in row.items() if not name.endswith("attention_mask")} for row in rows]
    return _difference(model, collate(rows), rows)


def _difference(model: nn.Module, batch: Row, alone: list[Row]) -> float:
    """Largest relative error of samples in a batch, compared with each alone."""
    together = result(model, batch)
    errors = []
    for i, row in enumerate(alone):
        for name, expected in result(model, row).items():
            actual = together[name].unflatten(0, (len(alone), -1))[i]
            mask = _mask_of(model, batch, name, together[name])
            errors.append(_relative_error(actual if mask is None else actual[:, mask[i]], expected))
    return max(errors)


def _mask_of(model: nn.Module, batch: Row, name: str, state: Tensor) -> Tensor | None:
    """Which tokens of an output are valid, `(batch, time)`; None if all are."""
    if name in ("last_hidden_state", "logits") and "decoder_attention_mask" in batch:
        return batch["decoder_attention_mask"].bool()
    if "attention_mask" not in batch:
        return None
    if "input_values" in batch:  # many samples per token
        return model._get_feature_vector_attention_mask(state.shape[1], batch["attention_mask"]).bool()
    if name in ("last_hidden_state", "logits", "encoder_last_hidden_state", "text_model_output"):
        return batch["attention_mask"].bool()
    return None


def _generate(model: nn.Module, prompt: Row, *, use_cache: bool) -> Any:
    return model.generate(
        **prompt,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )


@torch.no_grad()
def _logits_of_forward(model: nn.Module, prompt: Row, sequences: Tensor) -> Tensor:
    """What one forward over the prompt and all that was generated gives for the latter."""
    new = sequences[:, -NEW_TOKENS:]
    ids = torch.cat([prompt["input_ids"], new], dim=1)
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(new)], dim=1)
    return model(**prompt | {"input_ids": ids, "attention_mask": mask}).logits[:, -NEW_TOKENS - 1 : -1]
