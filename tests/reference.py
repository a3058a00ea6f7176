"""Slow, obvious versions of every formula: loops over batch, head and token, one number at a time.

The package must equal these; nothing here is shared with it.
"""

import itertools
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


def attention_row(states, row, query_head, query):
    """The causal softmax of one query over the tokens: a list."""
    keys = vectors(states.keys)[row][query_head * states.keys.shape[1] // states.queries.shape[1]]
    q = vectors(states.queries)[row][query_head][query]
    position = int(states.query_positions[row][query])
    logits = [dot(q, k) / math.sqrt(len(q)) for k in keys]
    seen = [i for i in range(len(keys)) if i <= position]
    exponents = {i: math.exp(logits[i] - max(logits[j] for j in seen)) for i in seen}
    return [exponents.get(i, 0.0) / sum(exponents.values()) for i in range(len(keys))]


def snapkv(states, window, kernel):
    batch, heads, length = states.keys.shape[:3]
    group, num_queries = states.queries.shape[1] // heads, states.queries.shape[2]
    asked = range(max(0, num_queries - window), num_queries)
    before = length if len(asked) >= length else length - len(asked)
    scores = torch.ones(batch, heads, length)
    for row in range(batch):
        for head in range(heads):
            rows = [attention_row(states, row, head * group + g, q) for g in range(group) for q in asked]
            mean = [sum(weights[i] for weights in rows) / len(rows) for i in range(length)]
            for i in range(before):
                near = range(i - kernel // 2, i + kernel // 2 + 1)
                scores[row, head, i] = sum(mean[j] for j in near if 0 <= j < before) / kernel
    return scores


def kvzip(states, plus):
    """The largest weight of any token that is read again and any query head of the group."""
    batch, heads, length, dim = states.keys.shape
    shown, values = vectors(states.again.weights), vectors(states.values)
    scores = torch.zeros(batch, heads, length)
    for b, kv in itertools.product(range(batch), range(heads)):
        for number, rows in enumerate(shown[b][kv]):
            head = kv * len(shown[b][kv]) + number
            part = states.module.o_proj.weight[:, head * dim : (head + 1) * dim].double().tolist()
            for (i, row), j in itertools.product(enumerate(rows), range(length)):
                drawn = row[j]
                if plus:
                    drawn *= norm([dot(line, values[b][kv][j]) for line in part]) / states.again.norms[b, i].item()
                scores[b, kv, j] = max(scores[b, kv, j].item(), drawn)
    return scores


def leave_one_out(states, projection=None):
    """How the output of the layer changes, relative to itself, where one token is gone and the others share its part.

    A weight above .99 counts as .99 of the attention does.
    """
    batch, heads, length, dim = states.keys.shape
    projection = (states.module.o_proj.weight if projection is None else projection).double()
    weights, values, outputs = (one.double() for one in (states.again.weights, states.values, states.again.outputs))
    scores = torch.zeros(batch, heads, length)
    for b, kv, i in itertools.product(range(batch), range(heads), range(weights.shape[3])):
        for j in range(length):
            change = 0.0
            for number in range(weights.shape[2]):
                head, drawn = kv * weights.shape[2] + number, weights[b, kv, number, i, j].item()
                read, value = outputs[b, kv, number, i], values[b, kv, j]
                left = max(1 - drawn, 0.01)
                without = read + drawn * (read - value) / left
                part = projection[:, head * dim : (head + 1) * dim]
                change += norm((part @ (without - read)).tolist())
            scores[b, kv, j] += (change / states.again.lengths[b, i].item()) ** 2
    return scores


def tova(states):
    batch, heads, length = states.keys.shape[:3]
    scores = torch.ones(batch, heads, length)
    for row in range(batch):
        rows = [attention_row(states, row, head, -1) for head in range(states.queries.shape[1])]
        for i in range(length - 1):
            scores[row, :, i] = sum(weights[i] for weights in rows) / len(rows)
    return scores


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


# Scorers that see queries: one row and KV head, lists of float64 vectors. Queries are [group member][position][D].


def rotation(position, dim, base=10000.0):
    """The RoPE matrix of a position, dimension i turning with i + dim / 2."""
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(dim // 2):
        angle = position * base ** (-2 * i / dim)
        matrix[i, i] = matrix[i + dim // 2, i + dim // 2] = math.cos(angle)
        matrix[i, i + dim // 2], matrix[i + dim // 2, i] = -math.sin(angle), math.sin(angle)
    return matrix


def mean_rotation(first, count, dim):
    return sum(rotation(first + i, dim) for i in range(count)) / count


def softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def observed_attention(keys, queries, scale):
    length, received = len(keys), [0.0] * len(keys)
    for member in queries:
        for p, q in enumerate(member):
            for i, w in enumerate(softmax([float(q @ keys[i]) * scale for i in range(p + 1)])):
                received[i] += w / len(queries)
    return [received[i] / (length - i) for i in range(length)]


def expected_attention(keys, values, unrotated, n_sink, n_future_positions, use_covariance, use_vnorm, epsilon):
    length, dim = keys.shape
    turn = mean_rotation(length, n_future_positions, dim)
    scores = [0.0] * length
    for member in unrotated:
        counted = member[n_sink:]
        mean = counted.mean(0)
        spread = (counted - mean).T @ (counted - mean) / len(counted)
        mean, spread = turn @ mean, turn @ spread @ turn.T
        logits = [
            float(mean @ k) / dim**0.5 + (float(k @ spread @ k) / dim / 2 if use_covariance else 0.0)
            for k in keys[n_sink:]
        ]
        for i, w in enumerate(softmax(logits)):
            scores[n_sink + i] += w / len(unrotated)
    if use_vnorm:
        scores = [(s + epsilon) * float(v.norm()) for s, v in zip(scores, values, strict=True)]
    return [math.inf] * n_sink + scores[n_sink:]


def qfilter(keys, queries):
    stacked = torch.cat(list(queries))
    direction = torch.linalg.svd(stacked).Vh[0]
    if float(direction @ stacked.mean(0)) > 0:
        direction = -direction
    return [-float(k @ direction) for k in keys]


def non_causal(keys, values, queries, chunk_size):
    """Before the z-score, which is over all heads of a row."""
    length, received = len(keys), [0.0] * len(keys)
    for start in range(0, length, chunk_size):
        chunk = range(start, min(start + chunk_size, length))
        for member in queries:
            for p in chunk:
                for i, w in zip(chunk, softmax([float(member[p] @ keys[i]) for i in chunk]), strict=True):
                    received[i] += w / len(queries)
    received = [r * float(v.norm()) for r, v in zip(received, values, strict=True)]
    return [
        sum(received[j] for j in (i - 1, i, i + 1) if 0 <= j < length) / 3 for i in range(length)
    ]  # zeros beyond the ends


def leverage(unrotated_keys, projection):
    """Before the z-score."""
    sketch = (unrotated_keys - unrotated_keys.mean(0)) @ projection
    inverse = torch.linalg.inv(sketch.T @ sketch + 0.01 * torch.eye(sketch.shape[1], dtype=torch.float64))
    return [float(x @ inverse @ x) for x in sketch]


def z_scores(heads):
    """All heads of a row together."""
    flat = [s for head in heads for s in head]
    mean = sum(flat) / len(flat)
    deviation = (sum((s - mean) ** 2 for s in flat) / (len(flat) - 1)) ** 0.5
    return [[(s - mean) / deviation for s in head] for head in heads]


def cap(keys, values, unrotated, tau, n_sink, n_future_positions, epsilon=1e-6):
    length, dim = keys.shape
    turn, scores = mean_rotation(length, n_future_positions, dim), [0.0] * length
    for member in unrotated:
        anchor = turn @ member[n_sink:].mean(0)
        cosines = [float(anchor @ k / anchor.norm() / k.norm()) for k in keys[n_sink:]]
        weights = [math.exp(tau * (c - max(cosines))) for c in cosines]
        capacity = torch.eye(values.shape[1], dtype=torch.float64)
        for w, v in zip(weights, values[n_sink:], strict=True):
            capacity += (w + epsilon) * torch.outer(v, v)
        inverse = torch.linalg.inv(capacity)
        for i, (w, v) in enumerate(zip(weights, values[n_sink:], strict=True)):
            scores[n_sink + i] += w * float(v @ inverse @ v) / len(unrotated)
    return [math.inf] * n_sink + scores[n_sink:]
