"""All causal LM architectures of the installed transformers: prefill unchanged, and one exact step after the fold."""

import warnings

import pytest
import torch
from transformers import DynamicCache

from architectures import causal_lm_types, tiny_model
from merging_cache import MergingDynamicCache, Scorer

LENGTH, WINDOW = 48, 16

# why an architecture is not among those that fold, by what stops it first
NOT_BUILT = "cannot be built small from its config class alone"
NOT_RUN = "does not run with transformers' own DynamicCache as built here"
NO_FULL_ATTENTION = "has no layer of full attention over cached keys and values"
POSITION_BIAS = "adds a bias by a key's place in the cache: refused"
ENFORCES_POSITIONS = "its own forward checks positions against the length of the cache: refused there"


class SameInAllHeads(Scorer):
    """Random scores that all layers and heads share, so that an attention mask can do what dropping does."""

    def score(self, states):
        scores = torch.rand(states.num_tokens, generator=torch.Generator().manual_seed(5))
        return scores.to(states.keys.device).expand(states.keys.shape[:3])


@torch.no_grad()
def outcome(model_type):
    """`"exact"`, or why this architecture was not tried; an `AssertionError` if it went wrong."""
    try:
        try:
            model = tiny_model(model_type)
        except ValueError as error:
            if "sdpa" not in str(error) and "scaled_dot" not in str(error):
                raise
            model = tiny_model(model_type, attention="eager")
    except Exception:
        return NOT_BUILT
    ids = torch.randint(5, 90, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    prompt, last = ids[:, :-1], ids[:, -1:]
    full = DynamicCache(config=model.config)
    mask = torch.ones(1, LENGTH + 1, dtype=torch.long)
    # OPT counts positions in the mask, so they have to be told
    told = {"position_ids": torch.tensor([[LENGTH]])} if model_type == "opt" else {}
    try:
        expected = model(prompt, past_key_values=full).logits
        model(last, past_key_values=full, attention_mask=mask, **told)
    except Exception:
        return NOT_RUN

    options = {"compression_ratio": 0.5, "merger": "drop", "scorer": SameInAllHeads(), "recent_tokens": WINDOW}
    try:
        with warnings.catch_warnings(record=True):
            cache = MergingDynamicCache(config=model.config, **options)
    except ValueError as error:
        assert "position bias" in str(error)
        return POSITION_BIAS
    logits = model(prompt, past_key_values=cache).logits
    folded = [layer for layer in cache.folding_layers if layer.num_stored]
    if not folded:
        return NO_FULL_ATTENTION
    assert torch.equal(logits, expected), f"prefill differs by {(logits - expected).abs().max()}"
    assert all(layer.num_slots == LENGTH // 2 for layer in folded)

    # the same step with the full cache and a mask over what was dropped; sliding windows lie inside what is kept
    kept = folded[0].positions[0, 0]
    mask[0, [position for position in range(LENGTH) if position not in kept]] = 0
    full = DynamicCache(config=model.config)
    model(prompt, past_key_values=full)
    masked = model(last, past_key_values=full, attention_mask=mask, **told).logits
    try:
        step = model(last, past_key_values=cache).logits
    except ValueError as error:
        assert "position_ids" in str(error)
        return ENFORCES_POSITIONS
    difference = (step - masked).abs().max().item()
    assert difference < 1e-4 * max(1.0, masked.abs().max().item()), f"the step after the fold differs by {difference}"
    return "exact"


@pytest.mark.filterwarnings("ignore")
def test_every_architecture_is_exact_or_refused():
    outcomes, wrong = {}, {}
    for model_type in causal_lm_types():
        try:
            outcomes[model_type] = outcome(model_type)
        except Exception as error:
            wrong[model_type] = f"{type(error).__name__}: {error}"
    assert not wrong
    exact = sorted(name for name, how in outcomes.items() if how == "exact")
    others = {name: how for name, how in outcomes.items() if how != "exact"}
    print(f"{len(exact)} exact: {' '.join(exact)}")
    for name, how in others.items():
        print(f"{name}: {how}")
    refused = {name for name, how in others.items() if how in (POSITION_BIAS, ENFORCES_POSITIONS)}
    assert refused <= {"bloom", "mpt", "inkling_text", "inkling2_text", "prophetnet"}
    assert len(exact) >= 105
