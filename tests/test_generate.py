"""Every way `generate` can run, each equal to a reference: transformers' cache, ours fed by hand, or rows alone."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

from merging_cache import MergingDynamicCache
from merging_cache.model import CACHE_ARGUMENT, cache_argument
from models import (
    CACHES,
    WINDOW,
    assert_same_cache,
    greedy,
    left_padded,
    llama,
    prompt,
    score_by_hand,
    stored,
    tiny_config,
    tiny_model,
)

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:A batch of")]

LENGTH = 48
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
kinds = pytest.mark.parametrize("kind", CACHES)
folds = pytest.mark.parametrize("fold_at", ["prefill", "decode"])


def by_hand(model, cache, ids, new_tokens):
    """Greedy decoding with plain forwards: the prompt, then token by token. Returns ids and logits `[new, vocab]`."""
    logits = [model(ids, **cache_argument(cache)).logits[:, -1]]
    out = ids
    for _ in range(new_tokens - 1):
        out = torch.cat([out, logits[-1].argmax(-1, keepdim=True)], 1)
        logits.append(model(out[:, -1:], **cache_argument(cache)).logits[:, -1])
    return torch.cat([out, logits[-1].argmax(-1, keepdim=True)], 1), torch.stack(logits)


def full_precision_twin(kind, model, **options):
    """A dynamic cache with the same fold, for what a quantized one should come close to."""
    return CACHES["dynamic"](model, **options)


# One turn -------------------------------------------------------------------------------------------------------------


@attentions
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_ratio_zero_is_dynamic_cache_bit_for_bit(attention, options):
    model, inputs = llama(attention), left_padded([LENGTH, 20, LENGTH])
    outputs = []
    for cache in (DynamicCache(config=model.config), CACHES["dynamic"](model, compression_ratio=0)):
        torch.manual_seed(3)
        outputs.append(greedy(model, inputs, **cache_argument(cache), **options))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for one, other in zip(outputs[0].logits, outputs[1].logits, strict=True):
        assert torch.equal(one, other)


@attentions
@pytest.mark.parametrize("length", [1, 2, 7, 24])
def test_a_prompt_within_the_budget_is_bit_for_bit_too(attention, length):
    model, ids = llama(attention), prompt(length)
    full = greedy(model, ids, **cache_argument(DynamicCache(config=model.config)))
    cache = CACHES["dynamic"](model, max_tokens=24)
    ours = greedy(model, ids, **cache_argument(cache))
    assert torch.equal(torch.stack(full.logits), torch.stack(ours.logits))
    assert cache.layers[0].num_slots == 0


@attentions
@kinds
@folds
def test_greedy_equals_feeding_by_hand(attention, kind, fold_at):
    model, ids = llama(attention), prompt(LENGTH)
    cache, twin = (CACHES[kind](model, compression_ratio=0.5, fold_at=fold_at) for _ in range(2))
    output = greedy(model, ids, **cache_argument(cache), new_tokens=24)
    sequence, logits = by_hand(model, twin, ids, 24)
    assert torch.equal(output.sequences, sequence)
    torch.testing.assert_close(torch.stack(output.logits), logits, rtol=1e-4, atol=1e-4)
    assert_same_cache(cache, twin, atol=1e-5)
    assert [layer.num_stored for layer in cache.layers] == [24 + 23] * 2


@attentions
def test_prefill_logits_are_those_of_the_full_cache(attention):
    model, ids = llama(attention), prompt(LENGTH)
    full = model(ids, **cache_argument(DynamicCache(config=model.config))).logits
    for kind in CACHES:
        assert torch.equal(model(ids, **cache_argument(CACHES[kind](model, compression_ratio=0.75))).logits, full)


@attentions
def test_a_folded_step_equals_masking_the_evicted(attention):
    """Dropped tokens that are the same in all heads must count exactly like tokens that a mask hides."""
    model, ids = llama(attention), prompt(LENGTH + 1)

    def same_in_all_heads(states):
        return torch.rand(states.num_tokens, generator=torch.Generator().manual_seed(1)).expand(states.keys.shape[:3])

    cache = CACHES["dynamic"](model, compression_ratio=0.5, merger="drop", scorer=same_in_all_heads)
    model(ids[:, :-1], **cache_argument(cache))
    kept = cache.layers[0].positions[0, 0]
    folded = model(ids[:, -1:], **cache_argument(cache)).logits
    mask = torch.zeros(1, LENGTH + 1, dtype=torch.long)
    mask[0, kept], mask[0, -1] = 1, 1
    full = DynamicCache(config=model.config)
    model(ids[:, :-1], **cache_argument(full))
    masked = model(
        ids[:, -1:], **cache_argument(full), attention_mask=mask, position_ids=torch.tensor([[LENGTH]])
    ).logits
    torch.testing.assert_close(folded, masked, rtol=1e-4, atol=1e-5)


@kinds
def test_sampling_with_a_seed_is_reproducible(kind):
    model, ids = llama(), prompt(LENGTH)
    sequences = []
    for _ in range(2):
        torch.manual_seed(7)
        cache = CACHES[kind](model, compression_ratio=0.5)
        sequences.append(greedy(model, ids, **cache_argument(cache), do_sample=True, new_tokens=16).sequences)
    assert torch.equal(*sequences)
    # and each sampled token was drawn from the logits that the cache gives when fed by hand
    twin = CACHES[kind](model, compression_ratio=0.5)
    model(ids, **cache_argument(twin))
    for token in sequences[0][0, LENGTH:-1]:
        model(token.view(1, 1), **cache_argument(twin))
    assert_same_cache(cache, twin, atol=1e-5)


@attentions
@kinds
def test_several_sequences_equal_a_batch_of_copies(attention, kind):
    model, ids = llama(attention), prompt(LENGTH)
    outputs = []
    for inputs, options in ((ids, {"num_return_sequences": 3}), (ids.repeat(3, 1), {})):
        torch.manual_seed(7)
        cache = CACHES[kind](model, compression_ratio=0.5)
        outputs.append(greedy(model, inputs, **cache_argument(cache), do_sample=True, **options))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


@attentions
@kinds
def test_beams_score_what_their_tokens_score_alone(attention, kind):
    """Beam search reorders the cache each step; its scores must be those of the found sequence fed by hand."""
    model, ids = llama(attention), prompt(LENGTH)
    cache = CACHES[kind](model, compression_ratio=0.5)
    # longer than the residual of the quantized caches, so that segments are reordered too
    output = greedy(
        model, ids, **cache_argument(cache), num_beams=4, new_tokens=24, output_scores=True, length_penalty=0.0
    )
    twin = CACHES[kind](model, compression_ratio=0.5)
    total = score_by_hand(model, twin, ids, output.sequences[0, LENGTH:])
    assert output.sequences_scores.item() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("kind", ["dynamic", "quanto"])
def test_padded_beams_equal_each_prompt_alone(kind):
    model, inputs = llama(), left_padded([LENGTH, 40, 30])
    cache = CACHES[kind](model, max_tokens=20, attention_mask=inputs["attention_mask"])
    together = greedy(model, inputs, **cache_argument(cache), num_beams=3)
    for row, length in enumerate((LENGTH, 40, 30)):
        alone = inputs["input_ids"][row : row + 1, LENGTH - length :]
        one = greedy(model, alone, **cache_argument(CACHES[kind](model, max_tokens=20)), num_beams=3)
        assert torch.equal(together.sequences[row, LENGTH:], one.sequences[0, length:])


@attentions
@kinds
@folds
@pytest.mark.parametrize("merger", ["drop", "similarity"])
@pytest.mark.parametrize("lengths", [(48, 30, 12), (48, 48, 47), (48, 2, 1), (48, 24, 25)], ids=str)
def test_left_padded_rows_equal_each_row_alone(attention, kind, fold_at, merger, lengths):
    model, inputs = llama(attention), left_padded(lengths)
    options = {"scorer": "keydiff", "merger": merger, "fold_at": fold_at}
    cache = CACHES[kind](model, compression_ratio=0.5, attention_mask=inputs["attention_mask"], **options)
    together = greedy(model, inputs, **cache_argument(cache), new_tokens=6)
    logits = torch.stack(together.logits)
    for row, length in enumerate(lengths):
        pads = LENGTH - length
        alone = CACHES[kind](model, max_tokens=24, **options)
        one = greedy(model, inputs["input_ids"][row : row + 1, pads:], **cache_argument(alone), new_tokens=6)
        if kind == "dynamic" or length > 24:  # a short row alone is not folded, so it is not quantized either
            torch.testing.assert_close(logits[:, row], torch.stack(one.logits)[:, 0], rtol=1e-4, atol=1e-4)
        for layer, single in zip(cache.folding_layers, alone.folding_layers, strict=True):
            real = layer.positions[row] >= pads
            used = min(24, length) + 5
            assert (real.sum(-1) == used).all()  # no padding is kept while there are tokens left
            assert torch.equal(layer.positions[row][:, -used:] - pads, single.positions[0])


def test_rows_are_wrong_without_the_mask_so_the_tests_above_can_fail():
    model, inputs = llama(), left_padded([48, 20])
    options = {"max_tokens": 24, "scorer": {"name": "random", "seed": 0}}
    outputs = [
        greedy(model, inputs, **cache_argument(CACHES["dynamic"](model, attention_mask=mask, **options)))
        for mask in (inputs["attention_mask"], None)
    ]
    assert (outputs[0].logits[-1][1] - outputs[1].logits[-1][1]).abs().max() > 1e-2


# Several turns --------------------------------------------------------------------------------------------------------


@attentions
@kinds
@folds
@pytest.mark.parametrize("new_ids_only", [False, True])
def test_turns_equal_feeding_by_hand(attention, kind, fold_at, new_ids_only):
    model = llama(attention)
    cache, twin = (CACHES[kind](model, compression_ratio=0.5, fold_at=fold_at) for _ in range(2))
    text = prompt(LENGTH)
    for turn in range(3):
        if turn:
            text = torch.cat([text, prompt(11, seed=turn)], 1)
        new = text[:, cache.get_seq_length() :]
        inputs = {"input_ids": new if new_ids_only else text, "attention_mask": torch.ones_like(text)}
        output = greedy(model, inputs, **cache_argument(cache), new_tokens=9)
        sequence, logits = by_hand(model, twin, new, 9)
        torch.testing.assert_close(torch.stack(output.logits), logits, rtol=1e-4, atol=1e-4)
        text = torch.cat([text, sequence[:, -9:]], 1)
    assert cache.get_seq_length() == text.shape[1] - 1
    assert_same_cache(cache, twin, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "quanto"])
def test_padded_turns_equal_each_row_alone(kind):
    model, lengths = llama(), (48, 35)
    inputs = left_padded(lengths)
    cache = CACHES[kind](model, max_tokens=24, attention_mask=inputs["attention_mask"])
    alone = [CACHES[kind](model, max_tokens=24) for _ in lengths]
    text, mask = inputs["input_ids"], inputs["attention_mask"]
    for turn in range(2):
        if turn:
            text = torch.cat([text, prompt(9, 2, seed=5)], 1)
            mask = torch.cat([mask, torch.ones(2, text.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        output = greedy(model, {"input_ids": text, "attention_mask": mask}, **cache_argument(cache))
        for row, length in enumerate(lengths):
            one = greedy(model, text[row : row + 1, LENGTH - length :], **cache_argument(alone[row]))
            torch.testing.assert_close(
                torch.stack(output.logits)[:, row], torch.stack(one.logits)[:, 0], rtol=1e-4, atol=1e-4
            )
        text, mask = output.sequences, torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], 1)


@pytest.mark.parametrize("fold_at", ["prefill", "decode"])
def test_right_padding_loses_nothing(fold_at):
    """Every row keeps at least what it would alone, wherever its padding is."""
    model, ids = llama(), prompt(40, 2)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 15:] = 0
    cache = CACHES["dynamic"](model, max_tokens=12, attention_mask=mask, fold_at=fold_at)
    model(ids, attention_mask=mask, **cache_argument(cache))
    more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    position_ids = torch.tensor([[40], [15]])
    step = model(prompt(1, 2), attention_mask=more, position_ids=position_ids, **cache_argument(cache)).logits
    real = [mask[row].bool()[cache.layers[0].positions[row, 0, :-1]] for row in range(2)]
    assert int(real[0].sum()) >= 12
    assert int(real[1].sum()) == 12
    alone = CACHES["dynamic"](model, max_tokens=12)
    model(ids[1:, :15], **cache_argument(alone))
    expected = model(prompt(1, 2)[1:], **cache_argument(alone)).logits
    torch.testing.assert_close(step[1:], expected, rtol=1e-4, atol=1e-4)


def test_padding_between_turns_is_never_attended():
    """Rows whose later turns are padded too: the mask given to the cache grows, and hides what it should."""
    model = llama()
    first, second = left_padded([30, 22], seed=1), left_padded([16, 10], seed=2)
    text = torch.cat([first["input_ids"], second["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    logits = []
    for filler in (0, 3):  # what stands where padding is must not matter
        text[mask == 0] = filler
        cache = CACHES["dynamic"](model, max_tokens=18, attention_mask=first["attention_mask"])
        position_ids = (mask.cumsum(1) - 1).clamp_min(0)
        model(text[:, :30], attention_mask=mask[:, :30], position_ids=position_ids[:, :30], **cache_argument(cache))
        cache.attention_mask = mask
        model(text[:, 30:], attention_mask=mask, position_ids=position_ids[:, 30:], **cache_argument(cache))
        more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        step = model(
            torch.tensor([[7], [8]]),
            attention_mask=more,
            position_ids=position_ids[:, -1:] + 1,
            **cache_argument(cache),
        )
        logits.append(step.logits)
        for layer in cache.layers:
            padding = (mask == 0)[:, None].expand(-1, 2, -1).gather(2, layer.positions[:, :, :-1])
            # 6 columns more than asked, so that the row with padding among its last tokens has its 18 slots too
            assert torch.equal(padding[:, 0], (mask == 0)[:, -24:])
            assert (~padding[1]).sum(dim=-1).tolist() == [18, 18]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@attentions
@kinds
@pytest.mark.parametrize("block", [1, 2, 5])
def test_blocks_on_a_folded_cache_equal_single_tokens(attention, kind, block):
    model, ids, more = llama(attention), prompt(LENGTH), prompt(10, seed=3)
    cache, twin = (CACHES[kind](model, compression_ratio=0.5, fold_at="decode") for _ in range(2))
    for each in (cache, twin):
        model(ids[:, :-1], **cache_argument(each))
        model(ids[:, -1:], **cache_argument(each))  # folds; then nothing more before another single token
    blocks = [model(piece, **cache_argument(cache)).logits for piece in more.split(block, 1)]
    tokens = [model(token, **cache_argument(twin)).logits for token in more.split(1, 1)]
    torch.testing.assert_close(torch.cat(blocks, 1), torch.cat(tokens, 1), rtol=1e-4, atol=1e-4)
    if kind == "dynamic" and block > 1:  # others quantize the tail, or a single token would have folded the blocks
        assert_same_cache(cache, twin, atol=1e-5)


@kinds
def test_a_block_that_is_folded_sees_itself_in_full(kind):
    model, ids, more = llama(), prompt(LENGTH), prompt(10, seed=3)
    cache, twin = (CACHES[kind](model, compression_ratio=0.5) for _ in range(2))
    for each in (cache, twin):
        model(ids, **cache_argument(each))
    block = model(more, **cache_argument(cache)).logits
    tokens = torch.cat([model(token, **cache_argument(twin)).logits for token in more.split(1, 1)], 1)
    torch.testing.assert_close(block, tokens, rtol=1e-4, atol=1e-4)
    assert [layer.num_stored for layer in cache.layers] == [29, 29]
    assert [layer.num_stored for layer in twin.layers] == [34, 34]


# Chunks ---------------------------------------------------------------------------------------------------------------


@attentions
@kinds
@pytest.mark.parametrize("chunk", [5, 16, 30])
def test_chunks_folded_at_decode_equal_one_piece(attention, kind, chunk):
    model, ids = llama(attention), prompt(LENGTH)
    cache, whole = (CACHES[kind](model, compression_ratio=0.5, fold_at="decode") for _ in range(2))
    chunked = greedy(model, ids, **cache_argument(cache), prefill_chunk_size=chunk)
    one = greedy(model, ids, **cache_argument(whole))
    torch.testing.assert_close(torch.stack(chunked.logits), torch.stack(one.logits), rtol=1e-4, atol=1e-4)
    assert_same_cache(cache, whole, atol=1e-5)


def test_a_last_chunk_of_one_token_folds_one_token_early():
    model, ids = llama(), prompt(LENGTH + 1)
    cache = CACHES["dynamic"](model, compression_ratio=0.5, fold_at="decode")
    greedy(model, ids, **cache_argument(cache), prefill_chunk_size=LENGTH, new_tokens=1)
    assert cache.layers[0].num_slots == 24
    assert cache.layers[0].num_stored == 25


@attentions
@kinds
@pytest.mark.parametrize("chunk", [5, 16, 30])
def test_chunks_folded_at_prefill_stream_in_bounded_memory(attention, kind, chunk):
    model, ids = llama(attention), prompt(LENGTH)
    cache, twin = (CACHES[kind](model, max_tokens=12) for _ in range(2))
    output = greedy(model, ids, **cache_argument(cache), prefill_chunk_size=chunk, new_tokens=1)
    for piece in ids.split(chunk, 1):
        logits = model(piece, **cache_argument(twin)).logits[:, -1]
        if piece.shape[1] > 1:
            assert max(layer.num_stored for layer in twin.layers) <= max(12, chunk)
    torch.testing.assert_close(output.logits[0], logits, rtol=1e-4, atol=1e-4)
    assert_same_cache(cache, twin, atol=1e-5)
    assert cache.get_seq_length() == LENGTH


# Drafts ---------------------------------------------------------------------------------------------------------------


def drafting(name):
    if name == "prompt lookup":
        return {"prompt_lookup_num_tokens": 4}
    return {"assistant_model": tiny_model("llama", layers=1, seed=1)}


def repetitive(length=LENGTH):
    """A prompt that repeats itself, so that prompt lookup finds something."""
    return prompt(12).repeat(1, length // 12)


def assisted(model, ids, cache, **options):
    """Assisted generation, and how many tokens the cache had seen after each crop."""
    cache.activate_past_recording()  # `generate` does so itself since transformers 5.14
    crop, seen = cache.crop, []

    def watched(tokens_to_remove):
        crop(tokens_to_remove)
        seen.append(cache.get_seq_length())

    cache.crop = watched
    # an end token that never comes: prompt lookup asks for one
    output = greedy(model, ids, **cache_argument(cache), eos_token_id=[1], **options)
    del cache.crop
    return output, seen


@attentions
@pytest.mark.parametrize("draft", ["prompt lookup", "assistant"])
def test_drafts_without_folding_equal_greedy(attention, draft):
    model, ids = llama(attention), repetitive()
    plain = greedy(model, ids, **cache_argument(DynamicCache(config=model.config)), new_tokens=16)
    cache = CACHES["dynamic"](model, compression_ratio=0)
    output, _ = assisted(model, ids, cache, new_tokens=16, **drafting(draft))
    assert torch.equal(output.sequences, plain.sequences)


@attentions
@kinds
@folds
@pytest.mark.parametrize("draft", ["prompt lookup", "assistant"])
def test_rejected_drafts_leave_no_trace(attention, kind, fold_at, draft):
    model, ids = llama(attention), repetitive()
    cache, twin = (CACHES[kind](model, compression_ratio=0.5, fold_at=fold_at) for _ in range(2))
    output, seen = assisted(model, ids, cache, new_tokens=16, **drafting(draft))
    # the first verification saw the prompt unfolded, as greedy decoding with the full cache does
    full = greedy(model, ids, **cache_argument(DynamicCache(config=model.config)), new_tokens=1)
    torch.testing.assert_close(output.logits[0], full.logits[0], rtol=1e-4, atol=1e-5)
    # by hand: the tokens accepted by the first verification in one pass, folded there, then one by one
    accepted = output.sequences[:, : cache.get_seq_length()]
    twin.activate_past_recording()
    model(accepted[:, : seen[0]], **cache_argument(twin))
    twin.crop(0)
    for token in accepted[:, seen[0] :].split(1, 1):
        model(token, **cache_argument(twin))
        twin.crop(0)
    assert cache.layers[0].num_slots == int(seen[0] * 0.5)
    if kind == "dynamic":
        assert_same_cache(cache, twin, atol=1e-5)
    else:  # the tail becomes segments at other moments, but it holds the same tokens
        for mine, theirs in zip(stored(cache), stored(twin), strict=True):
            assert torch.equal(mine[2], theirs[2])


def test_a_second_assisted_turn_folds_again():
    model, ids = llama(), repetitive()
    cache = CACHES["dynamic"](model, compression_ratio=0.5)
    output, _ = assisted(model, ids, cache, **drafting("prompt lookup"))
    text = torch.cat([output.sequences, repetitive(24)], 1)
    _, seen = assisted(model, text, cache, **drafting("prompt lookup"))
    assert cache.layers[0].num_slots == seen[0] // 2
    assert seen[0] >= text.shape[1]


# The cache as an object -----------------------------------------------------------------------------------------------


@kinds
def test_compress_once_ask_many(kind):
    model, context = llama(), prompt(LENGTH)
    cache = CACHES[kind](model, compression_ratio=0.5)
    model(context, **cache_argument(cache))
    for seed in range(3):
        text = torch.cat([context, prompt(6, seed=seed)], 1)
        answer = greedy(model, text, **cache_argument(copy.deepcopy(cache)))
        fresh = CACHES[kind](model, compression_ratio=0.5)
        model(context, **cache_argument(fresh))
        torch.testing.assert_close(
            torch.stack(answer.logits),
            torch.stack(greedy(model, text, **cache_argument(fresh)).logits),
            rtol=1e-4,
            atol=1e-5,
        )
    assert cache.get_seq_length() == LENGTH


@kinds
def test_one_context_many_questions_in_a_batch(kind):
    model, context = llama(), prompt(LENGTH)
    questions = prompt(6, 3, seed=4)
    cache = CACHES[kind](model, compression_ratio=0.5)
    model(context, **cache_argument(cache))
    single = copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    together = greedy(model, torch.cat([context.repeat(3, 1), questions], 1), **cache_argument(cache))
    one = greedy(model, torch.cat([context, questions[1:2]], 1), **cache_argument(single))
    torch.testing.assert_close(torch.stack(together.logits)[:, 1], torch.stack(one.logits)[:, 0], rtol=1e-4, atol=1e-4)
    cache.batch_select_indices(torch.tensor([1]))
    assert_same_cache(cache, single, atol=1e-4)


@kinds
def test_reset_makes_it_new(kind):
    model, ids = llama(), prompt(LENGTH)
    cache = CACHES[kind](model, compression_ratio=0.5)
    first = greedy(model, ids, **cache_argument(cache))
    cache.reset()
    second = greedy(model, ids, **cache_argument(cache))
    assert torch.equal(torch.stack(first.logits), torch.stack(second.logits))


@attentions
@kinds
def test_crop_takes_back_generated_tokens(attention, kind):
    model, ids = llama(attention), prompt(LENGTH)
    cache = CACHES[kind](model, compression_ratio=0.5)
    output = greedy(model, ids, **cache_argument(cache), new_tokens=20)
    cache.crop(LENGTH + 3 - cache.get_seq_length())
    twin = CACHES[kind](model, compression_ratio=0.5)
    greedy(model, ids, **cache_argument(twin), new_tokens=4)
    next_token = output.sequences[:, LENGTH + 3 : LENGTH + 4]
    torch.testing.assert_close(
        model(next_token, **cache_argument(cache)).logits,
        model(next_token, **cache_argument(twin)).logits,
        # cropped tokens had been quantized in the one, were still exact in the other
        **({"rtol": 1e-4, "atol": 1e-5} if kind == "dynamic" else {"rtol": 0.2, "atol": 1.5}),
    )


@attentions
@kinds
def test_inputs_embeds(attention, kind):
    model, ids = llama(attention), prompt(LENGTH)
    outputs = [
        greedy(model, inputs, **cache_argument(CACHES[kind](model, compression_ratio=0.5)))
        for inputs in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids).detach()})
    ]
    assert torch.equal(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))


@attentions
@kinds
@pytest.mark.parametrize("length", [1, 2, 5, 8, 9])
def test_short_prompts(attention, kind, length):
    """Of one token, and not longer than sinks and recent window (2 + 6) together."""
    model, ids = llama(attention), prompt(length)
    cache, twin = (CACHES[kind](model, compression_ratio=0.5) for _ in range(2))
    output = greedy(model, ids, **cache_argument(cache))
    sequence, logits = by_hand(model, twin, ids, 8)
    assert torch.equal(output.sequences, sequence)
    torch.testing.assert_close(torch.stack(output.logits), logits, rtol=1e-4, atol=1e-4)
    assert cache.layers[0].num_stored == max(1, length // 2) + 7


@pytest.mark.parametrize("length", [20, LENGTH + 7])
def test_a_prompt_no_longer_than_the_cache_is_refused(length):
    model, ids = llama(), prompt(LENGTH)
    cache = CACHES["dynamic"](model, compression_ratio=0.5)
    greedy(model, ids, **cache_argument(cache))
    with pytest.raises(ValueError, match=rf"prompt has {length} tokens, but this cache has already seen {LENGTH + 7}"):
        greedy(model, prompt(length), **cache_argument(cache))
    with pytest.raises(ValueError, match="already seen"):
        greedy(model, {"inputs_embeds": torch.zeros(1, length, 64)}, **cache_argument(cache))
    # arithmetic that people do themselves is left alone
    cache.crop(LENGTH - cache.get_seq_length())
    assert cache.get_seq_length() == LENGTH
    assert 100 - cache.get_seq_length() == 100 - LENGTH
    assert abs(LENGTH - 1 - cache.get_seq_length()) == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["phi3", "phimoe", "phi4_multimodal"])
@pytest.mark.parametrize("given", ["config", "model", "ratio 0", "quanto"])
def test_models_whose_rotation_switches(family, given):
    """Phi-3 rotates otherwise from a length on: longer prompts are folded as by hand, and none is carried across it."""
    switch, half = 40, 8
    try:
        config = tiny_config(family)
    except Exception as error:
        pytest.skip(f"this transformers cannot build it: {error}")
    config.original_max_position_embeddings = switch
    factors = {"short_factor": [1.0] * half, "long_factor": [2.0] * half, "rope_type": "longrope", "rope_theta": 1e4}
    options = {"original_max_position_embeddings": switch, "partial_rotary_factor": 1.0}
    config.rope_parameters = factors | options | {"short_mscale": 1.0, "long_mscale": 1.0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None

    def new_cache():
        match given:
            case "quanto":
                return CACHES["quanto"](model)
            case "ratio 0":
                return MergingDynamicCache(config=model.config, compression_ratio=0)
            case "config":
                return MergingDynamicCache(config=model.config, merger="drop", **WINDOW)
            case "model":
                return MergingDynamicCache(model=model, **WINDOW)

    for length in (switch - 10, switch + 20):
        cache, ids = new_cache(), prompt(length)
        out = greedy(model, ids, **cache_argument(cache))
        if given == "ratio 0":
            full = DynamicCache(config=model.config)
            assert torch.equal(out.sequences, greedy(model, ids, **cache_argument(full)).sequences)
            continue
        assert cache.get_seq_length() == length + 7
        assert 0 < cache.layers[0].num_slots < length
        sequence, logits = by_hand(model, new_cache(), ids, 8)
        assert torch.equal(out.sequences, sequence)
        torch.testing.assert_close(torch.stack(out.logits), logits, rtol=1e-4, atol=1e-4)
    for length in (switch - 2, switch):
        cache, ids = new_cache(), prompt(length)
        if given == "ratio 0":
            full = DynamicCache(config=model.config)
            expected = greedy(model, ids, **cache_argument(full)).sequences
            assert torch.equal(greedy(model, ids, **cache_argument(cache)).sequences, expected)
            continue
        with pytest.raises(ValueError, match=f"rotates its keys otherwise from {switch} tokens on"):
            greedy(model, ids, **cache_argument(cache))
        assert cache.get_seq_length() == switch


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("how", [KeyboardInterrupt, MemoryError])
def test_a_pass_that_stops_halfway_is_not_gone_on_with(kind, how):
    model, ids = llama(), prompt(LENGTH)
    cache = CACHES[kind](model)
    expected = greedy(model, ids, **cache_argument(CACHES[kind](model))).sequences

    def stop(*_):
        raise how

    model(ids, **cache_argument(cache))
    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(how):
        model(prompt(1), **cache_argument(cache))
    hook.remove()
    for go_on in (lambda: model(prompt(1), **cache_argument(cache)), cache.fold, lambda: cache.fixed(4)):
        with pytest.raises(ValueError, match="stopped halfway|a quantized cache cannot be fixed"):
            go_on()
    cache.reset()
    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(how):
        model(ids, **cache_argument(cache))
    hook.remove()
    with pytest.raises(ValueError, match="stopped halfway"):
        model(ids, **cache_argument(cache))
    cache.reset()
    assert torch.equal(greedy(model, ids, **cache_argument(cache)).sequences, expected)


def test_a_cache_goes_when_nobody_has_it():
    """With a config or without; no collector has to find it."""
    gc.disable()
    try:
        for config in (llama().config, None):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cache = MergingDynamicCache(config=config, compression_ratio=0.5)
            cache.update(torch.randn(1, 2, 60, 16), torch.randn(1, 2, 60, 16), 0)
            gone = weakref.ref(cache)
            del cache
            assert gone() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_mask_narrower_than_the_first_pass():
    """Soft prompts before padded rows: the attention's own mask knows better, and where that is not seen it is said."""
    model = llama()
    padded, soft = left_padded([20, 44]), torch.randn(2, 5, 64)
    embeds = torch.cat([soft, model.get_input_embeddings()(padded["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(2, 5, dtype=torch.long), padded["attention_mask"]], dim=1)
    options = {"merger": "drop", "compression_ratio": 0.5, **WINDOW}
    told, known = (MergingDynamicCache(model=model, **options) for _ in range(2))
    told.attention_mask = padded["attention_mask"]
    for cache in (told, known):
        model(inputs_embeds=embeds, attention_mask=mask, **cache_argument(cache))
    assert_same_cache(told, known)
    cache = MergingDynamicCache(config=model.config, attention_mask=padded["attention_mask"], **options)
    with pytest.raises(ValueError, match="attention_mask is of 44 tokens, but the first pass has 49"):
        model(inputs_embeds=embeds, attention_mask=mask, **cache_argument(cache))


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("rows", [1, 2])
def test_generate_hands_the_model_what_it_hands_with_a_plain_cache(kind, rows):
    """The same arguments of the same kinds, masks of two dimensions: a wrapper that reads them sees nothing else."""
    model = llama()
    inputs, handed = left_padded([40, 30][:rows]), []

    def note(_, args, kwargs):
        handed.append(
            [
                (name, type(value).__name__, value.dim() if isinstance(value, torch.Tensor) else None)
                for name, value in sorted(kwargs.items())
                if name != CACHE_ARGUMENT
            ]
        )

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    for cache in (DynamicCache(config=model.config), CACHES[kind](model, attention_mask=inputs["attention_mask"])):
        greedy(model, inputs, **cache_argument(cache))
        assert not cache.is_compileable
    hook.remove()
    plain, ours = handed[: len(handed) // 2], handed[len(handed) // 2 :]
    assert ours == plain


def test_another_batch_is_refused():
    model = llama()
    cache = CACHES["dynamic"](model, compression_ratio=0.5)
    greedy(model, prompt(LENGTH), **cache_argument(cache))
    with pytest.raises(ValueError, match="holds a batch of 1 rows, but got 2"):
        model(prompt(3, 2), **cache_argument(cache))


def test_without_a_config_every_layer_folds():
    from merging_cache import MergingDynamicCache

    model, ids = llama(), prompt(LENGTH)
    with_config = greedy(model, ids, **cache_argument(CACHES["dynamic"](model, compression_ratio=0.5)))
    with pytest.warns(UserWarning, match="MergingDynamicCache was given neither config=model.config nor model=model"):
        cache = MergingDynamicCache(compression_ratio=0.5, merger="similarity", **WINDOW)
    without = greedy(model, ids, **cache_argument(cache))
    assert_same_cache(getattr(with_config, CACHE_ARGUMENT), cache, rtol=1e-4, atol=1e-5)
    # with the config the cache knows that masks make attention faster, which adds in another order
    torch.testing.assert_close(torch.stack(with_config.logits), torch.stack(without.logits), rtol=1e-4, atol=1e-5)


def test_two_threads_on_one_model():
    from concurrent.futures import ThreadPoolExecutor

    model, prompts = llama(), [prompt(LENGTH, seed=seed) for seed in range(4)]

    def run(ids):
        return greedy(model, ids, **cache_argument(CACHES["dynamic"](model, compression_ratio=0.5))).sequences

    alone = [run(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, prompts))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_without_folding_a_quantized_cache_is_as_close_as_transformers_own():
    model, ids = llama(), prompt(LENGTH)
    full = torch.stack(greedy(model, ids, **cache_argument(DynamicCache(config=model.config)), new_tokens=2).logits)
    errors = []
    for cache in (
        QuantizedCache("quanto", config=model.config, nbits=4, q_group_size=16),
        CACHES["quanto"](model, compression_ratio=0, nbits=4),
    ):
        logits = torch.stack(greedy(model, ids, **cache_argument(cache), new_tokens=2).logits)
        errors.append((logits[1] - full[1]).norm().item())
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
