"""Slow, obvious versions of every formula: loops over batch, head and token, one number at a time.

The package must equal these; nothing here is shared with it.
"""

import math
import statistics

import torch


def vectors(states):
    """`[B, H, L, D]` as nested lists of Python floats."""
    return states.double().tolist()


def norm(x):
    return math.sqrt(sum(c * c for c in x))


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def cosine(x, y):
    return dot(x, y) / max(norm(x) * norm(y), 1e-30)


def per_head(states, score_head):
    """Apply `score_head(keys, values) -> list` to every row and head: `[B, H, L]`."""
    keys, values = vectors(states.keys), vectors(states.values)
    return torch.tensor(
        [[score_head(k, v) for k, v in zip(*row, strict=True)] for row in zip(keys, values, strict=True)]
    )


def knorm(keys, values):
    return [-norm(k) for k in keys]


def value_norm(keys, values):
    return [norm(v) for v in values]


def keydiff(keys, values):
    units = [[c / norm(k) for c in k] for k in keys]
    mean = [sum(unit[d] for unit in units) / len(units) for d in range(len(units[0]))]
    return [-cosine(k, mean) for k in keys]


def streaming_llm(keys, values, n_sink=4):
    return [1.0 if i < n_sink else (i + 1) / len(keys) for i in range(len(keys))]


def lagkv(keys, values, n_sink, lag_size):
    length = len(keys)
    blocks = max(0, length - n_sink) // lag_size
    if blocks < 2:
        after = max(0, length - n_sink)
        return [1.0 if i < length - after else (i - (length - after)) / after for i in range(length)]
    scores = [1.0] * length
    for block in range(blocks - 1):
        start = n_sink + block * lag_size
        following = range(start + lag_size, start + 2 * lag_size)
        total = [0.0] * lag_size
        for states in (keys, values):
            dims = range(len(states[0]))
            low = [min(states[t][d] for t in following) for d in dims]
            high = [max(states[t][d] for t in following) for d in dims]
            spread = [
                statistics.stdev([(states[start + i][d] - low[d]) / (high[d] - low[d]) for d in dims])
                for i in range(lag_size)
            ]
            exponents = [math.exp(s - max(spread)) for s in spread]
            for i in range(lag_size):
                total[i] += exponents[i] / sum(exponents) / 2
        for i in range(lag_size):
            scores[start + i] = sum(other < total[i] for other in total) / lag_size
    return scores


def cur(keys, values, num_sinks=4, window=16):
    length = len(keys)

    def share(states):
        squares = [norm(x) ** 2 for x in states]
        return [squares[i] / sum(squares[i - i % window : i - i % window + window]) for i in range(length)]

    product = [a * b for a, b in zip(share(keys), share(values), strict=True)]
    return [1.0 if i < num_sinks else product[i] / sum(product) for i in range(length)]


def top_tokens(scores, count):
    """The indices of the `count` highest scores, ascending; of equal ones the later."""
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)
    return sorted(ranked[:count])


def similarity_merge(
    keys,
    values,
    kept,
    protected=(),
    similarity_threshold=0.0,
    merge_fraction=1.0,
    value_norm_weighting=True,
    max_merge_per_token=0,
    merge_keys=False,
):
    """One head: lists of vectors and the kept indices in, `(keys, values, merged, dropped)` out."""
    evicted = [i for i in range(len(keys)) if i not in kept]
    targets = [j for j in kept if j not in protected]
    plan = []  # (similarity, token, target, weight)
    for i in evicted:
        if not targets:
            continue
        j = max(targets, key=lambda j: (cosine(keys[i], keys[j]), j))
        similarity = cosine(keys[i], keys[j])
        weight = max(similarity, 0.0)
        if value_norm_weighting:
            weight *= norm(values[i]) / (norm(values[i]) + norm(values[j]))
        if similarity >= similarity_threshold and weight > 0:
            plan.append((similarity, i, j, weight))
    plan.sort(key=lambda p: (p[0], p[1]), reverse=True)
    plan = plan[: math.ceil(merge_fraction * len(plan))]
    if max_merge_per_token:
        taken = {}
        limited = []
        for entry in plan:
            taken[entry[2]] = taken.get(entry[2], 0) + 1
            if taken[entry[2]] <= max_merge_per_token:
                limited.append(entry)
        plan = limited

    def fold(states):
        result = []
        for j in kept:
            mine = [(i, w) for _, i, target, w in plan if target == j]
            total = 1 + sum(w for _, w in mine)
            result.append(
                [(states[j][d] + sum(w * states[i][d] for i, w in mine)) / total for d in range(len(states[j]))]
            )
        return result

    folded_keys = fold(keys) if merge_keys else [keys[j] for j in kept]
    return folded_keys, fold(values), len(plan), len(evicted) - len(plan)


def fold_row(keys, values, scores, num_slots, sinks, recent, **merge_options):
    """One row and head without padding: kept indices, keys, values, merged, dropped."""
    length = len(keys)
    sinks = min(sinks, num_slots)
    recent = min(recent, num_slots - sinks)
    protected = {i for i in range(length) if i < sinks or i >= length - recent}
    scores = [math.inf if i in protected else scores[i] for i in range(length)]
    kept = top_tokens(scores, num_slots)
    return kept, *similarity_merge(keys, values, kept, protected, **merge_options)
