"""What users of the Hub do, each part in a process of its own: `python hub_client.py PART FOLDER`.

`HF_ENDPOINT` has to be set before huggingface_hub is imported, so these aren't tests themselves.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub import EvalResult, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from models import WIDTH, bert_config, classifier, vit_config
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    default_data_collator,
)


ROWS = [{"input_ids": list(range(i, i + 8)), "attention_mask": [1] * 8, "labels": i % 3} for i in range(3, 11)]
OWN_SECTION = "## My notes\n\nIt was raining.\n"
RESULT = EvalResult("text-classification", "ann/rain", "Rain", "accuracy", 0.875, dataset_split="test")


def main():
    torch.manual_seed(0)
    part, folder = sys.argv[1], Path(sys.argv[2])
    found = {"publish": publish, "pull": pull, "offline": offline}[part](folder)
    (folder / f"{part}.json").write_text(json.dumps(found))


def publish(folder):
    """Push adapters by all ways, and edit their cards on the Hub in between."""
    classifier().push_to_hub("ann/base")
    lora("ann", None, folder)
    import peft_read

    lora("bob", "token of bob", folder)

    found = {"refusals": {}}
    model = adapter(peft_read.ReadConfig(r=4, cell="gru", modules_to_save=["classifier"]))
    try:
        model.push_to_hub("ann/adapter")
    except Exception as error:
        found["refusals"]["broken"] = repr(error)
    found["after the broken push"] = HfApi().list_repo_files("ann/adapter")
    peft_read.describe_adapter(model, data="Words about rain.", results=[RESULT], license="mit")
    model.push_to_hub("ann/adapter")
    edit("ann/adapter", ("Words about rain.", "Sentences about rain."), ("license: mit", "license: cc0-1.0"))
    model.push_to_hub("ann/adapter", tags=["weather"])
    keep(folder, "ann/adapter", model)

    randomize(model, 1)
    model.push_to_hub("ann/adapter", revision="v2")
    keep(folder, "ann/adapter@v2", model)
    model.push_to_hub("ann/private", private=True)

    model.add_adapter("other", peft_read.ReadConfig(r=2, modules_to_save=["classifier"]))
    randomize(model, 2)
    model.push_to_hub("ann/two")
    keep(folder, "ann/two", model)

    odd_card(model, found)
    trained(folder, found)
    composite(folder)
    readme(folder)
    return found


def odd_card(model, found):
    """A card on the Hub that nothing should read, and a push thereafter."""
    model.push_to_hub("ann/odd")
    text = "---\na: &a [1]\nb: *a\n---\nMine.\n"
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="ann/odd")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.push_to_hub("ann/odd", commit_message="with the odd card")
    found["odd card"] = [str(each.message) for each in caught if "its card isn't" in str(each.message)]


def lora(user, token, folder):
    """What PEFT and transformers make of LoRA, by both ways, from a repository with a card of one's own as well."""
    torch.manual_seed(0)
    base = BertForSequenceClassification.from_pretrained("ann/base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    model.push_to_hub(f"{user}/lora", token=token, tags=["weather"])
    edit(f"{user}/lora", ("---\n\n", f"---\n\n{OWN_SECTION}\n"), token=token)
    model.push_to_hub(f"{user}/lora", token=token)
    args = TrainingArguments(folder / user / "lora-trained", hub_model_id=f"{user}/lora-trained", hub_token=token)
    args = set_usual(args)
    trainer = Trainer(model, args, default_data_collator, ROWS, ROWS)
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()


def set_usual(args):
    """Few steps, on the CPU, and no reports."""
    args.max_steps, args.per_device_train_batch_size, args.report_to, args.save_strategy = 2, 4, [], "no"
    args.disable_tqdm = True
    return args


def trained(folder, found):
    """Trainers that push, into repositories whose cards are edited in between."""
    import peft_read

    model = adapter(peft_read.ReadConfig(r=4, modules_to_save=["classifier"]))
    options = {"hub_model_id": "ann/trained", "push_to_hub": True, "hub_strategy": "every_save"}
    args = set_usual(TrainingArguments(folder / "trained", **options))
    args.save_strategy, args.save_steps = "steps", 1
    trainer = Trainer(model, args, default_data_collator, ROWS, ROWS[:4])
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(dataset="Rain", dataset_tags="ann/rain", language="en", tags="weather")
    edit("ann/trained", ("It has its base model's biases", "It has my biases"))
    trainer.train()
    trainer.push_to_hub()
    keep(folder, "ann/trained", model)

    local = folder / "trained" / "README.md"
    local.write_text(local.read_text().replace("my biases", "our biases"))
    trainer.push_to_hub()  # changed here alone
    found["local edit"] = remote_text("ann/trained")
    local.write_text(local.read_text().replace("our biases", "no biases"))
    edit("ann/trained", ("our biases", "all biases"))
    try:
        trainer.push_to_hub()
    except ValueError as error:
        found["refusals"]["both changed"] = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()  # pushes nothing over it, and goes on
    found["refusals"]["in training"] = [str(each.message) for each in caught if "isn't pushed" in str(each.message)]
    found["both changed"] = [local.read_text(), remote_text("ann/trained")]

    model = adapter(peft_read.ReadConfig(r=4, modules_to_save=["classifier"]))
    args = set_usual(peft_read.PvlaTrainingArguments(folder / "pvla", hub_model_id="ann/pvla"))
    rows = [row | {"video_token_mask": [1] * 4 + [0] * 4, "text_token_mask": [0] * 4 + [1] * 4} for row in ROWS]
    trainer = peft_read.PvlaTrainer(model, args, default_data_collator, rows, rows[:4])
    trainer.train()
    trainer.push_to_hub()
    HfApi().create_branch("ann/pvla", branch="draft")
    edit("ann/pvla", ("# pvla", "# Of the draft"), revision="draft")
    trainer.push_to_hub(revision="draft")


def composite(folder):
    """A trimodal model of towers that are on the Hub."""
    import peft_read

    sizes = {"num_attention_heads": 4, "hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 64}
    conv = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
    conv |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    ViTModel(vit_config()).push_to_hub("ann/vit")
    Wav2Vec2Model(Wav2Vec2Config(**sizes, **conv)).push_to_hub("ann/wav2vec2")
    BertModel(bert_config()).push_to_hub("ann/bert")
    base = peft_read.TrimodalForFrameClassification.from_pretrained_towers(
        vision="ann/vit", audio="ann/wav2vec2", text="ann/bert", num_labels=3, projection_dim=16
    )
    config = peft_read.LsttaConfig(r=8, num_heads=2, modules_to_save=["fusion", "classifier"])
    model = get_peft_model(base, config).eval()
    randomize(model, 3)
    model.push_to_hub("ann/lstta")
    keep(folder, "ann/lstta", model)


def readme(folder):
    """The README's own code for sharing, as somebody called your-name."""
    import peft_read

    os.environ["HF_TOKEN"] = "token of your-name"
    text = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    share, load = (part.split("```")[0] for part in text.split("\n## Share\n")[1].split("```python\n")[1:3])
    model = adapter(peft_read.ReadConfig(r=2, modules_to_save=["classifier"]))
    args = set_usual(TrainingArguments(folder / "your-adapter"))
    exec(share, {"peft_read": peft_read, "model": model, "trainer": Trainer(model, args, default_data_collator, ROWS)})
    exec(load, {"base_model": BertForSequenceClassification.from_pretrained("ann/base")})


def pull(folder):
    """Load what was pushed by the code on its page, as a stranger without a token."""
    found = {"equal": {}, "files": {}, "refusals": {}}
    for name in ("ann/adapter", "ann/two", "ann/trained", "ann/lstta"):
        code = remote_text(name).split("```python\n")[1].split("```")[0]
        scope = {}
        exec(code, scope)
        found["equal"][name] = same(folder, name, scope["model"])
        found["files"][name] = HfApi().list_repo_files(name)
    base = BertForSequenceClassification.from_pretrained("ann/base")
    model = PeftModel.from_pretrained(base, "ann/adapter", revision="v2")
    found["equal"]["ann/adapter@v2"] = same(folder, "ann/adapter@v2", model)
    try:
        PeftModel.from_pretrained(base, "ann/private")
    except (RepositoryNotFoundError, ValueError) as error:
        found["refusals"]["private"] = repr([error, error.__cause__, error.__context__])
    model = PeftModel.from_pretrained(classifier(), "ann/private", token="token of ann")
    found["equal"]["ann/private"] = same(folder, "ann/adapter@v2", model)
    return found


def offline(folder):
    """Without a network: from the cache, and what happens without the import."""
    found = {"equal": {}}
    base = BertForSequenceClassification.from_pretrained("ann/base")
    try:
        PeftModel.from_pretrained(base, "ann/adapter")
    except KeyError as error:
        found["without the import"] = repr(error)
    import peft_read  # noqa: F401

    found["equal"]["ann/adapter"] = same(folder, "ann/adapter", PeftModel.from_pretrained(base, "ann/adapter"))
    base = BertForSequenceClassification.from_pretrained("ann/base")
    # PEFT 0.21 looks for a subfolder's weights in a subfolder of it, if it is offline and given the repository's name.
    cached = snapshot_download("ann/two")
    model = PeftModel.from_pretrained(base, cached, subfolder="other", adapter_name="other")
    found["equal"]["ann/two/other"] = same(folder, "ann/two", model)
    return found


def adapter(config):
    """The base from the Hub, with an adapter that acts."""
    model = get_peft_model(BertForSequenceClassification.from_pretrained("ann/base"), config).eval()
    randomize(model, 0)
    return model


@torch.no_grad()
def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".read_" in name or ".lstta_" in name or ".modules_to_save." in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def keep(folder, name, model):
    torch.save(weights(model), folder / f"{name.replace('/', ' ')}.pt")


def same(folder, name, model):
    """Whether a model has the adapters that were kept, those of them that it has, and all of their weights."""
    kept, got = torch.load(folder / f"{name.replace('/', ' ')}.pt"), weights(model)
    return bool(got) and all(
        got[adapter].keys() == kept[adapter].keys()
        and all(torch.equal(value, kept[adapter][key]) for key, value in got[adapter].items())
        for adapter in got
    )


def weights(model: nn.Module):
    return {
        name: {key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}
        for name in model.peft_config
    }


def edit(repo, *changes, token=None, revision=None):
    """Change a card on the Hub, as its page lets one, and add a section."""
    text = remote_text(repo, token, revision)
    for old, new in changes:
        assert old in text, (old, text)
        text = text.replace(old, new, 1)
    if OWN_SECTION not in text:
        text = text.replace("\n## Limits\n", f"\n{OWN_SECTION}\n## Limits\n", 1)
    HfApi().upload_file(
        path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo, token=token, revision=revision
    )


def remote_text(repo, token=None, revision=None):
    return Path(hf_hub_download(repo, "README.md", token=token, revision=revision, force_download=True)).read_text()


if __name__ == "__main__":
    main()
