"""Tasks: a prompt holds what it says it holds, where it says, and its answer is the only one."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from memory_service.errors import InvalidArgument
from model_worker import reference
from model_worker.tasks import corpus, dictionary, labels, landmark, lookup, repeats, ruler, tokenizer
from model_worker.tasks.corpus import Kind, Split, Text
from model_worker.tasks.fillers import Filler
from model_worker.tasks.labels import Labels
from model_worker.tasks.landmark import DESCRIPTION, FILLER, Passkeys
from model_worker.tasks.parts import Part, Role, text_of
from model_worker.tasks.repeats import Repeat
from model_worker.tasks.tokens import Tokenizer, tokens_of

UUIDS = ("fadebeef-cafe-4ead-beef-abcdefabcdef", "01234567-89ab-4def-8123-456789abcdef")
SAMPLE = f"{DESCRIPTION}\n{FILLER} {FILLER}\nThe pass key is 4711. Remember it. What are the grasses of yellow suns?\n"


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """The reference model's."""
    return tokens_of(reference.path("reference"))


def sentencepiece_like() -> Tokenizer:
    """A BPE that marks the beginning of words, also of the first, and knows no more bytes than it has seen."""
    made = FastTokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], initial_alphabet=list(string.printable), show_progress=False
    )
    made.train_from_iterator([SAMPLE] * 3, trainer)
    return tokens_of(made)


class Blocks:
    """A tokenizer whose tokens are eight characters counted from the text's beginning: no repetition repeats them."""

    size, begin, end, name = 1 << 31, None, None, "blocks"

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, text[at : at + 8])) for at in range(0, len(text), 8)]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        raise AssertionError("not asked for here")

    def decode(self, ids: Sequence[int]) -> str:
        raise AssertionError("not asked for here")


# --- Tokenizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uuid", UUIDS)
@pytest.mark.parametrize(
    ("before", "after"),
    [('"', '"'), (" ", "\n"), ("", ""), ('{"', '": "'), ("is: ", "."), ("- ", " the"), ("5 ", "\n"), ("(", "),")],
)
def test_a_uuid_is_its_characters_wherever_it_stands(small: Tokenizer, uuid: str, before: str, after: str) -> None:
    alone = small.encode(uuid)
    ids, owners = small.encode_parts([before, uuid, after])
    assert [small.decode([one]) for one in alone] == list(uuid)
    assert [one for one, owner in zip(ids, owners, strict=True) if owner == 1] == alone


def test_what_looks_like_a_part_of_a_uuid_is_still_words(small: Tokenizer) -> None:
    for text in (" define", "define", "code-feed", "a-b"):
        assert len(small.encode(text)) < len(text) or len(text) < 4
    # A hex digit more on either side, and it is none.
    for text in (f"a{UUIDS[0]}", f"{UUIDS[0]}0"):
        assert small.encode(text) != [small.encode(letter)[0] for letter in text]


def test_digits_stand_one_by_one(small: Tokenizer) -> None:
    assert [small.decode([one]) for one in small.encode("is 12345.")][-6:] == [*"12345", "."]


def test_every_text_comes_back_from_its_tokens(small: Tokenizer) -> None:
    text = "naïve 東京 🙂\t\x00\r\n  indented(x)[0] = 'a' -- 0xFF " + UUIDS[0]
    assert small.decode(small.encode(text)) == text


def test_transformers_reads_the_saved_folder_and_gives_the_same_ids(tmp_path: Path) -> None:
    made = tokenizer.train([SAMPLE], [f'{{"{UUIDS[0]}": 1}}'], size=300)
    tokenizer.save(made, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"{SAMPLE} . {UUIDS[1]}"
    ids = loaded(text)["input_ids"]
    assert ids == tokens_of(tmp_path).encode(text) == tokens_of(loaded).encode(text)
    assert loaded.decode(ids) == text  # No space before the full stop is cleaned up.
    assert [loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id] == [0, 1, 2]
    assert (tokens_of(loaded).begin, tokens_of(loaded).end) == (1, 2)


def test_the_same_texts_train_the_same_vocabulary() -> None:
    one, two = (tokenizer.train([SAMPLE, "other words"], [FILLER], size=290).to_str() for _ in range(2))
    assert one == two


def test_a_token_belongs_to_the_part_it_ends_in(small: Tokenizer) -> None:
    ids, owners = small.encode_parts(["The pass", " key", " is ", "12", "."])
    told = [(small.decode([one]), owner) for one, owner in zip(ids, owners, strict=True)]
    assert told[-6:] == [(" key", 1), (" is", 2), (" ", 2), ("1", 3), ("2", 3), (".", 4)]


def test_a_number_that_is_one_token_with_the_space_before_it_is_the_numbers() -> None:
    made = FastTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    made.train_from_iterator(["a 123 a 123"] * 5, trainer)
    ids, owners = tokens_of(made).encode_parts(["a ", "123", " a"])
    assert len(ids) == 3 and owners == [0, 1, 2]


def test_a_folder_without_tokenizer_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"give a folder that holds tokenizer\.json"):
        tokens_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidArgument, match="not a tokenizer"):
        tokens_of(tmp_path)


# --- Corpus ---------------------------------------------------------------------------------------------------------


def test_real_text_is_split_by_file_and_comes_in_the_same_order() -> None:
    every, held_out = corpus.texts(), corpus.texts(Split.HELD_OUT)
    train = [one for one in every if one.split is Split.TRAIN]
    assert len(train) + len(held_out) == len(every) == len({one.name for one in every})
    assert {one.name for one in train}.isdisjoint(one.name for one in held_out)
    assert [one.name for one in every] == sorted(one.name for one in every)
    assert 0.01 < len(held_out) / len(every) < 0.2
    assert {one.kind for one in every} >= {Kind.CODE}
    assert not any("site-packages" in one.name or "/test/" in one.name for one in every)


def test_tokens_are_kept_and_read_again_and_made_anew_where_the_file_is_broken(
    small: Tokenizer, tmp_path: Path
) -> None:
    texts = [Text("a", Kind.CODE, "x = 1"), Text("b", Kind.PROSE, "Some words.")]
    ids = corpus.token_ids(texts, small, tmp_path)
    assert ids.tolist() == [*small.encode("x = 1"), small.end, *small.encode("Some words."), small.end]
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert corpus.token_ids(texts, small, tmp_path).tolist() == ids.tolist()
    assert file.stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:20])
    assert corpus.token_ids(texts, small, tmp_path).tolist() == ids.tolist()
    assert file.stat().st_size > 20
    corpus.token_ids([Text("a", Kind.CODE, "x = 2")], small, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_place_to_keep_tokens_is_no_error(small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(corpus.token_ids([Text("a", Kind.CODE, "x = 1")], small, tmp_path / "file" / "below")) > 1


# --- Labels ---------------------------------------------------------------------------------------------------------


def test_labels_differ_and_the_plain_one_comes_only_when_asked_for_and_once() -> None:
    drawn = Labels(Random(0))
    made = [drawn.plain(), *(drawn.draw() for _ in range(3000))]
    assert len(set(made)) == 3001
    assert made.count(labels.PLAIN) == 1
    with pytest.raises(InvalidArgument):
        drawn.plain()


def test_labels_for_evaluation_have_words_that_training_never_draws() -> None:
    kept, trained = set(labels.words(held_out=True)), set(labels.words())
    assert len(kept) == labels.HELD_OUT_WORDS and kept.isdisjoint(trained)
    known = {word for kind in labels.KINDS for word in kind.split()} | {"of", "for"}
    for seed, held_out in ((0, True), (1, False)):
        drawn = Labels(Random(seed), held_out=held_out)
        own = [set(drawn.draw().split()) - known for _ in range(500)]
        allowed, other = (kept, trained) if held_out else (trained, kept)
        assert all(words <= allowed and words.isdisjoint(other) for words in own)
        assert all(own) or not held_out  # In evaluation, every label has a word.


def test_close_labels_share_their_words_with_an_earlier_one() -> None:
    known = {word for kind in labels.KINDS for word in kind.split()} | {"of", "for"}

    def sharing(close: float) -> float:
        shared = []
        for seed in range(40):
            drawn, seen = Labels(Random(seed), close=close), set[str]()
            for _ in range(24):
                words = set(drawn.draw().split()) - known
                shared.append(bool(words & seen))
                seen |= words
        return sum(shared) / len(shared)

    assert sharing(0.0) < 0.05
    assert sharing(0.4) == pytest.approx(0.37, abs=0.05)


def test_keys_have_one_to_eight_digits_and_mostly_five() -> None:
    rng = Random(0)
    lengths = Counter(len(labels.number(rng)) for _ in range(4000))
    assert set(lengths) == set(range(1, 9))
    assert lengths[5] > 0.75 * 4000


def test_a_stated_key_is_new_once_and_what_is_asked_is_answered() -> None:
    rng = Random(0)
    for _ in range(50):
        stated, asked = labels.stated("vault key of snow", "314", rng), labels.asked("vault key of snow", "314", rng)
        assert [part.text for part in stated if part.role is Role.NEW] == ["314"]
        assert [part.text for part in asked if part.role is Role.ANSWER] == ["314"]
        assert re.match(r"\n(The|Note that the) vault key of snow is 314\.", text_of(stated))
        assert re.search(r"The vault key of snow is 314\.$", text_of(asked))


# --- UUID look-up ---------------------------------------------------------------------------------------------------


def test_a_listing_is_json_and_its_question_is_the_benchmarks() -> None:
    import json

    rng = Random(3)
    records = [lookup.record(rng) for _ in range(5)]
    text = lookup.OPENING + text_of(lookup.listed(records)) + '"}'
    assert json.loads(text.removeprefix("JSON data:\n")) == {one.key: one.value for one in records}
    question = text_of(lookup.asked(records[2]))
    assert question == (
        f'\n\nKey: "{records[2].key}"\nThe value associated with the specified key is: {records[2].value}\n'
    )
    answer = [part for part in lookup.asked(records[2]) if part.role in (Role.ANSWER, Role.COPIED)]
    assert text_of(answer) == records[2].value


def test_uuids_are_random_and_of_version_4() -> None:
    rng = Random(1)
    every = [uuid for _ in range(500) for uuid in lookup.record(rng)]
    assert len(set(every)) == 1000
    assert all(
        re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", one) for one in every
    )


# --- Landmark -------------------------------------------------------------------------------------------------------


def authors_prompt(characters: int, before: int, key: str) -> str:
    """As their script makes it, but for the haystack's cap."""
    garbage = " ".join([FILLER] * (characters // 90 + 1))
    line = f"The pass key is {key}. Remember it. {key} is the pass key."
    question = "What is the pass key? The pass key is"
    return "\n".join([DESCRIPTION, garbage[:before], line, garbage[: characters - before], question])


@pytest.mark.parametrize("before", [0, 1, 88, 89, 90, 91, 4000, 9999, 10_000])
def test_the_prompt_is_the_authors_to_the_letter(small: Tokenizer, before: int) -> None:
    made = Passkeys(small).of_characters(10_000, before, key="31415")
    assert made.text(small) == authors_prompt(10_000, before, "31415")


@pytest.mark.parametrize("name", ["small", "sentencepiece", "blocks"])
def test_ids_are_those_of_the_whole_text_whatever_the_tokenizer(small: Tokenizer, name: str) -> None:
    tokenizers: dict[str, Tokenizer] = {"small": small, "sentencepiece": sentencepiece_like(), "blocks": Blocks()}
    chosen = tokenizers[name]
    rng = Random(name)
    for characters in (0, 50, 500, 700, 2000, 5003, *(rng.randint(1000, 30_000) for _ in range(12))):
        before = rng.randint(0, characters)
        runs = landmark.runs_of(characters, before, labels.PLAIN, "271")
        assert repeats.token_ids(chosen, runs).tolist() == chosen.encode(authors_prompt(characters, before, "271"))


def test_repetitions_are_not_tokenised_again() -> None:
    lengths = []

    class Counting(Blocks):
        def encode(self, text: str) -> list[int]:
            lengths.append(len(text))
            return [ord(letter) for letter in text]

    ids = repeats.token_ids(Counting(), ["begin ", Repeat("over and ", 10_000), "end"])
    assert "".join(map(chr, ids)) == "begin " + "over and " * 10_000 + "end"
    assert max(lengths) < 200


@pytest.mark.parametrize("tokens", [200, 1000, 4096, 33_000])
@pytest.mark.parametrize("depth", [0.0, 0.31, 1.0])
def test_a_prompt_has_the_tokens_asked_for_and_its_key_at_the_depth(
    small: Tokenizer, tokens: int, depth: float
) -> None:
    made = Passkeys(small).prompt(tokens, depth, Random(tokens))
    assert abs(len(made.ids) - tokens) <= 64
    text, line = made.text(small), small.decode(made.ids[made.line.start : made.line.stop].tolist())
    assert line.strip("\n") == f"The pass key is {made.key}. Remember it. {made.key} is the pass key."
    assert text.count(made.key) == 2 and 1 <= int(made.key) <= 49_999
    assert text.endswith("\nWhat is the pass key? The pass key is")
    assert small.decode(made.answer) == f" {made.key}"
    haystack = len(text) - len(DESCRIPTION) - len(line) - len("\nWhat is the pass key? The pass key is")
    before = text.index(line) - len(DESCRIPTION) - 1
    assert before / haystack == pytest.approx(depth, abs=0.02)


def test_the_same_seed_makes_the_same_prompt_and_another_another(small: Tokenizer) -> None:
    passkeys = Passkeys(small)
    one, same, other = (passkeys.prompt(500, 0.5, Random(seed)) for seed in (1, 1, 2))
    assert one.ids.tolist() == same.ids.tolist() and one.key == same.key
    assert one.key != other.key


def test_a_label_can_be_asked_instead(small: Tokenizer) -> None:
    made = Passkeys(small).prompt(300, 0.5, Random(0), label="door code of the barn", key="77")
    assert "The door code of the barn is 77. Remember it." in made.text(small)
    assert made.text(small).endswith("What is the door code of the barn? The door code of the barn is")
    assert "pass key" not in made.text(small)


@pytest.mark.parametrize("filler", [Filler.TEXT, Filler.CODE, Filler.RANDOM])
def test_a_haystack_may_be_real_text_code_or_words(
    small: Tokenizer, filler: Filler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(split: Split | None = None, kind: Kind | None = None) -> list[Text]:
        return [Text(f"{split}{kind}{n}", Kind.CODE, f"{kind} {split} number {n}; " * 20) for n in range(3)]

    monkeypatch.setattr(corpus, "texts", few)
    made = Passkeys(small).prompt(1500, 0.25, Random(5), filler=filler)
    text = made.text(small)
    assert len(made.ids) == 1500
    assert text.count(f"The pass key is {made.key}. Remember it.") == 1
    assert made.line.start / 1500 == pytest.approx(0.25, abs=0.05)
    assert FILLER not in text
    if filler is not Filler.RANDOM:
        # What training never saw comes first, and what it saw only then.
        kind = "prose" if filler is Filler.TEXT else "code"
        assert f"{kind} train" in text and text.index(f"{kind} held-out") < text.index(f"{kind} train")


def test_distractors_carry_other_labels_one_each(small: Tokenizer) -> None:
    rng = Random(0)
    drawn = Labels(rng, held_out=True)
    asked = drawn.draw()
    documents = Passkeys(small).distractors(20, 200, drawn, rng)
    found = [re.findall(r"\nThe (.+?) is (\d+)\. Remember it\.", small.decode(ids.tolist())) for ids in documents]
    assert all(len(ids) == 200 for ids in documents)
    assert all(len(lines) == 1 for lines in found)
    assert len({asked, labels.PLAIN, *(label for ((label, _),) in found)}) == 22


@pytest.mark.parametrize("filler", ["landmark", "random"])
def test_too_few_tokens_are_refused(small: Tokenizer, filler: str) -> None:
    with pytest.raises(InvalidArgument, match="more than the 40 asked for"):
        Passkeys(small).prompt(40, 0.5, Random(0), filler=filler)
    with pytest.raises(InvalidArgument, match="cannot hold it"):
        Passkeys(small).distractors(1, 10, Labels(Random(0)), Random(0), filler=filler)
    with pytest.raises(InvalidArgument, match="depth"):
        Passkeys(small).prompt(400, 1.5, Random(0), filler=filler)


# --- Dictionary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "alphabet"), [(10, 61), (300, 5), (625, 5), (100_000, 61)])
def test_keys_of_a_dictionary_are_all_different(count: int, alphabet: int) -> None:
    numbers = dictionary.distinct(count, np.random.default_rng(0), alphabet)
    assert len(numbers) == count == len(np.unique(numbers))
    assert numbers.min() >= 0 and numbers.max() < alphabet**4
    assert (np.diff(numbers) < 0).mean() == pytest.approx(0.5, abs=0.2)  # In no order.


def test_a_key_is_its_numbers_digits_and_a_record_ten_tokens() -> None:
    keys = dictionary.keys_of(np.array([0, 61 + 2, 61**4 - 1]))
    assert keys.tolist() == [[3, 3, 3, 3], [3, 3, 4, 5], [63, 63, 63, 63]]
    made = dictionary.records(dictionary.QUESTION, keys[:1], np.array([[9, 8, 7, 6]]))
    assert made.tolist() == [[2, 3, 3, 3, 3, 1, 9, 8, 7, 6]]


def test_keys_that_nearly_collide_differ_in_fewer_tokens() -> None:
    def alike(keys: np.ndarray) -> float:
        return float(((keys[:, None] == keys[None]).sum(-1) == 3).mean())

    rng = np.random.default_rng(0)
    near = dictionary.nearly_colliding(400, rng)
    assert len(np.unique(near, axis=0)) == 400
    assert alike(near) > 20 * alike(dictionary.keys_of(dictionary.distinct(400, rng))) + 0.001


def test_more_keys_than_there_are_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="13,845,841 keys"):
        dictionary.distinct(dictionary.MOST_KEYS + 1, np.random.default_rng(0))


# --- RULER ----------------------------------------------------------------------------------------------------------


def solved(task: ruler.Task, prompt: str) -> str:
    """What somebody answers who reads the prompt by its letters."""
    if task is ruler.Task.VARIABLES:
        value = re.findall(r"assigned the value (\d+),", prompt)[0]
        found, seen = [value], True
        pairs = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt)
        while seen:
            seen = [name for name, source in pairs if source in found and name not in found]
            found += seen
        return " ".join(found[1:])
    if task is ruler.Task.COMMON_WORDS:
        counts = Counter(re.findall(r"\d+\. (\S+)", prompt))
        return " ".join(word for word, _ in counts.most_common(10))
    if task is ruler.Task.FREQUENT_WORDS:
        coded = prompt.split("coded words. ")[1].split("\n")[0].split()
        return " ".join(word for word, _ in Counter(coded).most_common(4) if word != "...")
    asked = re.findall(r"[Ww]hat (?:is|are all) the special magic numbers? for (.+?) mentioned", prompt)[0]
    keys = re.split(r", and |, ", asked)
    return " ".join(v for key, v in re.findall(r"numbers for (\S+) is: (\d+)\.", prompt) if key in keys)


@pytest.mark.parametrize("task", list(ruler.Task))
@pytest.mark.parametrize("tokens", [1200, 4100])
def test_a_reader_solves_every_ruler_task_and_a_guesser_none(small: Tokenizer, task: ruler.Task, tokens: int) -> None:
    for seed in range(1 if tokens > 4000 else 3):
        made = ruler.example(task, small, tokens, Random(seed))
        assert made.score(solved(task, made.prompt)) == 1.0
        assert made.score("I do not know. 1234567") == 0.0
        assert 0.9 * tokens < len(small.encode(made.prompt)) <= tokens


def test_the_same_seed_makes_the_same_example(small: Tokenizer) -> None:
    one, same, other = (ruler.example("niah_multikey", small, 700, Random(seed)) for seed in (1, 1, 2))
    assert one == same and one.answers != other.answers


def test_half_of_the_answers_is_half_a_score(small: Tokenizer) -> None:
    made = ruler.example(ruler.Task.MULTIVALUE, small, 600, Random(0))
    assert made.score(" and ".join(made.answers[:2])) == 0.5


def test_a_ruler_prompt_that_cannot_be_so_short_is_refused(small: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match="smallest prompt of cwe"):
        ruler.example("cwe", small, 100, Random(0))


def test_parts_join_to_their_text() -> None:
    assert text_of([Part("a ", Role.PLAIN), Part("7", Role.NEW)]) == "a 7"
