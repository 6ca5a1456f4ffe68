"""Sharing over HTTP: huggingface_hub's own client, in processes of its own, and a Hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import running_hub
from huggingface_hub import ModelCard


CLIENT = Path(__file__).parents[1] / "support" / "hub_client.py"
FILES = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The Hub after everything was pushed and pulled, and what each of the processes found."""
    folder = tmp_path_factory.mktemp("hub")
    with running_hub("ann", "bob", "your-name") as hub:
        hub.broken["ann/adapter"] = 1

        def client(part, home, **environment):
            usual = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
            usual |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
            usual |= {"HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
            usual |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            command = [sys.executable, str(CLIENT), part, str(folder)]
            done = subprocess.run(command, env=os.environ | usual | environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr + "\n".join(hub.requests[-80:])
            return json.loads((folder / f"{part}.json").read_text())

        hub.found = client("publish", folder / "publisher", HF_TOKEN="token of ann")
        hub.pulled = client("pull", folder / "stranger")
        hub.offline = client("offline", folder / "stranger", HF_HUB_OFFLINE="1")
        yield hub


def test_a_stranger_gets_the_tensors_by_the_code_on_the_page(shared):
    """Each card's own code, run in a new process, by repository, revision, subfolder, and for a composite."""
    assert shared.pulled["equal"] == dict.fromkeys(
        ["ann/adapter", "ann/two", "ann/trained", "ann/lstta", "ann/adapter@v2", "ann/private"], True
    )


def test_a_repository_holds_the_adapter_and_its_card(shared):
    assert set(shared.pulled["files"]["ann/adapter"]) == FILES
    assert set(shared.pulled["files"]["ann/lstta"]) == FILES
    assert set(shared.pulled["files"]["ann/two"]) == FILES | {
        "other/adapter_config.json",
        "other/adapter_model.safetensors",
    }


def test_from_the_cache_offline(shared):
    """What was pulled once needs no network, and `import peft_read` first."""
    assert shared.offline["without the import"] == "KeyError('READ')"
    assert shared.offline["equal"] == {"ann/adapter": True, "ann/two/other": True}


def test_a_private_repository_is_refused_without_a_token(shared):
    assert "RepositoryNotFoundError" in shared.pulled["refusals"]["private"]
    assert shared.repos["ann/private"].private


def test_an_interrupted_upload_can_be_repeated(shared):
    """A push that breaks off commits nothing; the next one does."""
    assert "adapter_model.safetensors" in shared.found["refusals"]["broken"]
    assert shared.found["after the broken push"] == [".gitattributes"]
    assert any(request.endswith("/broken") for request in shared.requests)


def test_the_pushed_card_says_what_was_told(shared):
    """Our card is the last one written, with metadata that the Hub reads."""
    for name, method in (("adapter", "read"), ("lstta", "lstta"), ("trained", "read"), ("pvla", "read")):
        text = shared.text(f"ann/{name}", "README.md")
        card = ModelCard(text)
        assert card.data.library_name == "peft"
        assert method in card.data.tags
        assert f"# {name}\n" in card.text
        assert f'"ann/{name}"' in card.text
        assert "import peft_read" in card.text
    card = ModelCard(shared.text("ann/adapter", "README.md"))
    assert card.data.base_model == "ann/base"
    assert card.data.pipeline_tag == "text-classification"
    assert "base_model:adapter:ann/base" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("Rain", "accuracy", 0.875)
    card = ModelCard(shared.text("ann/lstta", "README.md"))
    assert card.data.base_model == ["ann/vit", "ann/wav2vec2", "ann/bert"]
    assert card.data.pipeline_tag == "video-classification"


def test_edits_on_the_hub_survive_the_next_push(shared):
    """Changed text, a changed field and a section of one's own; tags that a push asks for come in beside them."""
    card = ModelCard(shared.text("ann/adapter", "README.md"))
    assert "Sentences about rain." in card.text
    assert "It was raining." in card.text
    assert card.data.license == "cc0-1.0"
    assert "weather" in card.data.tags
    assert "cc0-1.0" in shared.text("ann/adapter", "README.md", "v2")
    draft = shared.text("ann/pvla", "README.md", "draft")
    assert "# Of the draft\n" in draft
    assert "# Of the draft\n" not in shared.text("ann/pvla", "README.md")


def test_an_unreadable_card_on_the_hub_stays(shared):
    """The weights are pushed without a card, with a warning that names it."""
    (warning,) = shared.found["odd card"]
    assert warning.startswith(
        "The adapter is pushed, its card isn't. The card README.md of ann/odd on the Hub can't be"
    )
    assert shared.text("ann/odd", "README.md") == "---\na: &a [1]\nb: *a\n---\nMine.\n"
    assert "adapter_model.safetensors" in shared.repos["ann/odd"].files()


def test_a_trainer_tells_the_card_what_it_knows(shared):
    """Hyperparameters, data and metrics, by the Trainer's own names."""
    card = ModelCard(shared.text("ann/trained", "README.md"))
    assert "| learning_rate | 5e-05 |" in card.text
    assert "Trained on Rain (8 samples), evaluated on held-out data (4 samples)." in card.text
    assert (card.data.language, card.data.datasets) == ("en", ["ann/rain"])
    (result,) = [each for each in card.data.eval_results if each.metric_type == "loss"]
    assert result.dataset_type == "ann/rain"
    assert {"weather", "generated_from_trainer"} <= set(card.data.tags)
    assert "pvla_weight" in shared.text("ann/pvla", "README.md")


def test_edits_on_the_hub_survive_training_that_pushes(shared):
    """The Trainer pushes its folder at each step that it saves, and writes over no page."""
    first = shared.found["local edit"]
    assert "our biases" in first
    assert "It was raining." in first
    texts = [
        files["README.md"].decode() for files in shared.repos["ann/trained"].commits.values() if "README.md" in files
    ]
    edited = next(number for number, text in enumerate(texts) if "my biases" in text)
    assert len(texts) > edited + 3
    assert all("biases" in text and "It has its base model's biases" not in text for text in texts[edited:])


def test_two_edits_are_not_written_over(shared):
    """Who changed the card here and on the Hub is told so, and loses neither."""
    refusal = shared.found["refusals"]["both changed"]
    assert "changed both in" in refusal
    assert "They differ in ## Limits:" in refusal
    steps = [warning.split("isn't pushed")[0] for warning in shared.found["refusals"]["in training"]]
    assert steps == ["Step 1 ", "Step 2 "]
    assert shared.repos["ann/trained"].messages[-1] == "Upload README.md with huggingface_hub"
    local, remote = shared.found["both changed"]
    assert "no biases" in local
    assert "all biases" in remote


def test_the_readme_shares(shared):
    """Its code, run as it stands: both pushes go to one page."""
    repo = shared.repos["your-name/your-adapter"]
    assert repo.messages == ["initial commit", "Upload model", "End of training"]
    card = ModelCard(repo.files()["README.md"].decode())
    assert card.data.license == "mit"
    assert "from my window" in card.text


def test_lora_is_untouched(shared):
    """Cards of LoRA are the same with and without peft_read, by both ways of pushing."""
    for name in ("lora", "lora-trained"):
        plain, beside = (shared.text(f"{user}/{name}", "README.md") for user in ("ann", "bob"))
        assert plain == beside
        assert "peft_read" not in plain
    assert "It was raining." in plain or "It was raining." in shared.text("ann/lora", "README.md")
