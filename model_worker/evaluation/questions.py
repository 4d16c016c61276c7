"""Questions for a job's trials: the passkey prompts of tasks/landmark.py, and documents with other keys beside them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from memory_service.errors import InvalidArgument
from model_worker.evaluation.trials import Question, Trial
from model_worker.tasks.fillers import Filler
from model_worker.tasks.labels import Labels
from model_worker.tasks.landmark import Passkeys, asked
from model_worker.tasks.tokens import Tokenizer

DISTRACTOR_TOKENS = 512  # Of a document with another key.


class Wording(StrEnum):
    """What the key that is asked for is called."""

    PLAIN = "plain"  # "pass key", as in the Landmark prompt.
    LABELLED = "labelled"  # "pass key of amber river": words that no training text had in a label.


class Questions:
    """Makes questions, for one tokenizer and one kind of job."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        window: int,
        wording: Wording = Wording.PLAIN,
        filler: Filler = Filler.LANDMARK,
        distractors: int = 0,
    ):
        """`window`: tokens at the end of a prompt that are read at once, the whole question among them."""
        self._tokenizer, self._window = tokenizer, window
        self._wording, self._filler, self._distractors = wording, filler, distractors
        self._passkeys = Passkeys(tokenizer)

    def question(self, trial: Trial) -> Question:
        """The same for the same trial. Raises InvalidArgument if the trial has too few tokens for a prompt."""
        rng = trial.rng
        labels = Labels(rng, held_out=True)
        label = labels.plain() if self._wording is Wording.PLAIN else labels.draw()
        self._check_window(label)
        prompt = self._passkeys.prompt(trial.tokens, trial.depth, rng, label=label, filler=self._filler)
        others = self._passkeys.distractors(self._distractors, DISTRACTOR_TOKENS, labels, rng, filler=self._filler)
        ids: Tensor = torch.from_numpy(prompt.ids)
        beside = tuple(torch.from_numpy(one) for one in others)
        return Question(trial, ids, prompt.answer, prompt.key, prompt.label, prompt.line, beside)

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text, without space around it."""
        return self._tokenizer.decode(ids).strip()

    def _check_window(self, label: str) -> None:
        needed = len(self._tokenizer.encode(f"\n{asked(label)}"))
        if needed > self._window:
            raise InvalidArgument(
                f"the question has {needed} tokens, but only the last {self._window} of a prompt are read at once: "
                f"give --last-context {needed} or more"
            )
