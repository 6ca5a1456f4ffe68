"""Models of one's own that meet PVLA in ways of their own: each a class, its data, and the alignment by hand."""

import torch
from alignment_batches import places, random, words
from alignment_models import adapt
from models import VOCAB, WIDTH, bert_config
from torch import nn
from transformers import BertModel, PreTrainedModel
from transformers.models.bert.modeling_bert import BertEncoder


FEATURES, FRAMES = 6, 4
PLACEHOLDER = VOCAB - 1
ENCODER = {"target_modules": r".*encoder\.layer\.\d+\.output\.dense"}


def loss_of(logits, labels):
    return None if labels is None else nn.functional.cross_entropy(logits, labels)


class Own(PreTrainedModel):
    """What all of them have."""

    config_class = type(bert_config())

    def __init__(self, config):
        super().__init__(config)
        self.project = nn.Linear(FEATURES, WIDTH)
        self.head = nn.Linear(WIDTH, 2)
        self.make(config)
        self.post_init()

    def answer(self, states, labels):
        logits = self.head(states[:, 0])
        return {"loss": loss_of(logits, labels), "logits": logits}


class PutsVideoIn(Own):
    """One class that has the embeddings and the blocks, and puts the video in the places of words itself."""

    def make(self, config):
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.encoder = BertEncoder(config)

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids, frame_features, labels=None):
        embedded = self.embed_tokens(input_ids)
        places_of_video = (input_ids == PLACEHOLDER)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(places_of_video, self.project(frame_features))
        return self.answer(self.encoder(embedded).last_hidden_state, labels)

    @staticmethod
    def data(rows=8):
        data = []
        for row in range(rows):
            ids = words(row)
            ids[1 : 1 + FRAMES] = PLACEHOLDER
            masks = {"video_token_mask": places((1, 5)), "text_token_mask": places((5, 10))}
            data.append({"input_ids": ids, "frame_features": random(FRAMES, FEATURES, seed=row), **masks})
        return labelled(data)

    def by_hand(self, batch):
        return self.project(batch["frame_features"]), self.embed_tokens(batch["input_ids"][:, 5:])


class WithTower(Own):
    """A text encoder that is given embeddings."""

    def make(self, config):
        self.text = BertModel(config)

    def get_input_embeddings(self):
        return self.text.get_input_embeddings()


class TakesMask(WithTower):
    """Its forward names a mask of PVLA."""

    def make(self, config):
        super().make(config)
        self.kind = nn.Embedding(2, WIDTH)

    def forward(self, input_ids, attention_mask=None, video_token_mask=None, labels=None):
        embedded = self.get_input_embeddings()(input_ids) + self.kind(video_token_mask.long())
        states = self.text(inputs_embeds=embedded, attention_mask=attention_mask).last_hidden_state
        return self.answer(states, labels)

    @staticmethod
    def data(rows=8):
        masks = {"video_token_mask": places((1, 5)), "text_token_mask": places((5, 10))}
        return labelled([{"input_ids": words(row), "attention_mask": places((0, 10)), **masks} for row in range(rows)])


class ProjectsWords(WithTower):
    """Words go through a trained module of their own, behind frozen embeddings."""

    def make(self, config):
        super().make(config)
        self.words = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, frame_features, labels=None):
        video, said = self.by_hand({"input_ids": input_ids, "frame_features": frame_features})
        return self.answer(self.text(inputs_embeds=torch.cat([video, said], 1)).last_hidden_state, labels)

    @staticmethod
    def data(rows=8):
        masks = {"video_token_mask": places((0, 4), time=9), "text_token_mask": places((4, 9), time=9)}
        return labelled(
            [
                {"input_ids": words(row, 5), "frame_features": random(FRAMES, FEATURES, seed=row), **masks}
                for row in range(rows)
            ]
        )

    def by_hand(self, batch):
        return self.project(batch["frame_features"]), self.words(self.get_input_embeddings()(batch["input_ids"]))


class HasPrefix(WithTower):
    """A learnt state stands before the words, which frames follow."""

    def make(self, config):
        super().make(config)
        self.prefix = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, input_ids, frame_features, labels=None):
        embedded = self.get_input_embeddings()(input_ids)
        sequence = [self.prefix.expand(len(embedded), -1, -1), embedded, self.project(frame_features)]
        return self.answer(self.text(inputs_embeds=torch.cat(sequence, 1)).last_hidden_state, labels)

    @staticmethod
    def data(rows=4):
        """`[prefix] start verb noun end frames`, with a verb of its own for each."""
        masks = {"video_token_mask": places((5, 9), time=9), "text_token_mask": places((2, 4), time=9)}
        return labelled(
            [
                {
                    "input_ids": torch.tensor([1, 10 + row, 20, 2]),
                    "frame_features": random(FRAMES, FEATURES, seed=row),
                    **masks,
                }
                for row in range(rows)
            ]
        )

    def by_hand(self, batch):
        return self.project(batch["frame_features"]), self.get_input_embeddings()(batch["input_ids"][:, 1:3])


def labelled(data):
    return [example | {"labels": torch.tensor(row % 2)} for row, example in enumerate(data)]


def adapted(cls, saved, **options):
    """A model of one of these classes with READ in its blocks."""
    torch.manual_seed(0)
    return adapt(cls(bert_config()), modules_to_save=saved, **((ENCODER if cls is PutsVideoIn else {}) | options))
