"""A small byte-level BPE vocabulary: digits one by one, and so the characters of a UUID, wherever it stands."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from model_worker.tasks import corpus, lookup
from model_worker.tasks.corpus import Split
from model_worker.tasks.landmark import DESCRIPTION, FILLER

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # Ids 0, 1, 2.
TEMPLATE_WEIGHT = 300  # Times that the tasks' own sentences count.

_HEX = "[0-9a-f]"
UUID = rf"(?<![0-9A-Za-z]){_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}(?![0-9A-Za-z])"
# A piece that is a UUID and nothing else falls into its characters: \G is where the last match ended, so a match that
# did not start with the whole UUID cannot start in a later place.
CHARACTERS_OF_A_UUID = rf"(?:\A(?={UUID}\z)|(?!\A)\G)[0-9a-f-](?=[0-9a-f-]*\z)"

_EXAMPLE = "6ab6ea3e-f288-4f33-ba46-7f42bb75b03f"
TEMPLATES = (
    f"{DESCRIPTION}\n{FILLER} {FILLER}\nThe pass key is 12345. Remember it. 12345 is the pass key.\n"
    f"{FILLER} {FILLER}\nWhat is the pass key? The pass key is 12345.",
    "\nNote that the access code of garden is 12. \nThe secret number for island is 3.",
    f'{lookup.TASK}{lookup.OPENING}"{_EXAMPLE}": "{_EXAMPLE}", "{_EXAMPLE}": "{_EXAMPLE}"}}\n\nKey: "{_EXAMPLE}"\n'
    f"The value associated with the specified key is: {_EXAMPLE}\n",
)


def train_reference() -> Tokenizer:
    """The reference model's vocabulary, from this machine's library, documentation and licences.

    Another version of Python has other texts and gives another vocabulary: the one that came with the weights is kept
    beside them.
    """
    return train([one.text for one in corpus.texts(Split.TRAIN)], TEMPLATES)


def train(texts: Iterable[str], templates: Iterable[str] = (), size: int = 1024) -> Tokenizer:
    """Learn a vocabulary of `size` tokens; the same texts give the same one.

    A run of hex letters would be cut differently after each neighbour ("cafe" is a word, "c4fe" is not), and a model
    could not match a value's middle with its beginning. Inside a UUID, nothing is merged: 36 characters, 36 tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(UUID), "isolated"),
            pre_tokenizers.Split(Regex(CHARACTERS_OF_A_UUID), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    weighted = [template for template in templates for _ in range(TEMPLATE_WEIGHT)]
    tokenizer.train_from_iterator([*texts, *weighted], trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, begin, end = SPECIAL_TOKENS
    special = {"bos_token": begin, "eos_token": end, "pad_token": pad}
    # `clean_up_tokenization_spaces` would take the space before a full stop out of code.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
