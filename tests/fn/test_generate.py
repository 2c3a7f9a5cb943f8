"""Decoding equals the full forward, and what generate makes of it."""

import re

import pytest
import torch
from torch.utils import _pytree

from rlm_mhc import fn
from rlm_mhc.program import make_decoder
from rlm_mhc.testing import assert_as_accurate, largest_difference, small_config
from rlm_mhc.testing.models import double, perturbed, with_wide_vectors
from rlm_mhc.tree import tree_leaves, tree_map
from rlm_mhc.variants import PRESETS

SHAPES = {name: dict(mhc_preset=name) for name in PRESETS} | {
    "plain": dict(mhc_enabled=False),
    "untied": dict(tie_embeddings=False, num_kv_heads=1),
    "qwen": dict(qkv_bias=True, qk_norm=True, num_kv_heads=4),
    "one stream": dict(mhc_flows=1, head_dim=6),
}
LENGTHS = torch.tensor([1, 7, 4])


def model(dtype=torch.float32, **fields):
    config = small_config(**fields)
    params = perturbed(fn.init(config, dtype=dtype), 0.2)
    return config, params, torch.randint(config.vocab_size, (3, 14), generator=torch.Generator().manual_seed(1))


def prefilled(config, params, tokens, size=14):
    empty = fn.init_cache(config, len(tokens), size, dtype=params.norm.weight.dtype)
    return fn.prefill(params, tokens, config, empty, lengths=LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_rows_of_any_length_equals_the_full_forward_at_every_position(shape, dtype):
    config, params, tokens = model(dtype, **SHAPES[shape])
    plain, exact = (fn.forward(p, tokens, config) for p in (params, double(params)))
    rows = torch.arange(3)
    logits, cache = prefilled(config, params, tokens[:, :7])
    for step in range(8):
        at = LENGTHS + step
        assert_as_accurate(logits, plain[rows, at - 1], exact[rows, at - 1])
        assert torch.equal(cache.lengths, at)
        if step < 7:
            logits, cache = fn.decode_step(params, tokens[rows, at], config, cache, donate=step % 2 == 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_extending_rows_by_different_numbers_of_tokens_equals_the_full_forward(shape, dtype):
    config, params, tokens = model(dtype, **SHAPES[shape])
    plain, exact = (fn.forward(p, tokens, config) for p in (params, double(params)))
    rows, seen = torch.arange(3), LENGTHS
    _, cache = prefilled(config, params, tokens[:, :7])
    # The last one fills the rows: padding would stand beyond the end of the cache.
    for new in (torch.tensor([3, 1, 2]), torch.tensor([1, 1, 1]), torch.tensor([9, 5, 7])):
        width = int(new.max())
        chunk = tokens.take_along_dim((seen.unsqueeze(-1) + torch.arange(width)).clamp(max=13), -1)
        before = tree_map(torch.clone, cache)
        logits, cache = fn.extend(params, chunk, config, cache, lengths=new, donate=width == 1)
        for old, now in zip(tree_leaves(before.keys), tree_leaves(cache.keys), strict=True):
            assert all(torch.equal(old[row, :, :n], now[row, :, :n]) for row, n in enumerate(seen))
        seen = seen + new
        assert torch.equal(cache.lengths, seen)
        assert_as_accurate(logits, plain[rows, seen - 1], exact[rows, seen - 1])
    assert torch.equal(seen, torch.full((3,), 14))


def test_prefill_is_extend_of_an_empty_cache():
    config, params, tokens = model(torch.float64)
    empty = fn.init_cache(config, 3, 14, dtype=torch.float64)
    for lengths in (None, LENGTHS):
        expected = fn.prefill(params, tokens[:, :7], config, empty, lengths=lengths)
        logits, cache = fn.extend(params, tokens[:, :7], config, empty, lengths=lengths)
        torch.testing.assert_close(logits, expected[0])
        assert torch.equal(cache.lengths, expected[1].lengths)
        for ours, theirs in zip(cache.keys, expected[1].keys, strict=True):
            for row, n in enumerate(cache.lengths):
                torch.testing.assert_close(ours[row, :, :n], theirs[row, :, :n])


def test_selected_rows_go_on_as_the_rows_they_were():
    config, params, tokens = model(torch.float64)
    _, cache = prefilled(config, params, tokens[:, :7])
    rows = torch.tensor([2, 0, 2, 1])
    forked = cache.select(rows)
    assert torch.equal(forked.lengths, LENGTHS[rows])
    expected, _ = fn.extend(params, tokens[:, 7:10], config, cache)
    logits, after = fn.extend(params, tokens[rows, 7:10], config, forked, donate=True)
    torch.testing.assert_close(logits, expected[rows])
    assert torch.equal(cache.lengths, LENGTHS)
    assert cache.select(torch.arange(3)).keys[0].data_ptr() != cache.keys[0].data_ptr()
    assert torch.equal(after.lengths, LENGTHS[rows] + 3)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("lengths", [[0, 1, 1], [1, 1, 4], [1, 1]])
@pytest.mark.parametrize("run", [fn.prefill, fn.extend])
def test_lengths_that_are_not_those_of_the_tokens_are_refused(run, lengths):
    config, params, tokens = model()
    with pytest.raises(ValueError, match=re.escape(f"lengths={lengths}: expected [3] numbers from 1 to 3")):
        run(params, tokens[:, :3], config, fn.init_cache(config, 3, 8), lengths=torch.tensor(lengths))


def test_prefill_forgets_what_the_cache_held_and_does_not_read_padding():
    config, params, tokens = model(torch.float64)
    logits, cache = prefilled(config, params, tokens[:, :7])
    padded = tokens[:, :7].where(torch.arange(7) < LENGTHS.unsqueeze(-1), 5)
    again, other = fn.prefill(params, padded, config, cache, lengths=LENGTHS)
    assert torch.equal(logits, again)
    step, token = fn.decode_step, tokens[:, 0]
    torch.testing.assert_close(step(params, token, config, cache)[0], step(params, token, config, other)[0])


def test_nothing_given_is_changed_unless_donated():
    config, params, tokens = model()
    _, cache = prefilled(config, params, tokens[:, :7])
    before = tree_map(torch.clone, (params, tokens, cache))
    fn.decode_step(params, tokens[:, 0], config, cache)
    fn.prefill(params, tokens[:, :7], config, cache, lengths=LENGTHS)
    fn.generate(params, tokens[:, :7], config, max_new_tokens=3, lengths=LENGTHS, repetition_penalty=1.5)
    assert all(map(torch.equal, tree_leaves((params, tokens, cache)), tree_leaves(before)))
    _, donated = fn.decode_step(params, tokens[:, 0], config, cache, donate=True)
    assert all(a is b for a, b in zip(donated.keys, cache.keys, strict=True))
    assert not torch.equal(cache.keys[0], before[2].keys[0])


def test_a_cache_is_a_pytree_of_fixed_size():
    config, params, tokens = model()
    _, cache = prefilled(config, params, tokens[:, :7])
    _, after = fn.decode_step(params, tokens[:, 0], config, cache)
    leaves, structure = _pytree.tree_flatten(cache)
    assert len(leaves) == 2 * config.num_layers + 1
    assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in _pytree.tree_leaves(after)]
    again = _pytree.tree_unflatten(leaves, structure)
    assert isinstance(again, fn.Cache)
    assert torch.equal(
        fn.decode_step(params, tokens[:, 1], config, again)[0], fn.decode_step(params, tokens[:, 1], config, cache)[0]
    )


def test_vmap_over_rows_is_the_batch():
    config, params, tokens = model(torch.float64)
    _, cache = prefilled(config, params, tokens[:, :7])
    expected, after = fn.decode_step(params, tokens[:, 0], config, cache)
    axes = (0, fn.Cache((0,) * config.num_layers, (0,) * config.num_layers, 0))
    each, mapped = torch.func.vmap(lambda t, c: fn.decode_step(params, t, config, c), axes)(tokens[:, 0], cache)
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(mapped.keys[1], after.keys[1])


def test_a_step_has_the_gradient_of_the_full_forward():
    config, params, tokens = model(torch.float64)
    empty = fn.init_cache(config, 3, 4, dtype=torch.float64)

    def by_cache(p):
        _, cache = fn.prefill(p, tokens[:, :3], config, empty)
        return fn.decode_step(p, tokens[:, 3], config, cache)[0].sum()

    grads = torch.func.grad(by_cache)(params)
    expected = torch.func.grad(lambda p: fn.forward(p, tokens[:, :4], config)[:, -1].sum())(params)
    for ours, theirs in zip(tree_leaves(grads), tree_leaves(expected), strict=True):
        assert largest_difference(ours, theirs, 1.0) < 1e-9


@pytest.mark.parametrize("preset", ["paper", "single_pass"])
def test_generating_greedily_takes_the_likeliest_token_of_the_full_forward(preset):
    config, params, tokens = model(mhc_preset=preset)
    out = fn.generate(params, tokens[:, :7], config, max_new_tokens=6, lengths=LENGTHS)
    assert out.tokens.shape == (3, 13)
    assert torch.equal(out.lengths, LENGTHS + 6)
    for row, start, end in zip(out.tokens, LENGTHS, out.lengths, strict=True):
        assert torch.equal(row[:start], tokens[list(LENGTHS).index(start), :start])
        expected = fn.forward(params, row[None, : end - 1], config)[0, start - 1 :].argmax(-1)
        assert torch.equal(row[start:end], expected)
        assert not row[end:].any()


def test_a_row_ends_with_its_first_stop_token_and_the_others_go_on():
    config, params, tokens = model()
    free = fn.generate(params, tokens[:, :7], config, max_new_tokens=7, lengths=LENGTHS)
    new = [row[start:].tolist() for row, start in zip(free.tokens, LENGTHS, strict=True)]
    stops = [new[0][2], new[1][4]]
    out = fn.generate(params, tokens[:, :7], config, max_new_tokens=7, lengths=LENGTHS, stop_tokens=stops)
    for row, start, end, without in zip(out.tokens, LENGTHS, out.lengths, new, strict=True):
        ended = [i + 1 for i, token in enumerate(without[:7]) if token in stops] + [7]
        assert end - start == ended[0]
        assert row[start:end].tolist() == without[: ended[0]]
        assert not row[end:].any()
    assert out.lengths[0] < free.lengths[0]
    everything = range(config.vocab_size)
    steps = fn.generate_steps(params, tokens[:, :7], config, max_new_tokens=7, stop_tokens=everything)
    assert [drawn.counted.tolist() for drawn in steps] == [[True] * 3]


def test_draws_are_those_of_the_generator():
    config, params, tokens = model()

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        how = dict(temperature=1.5, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
        return fn.generate(params, tokens, config, max_new_tokens=8, generator=generator, **how).tokens

    state = torch.get_rng_state()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_penalised_token_is_one_of_the_row_not_of_its_padding():
    config, params, tokens = model()
    how = dict(max_new_tokens=5, lengths=LENGTHS, repetition_penalty=50.0)
    first = fn.generate(params, tokens[:, :7], config, **how).tokens[torch.arange(3), LENGTHS]
    # Padded with what is to be drawn: were it counted as seen, it would not be.
    rows = tokens[:, :7].where(torch.arange(7) < LENGTHS.unsqueeze(-1), first.unsqueeze(-1))
    out = fn.generate(params, rows, config, **how)
    for row, start, end in zip(out.tokens, LENGTHS, out.lengths, strict=True):
        for at in range(start, end):
            logits = fn.forward(params, row[None, :at], config)[0, -1]
            seen = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, row[:at], True)
            assert row[at] == fn.filter_logits(logits, fn.Sampling(repetition_penalty=50.0), seen).argmax()


def test_ids_beyond_a_tokenizers_are_not_drawn():
    config, params, tokens = model()
    out = fn.generate(params, tokens, config, max_new_tokens=20, vocab_size=3, repetition_penalty=1.1)
    assert set(out.tokens[:, 14:].flatten().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(max_new_tokens=51), "size=65 .*max_seq_len=64"),
        (dict(max_new_tokens=3, cache_size=16), "room for 16"),
        (dict(lengths=torch.tensor([1, 0, 3])), r"lengths=\[1, 0, 3\]"),
        (dict(lengths=torch.tensor([1, 15, 3])), "from 1 to 14"),
        (dict(stop_tokens=[3, 61]), r"stop_tokens=\[61\].* 0 to 60"),
        (dict(vocab_size=62), "vocab_size=62"),
        (dict(temperature=1.0), "generator"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(min_p=-0.1), "min_p=-0.1"),
        (dict(top_k=0), "top_k=0"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
        (dict(top_kk=3), "top_k"),
    ],
)
def test_a_wrong_value_is_named_before_anything_runs(how, message):
    config, params, tokens = model()
    with pytest.raises(ValueError, match=message):
        fn.generate_steps(params, tokens, config, **(dict(max_new_tokens=2) | how))


@pytest.mark.parametrize("run", [fn.prefill, fn.decode_step])
def test_a_donated_cache_whose_tensors_share_memory_is_refused(run):
    config = small_config()
    cache = fn.init_cache(config, 1, 4)
    shared = cache._replace(values=(*cache.values[:-1], cache.keys[0]))
    tokens = torch.ones((1, 2) if run is fn.prefill else 1, dtype=torch.int64)
    run(fn.init(config), tokens, config, shared)
    with pytest.raises(ValueError, match=rf"cache\.keys\[0\] and cache\.values\[{config.num_layers - 1}\]"):
        run(fn.init(config), tokens, config, shared, donate=True)


def test_a_cache_that_is_too_small_or_of_another_model_is_refused():
    config, params, tokens = model()
    with pytest.raises(ValueError, match="room for 1 to 13"):
        fn.prefill(params, tokens, config, fn.init_cache(config, 3, 13))
    with pytest.raises(ValueError, match=r"fn\.init_cache"):
        fn.prefill(params, tokens, config, fn.init_cache(config, 2, 14))
    with pytest.raises(ValueError, match="max_seq_len=64"):
        fn.init_cache(config, 3, 65)
    _, cache = fn.prefill(params, tokens, config, fn.init_cache(config, 3, 14))
    with pytest.raises(ValueError, match="holds 14 tokens and gets 1 more"):
        fn.decode_step(params, tokens[:, 0], config, cache)


@pytest.mark.parametrize("shape", ["paper", "qwen", "plain"])
def test_norms_and_biases_of_another_dtype_are_no_hindrance(shape):
    config, params, tokens = model(torch.bfloat16, **SHAPES[shape])
    # Exactly what bf16 holds, so that nothing but the dtype is another.
    mixed = with_wide_vectors(params)
    assert mixed.norm.weight.dtype != mixed.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(fn.forward(mixed, tokens, config), fn.forward(params, tokens, config))
    how = dict(max_new_tokens=6, lengths=LENGTHS)
    expected = fn.generate(params, tokens[:, :7], config, **how).tokens
    for decoder in (None, make_decoder(config, compiled=False)):
        assert torch.equal(fn.generate(mixed, tokens[:, :7], config, decoder=decoder, **how).tokens, expected)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cache_may_have_another_dtype_than_the_model(dtype, donate):
    config, params, tokens = model()
    empty = fn.init_cache(config, 3, 14, dtype=dtype)
    _, cache = fn.prefill(params, tokens[:, :7], config, empty, lengths=LENGTHS)
    logits, cache = fn.decode_step(params, tokens[:, 7], config, cache, donate=donate)
    assert {x.dtype for x in (*cache.keys, *cache.values)} == {dtype}
    _, exact = prefilled(config, params, tokens[:, :7])
    expected = fn.decode_step(params, tokens[:, 7], config, exact)[0]
    assert largest_difference(logits, expected) < (1e-6 if dtype == torch.float64 else 0.05)


def test_generation_runs_under_autocast():
    config, params, tokens = model()
    with torch.autocast("cpu", torch.bfloat16):
        out = fn.generate(params, tokens[:, :7], config, max_new_tokens=4, lengths=LENGTHS)
        logits = fn.forward(params, out.tokens, config)
    for row, (start, end) in enumerate(zip(LENGTHS, out.lengths, strict=True)):
        chosen = logits[row, start - 1 : end - 1].gather(-1, out.tokens[row, start:end, None])
        assert (chosen[:, 0] >= logits[row, start - 1 : end - 1].amax(-1) - 0.1).all()
