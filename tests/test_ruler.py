"""RULER's tasks: built as they are defined, as long as asked, and answerable from their text alone."""

import itertools
import json
import random
import re
from collections import Counter
from pydoc_data.topics import topics

import pytest
from hypothesis import example as such_as
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from merging_cache.evaluation.documents import read_hotpotqa, read_squad
from merging_cache.evaluation.english import English
from merging_cache.evaluation.example import Example
from merging_cache.evaluation.haystack import is_for_evaluation, is_prose, reference_prose
from merging_cache.evaluation.needle_words import ATTRIBUTES, CODES, FILLER, GLUE, NAMES, NeedleWords, count_words
from merging_cache.evaluation.prose import PROSE
from merging_cache.evaluation.ready_made import example_of, read_examples
from merging_cache.evaluation.ruler import RULER, NeedleInAHaystack, first_words, fit, zeta

NIAH = [name for name in RULER if name.startswith("niah")]
ESSAY = "A river runs north. It is wide, and slow in spring! Who could cross it by night? Nobody has tried. "


# Material that English needs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """English with an essay and with questions in the formats of SQuAD and HotpotQA, about made-up cities."""
    folder = tmp_path_factory.mktemp("material")
    rng = random.Random(0)
    names = [f"{rng.choice('bdfgklmnprst')}{rng.choice('aeiou')}x{i}" for i in range(400)]
    filler = "It has streets and squares, and people who like to walk there in the evening when it is not raining. " * 3
    (folder / "essay.txt").write_text(ESSAY * 800 + "The end of it was never written down")
    paragraphs = [
        {
            "context": f"The mayor of {city} is {mayor}. {filler}",
            "qas": [
                {"question": f"Who is the mayor of {city}?", "answers": [{"text": mayor}, {"text": f"mayor {mayor}"}]},
                {"question": "What cannot be known?", "answers": [], "is_impossible": True},
            ],
        }
        for city, mayor in zip(names[:100], names[100:200], strict=True)
    ]
    articles = [{"paragraphs": paragraphs[first : first + 5]} for first in range(0, 100, 5)]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    asked = []
    for i in range(50):
        city, mayor, home = names[i], names[100 + i], names[200 + i]
        about = [[f"The mayor of {city}", [f"The mayor of {city} is {mayor}.", filler]]]
        about += [[mayor, [f"{mayor} was born in {home}.", filler]]]
        about += [[f"About {names[300 + i]}", [filler]], [f"About {names[350 + i]}", [filler]]]
        asked.append({"question": f"Where was the mayor of {city} born?", "answer": home, "context": about})
    (folder / "hotpotqa.json").write_text(json.dumps(asked))
    return English([folder / "essay.txt"], folder / "squad.json", folder / "hotpotqa.json")


@pytest.fixture(scope="module")
def count_tokens(english):
    """How many tokens a text is, in byte pairs learned from text like it."""
    text = [fit(name, english, count_words, 900).prompt for name in RULER]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet))
    return lambda example: len(tokenizer.encode(example.prompt).ids) + example.max_new_tokens


# Solvers that know nothing but the text and the wording ---------------------------------------------------------------


def solve_english(prompt: str) -> list[str]:
    if asked := re.search(r"What (?:is|are all) the special magic \w+ for (.+?) mentioned in the provided", prompt):
        needle = r"One of the special magic \w+ for {} is: (\S+)\.(?:\s|$)"
        keys = re.split(r", and |, ", asked[1])
        return [value for key in keys for value in re.findall(needle.format(re.escape(key)), prompt)]
    if asked := re.findall(r"all variables that are assigned the value (\d+) in the text above", prompt):
        text = prompt[prompt.rindex("Memorize and track") :]
        held, answers = {asked[-1]}, []
        for variable, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            if value in held:
                held.add(variable)
                answers.append(variable)
        return answers
    if "most common words" in prompt:
        listed = prompt[prompt.rindex("Below is a numbered list") : prompt.rindex("\nQuestion:")]
        words = re.split(r"(?:^|\s)\d+\. ", listed.split("\n", 1)[1])[1:]
        return [word for word, _ in Counter(words).most_common(10)]
    if "coded words" in prompt:
        coded = prompt[prompt.index("coded words. ") + len("coded words. ") : prompt.index("\nQuestion:")].split()
        return [word for word, _ in Counter(word for word in coded if word != "...").most_common(3)]
    if asked := re.search(r"Question: Who is the mayor of (\w+)\?", prompt):
        return re.findall(rf"The mayor of {asked[1]} is (\w+)\.", prompt)
    asked = re.search(r"Question: Where was the mayor of (\w+) born\?", prompt)
    (mayor,) = re.findall(rf"The mayor of {asked[1]} is (\w+)\.", prompt)
    return re.findall(rf"{mayor} was born in (\w+)\.", prompt)


def solve_needle(prompt: str) -> list[str]:
    context, question = prompt.split(" question : ")
    match question.split():
        case ["code", *key]:
            return re.findall(rf"code {' '.join(key)} ([^.]+) \.", context)
        case ["all", "code", key]:
            return re.findall(rf"code {key} (\d+) \.", context)
        case ["each", "code", *keys]:
            return [value for key in keys for value in re.findall(rf"code {key} (\d+) \.", context)]
        case ["set", number]:
            chain = re.findall(rf"set (\w+) {number} \.", context)
            while found := re.findall(rf"set (\w+) {chain[-1]} \.", context):
                chain += found
            return chain
        case ["ten", *_]:
            return [word for word, _ in Counter(context.split()[1:-1]).most_common(10)]
        case ["three", *_]:
            words = Counter(word for word in context.split()[1:-1] if word != "...")
            return [word for word, _ in words.most_common(3)]
        case [name, attribute]:
            return re.findall(rf"\b{name} {attribute} (\w+) \.", context)  # a sparrow is no arrow
        case [attribute, name, "friend"]:
            (friend,) = re.findall(rf"\b{name} friend (\w+) \.", context)
            return re.findall(rf"\b{friend} {attribute} (\w+) \.", context)


def check_solved(example: Example, given: list[str]) -> None:
    if RULER[example.task].metric == "part":
        assert len(given) == 1
        assert given[0] in example.answers
    else:
        assert sorted(given) == sorted(example.answers)


# The tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULER)
@pytest.mark.parametrize("length", [4096, 8000])
def test_english_tasks_are_as_long_as_asked_and_can_be_solved(name, length, english, count_tokens):
    for index in range(3):
        example = fit(name, english, count_tokens, length, index=index)
        assert 0.98 * length <= count_tokens(example) <= length
        check_solved(example, solve_english(example.prompt))


@pytest.mark.parametrize("name", RULER)
@pytest.mark.parametrize("length", [384, 512])
def test_needle_tasks_are_as_long_as_asked_and_can_be_solved(name, length):
    vocabulary = {*GLUE, *NAMES, *CODES, *FILLER}
    for index in range(20):
        example = fit(name, NeedleWords(), count_words, length, index=index)
        assert 0.98 * length <= count_words(example) <= length
        assert set(example.prompt.split()) <= vocabulary
        assert len(" ".join(example.answers).split()) < example.max_new_tokens or "multiquery" in name
        check_solved(example, solve_needle(example.prompt))


@given(
    name=st.sampled_from(sorted(RULER)),
    length=st.integers(160, 560),
    seed=st.integers(0, 10**6),
    index=st.integers(0, 99),
)
@such_as(name="qa_1", length=161, seed=131, index=21)  # a sparrow beside an arrow
@settings(max_examples=60, deadline=None)
def test_examples_are_reproducible_and_never_too_long(name, length, seed, index):
    example = fit(name, NeedleWords(), count_words, length, seed=seed, index=index)
    assert count_words(example) <= length
    assert example == fit(name, NeedleWords(), count_words, length, seed=seed, index=index)
    other = fit(name, NeedleWords(), count_words, length, seed=seed + 1, index=index)
    assert other.context != example.context
    check_solved(example, solve_needle(example.prompt))


@pytest.mark.parametrize("name", NIAH)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_a_needle_stands_once_at_the_asked_depth(name, depth, english, count_tokens):
    task = RULER[name].at(depth)
    example = fit(name, english, count_tokens, 4096, task=task)
    assert example.depths[0] == pytest.approx(depth, abs=0.05)
    for answer in example.answers:
        assert example.context.count(answer) == 1
    text = example.context[example.context.index("\n") :]
    before = text[: text.index(f" is: {example.answers[0]}.")]
    # by text instead of by lines; the needles that come before are not of the haystack
    assert len(before) / len(text) == pytest.approx(depth, abs=0.06)
    needle = fit(name, NeedleWords(), count_words, 512, task=task)
    place = f" {needle.context} ".index(f" {needle.answers[0]} ")
    assert f" {needle.context} ".count(f" {needle.answers[0]} ") == 1
    assert place / len(needle.context) == pytest.approx(depth, abs=0.1)


@pytest.mark.parametrize("name", NIAH)
def test_depths_of_needles_are_spread(name):
    depths = [depth for i in range(100) for depth in fit(name, NeedleWords(), count_words, 300, index=i).depths]
    assert min(depths) < 0.1
    assert max(depths) > 0.85
    assert sum(depths) / len(depths) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(
    ("name", "needles", "asked"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multikey_2", None, 1),
        ("niah_multikey_3", None, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_are_as_many_and_of_the_kind_that_is_defined(name, needles, asked, english, count_tokens):
    example = fit(name, english, count_tokens, 4096)
    found = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", example.context)
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    value = uuid if name in ("niah_single_3", "niah_multikey_3") else r"[1-9]\d{6}"
    key = uuid if name == "niah_multikey_3" else r"\D+-\D+"
    assert len(found) == needles or (needles is None and len(found) > 50)
    assert all(re.fullmatch(value, found_value) and re.fullmatch(key, found_key) for _, found_key, found_value in found)
    assert len({found_value for _, _, found_value in found}) == len(found)
    assert len({found_key for _, found_key, _ in found}) == (1 if name == "niah_multivalue" else len(found))
    assert len(example.answers) == asked
    assert ("numbers" in example.question or "uuids" in example.question) == (asked > 1)
    assert example.max_new_tokens == 128


def test_the_other_tasks_are_as_defined(english, count_tokens):
    vt = fit("vt", english, count_tokens, 4096)
    chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", vt.context)
    assert [name for name, _ in chain] == vt.answers
    assert len(chain) == 5
    assert [value for _, value in chain[1:]] == vt.answers[:-1]
    assert re.fullmatch(r"[1-9]\d{4}", chain[0][1])
    assert "5 variables are assgined the value" in vt.answer_prefix  # RULER's own spelling
    assert len(re.findall(r"VAR [A-Z]{3} =", vt.context)) == 5  # the solved example
    assert vt.max_new_tokens == 30

    cwe = fit("cwe", english, count_tokens, 4096)
    listed = cwe.context[cwe.context.rindex("Below") :].split("\n", 1)[1]
    counts = Counter(re.split(r"(?:^|\s)\d+\. ", listed)[1:])
    assert {counts[word] for word in cwe.answers} == {30}
    assert set((counts - Counter(dict.fromkeys(cwe.answers, 30))).values()) == {3}
    assert cwe.max_new_tokens == 120
    short = fit("cwe", english, count_tokens, 2048)
    counts = Counter(re.split(r"(?:^|\s)\d+\. ", short.context[short.context.rindex("Below") :].split("\n", 1)[1])[1:])
    assert sorted(set(counts.values())) == [1, 6]

    fwe = fit("fwe", english, count_tokens, 4096)
    coded = Counter(fwe.context[fwe.context.index("words. ") + 7 :].split())
    assert coded.most_common(1)[0][0] == "..."
    assert [word for word, _ in coded.most_common(4)][1:] == fwe.answers
    top = coded["..."]
    for rank, word in enumerate(fwe.answers, start=2):
        assert coded[word] == pytest.approx(top / rank**2, abs=1)
    assert all(re.fullmatch(r"[a-z]{6}", word) for word in coded if word != "...")
    assert fwe.max_new_tokens == 50

    for name in ("qa_1", "qa_2"):
        example = fit(name, english, count_tokens, 4096)
        numbers = [int(number) for number in re.findall(r"^Document (\d+):$", example.context, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) > 5
        assert example.max_new_tokens == 32


def test_questions_about_documents_take_their_own_and_related_ones_first(english, count_tokens):
    quiz = read_squad(english.files["squad"])
    assert len(quiz.documents) == len(quiz.questions) == 100  # what has no answer is left out
    example = fit("qa_1", english, count_tokens, 2048, index=7)
    question = quiz.questions[7]
    assert example.answers == question.answers
    shown = re.split(r"Document \d+:\n", example.context)[1:]
    assert any(quiz.documents[question.own[0]] in text for text in shown)
    related = [quiz.documents[number] for number in question.related]
    assert sum(any(text.strip() in one for one in related) for text in shown) == len(related) == 4
    hotpot = read_hotpotqa(english.files["hotpotqa"])
    assert len(hotpot.questions) == 50
    example = fit("qa_2", english, count_tokens, 2048, index=3)
    assert all(hotpot.documents[number] in example.context for number in hotpot.questions[3].own)


def test_the_noise_is_rulers_own(english, count_tokens):
    example = fit("niah_single_1", english, count_tokens, 1024)
    line = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    lines = example.context.split("\n")[1:]
    key = example.question.split(" for ")[1].split(" mentioned")[0]
    (needle,) = [text for text in lines if not line.startswith(text)]
    assert needle == f"One of the special magic numbers for {key} is: {example.answers[0]}."
    assert example.context.startswith("A special magic number is hidden within the following text. Make sure to ")


def test_too_few_documents_are_refused(english, tmp_path):
    data = json.loads(english.files["squad"].read_text())["data"]
    for articles in (data[:1], data[:3]):
        (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
        with pytest.raises(ValueError, match=r"qa_1 of 4096 tokens: there are only \d+ documents"):
            fit("qa_1", English(squad=tmp_path / "squad.json"), count_words, 4096)


@pytest.mark.parametrize("length", [100, 130, 160, 220])
def test_frequent_words_are_frequent_in_short_texts_too(length):
    for index in range(10):
        example = fit("fwe", NeedleWords(), count_words, length, index=index)
        counts = Counter(example.context.split()[1:-1]).most_common(5)
        assert [word for word, _ in counts[1:4]] == example.answers
        assert counts[3][1] > (counts[4][1] if len(counts) > 4 else 0)
    with pytest.raises(ValueError, match="fwe takes at least"):
        fit("fwe", NeedleWords(), count_words, 60)


def test_zeta_is_riemanns():
    assert zeta(2.0) == pytest.approx(1.6449340668, abs=1e-6)


@pytest.mark.parametrize(("count", "expected"), [(1, "a"), (2, "a\n b"), (9, "a\n b  c")])
def test_first_words(count, expected):
    assert first_words("a\n b  c", count) == expected


# What cannot be made --------------------------------------------------------------------------------------------------


def test_too_short_and_too_long_contexts_are_refused(english, count_tokens):
    with pytest.raises(ValueError, match="cwe takes at least .* tokens, and the context length is 64"):
        fit("cwe", NeedleWords(), count_words, 64)
    with pytest.raises(ValueError, match=r"niah_multikey_2 of 2000 tokens: \d+ different words .* there are \d+"):
        fit("niah_multikey_2", NeedleWords(), count_words, 2000)


@pytest.mark.parametrize(("name", "material"), [("qa_1", "squad"), ("qa_2", "hotpotqa")])
def test_missing_material_is_named(name, material, tmp_path):
    assert RULER[name].needs == material
    with pytest.raises(ValueError, match=f"{name} asks about the file {material}"):
        fit(name, English(), count_words, 2048)
    broken = tmp_path / "broken"
    broken.write_text('{"data": [1]}')
    with pytest.raises(ValueError, match="broken"):
        fit(name, English(**{material: broken}), count_words, 2048)


# Prose ----------------------------------------------------------------------------------------------------------------


def prose(wording, length, index=0, seed=0):
    """The examples of the three tasks about a stretch, by task."""
    return {name: task.examples(name, wording, count_words, length, seed, index) for name, task in PROSE.items()}


@pytest.mark.parametrize("wording", [English(), NeedleWords()], ids=["English", "needle"])
@pytest.mark.parametrize("length", [300, 700])
def test_facts_quotations_and_what_follows_are_told_by_one_context(wording, length):
    made = prose(wording, length)
    (context,) = {example.context for examples in made.values() for example in examples}
    assert 0.85 * length <= max(count_words(one) for examples in made.values() for one in examples) <= length
    assert len(made["facts"]) == 8
    assert len({example.prompt for example in made["facts"]}) == 8
    for example in made["facts"]:
        (answer,) = example.answers
        assert example.reference == f" {answer}"
        assert context.count(answer) >= 1
        assert RULER["vt"].metric  # facts are judged without generation
        assert not PROSE["facts"].generates
    assert len(made["quotations"]) == 4
    for example in made["quotations"]:
        assert context.count(example.answer_prefix + example.reference) == 1  # a passage that nothing was put into
        assert (len(example.answer_prefix.split()), len(example.reference.split())) == (8, 12)
    (following,) = made["following"]
    assert following.question is None
    assert len((following.answer_prefix + following.reference).split()) == 48
    assert following.prompt not in context


def test_what_follows_is_what_the_haystack_says_next():
    (following,) = prose(English(), 700)["following"]
    words = " ".join(reference_prose()).split()
    last, told = following.context.split()[-6:], (following.answer_prefix + following.reference).split()
    places = [i for i in range(len(words)) if words[i : i + 48] == told]
    assert any(words[place - 6 : place] == last for place in places) or len(last) < 6


def test_stretches_share_nothing_and_are_the_same_for_a_seed():
    wording = English()
    stretches = [wording.stretch(400, 48, 512, seed=0, index=index) for index in range(12)]
    texts = [" ".join(itertools.chain(*sentences, after)) for sentences, after in stretches]
    words = " ".join(reference_prose()).split()
    whole = " ".join(words)
    spans = sorted((whole.index(text), whole.index(text) + len(text)) for text in texts)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert stretches[3] == English().stretch(400, 48, 512, seed=0, index=3)
    assert stretches[3] != English().stretch(400, 48, 512, seed=1, index=3)


def test_the_halves_of_the_reference_share_nothing():
    ours, theirs = reference_prose(), reference_prose(fitting=True)
    assert not {*ours} & {*theirs}
    assert min(len(" ".join(half).split()) for half in (ours, theirs)) > 10_000
    assert all(is_prose(one) for one in ours + theirs)
    assert is_for_evaluation("assert") == is_for_evaluation("assert")
    assert {is_for_evaluation(name) for name in topics} == {True, False}


def test_a_haystack_that_is_too_short_says_so(tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("The fox sat on a wall. " * 30)
    for name, task in [("niah_single_2", RULER["niah_single_2"]), ("facts", PROSE["facts"])]:
        with pytest.raises(ValueError, match="the haystack has 180 words"):
            task.examples(name, English([few]), count_words, 700, 0, 0)
    few.write_text("")
    with pytest.raises(ValueError, match="few.txt has no words"):
        fit("niah_single_2", English([few]), count_words, 700)
    with pytest.raises(ValueError, match=r"contexts of 700 tokens that share nothing, and this is number \d+"):
        prose(English(), 700, index=500)


def test_several_files_are_one_haystack(tmp_path):
    for name, word in (("one", "fox"), ("two", "owl")):
        (tmp_path / name).write_text(f"The {word} sat. " * 200)
    text = " ".join(English([tmp_path / "one", tmp_path / "two"]).prose(random.Random(3), 1100))
    assert "fox" in text
    assert "owl" in text


# Ready-made examples --------------------------------------------------------------------------------------------------


def test_rulers_own_records_are_split_where_the_question_begins(english, count_tokens):
    for name in RULER:
        example = fit(name, english, count_tokens, 4096)
        record = {"index": 0, "input": example.prompt, "outputs": example.answers, "length": 4096, "task": name}
        again = example_of(record)
        assert again.context == example.context
        assert again.prompt == example.prompt
        assert again.answers == example.answers
        assert again.max_new_tokens == example.max_new_tokens
        apart = {"input": example.context + example.question, "answer_prefix": example.answer_prefix, "outputs": ["x"]}
        assert example_of(apart | {"task": name}).prompt == example.prompt


def test_ready_made_examples_are_read_from_files(tmp_path):
    made = [fit("vt", NeedleWords(), count_words, 200, index=index) for index in range(9)]
    records = [
        {
            "context": one.context,
            "question": one.question,
            "answer_prefix": one.answer_prefix,
            "answer": one.answers,
            "task": one.task,
            "max_new_tokens": 77,
        }
        for one in made
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    chosen = read_examples(str(tmp_path / "all.jsonl"), None, 4, seed=0, folder=None)
    assert len(chosen) == 4
    assert all(one.max_new_tokens == 77 for one in chosen)
    assert {one.context for one in chosen} < {one.context for one in made}
    assert chosen == read_examples(str(tmp_path / "all.jsonl"), ["vt"], 4, seed=0, folder=None)
    assert chosen != read_examples(str(tmp_path / "all.jsonl"), ["vt"], 4, seed=1, folder=None)

    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    folder = tmp_path / "data" / "test"
    folder.mkdir(parents=True)
    parquet.write_table(Table.from_pylist(records), folder / "test-0.parquet")
    assert read_examples(str(folder / "test-0.parquet"), None, 4, seed=0, folder=None) == chosen
    assert read_examples(str(tmp_path / "data"), None, 4, seed=0, folder=None) == chosen
    # a data set by its name and folder, without a hub
    assert read_examples("parquet", None, 4, seed=0, folder=str(tmp_path / "data")) == chosen

    native = tmp_path / "vt" / "validation.jsonl"  # RULER's own: the task is the folder's name
    native.parent.mkdir()
    english = fit("vt", English(), count_words, 1200)
    native.write_text(json.dumps({"input": english.prompt, "outputs": english.answers}))
    (one,) = read_examples(str(native), None, 5, seed=0, folder=None)
    assert (one.task, one.answers) == ("vt", english.answers)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"task": "longbench", "context": "x"}', "data.jsonl, record 1: its task is 'longbench'"),
        ("[1]", "record 1: it is .*; expected an object"),
        ("", "holds no example"),
        ('{"task": "vt", "context": "", "question": "y", "answer": "z"}', "its context is empty"),
        ('{"task": "vt", "context": "x", "question": "y", "answer": []}', "its answer is"),
        ('{"task": "vt", "context": "x", "question": "y", "answer": [1]}', "its answer is .1.; expected a string"),
        ('{"task": "vt", "context": "x", "question": "y", "answer": ""}', "its answer is"),
        ('{"task": "vt", "context": "x", "question": "y"}', "its answer is None"),
        ('{"task": "vt", "context": "x", "question": 3, "answer": "z"}', "its question is 3"),
        (
            '{"task": "vt", "context": "x", "question": "y", "answer": "z", "max_new_tokens": -3}',
            "max_new_tokens is -3",
        ),
        ('{"task": "vt", "text": "x"}', r"columns \['task', 'text'\]"),
        ('{"task": "vt", "input": "x", "outputs": ["y"]}', "has no question"),
        ("{", "JSON lines"),
    ],
)
def test_unreadable_data_is_refused(content, complaint, tmp_path):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_examples(str(tmp_path / "data.jsonl"), None, 1, seed=0, folder=None)
    with pytest.raises(ValueError, match="no file"):
        read_examples(str(tmp_path / "none.jsonl"), None, 1, seed=0, folder=None)


def test_a_task_that_the_data_lack_is_named(tmp_path):
    (tmp_path / "fwe.jsonl").write_text('{"context": "x", "question": "y", "answer": "z"}')
    with pytest.raises(ValueError, match=r"no example of 'vt'; it holds \['fwe'\]"):
        read_examples(str(tmp_path / "fwe.jsonl"), ["vt"], 1, seed=0, folder=None)


def test_the_needle_models_lists_of_words_are_apart():
    assert len(NAMES) == len(set(NAMES))
    assert not set(NAMES) & {*FILLER, *GLUE, *CODES}
    assert set(ATTRIBUTES) <= set(GLUE)
    assert isinstance(RULER["niah_single_1"], NeedleInAHaystack)
