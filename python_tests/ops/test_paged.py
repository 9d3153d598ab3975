"""Attention on a cache in pages: equal to the reference, whatever the pages, and errors before a page is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close, assert_within_rule
from torch.library import opcheck

import moda_ext
from moda_ext import reference
from moda_ext.attention import paged_cache_update, paged_duplex_attention, paged_modular_attention
from moda_ext.functional.paged import positions_of_rows
from moda_ext.nn.aligner import DuplexAligner
from moda_ext.nn.attention import Tokens, align_and_attend
from moda_ext.nn.mask import ModularMask
from moda_ext.nn.paged import PagedAttention, Pages, Rows

RANK = 4
NAMES = ("out", "lse", "mass")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Decoding, a prompt, an empty sequence, decoding, a chunk after few keys and one after many, rows to be verified.
MIXED = {"lengths": [1, 40, 0, 300, 77, 400, 350], "queries": [1, 40, 0, 1, 30, 20, 4]}
FULL = {"return_lse": True, "return_mass": True}


def make(
    lengths,
    queries,
    *,
    block=16,
    head_size=32,
    heads=4,
    kv_heads=2,
    modalities=3,
    dtype=torch.float32,
    views=False,
    seed=0,
):
    """Arguments of a call on pages in any order, of a cache whose other cells are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    pages = [-(-length // block) for length in lengths]
    order = torch.randperm(sum(pages) + 3, generator=generator).int()
    cache = torch.full((len(order), kv_heads, block, 2 * head_size + 1), torch.nan, dtype=dtype)
    table = torch.zeros(len(lengths), max(pages, default=0) + 1, dtype=torch.int32)
    slots, at = [], 0
    for i, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        table[i, :count] = order[at : at + count]
        at += count
        slots += [int(table[i, j // block]) * block + j % block for j in range(length)]
    ids = torch.randint(-1, modalities, (len(slots),), generator=generator)
    tokens = len(slots), kv_heads, head_size
    reference.paged_cache_update(randn(*tokens), randn(*tokens), ids, cache, torch.tensor(slots, dtype=torch.int64))
    rows = sum(queries)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "query": randn(*((modalities,) if views else ()), rows, heads, head_size),
        "kv_cache": cache,
        "block_table": table,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "query_start_loc": torch.nn.functional.pad(torch.tensor(queries).cumsum(0), (1, 0)).int(),
        "modality_bias": randn(rows, heads, modalities).to(sums),
        "sink": randn(rows, heads).to(sums),
        "num_modalities": modalities,
        "scale": head_size**-0.5,
    }


def with_aligner(arguments, seed=0):
    """The arguments of paged_duplex_attention; some rows are padding."""
    generator = torch.Generator().manual_seed(seed)
    rows, _, size = arguments["query"].shape
    modalities, sums = arguments["num_modalities"], arguments["sink"].dtype

    def randn(*shape, factor=0.3):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * factor).to(sums)

    return {
        **arguments,
        "query_modality": torch.randint(-1, modalities, (rows,), generator=generator).int(),
        "condition": randn(*arguments["modality_bias"].shape, factor=1.0),
        **{name: randn(modalities, size, RANK) for name in ("a1", "a2")},
        **{name: randn(modalities, RANK, size) for name in ("b1", "b2")},
    }


def make_step(aligned: bool, dtype: torch.dtype = torch.float32, **change) -> dict:
    """Arguments of the operator paged_attention_step, whose rows are not in their cells yet."""
    arguments = with_aligner(make(**MIXED, dtype=dtype)) | {"unit_keys": True, "by_trace": True, "eps": 1e-6}
    query, sums, cache = arguments["query"], arguments["sink"].dtype, arguments["kv_cache"]
    rows, heads, size = query.shape
    modalities, kv_heads, block = arguments["num_modalities"], cache.shape[1], cache.shape[2]
    starts = arguments["query_start_loc"].tolist()
    slots = torch.full((rows,), -1)
    for i, (length, table) in enumerate(zip(MIXED["lengths"], arguments["block_table"].long(), strict=True)):
        place = torch.arange(length - (starts[i + 1] - starts[i]), length)
        slots[starts[i] : starts[i + 1]] = table[place // block] * block + place % block
    cache.transpose(1, 2)[slots // block, slots % block] = torch.nan
    generator = torch.Generator().manual_seed(5)
    key, value = torch.randn(2, rows, kv_heads, size, generator=generator, dtype=torch.float64).to(dtype).unbind()
    given = {
        **arguments,
        "key": key,
        "value": value,
        "modality": torch.randint(-1, modalities, (rows,), generator=generator).int(),
        "slot_mapping": slots,
        "modality_bias": torch.randn(modalities, heads, modalities, generator=generator).to(sums),
        "condition": torch.randn(modalities, heads, modalities, generator=generator).to(sums),
        "sink": torch.randn(50, heads, generator=generator).to(sums),
        "out": torch.full_like(query, torch.nan),
    }
    if not aligned:
        given |= dict.fromkeys(("a1", "b1", "a2", "b2", "condition"))
    return given | change


def judge(ours, oracle, arguments, magnitude=0.0):
    """``ours`` obeys the tolerance rule beside ``oracle`` in float64 and in the dtype of the call."""
    found = ours(**arguments, **FULL)
    wide = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in arguments.items()}
    for name, result, exact, dense in zip(NAMES, found, oracle(**wide), oracle(**arguments), strict=True):
        if torch.isfinite(exact).any():
            assert_within_rule(name, result, exact, dense, magnitude)


# The operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", (1, 16, 128))
@pytest.mark.parametrize("views", (False, True))
def test_attention_is_that_of_the_gathered_keys(native, block, views, dtype):
    arguments = make(**MIXED, block=block, views=views, dtype=dtype)
    judge(paged_modular_attention, reference.paged_modular_attention, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", (1, 16, 128))
@pytest.mark.parametrize(
    ("key_norm", "normalize"), [("l2", "trace"), (None, "trace"), ("l2", None), ("l2", "frobenius")]
)
def test_duplex_attention_is_that_of_the_gathered_keys(native, key_norm, normalize, block, dtype):
    arguments = with_aligner(make(**MIXED, block=block, dtype=dtype)) | {"key_norm": key_norm, "normalize": normalize}
    if normalize is None:
        arguments["condition"] = arguments["condition"] / 100  # of a sum over all keys
    judge(paged_duplex_attention, reference.paged_duplex_attention, arguments, 0.0 if normalize else 10.0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_many_rows_take_the_kernels_with_tiles(native, dtype):
    """Beside sequences that decode, in one call."""
    arguments = make([700, 1, 500, 300], [300, 1, 2, 299], head_size=64, heads=8, dtype=dtype)
    judge(paged_modular_attention, reference.paged_modular_attention, arguments)
    judge(paged_duplex_attention, reference.paged_duplex_attention, with_aligner(arguments))


@pytest.mark.parametrize("threads", (1, 2))
def test_a_sequence_does_not_depend_on_those_beside_it(native, threads):
    """Which kernels it takes is decided by its own rows; how its keys are split, among all."""
    arguments = with_aligner(make([*MIXED["lengths"], 3000], [*MIXED["queries"], 1]))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = paged_duplex_attention(**arguments)
        for i, (first, last) in enumerate(arguments["query_start_loc"].unfold(0, 2, 1).tolist()):
            rows = {
                n: arguments[n][first:last] for n in ("query", "query_modality", "modality_bias", "condition", "sink")
            }
            alone = arguments | rows | {n: arguments[n][i : i + 1] for n in ("block_table", "seq_lens")}
            alone["query_start_loc"] = torch.tensor([0, last - first], dtype=torch.int32)
            assert_close(paged_duplex_attention(**alone), together[first:last], 8)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60)
@given(data=st.data())
def test_fuzzed(native, data):
    queries = data.draw(st.lists(st.integers(0, 40), max_size=5))
    before = data.draw(st.lists(st.integers(0, 300), min_size=len(queries), max_size=len(queries)))
    kv_heads = data.draw(st.sampled_from((1, 2, 3)))
    aligned = data.draw(st.booleans())
    arguments = make(
        [new + old for new, old in zip(queries, before, strict=True)],
        queries,
        block=data.draw(st.sampled_from((1, 8, 16, 32, 128))),
        head_size=8 * data.draw(st.integers(1, 20)),
        heads=kv_heads * data.draw(st.sampled_from((1, 2, 3, 8))),
        kv_heads=kv_heads,
        modalities=data.draw(st.integers(1, 5)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        views=not aligned and data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    if aligned:
        arguments = with_aligner(arguments)
    for name in ("modality_bias", "sink", *(("condition",) if aligned else ())):
        if data.draw(st.booleans()):
            arguments[name] = None
    if data.draw(st.booleans()):  # heads inside of blocks, as (blocks, block, heads, C) in memory
        arguments["kv_cache"] = arguments["kv_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    if aligned:
        judge(paged_duplex_attention, reference.paged_duplex_attention, arguments, magnitude=10.0)
    else:
        judge(paged_modular_attention, reference.paged_modular_attention, arguments, magnitude=10.0)


def test_shared_blocks(native):
    """A prefix that two sequences have in common lies in the cache once."""
    arguments = with_aligner(make([48, 64], [1, 16]))
    arguments["block_table"][1, :2] = arguments["block_table"][0, :2]
    judge(paged_duplex_attention, reference.paged_duplex_attention, arguments)


def test_rows_of_no_sequence_are_zero(native):
    arguments = with_aligner(make([40], [8]))
    for name in ("query", "modality_bias", "sink", "condition"):
        arguments[name] = torch.cat([arguments[name], torch.full_like(arguments[name][:3], torch.nan)])
    arguments["query_modality"] = torch.cat([arguments["query_modality"], torch.zeros(3, dtype=torch.int32)])
    for call in (paged_modular_attention, paged_duplex_attention):
        taken = {n: v for n, v in arguments.items() if call is paged_duplex_attention or n in make([1], [1])}
        assert all(torch.equal(result[8:], torch.zeros_like(result[8:])) for result in call(**taken, **FULL))


@pytest.mark.parametrize("lengths", ([], [0], [0, 0]))
def test_nothing_is_valid(native, lengths):
    arguments = with_aligner(make(lengths, lengths))
    out, lse, mass = paged_duplex_attention(**arguments, **FULL)
    assert out.shape == (0, 4, 32) and lse.shape == (0, 4) and mass.shape == (0, 4, 3)


@pytest.mark.parametrize("normalize", ("trace", "frobenius"))
def test_gathered_on_other_devices(normalize):
    """As on devices without these kernels, here on the reference; with the longest lengths given or looked up."""
    arguments = with_aligner(make(**MIXED)) | {"normalize": normalize}
    expected = reference.paged_duplex_attention(**arguments)
    with moda_ext.use_backend("reference"):
        for lengths in ({}, {"max_seqlen_q": 64, "max_seqlen_k": 401}):
            found = paged_duplex_attention(**arguments, **lengths, **FULL)
            for result, wanted in zip(found, expected, strict=True):
                assert_close(result, wanted)
        views = make(**MIXED, views=True)
        for result, wanted in zip(
            paged_modular_attention(**views, **FULL), reference.paged_modular_attention(**views), strict=True
        ):
            assert_close(result, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("aligned", (False, True))
def test_a_step_is_an_update_and_attention_with_tables(native, aligned, dtype):
    given = make_step(aligned, dtype)
    schema = torch.ops.moda_ext.paged_attention_step.default._schema
    cache, names = given["kv_cache"].clone(), ("block_table", "seq_lens", "query_start_loc", "num_modalities", "scale")
    tokens = (given[name] for name in ("key", "value", "modality"))
    paged_cache_update(*tokens, cache, given["slot_mapping"])
    taken = {name: given[name] for name in names} | {"query": given["query"], "kv_cache": cache}
    of_row = given["modality"].clamp(min=0)
    position = positions_of_rows(given["seq_lens"], given["query_start_loc"], len(of_row))
    taken |= {"modality_bias": given["modality_bias"][of_row], "sink": given["sink"][position.clamp(max=49)]}
    mass = torch.ops.moda_ext.paged_attention_step(*(given[a.name] for a in schema.arguments))
    if aligned:
        taken |= {name: given[name] for name in ("a1", "b1", "a2", "b2")}
        taken |= {"query_modality": given["modality"], "condition": given["condition"][of_row]}
        expected = paged_duplex_attention(**taken, **FULL)
    else:
        expected = paged_modular_attention(**taken, **FULL)
    torch.testing.assert_close(given["kv_cache"], cache, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(given["out"], expected[0]) and torch.equal(mass, expected[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modality_bias": torch.zeros(2, 4, 3)}, "modality_bias: expected"),
        ({"condition": torch.zeros(96, 4, 3)}, "condition: expected"),
        ({"sink": torch.zeros(0, 4)}, "sink: expected"),
        ({"modality": torch.full((96,), 3).int()}, "modality: expected ids from -1 to 2, got 3"),
        ({"slot_mapping": torch.full((96,), 10**6)}, "slot_mapping: expected slots below"),
        ({"seq_lens": torch.full((7,), 10**6).int()}, "seq_lens: expected at most"),
        ({"block_table": torch.full((7, 26), 999).int()}, "block_table: expected blocks from 0 to"),
        ({"key": torch.randn(3, 2, 32)}, "key: expected"),
        ({"out": torch.randn(3, 4, 32)}, "out: expected"),
        ({"out": torch.randn(96, 4, 32).double()}, "out: expected"),
        ({"a1": None}, "a1, b1, a2, b2: expected all or none"),
    ],
)
def test_a_step_that_does_not_fit_writes_nothing(native, change, message):
    given = make_step(True, **change)
    cache = given["kv_cache"].clone()
    schema = torch.ops.moda_ext.paged_attention_step.default._schema
    with pytest.raises((ValueError, RuntimeError), match=f"^paged_attention_step: {message}"):
        torch.ops.moda_ext.paged_attention_step(*(given[a.name] for a in schema.arguments))
    torch.testing.assert_close(given["kv_cache"], cache, rtol=0, atol=0, equal_nan=True)


def test_opcheck(native):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = make(**MIXED)
    opcheck(torch.ops.moda_ext.paged_modular_attention, tuple(arguments.values()), test_utils=tests)
    aligned = with_aligner(arguments) | {"unit_keys": True, "by_trace": True, "eps": 1e-6}
    schema = torch.ops.moda_ext.paged_duplex_attention.default._schema
    opcheck(
        torch.ops.moda_ext.paged_duplex_attention, tuple(aligned[a.name] for a in schema.arguments), test_utils=tests
    )
    key, value = torch.randn(2, 5, 2, 32).unbind()
    tokens = key, value, torch.zeros(5, dtype=torch.int32), arguments["kv_cache"], torch.arange(-1, 4)
    opcheck(torch.ops.moda_ext.paged_cache_update, tokens, test_utils=tests)
    schema = torch.ops.moda_ext.paged_attention_step.default._schema
    for of_step in (make_step(aligned=True), make_step(aligned=False)):
        taken = tuple(of_step[argument.name] for argument in schema.arguments)
        opcheck(torch.ops.moda_ext.paged_attention_step, taken, test_utils=tests)


def test_one_graph(native):
    arguments = with_aligner(make(**MIXED))
    key, value = torch.randn(2, 5, 2, 32).unbind()

    def step(**arguments):
        paged_cache_update(key, value, torch.zeros(5, dtype=torch.int32), arguments["kv_cache"], torch.arange(5))
        return paged_duplex_attention(**arguments)

    compiled = torch.compile(step, fullgraph=True)(**(arguments | {"kv_cache": arguments["kv_cache"].clone()}))
    torch.testing.assert_close(compiled, step(**arguments), equal_nan=True)


# The cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cache_update(native, dtype, backend):
    key, value = torch.randn(2, 90, 3, 40).to(dtype).unbind()
    modality, slots = torch.randint(-1, 16, (90,)), torch.randperm(160)[:90] - 5
    found = torch.randn(10, 16, 3, 96).to(dtype).transpose(1, 2)
    expected = found.clone()
    with moda_ext.use_backend(backend):
        paged_cache_update(key.transpose(0, 1).contiguous().transpose(0, 1), value, modality, found, slots)
    reference.paged_cache_update(key, value, modality, expected, slots)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("tokens", (0, 3))
def test_tokens_of_no_slot_are_written_nowhere(native, tokens, backend):
    cache = torch.randn(2, 2, 4, 20)
    before = cache.clone()
    with moda_ext.use_backend(backend):
        key = torch.randn(tokens, 2, 8)
        paged_cache_update(key, key, torch.zeros(tokens, dtype=torch.int32), cache, torch.full((tokens,), -1))
    assert torch.equal(cache, before)


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"slot_mapping": torch.tensor([1, 32, 0])}, ValueError, "slot_mapping"),
        ({"slot_mapping": torch.tensor([1, 2])}, ValueError, "slot_mapping must have the shape"),
        ({"slot_mapping": torch.tensor([1.0, 2, 3])}, TypeError, "slot_mapping must have one of the dtypes"),
        ({"value": torch.randn(3, 2, 16)}, ValueError, "value must have the shape of key"),
        ({"kv_cache": torch.randn(4, 2, 8, 16)}, ValueError, "kv_cache must have cells of key, value and modality"),
        ({"kv_cache": torch.randn(4, 3, 8, 17)}, ValueError, "kv_cache must have the heads of key"),
        ({"kv_cache": torch.randn(4, 2, 8, 17).double()}, TypeError, "kv_cache must have the dtype of key"),
        ({"modality": [0, 0, 0]}, TypeError, "modality must be a tensor"),
    ],
)
def test_a_cache_update_that_does_not_fit_writes_nothing(native, change, error, message, backend):
    key = torch.randn(3, 2, 8)
    cache = torch.randn(4, 2, 8, 17)
    before = cache.clone()
    arguments = {
        "key": key,
        "value": key,
        "modality": torch.zeros(3, dtype=torch.int32),
        "kv_cache": cache,
        "slot_mapping": torch.arange(3),
    }
    with moda_ext.use_backend(backend), pytest.raises(error, match=f"paged_cache_update: {message}"):
        paged_cache_update(**(arguments | change))
    assert torch.equal(cache, before)


def test_a_modality_that_is_none_is_not_written(native):
    key, cache = torch.randn(2, 1, 8), torch.zeros(1, 1, 2, 17)
    with pytest.raises(ValueError, match="paged_cache_update: modality: expected ids from -1 to 15, got 16"):
        paged_cache_update(key, key, torch.tensor([0, 16]), cache, torch.arange(2))
    assert not cache.any()


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at", "number", "message"),
    [
        ("block_table", (0, 1), 99, "block_table: expected blocks from 0 to"),
        ("block_table", (1, 0), -1, "block_table: expected blocks from 0 to"),
        ("seq_lens", (0,), 1000, "seq_lens: expected at most the"),
        ("seq_lens", (0,), 2, "seq_lens: expected at least the 5 queries of a sequence, got 2"),
        ("seq_lens", (0,), -1, "seq_lens: expected at least the 5 queries of a sequence, got -1"),
        ("query_start_loc", (0,), 1, "query_start_loc: expected"),
        ("query_start_loc", (1,), 99, "query_start_loc: expected"),
        ("query_start_loc", (2,), 3, "query_start_loc: expected ascending offsets"),
        ("kv_cache", (slice(None), slice(None), slice(None), -1), 3, "kv_cache: expected modalities from -1 to 2"),
        ("kv_cache", (slice(None), slice(None), slice(None), -1), 0.5, "kv_cache: expected modalities from -1 to 2"),
        ("kv_cache", (slice(None), slice(None), slice(None), -1), torch.nan, "kv_cache: expected modalities"),
    ],
)
@pytest.mark.parametrize("backend", ("native", "reference"))
def test_what_would_lead_outside_is_an_error(native, name, at, number, message, backend):
    arguments = make([40, 33], [5, 7])
    arguments[name][at] = number
    message = message.partition(" the 5 queries")[0] if backend == "reference" else message
    with moda_ext.use_backend(backend):
        with pytest.raises(ValueError, match=f"paged_modular_attention: {message}"):
            paged_modular_attention(**arguments)
        with pytest.raises(ValueError, match=f"paged_duplex_attention: {message}"):
            paged_duplex_attention(**with_aligner(arguments))


@pytest.mark.parametrize("lengths", ({"max_seqlen_q": 6}, {"max_seqlen_k": 39}))
def test_longest_lengths_that_are_too_short_are_errors(lengths):
    """Where keys are gathered they would leave out rows, or keys."""
    (name,) = lengths
    with moda_ext.use_backend("reference"), pytest.raises(ValueError, match=f"{name}: expected at least"):
        paged_modular_attention(**make([40, 33], [5, 7]), **lengths)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.randn(12, 4)}, ValueError, "query must have shape"),
        ({"query": torch.randn(12, 3, 32)}, ValueError, "the heads of query must be a multiple"),
        ({"query": torch.randn(12, 4, 36)}, NotImplementedError, "query has head size 36"),
        ({"query": torch.randn(12, 4, 32).double()}, TypeError, "kv_cache must have the dtype of query"),
        ({"kv_cache": torch.randn(9, 2, 16, 64)}, ValueError, "kv_cache must have cells of key, value and modality"),
        ({"kv_cache": torch.randn(9, 2, 65)}, ValueError, "kv_cache must have shape"),
        ({"block_table": torch.zeros(2, 4)}, TypeError, "block_table must have one of the dtypes"),
        ({"block_table": torch.zeros(3, 4).int()}, ValueError, "seq_lens must have the shape"),
        ({"seq_lens": torch.tensor([40])}, ValueError, "seq_lens must have the shape"),
        ({"query_start_loc": torch.tensor([0, 5])}, ValueError, "query_start_loc must have the shape"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must be at least 0"),
        ({"num_modalities": 17}, ValueError, "num_modalities must lie in 1 to 16"),
        ({"modality_bias": torch.zeros(7, 4, 3)}, ValueError, "modality_bias must have a shape that broadcasts"),
        ({"sink": torch.zeros(3)}, ValueError, "sink must have a shape that broadcasts"),
        ({"sink": torch.zeros(4).int()}, TypeError, "sink must have one of the dtypes"),
        ({"scale": torch.inf}, ValueError, "scale must be finite"),
    ],
)
def test_what_does_not_fit_is_an_error(change, error, message):
    arguments = make([40, 33], [5, 7]) | change
    with pytest.raises(error, match=f"paged_modular_attention: {message}"):
        paged_modular_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.randn(3, 12, 4, 32)}, ValueError, "query must have shape"),
        ({"query_modality": torch.zeros(3).int()}, ValueError, "query_modality must have the shape"),
        ({"a1": torch.randn(3, 32, 200)}, NotImplementedError, "a1 has rank 200"),
        ({"b2": torch.randn(3, 32, 4)}, ValueError, "b2 must have the shape"),
        ({"eps": 0.0}, ValueError, "eps must be above 0"),
        ({"key_norm": "l1"}, ValueError, "key_norm must be one of"),
        ({"normalize": "row"}, ValueError, "normalize must be one of"),
        ({"condition": torch.zeros(5, 4, 3)}, ValueError, "condition must have a shape that broadcasts"),
    ],
)
def test_an_aligner_that_does_not_fit_is_an_error(change, error, message):
    arguments = with_aligner(make([40, 33], [5, 7])) | change
    with pytest.raises(error, match=f"paged_duplex_attention: {message}"):
        paged_duplex_attention(**arguments)


# Modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ("concat", "add", None))
@pytest.mark.parametrize("normalize", ("trace", "frobenius"))
@pytest.mark.parametrize("softmax", ("joint", "split"))
@pytest.mark.parametrize("variant", ("inf", "fix", "attn", "learned", None))
@pytest.mark.parametrize("length", (None, 350))  # shorter than the longest sequence
@torch.no_grad()
def test_modules_are_those_of_the_dense_layer(native, length, variant, softmax, normalize, fusion):
    if fusion is None and (variant in ("attn", "learned") or normalize == "frobenius"):
        pytest.skip("there is no such module")
    torch.manual_seed(0)
    arguments = make(**MIXED, modalities=2)
    cache, starts = arguments["kv_cache"], arguments["query_start_loc"].tolist()
    cache[..., -1].clamp_(min=0)  # a served sequence has no padding
    aligner = DuplexAligner(32, 2, fusion=fusion, normalize=normalize, rank=40) if fusion else None
    mask = ModularMask(4, 2, variant=variant, softmax=softmax, length=length, base=-1.0) if variant else None
    for module in (aligner, mask):
        for parameter in () if module is None else module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    pages = Pages(*(arguments[n] for n in ("kv_cache", "block_table", "seq_lens", "query_start_loc")))
    positions = positions_of_rows(pages.seq_lens, pages.query_start_loc, starts[-1])
    attention = PagedAttention(aligner, mask, 2, 32**-0.5, torch.float32, 1000)
    mixed = torch.randint(0, 2, (starts[-1],))
    of_row = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False))])
    slots = pages.block_table.long()[of_row, positions // 16] * 16 + positions % 16
    own = cache.transpose(1, 2)[slots // 16, slots % 16]  # (T, Hkv, C)
    for modality in (mixed, mixed * 0, mixed * 0 + 1):
        cache.transpose(1, 2)[slots // 16, slots % 16] = torch.nan  # until they are written
        given = arguments["query"], own[..., :32], own[..., 32:64]
        found = attention(*given, Rows(modality.int(), slots), pages)
        for i, length in enumerate(MIXED["lengths"]):
            rows = slice(starts[i], starts[i + 1])
            blocks = arguments["block_table"][i, : -(-length // 16)].long()
            cells = cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
            query = arguments["query"][rows].transpose(0, 1)[None]
            key, value, ids = cells[None, ..., :32], cells[None, ..., 32:64], cells[:1, :, 64].int()
            tokens = Tokens(query, key, value, modality[None, rows], ids, key, ids, 32**-0.5)
            if length:
                expected = align_and_attend(aligner, mask, tokens, 2, start=length - (rows.stop - rows.start))
                for result, wanted in zip(found, (expected.out, expected.mass), strict=True):
                    assert_close(result[rows], wanted[0].transpose(0, 1), 64)
