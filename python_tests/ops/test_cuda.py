"""What only a GPU has: streams, graphs, a host that runs ahead, several devices, tensors of more than 2^31 elements.

Results are compared with those of the same operator called plainly; that these are right is tested elsewhere.
"""

import pytest
import torch

from moda_ext import alignment, attention

TOKENS, SIZE, RANK = 300, 64, 8


def attend(query, key, value, bias, sink, modality):
    terms = {"modality_bias": bias, "sink": sink}
    options = {"is_causal": True, "return_lse": True, "return_mass": True}
    return attention.modular_attention(query, key, value, modality, **terms, **options)


def attend_packed(query, key, value, bias, sink, modality):
    tokens_first = [t[0].transpose(0, 1) for t in (query, key, value, bias)]
    offsets = torch.arange(0, TOKENS + 1, TOKENS // 3, device=query.device, dtype=torch.int32)
    return attention.modular_attention_varlen(
        *tokens_first[:3],
        modality[0],
        offsets,
        offsets,
        TOKENS // 3,
        TOKENS // 3,
        modality_bias=tokens_first[3],
        sink=sink[0].mT,
        is_causal=True,
        return_lse=True,
        return_mass=True,
    )


def project(query, key, modality):
    return (alignment.causal_gram_projection(query, key, modality, modality),)


def gram(key, modality):
    return (alignment.modality_gram(key, modality),)


def views(query, key, a1, b1, a2, b2, modality):
    return alignment.duplex_query_views(query, key, modality, modality, a1, b1, a2, b2, return_indicator=True)


def views_of_a_state(root, query, key, a1, b1, a2, b2, modality):
    state = root.mT @ root, torch.full(root.shape[:3], 50.0, device=root.device)
    views, indicator, (gram, _) = alignment.duplex_query_views(
        query, key, modality[:, -query.shape[2] :], modality, a1, b1, a2, b2, state=state, return_indicator=True,
        return_state=True,
    )  # fmt: skip
    return views, indicator, gram


def attention_shapes(rows, keys):
    heads = {"query": (1, 4, rows, SIZE), "key": (1, 2, keys, SIZE), "value": (1, 2, keys, SIZE)}
    return {**heads, "bias": (1, 4, rows, 2), "sink": (1, 4, rows)}


WEIGHTS = {"a1": (2, SIZE, RANK), "b1": (2, RANK, SIZE), "a2": (2, SIZE, RANK), "b2": (2, RANK, SIZE)}
QUERY_AND_KEY = {name: attention_shapes(TOKENS, TOKENS)[name] for name in ("query", "key")}
# The operator, and the shapes of its floating-point arguments; one row against many keys splits them.
CALLS = {
    "attention": (attend, attention_shapes(TOKENS, TOKENS)),
    "decoding": (attend, attention_shapes(1, 20 * TOKENS)),
    "packed": (attend_packed, attention_shapes(TOKENS, TOKENS)),
    "gram": (gram, {"key": QUERY_AND_KEY["key"]}),
    "projection": (project, QUERY_AND_KEY),
    "views": (views, QUERY_AND_KEY | WEIGHTS),
    "views of a state": (
        views_of_a_state,
        {"root": (1, 2, 2, SIZE, SIZE), "query": (1, 4, TOKENS // 3, SIZE), "key": QUERY_AND_KEY["key"]} | WEIGHTS,
    ),
}
every_call = pytest.mark.parametrize("name", CALLS)


def make(name, seed):
    """Floating-point arguments, which require a gradient, then the modalities, as long runs."""
    _, shapes = CALLS[name]
    generator = torch.Generator().manual_seed(seed)
    low = ("query", "key", "value")
    leaves = []
    for argument, shape in shapes.items():
        number = torch.randn(shape, generator=generator).to("cuda", torch.bfloat16 if argument in low else None)
        leaves.append(number.requires_grad_())
    keys = shapes["key"][2]
    starts = torch.randint(keys, (5,), generator=generator)
    modality = (torch.arange(keys)[:, None] >= starts).sum(-1)[None] % 2
    return [*leaves, modality.cuda()]


def everything(name, inputs):
    """The outputs and the gradient of every floating-point argument."""
    call, _ = CALLS[name]
    outputs = call(*inputs)
    incoming = [torch.ones_like(output) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs[:-1], incoming)]


def overwrite(targets, sources):
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def assert_all_close(found, expected):
    """The same up to a few roundings of the largest number: a matrix library may sum in another order."""
    for i, (result, other) in enumerate(zip(found, expected, strict=True)):
        roundings = 4 if result.dtype == torch.bfloat16 else 128
        error = (result.double() - other.to(result.device).double()).abs().max()
        assert error <= roundings * torch.finfo(result.dtype).eps * other.abs().max(), f"result {i} is off by {error}"


@every_call
@pytest.mark.parametrize("mode", ["forward", "forward and backward"])
def test_captured_graph_computes_anew_when_replayed(cuda, name, mode):
    inputs, fresh = make(name, 0), make(name, 1)

    def run(tensors):
        return everything(name, tensors) if mode != "forward" else CALLS[name][0](*tensors)

    with torch.set_grad_enabled(mode != "forward"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what happens only once, as loading a kernel, cannot be captured
            run(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(inputs)
        expected = run(fresh)
    overwrite(inputs, fresh)
    graph.replay()
    assert_all_close(captured, expected)


@every_call
def test_calls_on_two_streams_at_once(cuda, name):
    """Inputs arrive late, on the stream of the call: whoever runs on another stream, or shares scratch, is wrong."""
    sources = [make(name, seed) for seed in range(2)]
    expected = [everything(name, inputs) for inputs in sources]
    targets = [[torch.zeros_like(t, requires_grad=t.requires_grad) for t in inputs] for inputs in sources]
    streams = [torch.cuda.Stream() for _ in sources]
    found = [[], []]
    torch.cuda.synchronize()
    for _ in range(3):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(5_000_000)
                overwrite(targets[i], sources[i])
                found[i].append(everything(name, targets[i]))
    torch.cuda.synchronize()
    for i in range(2):
        for results in found[i]:
            assert_all_close(results, expected[i])


@every_call
def test_the_host_does_not_wait_for_the_device(cuda, name):
    inputs = make(name, 0)
    everything(name, inputs)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    slept = torch.cuda.Event()
    slept.record()
    everything(name, inputs)
    assert not slept.query(), "the call came back only after the work before it was done"
    torch.cuda.synchronize()


@every_call
def test_tensors_need_not_be_on_the_current_device(cuda, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    inputs = make(name, 0)
    moved = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in inputs]
    found = everything(name, moved)
    assert torch.cuda.current_device() == 0
    assert {result.device for result in found} == {torch.device("cuda:1")}
    assert_all_close(found, everything(name, inputs))


# More than 2^31 elements ----------------------------------------------------------------------------------------------
WIDE, LAST = 256, 100  # head size; the tokens at the end, which lie beyond 2^31 elements and are all that count
MANY = 2**31 // WIDE + LAST


def far(*shape):
    """(1, 1, MANY, ...): random where the last tokens are, zero before."""
    tensor = torch.zeros(1, 1, MANY, *shape, device="cuda", dtype=torch.bfloat16)
    tensor[:, :, -LAST:].normal_()
    return tensor.requires_grad_()


def near(*shape):
    return torch.randn(1, 1, LAST, *shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def last_of(tensor):
    return tensor.detach()[:, :, -LAST:].clone().requires_grad_()


def hidden_but_last(tokens):
    modality = torch.full((1, tokens), -1, device="cuda", dtype=torch.int32)
    modality[:, -LAST:] = torch.arange(LAST, device="cuda") % 2
    return modality


def skip_unless_free(gigabytes):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free / 1e9:.0f} GB are free")


def long_and_short(call, long, short):
    """Results of a call on long tensors, cut to their last tokens where they are long, and of one on those alone."""
    pairs = []
    for tensors in (long, short):
        outputs = call(*tensors)
        # The first output is the only one that may be long; gradients elsewhere are zero.
        incoming = torch.zeros_like(outputs[0])
        incoming[:, :, -LAST:] = 1
        leaves = [t for t in tensors if t.requires_grad]
        results = [*outputs, *torch.autograd.grad(outputs[0], leaves, incoming)]
        pairs.append([t.detach()[:, :, -LAST:].clone() for t in results])
    return pairs


def attend_to_all(query, key, value, modality):
    return attention.modular_attention(query, key, value, modality, return_lse=True, return_mass=True)


def test_more_rows_than_an_int_can_index(cuda):
    skip_unless_free(24)
    query, key, value, modality = far(WIDE), near(WIDE), near(WIDE), hidden_but_last(LAST)
    long = (query, key, value, modality)
    assert_all_close(*long_and_short(attend_to_all, long, (last_of(query), key, value, modality)))


def test_more_keys_than_an_int_can_index(cuda):
    skip_unless_free(24)
    query, key, value = near(WIDE), far(WIDE), far(WIDE)
    long = (query, key, value, hidden_but_last(MANY))
    short = (query, last_of(key), last_of(value), hidden_but_last(LAST))
    assert_all_close(*long_and_short(attend_to_all, long, short))


def test_gram_of_more_keys_than_an_int_can_index(cuda):
    skip_unless_free(100)  # in plain PyTorch, which copies the keys to float32 for each modality
    key = far(WIDE)
    assert_all_close(*long_and_short(gram, (key, hidden_but_last(MANY)), (last_of(key), hidden_but_last(LAST))))


def last_view(query, key, modality, *weights):
    return (alignment.duplex_query_views(query, key, modality, modality, *weights)[1],)


def test_views_of_more_rows_than_an_int_can_index(cuda):
    skip_unless_free(130)  # the Grams before every 256 tokens take 34 GB
    shapes = ((2, WIDE, RANK), (2, RANK, WIDE)) * 2
    weights = [torch.randn(shape, device="cuda").div_(WIDE**0.5).requires_grad_() for shape in shapes]
    query, key = far(WIDE), far(WIDE)
    long = (query, key, hidden_but_last(MANY), *weights)
    assert_all_close(*long_and_short(last_view, long, (last_of(query), last_of(key), hidden_but_last(LAST), *weights)))
