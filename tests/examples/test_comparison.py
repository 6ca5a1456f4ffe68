"""The comparison of methods: its peers, its plan, its results on disk, its tables, and a whole run on a tiny task."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import low_resource_comparison
import numpy as np
import pytest
import torch
from comparison.cells import GRID_SEED, RATES, Cell, Store, chosen_rates, finals, grid, run
from comparison.grounding import GroundingTask
from comparison.methods import METHODS, adapt
from comparison.report import beside_reference, mean_and_spread, of_setting, table, table_by_videos
from comparison.summaries import SummaryTask
from summarisation.how2 import SummarySample
from summarisation.modeling import SummaryConfig, SummaryModel
from summarisation.ordered_captions import (
    GREEDY,
    caption_tokenizer,
    make_caption_story,
    ordered_caption,
    plain_caption,
)
from summarisation.training import SummaryCollator, summarise
from transformers import BertConfig, T5Config
from video_grounding.features import Collator
from video_grounding.modeling import GroundingConfig, GroundingModel

from peft_read import ReadConfig


class TinyTokenizer:
    """What the collator of grounding examples asks of a tokeniser."""

    pad_token_id, sep_token_id = 0, 3


class TinyTask(GroundingTask):
    """Which frames are large? A text model of two small blocks, and examples of random lengths."""

    def make(self, seed):
        (self.work / str(seed)).mkdir(parents=True, exist_ok=True)

    def examples(self, seed):
        rng = np.random.default_rng(seed)

        def example():
            features = torch.from_numpy(rng.normal(size=(int(rng.integers(3, 6)), 4))).float()
            labels = (features[:, 0] > 0).float()
            labels[0] = 1
            asked, events = np.ones(len(labels)), np.arange(len(labels))
            query = {"input_ids": [2, int(rng.integers(5, 30)), 3], "word_mask": [0, 1, 0]}
            return query | {"frame_features": features, "labels": labels, "asked": asked, "events": events}

        return {split: [example() for _ in range(n)] for split, n in (("train", 8), ("validation", 4), ("test", 4))}

    def base(self, seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        return GroundingModel(GroundingConfig(BertConfig(vocab_size=30, **sizes), feature_size=4, sep_token_id=3))

    def collator(self, noisy=()):
        return Collator(TinyTokenizer(), 0.1 if noisy else 0.0, noisy)


OLD_NAME = pytest.mark.filterwarnings(
    "ignore:`past_key_values` is deprecated:FutureWarning"
)  # as PEFT calls the cache


@OLD_NAME
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_what_it_says(tmp_path, method):
    """The base's other weights stay as they are; what is counted is what changes."""
    task = TinyTask("positions", tmp_path)
    model = task.base(0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = run(task, Cell("positions", method, 8, 2, 0, 1e-2), tmp_path / "out")
    assert result["test"].keys() == {"mAP", "hit@1"}
    assert len(result["losses"]) == 2
    weights = adapt(model, method, task.heads)
    assert result["weights"] == weights
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if name.startswith("saliency_head")} == {
        "saliency_head.weight",
        "saliency_head.bias",
    }
    assert ("frame_projection.weight" in trained) == (METHODS[method].pvla is not None)
    if METHODS[method].config is not None:
        prefix = METHODS[method].config().peft_type.value.lower()
        assert len(trained) > 2
        assert all("base_layer" not in name and "embeddings" not in name for name in trained)
        assert weights < sum(weight.numel() for weight in before.values()) / 2 or prefix in ("read", "prefix_tuning")
    elif method == "partial":
        assert all(".layer.1." in name for name in trained if not name.startswith("saliency_head"))
    elif method == "bias":
        assert all(name.endswith("bias") or "LayerNorm" in name for name in trained if "saliency" not in name)
    elif method == "full":
        assert {name for name, _ in model.named_parameters()} - trained == {
            "text_model.embeddings.word_embeddings.weight",
            "frame_projection.weight",
            "frame_projection.bias",
        }


def test_pvla_is_in_the_loss_of_its_method(tmp_path, monkeypatch):
    """The same run with a weight of 0 ends elsewhere."""
    task, cell = TinyTask("positions", tmp_path), Cell("positions", "read-pvla", 8, 2, 0, 1e-2)
    with_it = run(task, cell, tmp_path / "out")["losses"]
    assert METHODS["read-pvla"].pvla
    monkeypatch.setitem(METHODS, "read-pvla", replace(METHODS["read-pvla"], pvla={"pvla_weight": 0.0}))
    assert run(task, cell, tmp_path / "out")["losses"] != with_it


@OLD_NAME
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_prompts_leave_the_model_s_interface(tmp_path, method):
    """As many logits as frames, padding without influence, and token types that count although PEFT drops them."""
    task = TinyTask("positions", tmp_path)
    model, examples = task.base(0).eval(), task.examples(0)["train"][:3]
    adapt(model, method, task.heads)
    model.eval()
    names = ("input_ids", "attention_mask", "frame_features", "frame_mask")

    def logits(some):
        batch = task.collator()(some)
        return model(**{name: batch[name] for name in names}).logits

    together = logits(examples)
    for row, example in enumerate(examples):
        assert torch.allclose(together[row, : len(example["labels"])], logits([example])[0], atol=1e-5)
    with torch.no_grad():
        model.text_model.model.get_base_model().embeddings.token_type_embeddings.weight[1].normal_()
    assert not torch.allclose(together, logits(examples), atol=1e-3)


@pytest.mark.parametrize(("best", "tries"), [(3e-3, 3), (1e-2, 4), (3e-2, 4), (3e-4, 4)])
def test_a_rate_is_better_than_those_beside_it(tmp_path, best, tries):
    """By validation scores of one seed, from the middle of the grid, as far as it takes."""
    store = Store(tmp_path)
    while cells := grid(store, "positions", ["lora"], "mAP"):
        for cell in cells:
            assert (cell.seed, cell.videos, cell.steps) == (GRID_SEED, 100, 200)
            distance = abs(RATES.index(cell.rate) - RATES.index(best))
            store.write(cell, {"validation": {"mAP": -distance}, "test": {"mAP": distance}})
    assert len(store.all()) == tries
    assert chosen_rates(store, "positions", ["lora", "head"], "mAP") == {"lora": best}
    assert len(grid(store, "set", ["lora", "head"], "mAP")) == 2 * 3  # of another panel


def test_the_plan_has_all_methods_of_a_seed_before_the_next():
    """And the first setting first: a table that is cut is whole on fewer bases."""
    plan = list(finals("positions", {"lora": 1e-3, "head": 1e-2}, [(100, 200), (25, 200)], [0, 1]))
    assert [(cell.videos, cell.seed, cell.method) for cell in plan[:4]] == [
        (100, seed, method) for seed in (0, 1) for method in ("lora", "head")
    ]
    assert len({cell.name for cell in plan}) == 8


def result_of(method, seed, value, rate=1e-2, **fields):
    scores = {"mAP": value, "hit@1": value / 2}
    setting = {"panel": "set", "method": method, "videos": 100, "steps": 200, "seed": seed, "rate": rate}
    rest = {"weights": 1234, "cpu_seconds_a_step": 0.5, "validation_curve": [(40, 1.0)]}
    return setting | rest | {"chosen": rate == 1e-2, "test": scores} | fields


def test_a_table_is_made_of_the_chosen_rate_alone():
    """Mean and standard deviation over bases, how many, and methods in their order."""
    results = [result_of("read-gru", seed, value) for seed, value in enumerate((90.0, 92.0))]
    results += [
        result_of("head", 1, 50.0),
        result_of("read-gru", 0, 10.0, rate=1e-3),
        result_of("lora", 0, 1.0, steps=400),
    ]
    assert list(of_setting(results, "set", 100, 200)) == ["head", "read-gru"]
    rows = table(results, "set", 100, 200, ["mAP"], {"head": 321}).splitlines()
    assert rows[2] == "| head alone | 50.0 | -42.0 (0 of 1) | 1 | 1,234 | 0.01 | 0.500 | 321 |"
    assert rows[3] == "| READ, GRU | 91.0 ± 1.4 |  | 2 | 1,234 | 0.01 | 0.500 | - |"
    assert mean_and_spread([1.0, 3.0]) == "2.0 ± 1.4"


def test_a_method_is_compared_base_by_base():
    """The bases differ more than the methods do: on each, the lone difference counts."""
    ours = [result_of("read-gru", seed, value) for seed, value in enumerate((50.0, 90.0, 70.0))]
    theirs = [result_of("lora", seed, value) for seed, value in ((0, 51.0), (2, 73.0), (4, 10.0))]
    assert beside_reference(theirs, ours, "mAP") == "+2.0 ± 1.4 (2 of 2)"
    assert beside_reference(theirs[2:], ours, "mAP") == ""


def test_scores_by_training_videos():
    """What is missing shows as such, and so do fewer bases."""
    results = [result_of("read-gru", seed, 90.0 + seed, videos=videos) for seed in (0, 2) for videos in (25, 100)]
    results += [result_of("head", 1, 50.0, videos=100), result_of("head", 1, 9.0, videos=25, steps=400)]
    rows = table_by_videos(results, "set", [25, 100], 200, "mAP").splitlines()
    assert rows[0] == "| method | 25 | 100 |"
    assert rows[2:] == ["| head alone | - | 50.0 (1) |", "| READ, GRU | 91.0 ± 1.4 | 91.0 ± 1.4 |"]


def test_a_whole_run_goes_on_where_it_was_cut(tmp_path, monkeypatch, capsys):
    """Bases, grid, settings, memory, table and picture; nothing is run twice."""
    monkeypatch.setattr(low_resource_comparison, "GroundingTask", TinyTask)
    for module in ("comparison.cells", "low_resource_comparison"):
        for name, value in {"GRID_VIDEOS": 8, "GRID_STEPS": 2, "RATES": (1e-3, 1e-2)}.items():
            monkeypatch.setattr(f"{module}.{name}", value)
    monkeypatch.setattr(low_resource_comparison, "ProcessPoolExecutor", Here)
    command = [
        "x",
        "--panels",
        "positions",
        "--methods",
        "head",
        "read-gru",
        "--seeds",
        "1",
        "2",
        "--settings",
        "8x2",
        "4x2",
        "--jobs",
        "1",
    ]
    command += ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results.json")]
    monkeypatch.setattr("sys.argv", command)
    low_resource_comparison.main()
    said = capsys.readouterr().out
    assert "12 runs (1 panels, 2 bases each" in said
    assert "| READ, GRU |" in said
    assert "positions: who doesn't see the order scores" in said
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(results["runs"]) == 2 * 2 + 2 * 4  # rates are chosen on a seed of their own
    told = {key for run in results["runs"] for key in run}
    assert told >= {"test", "validation", "validation_curve"}
    assert not told & {"losses", "seconds"}, "what no page tells stays in the work folder"
    assert {folder.name for folder in (tmp_path / "work" / "made").iterdir()} == {"0", "1", "2"}
    assert results["command"].endswith("--panels positions --methods head read-gru --seeds 1 2 --settings 8x2 4x2")
    assert results["memory"]["positions"].keys() == {"head", "read-gru"}
    assert (tmp_path / "results.png").stat().st_size > 5000
    monkeypatch.setattr(low_resource_comparison, "run", None)  # would fail if anything were run again
    low_resource_comparison.main()
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["runs"] == results["runs"]


def test_a_run_that_fails_ends_the_rest():
    """What waits in the pool is dropped, so that the error shows at once."""
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(ZeroDivisionError),
    ):
        low_resource_comparison.wait(pool, [(divmod, (1, 0)), *[(time.sleep, (0.2,))] * 100], float("inf"))
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(divmod, 1, 1)


def test_nothing_begins_after_the_deadline(capsys):
    done = []
    with ThreadPoolExecutor(1) as pool:
        low_resource_comparison.wait(pool, [(done.append, (1,)), (done.append, (2,))], time.time() - 1)
    assert not done
    assert "The time is up: 2 of 2 are left out" in capsys.readouterr().out


class Here:
    """A pool that runs things where they are asked for."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, function, *arguments):
        done = function(*arguments)
        return type("Done", (), {"result": lambda self: done})()


def test_captions_tell_the_digits_in_order_and_in_none():
    """Made of the same words; stories show each digit once, and every second clip shows every event."""
    assert ordered_caption([7, 1, 5]) == "first a seven , then a one , finally a five"
    assert plain_caption([7, 1, 5]) == "a one , a five , a seven"
    rng = np.random.default_rng(0)
    tokenizer = caption_tokenizer()
    for _ in range(50):
        story = make_caption_story(rng)
        assert len(set(story.digits)) == len(story.digits) >= 3
        assert set(story.event_of_clip[::2]) >= set(range(len(story.digits)))
        for caption in (ordered_caption(story.digits), plain_caption(story.digits)):
            ids = tokenizer(caption)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == caption


def tiny_summary_model():
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = T5Config(
        vocab_size=len(caption_tokenizer()), d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=2, **special
    )
    return SummaryModel(SummaryConfig(config, feature_size=4)).eval()


def summary_samples():
    rng = np.random.default_rng(0)
    said = ("a one , a two", "", "a five")
    rows = [rng.normal(size=(n, 4)).astype(np.float32) for n in (5, 3, 1)]
    return [
        SummarySample(str(n), row, words, "first a one") for n, (row, words) in enumerate(zip(rows, said, strict=True))
    ]


@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_summaries_of_a_batch_are_those_of_each_alone(cell):
    """Transcripts and videos of other lengths; greedy summaries by the cache equal the best words without one."""
    model = tiny_summary_model()
    adapted = replace(METHODS["read-gru"], config=lambda: ReadConfig(r=4, cell=cell, init_weights=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "read-gru", adapted)
        adapt(model, "read-gru", SummaryTask.heads)
    collator, samples = SummaryCollator(caption_tokenizer()), summary_samples()
    together = summarise(model, samples, collator, options=GREEDY)
    assert together == [summarise(model, [sample], collator, options=GREEDY)[0] for sample in samples]
    batch = collator(samples)
    inputs = {name: batch[name] for name in ("frame_features", "frame_mask", "input_ids", "attention_mask")}
    tokens = model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        logits = model(**inputs, labels=torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)).logits
    for row in range(len(samples)):
        length = int((tokens[row, 1:] != 0).sum())
        assert logits[row, :length].argmax(-1).tolist() == tokens[row, 1 : length + 1].tolist()


def test_the_parts_of_a_summary_s_sequence_are_masked():
    """The encoder sees the transcript's words, then the projected frames, without a hole; targets end and are cut."""
    model, given = tiny_summary_model(), {}
    model.text_model.encoder.register_forward_pre_hook(lambda m, args, kwargs: given.update(kwargs), with_kwargs=True)
    collator, samples = SummaryCollator(caption_tokenizer()), summary_samples()
    samples[0].summary = "a one , " * 40
    batch = collator(samples)
    names = ("frame_features", "frame_mask", "input_ids", "attention_mask", "labels")
    model(**{name: batch[name] for name in names})
    embed = model.get_input_embeddings()
    for row, sample in enumerate(samples):
        words = torch.tensor(caption_tokenizer()(sample.transcript)["input_ids"], dtype=torch.long)
        frames = model.frame_projection(torch.from_numpy(sample.video))
        assert torch.equal(given["inputs_embeds"][row][batch["text_token_mask"][row]], embed(words))
        assert torch.allclose(given["inputs_embeds"][row][batch["video_token_mask"][row]], frames, atol=1e-6)
        assert given["attention_mask"][row].tolist() == [1] * (len(words) + len(frames)) + [0] * (
            given["attention_mask"].shape[1] - len(words) - len(frames)
        )
    assert batch["labels"].shape == (3, 64)
    assert (batch["labels"][0, -1], batch["labels"][1, 3], batch["labels"][1, 4]) == (1, 1, -100)
    assert "input_ids" not in collator([replace(sample, transcript="") for sample in samples])
