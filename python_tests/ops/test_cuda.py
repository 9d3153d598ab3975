"""What only a GPU has: streams, graphs, a host that runs ahead, several devices, tensors of more than 2^31 elements.

Results are compared with those of the same operator called plainly; that these are right is tested elsewhere.
"""

import pytest
import torch

from moda_ext import alignment, attention
from moda_ext.verify import checks
from moda_ext.verify.cases import FAMILIES, cases

RANK = 8
LOW = (torch.bfloat16,)
# Every structure of every operator that has CUDA kernels, at one head size; one row against many keys splits them.
CASES = [case for op in FAMILIES for case in cases(op, LOW) if case.differentiable and ", D=64," in case.label]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}: {case.label}")
GPU = torch.device("cuda", 0)


@every_case
@pytest.mark.parametrize("check", (checks.fails_in_a_graph, checks.fails_on_two_streams, checks.waits_for_the_device))
def test_graphs_streams_and_a_host_that_runs_ahead(cuda, case, check):
    assert check(case, GPU) is None


@every_case
def test_tensors_need_not_be_on_the_current_device(cuda, case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    found = checks.ours(case, case.inputs(torch.device("cuda:1")))
    assert torch.cuda.current_device() == 0
    assert {result.device for result in found.values()} == {torch.device("cuda:1")}
    assert checks.differs(checks.ours(case, case.inputs(GPU)), found) is None


def assert_all_close(found, expected):
    """The same up to a few roundings of the largest number: a matrix library may sum in another order."""
    found, expected = ({str(i): result for i, result in enumerate(results)} for results in (found, expected))
    name = checks.differs(found, expected)
    assert name is None, f"result {name} is off"


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


def gram(key, modality):
    return (alignment.modality_gram(key, modality),)


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
