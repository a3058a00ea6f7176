"""Gradients through folded prompts: those of a masked cache where tokens are dropped, else finite differences."""

import copy

import pytest
import torch
from transformers import DynamicCache

from merging_cache import MERGERS, MergingDynamicCache, MergingQuantizedCache
from merging_cache.model import cache_argument
from models import WINDOW, SameInAllHeads, llama, prompt

IDS, NEW = prompt(40), prompt(3, seed=4)
STEP = 1e-3  # parts of a model are reckoned in fp32, whatever its precision


def cache_for(model, **options):
    """Which tokens survive is random, so that it does not change with the weights."""
    return MergingDynamicCache(model=model, scorer=SameInAllHeads(), compression_ratio=0.5, **WINDOW | options)


def loss_of(model, cache, mask=None):
    """What comes behind a prompt, as a number."""
    model(IDS, **cache_argument(cache))
    given = {} if mask is None else {"attention_mask": torch.cat([mask, torch.ones_like(NEW)], dim=1)}
    return model(NEW, **cache_argument(cache), **given).logits.square().mean()


def weights_of(model):
    attention = model.model.layers[0].self_attn
    return attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight


@pytest.mark.parametrize("fold_at", ["prefill", "decode"])
@pytest.mark.parametrize("budget", ["uniform", "adakv", "global"])
def test_what_is_dropped_is_as_if_masked(budget, fold_at):
    model = llama().double()
    cache = cache_for(model, merger="drop", budget=budget, fold_at=fold_at)
    model(IDS, **cache_argument(cache))
    cache.fold()
    step = {"input_ids": NEW[:, :1]}
    mine = torch.autograd.grad(model(**step, **cache_argument(cache)).logits.square().mean(), weights_of(model))
    mask = torch.zeros_like(IDS)
    mask[0, cache.layers[0].positions[0, 0, :-1]] = 1
    full = DynamicCache(config=model.config)
    model(IDS, **cache_argument(full))
    masked = model(**step, **cache_argument(full), attention_mask=torch.cat([mask, mask[:, -1:]], dim=1)).logits
    for one, other in zip(mine, torch.autograd.grad(masked.square().mean(), weights_of(model)), strict=True):
        assert one.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("budget", ["uniform", "adakv"])
@pytest.mark.parametrize("merger", sorted(MERGERS))
def test_gradients_are_how_the_loss_changes(merger, budget):
    model = llama().double()
    found = torch.autograd.grad(loss_of(model, cache_for(model, merger=merger, budget=budget)), weights_of(model))
    generator = torch.Generator().manual_seed(2)
    for weight, gradient in zip(weights_of(model), found, strict=True):
        direction = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        direction = direction / direction.norm()
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                weight.add_(direction, alpha=sign * STEP)
                losses.append(loss_of(model, cache_for(model, merger=merger, budget=budget)).item())
                weight.sub_(direction, alpha=sign * STEP)
        expected = (losses[0] - losses[1]) / (2 * STEP)
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=0.03, abs=5e-4)


@pytest.mark.parametrize("budget", ["uniform", "adakv"])
def test_copies_of_a_cache_keep_the_graph(budget):
    model = llama()
    cache = cache_for(model, merger="mass", budget=budget)
    model(IDS, **cache_argument(cache))
    twin = copy.deepcopy(cache)
    grads = [
        torch.autograd.grad(
            model(NEW, **cache_argument(one)).logits.square().mean(), weights_of(model), retain_graph=True
        )
        for one in (cache, twin)
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_scores_and_second_readings_have_no_gradient():
    """They say what survives; the graph is that of what is stored."""
    model = llama()
    for scorer in ("auto", "kvzip", "snapkv", "expected_attention"):
        cache = MergingDynamicCache(model=model, scorer=scorer, compression_ratio=0.5, **WINDOW)
        loss_of(model, cache).backward()
        assert all(weight.grad.abs().max() > 0 for weight in weights_of(model))
        held = [one for layer in cache.layers for one in layer._observed.remembered.values()]
        assert not any(part.requires_grad for one in held for part in (one.tokens, *one.queries) if part is not None)


def test_quantized_states_end_gradients_with_a_word():
    model = llama()
    cache = MergingQuantizedCache("quanto", config=model.config, compression_ratio=0.5, residual_length=16, **WINDOW)
    with pytest.warns(UserWarning, match="gradients end"):
        model(IDS, **cache_argument(cache))
