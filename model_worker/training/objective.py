"""What is minimised: the weighted mean of the negative log-likelihood, where a batch says it is worth something."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model_worker.hf.decoder import Decoder, Step
from model_worker.training.shapes import Batch


class Scored(NamedTuple):
    """What a batch gave."""

    loss: Tensor  # Σ weight · nll, with its gradient
    tallies: Tensor  # [7] float64, as `Tallies`; sums, so those of several batches add up


class Tallies(NamedTuple):
    """Sums over scored targets, and means that follow."""

    loss: float  # weight · nll
    weight: float
    answer_loss: float  # weight · nll of answers
    answer_weight: float
    answer_nll: float
    right: float  # Answers whose most probable token was the right one.
    answers: float

    @property
    def mean_loss(self) -> float:
        """What is minimised."""
        return self.loss / self.weight

    @property
    def mean_answer_nll(self) -> float | None:
        """Nats an answer token; None without answers."""
        return self.answer_nll / self.answers if self.answers else None

    @property
    def accuracy(self) -> float | None:
        """Share of answer tokens that came out right; None without answers."""
        return self.right / self.answers if self.answers else None

    @property
    def mean_text_loss(self) -> float | None:
        """Nats a token of everything that is no answer, weighted; None if nothing else is scored."""
        rest = self.weight - self.answer_weight
        return (self.loss - self.answer_loss) / rest if rest > 1e-9 * self.weight else None


def scored(decoder: Decoder, batch: Batch, attention: Step) -> Scored:
    """Run a batch [B, S] through the decoder; the head only runs where a target has a weight."""
    device = decoder.device
    counts = batch.weights.flatten().nonzero().squeeze(1)  # [N]
    targets, weights, answers = (x.flatten()[counts].to(device) for x in (batch.targets, batch.weights, batch.answers))
    hidden = decoder.hidden(batch.ids.to(device), attention).flatten(0, 1)  # [B·S, C]
    logits = decoder.head(hidden.index_select(0, counts.to(device))).float()  # [N, V]
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")  # [N]
    loss = (nll * weights).sum()
    with torch.no_grad():
        told, worth, asked = nll.double(), weights.double(), answers.double()
        right = (logits.argmax(1) == targets) * asked
        sums = (told * worth, worth, told * worth * asked, worth * asked, told * asked, right, asked)
        tallies = torch.stack([one.sum() for one in sums])
    return Scored(loss, tallies)
