"""The tiny models the suite runs, built from configs, and the caches it gives them."""

import functools

import torch

from architectures import tiny_config, tiny_model
from merging_cache import MergingDynamicCache, MergingQuantizedCache, Scorer
from merging_cache.model import cache_argument

VOCABULARY = 97
# a small window, so that few prompts are within the budget by protection alone
WINDOW = {"sink_tokens": 2, "recent_tokens": 6}

FOLDING = {"merger": "similarity", **WINDOW}
CACHES = {
    "dynamic": lambda model, **options: MergingDynamicCache(config=model.config, **FOLDING | options),
    "quanto": lambda model, **options: MergingQuantizedCache(
        "quanto", config=model.config, **{"residual_length": 16} | FOLDING | options
    ),
    "fp8": lambda model, **options: MergingQuantizedCache(
        "fp8", config=model.config, **{"residual_length": 16} | FOLDING | options
    ),
}


class SameInAllHeads(Scorer):
    """Random scores that all layers and heads share, so that an attention mask can do what dropping does."""

    def score(self, states):
        scores = torch.rand(states.num_tokens, generator=torch.Generator().manual_seed(5))
        return scores.to(states.keys.device).expand(states.keys.shape[:3])


def llama(attention="sdpa", layers=2):
    """A random Llama: 4 heads, 2 KV heads, head dimension 16, weights large enough to have opinions."""
    model = tiny_model("llama", layers=layers, attention=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def prompt(length, batch=1, seed=0):
    """Random ids `[batch, length]`, none of them special."""
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths, seed=0):
    """`input_ids` and `attention_mask` of random rows of these lengths."""
    width = max(lengths)
    ids, mask = prompt(width, len(lengths), seed), torch.ones(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = 0
        mask[row, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, inputs, new_tokens=8, **options):
    """`generate` without sampling, for exactly `new_tokens`; returns its full output with logits."""
    if isinstance(inputs, torch.Tensor):
        # told, or generate would take a generated 0 for padding
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    return model.generate(
        **inputs,
        **{
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            "pad_token_id": 0,
        }
        | options,
    )


def run_by_hand(model, cache, inputs, continuation):
    """The logits `[1 + n, B, vocabulary]` after a prompt and after each of the n tokens behind it, fed one by one."""
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs}
    logits = [model(**inputs, **cache_argument(cache)).logits[:, -1]]
    logits += [model(token, **cache_argument(cache)).logits[:, -1] for token in continuation.split(1, 1)]
    return torch.stack(logits)


def score_by_hand(model, cache, ids, continuation):
    """The log-probability of the tokens `[n]` behind a prompt `[1, L]`, fed one by one: what a beam scores."""
    logits = run_by_hand(model, cache, ids, continuation[None, :-1])[:, 0]
    return logits.log_softmax(-1).gather(1, continuation[:, None]).sum().item()


def watch(monkeypatch, module, note):
    """A list of what `note` says of each call of the module or a twin of it, whose calls no hook sees."""
    kind, noted, forward = type(module), [], type(module).forward

    @functools.wraps(forward)
    def watched(self, *args, **kwargs):
        if getattr(self, "layer_idx", None) == getattr(module, "layer_idx", None):
            noted.append(note(*args, **kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", watched)
    return noted


def watch_passes(monkeypatch, model):
    """A list of how many tokens the model reads in each pass, be it again."""
    return watch(monkeypatch, model.get_decoder(), lambda input_ids=None, **_: input_ids.shape[1])


def stored(cache):
    """Keys, values and positions of all folding layers, for comparisons."""
    return [(layer.keys, layer.values, layer.positions) for layer in cache.folding_layers]


def assert_same_cache(one, other, rtol=0.0, atol=0.0):
    """Slot for slot the same."""
    assert one.get_seq_length() == other.get_seq_length()
    for mine, theirs in zip(stored(one), stored(other), strict=True):
        assert torch.equal(mine[2], theirs[2])
        torch.testing.assert_close(mine[0], theirs[0], rtol=rtol, atol=atol)
        torch.testing.assert_close(mine[1], theirs[1], rtol=rtol, atol=atol)


__all__ = [
    "CACHES",
    "VOCABULARY",
    "WINDOW",
    "SameInAllHeads",
    "assert_same_cache",
    "greedy",
    "left_padded",
    "llama",
    "prompt",
    "run_by_hand",
    "score_by_hand",
    "stored",
    "tiny_config",
    "tiny_model",
    "watch",
    "watch_passes",
]
