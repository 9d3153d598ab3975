"""The release's algorithm: parity with it, and each of its faults, shown on it and shown absent here.

A fault is a function of an algorithm; every test asserts that it holds for the release and not for ours.
"""

import pytest
import torch
from tolerance import assert_close
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moda_ext.alignment import DuplexAligner
from moda_ext.attention import ModularDuplexAttention, modular_attention
from moda_ext.release import TEXT, VISION, ReleaseAligner, split_release_state_dict

B, H, N, D = 2, 2, 16, 8
PROMPT = 11  # [text 3][image 6][question 2], then the answer, which is text too


def inputs(device, dtype=torch.float32, batch=B):
    query, key, value = (torch.randn(batch, H, N, D, device=device, dtype=dtype) for _ in range(3))
    modality = torch.full((batch, N), TEXT, device=device)
    modality[:, 3:9] = VISION
    return query, key, value, modality


def release_loop(aligner, key, value, modality):
    """The release's alignment as it runs: sample by sample, tokens picked by boolean masks."""
    aligned = []
    for k, v, ids in zip(key, value, modality, strict=True):  # k, v (H, N, D)
        unit = (k + 1e-6) / (k + 1e-6).norm(dim=-1, keepdim=True)
        gram = unit[:, ids == TEXT].mT @ v[:, ids == TEXT]
        gram = gram / gram.norm(dim=-1, keepdim=True)
        seen, result = unit[:, ids == VISION] @ gram, k.clone()
        result[:, ids == VISION] = (k[:, ids == VISION] + aligner.ratio_v * seen) @ aligner.pfuser_v.weight.mT
        aligned.append(result)
    return torch.stack(aligned)


class Release:
    """Causal attention over the release's keys."""

    def __init__(self, device, *, trained=True, cache="raw"):
        self.aligner = ReleaseAligner(D).to(device)
        self.cache = cache  # what an attention backend finds in the cache: keys before or after alignment
        if trained:
            torch.nn.init.normal_(self.aligner.ratio_v)

    def __call__(self, query, key, value, modality):
        aligned = release_loop(self.aligner, key, value, modality)
        return modular_attention(query, aligned, value, modality, is_causal=True)

    def decode(self, query, key, value, modality, prompt):
        """The prompt in one call, then token by token: no alignment in a decode step."""
        part = slice(0, prompt)
        results = [self(query[:, :, part], key[:, :, part], value[:, :, part], modality[:, part])]
        cached = key
        if self.cache == "aligned":
            first = release_loop(self.aligner, key[:, :, part], value[:, :, part], modality[:, part])
            cached = torch.cat([first, key[:, :, prompt:]], dim=2)
        for i in range(prompt, N):
            seen = cached[:, :, : i + 1], value[:, :, : i + 1], modality[:, : i + 1]
            results.append(modular_attention(query[:, :, i : i + 1], *seen, is_causal=True))
        return torch.cat(results, dim=2)


class Ours:
    """Causal attention with the aligner of this package."""

    def __init__(self, device, *, trained=True):
        self.aligner = DuplexAligner(D).to(device)
        if trained:
            for parameter in self.aligner.parameters():
                torch.nn.init.normal_(parameter)

    def __call__(self, query, key, value, modality):
        return modular_attention(self.aligner(query, key, modality, modality), key, value, modality, is_causal=True)

    def decode(self, query, key, value, modality, prompt):
        results, state = [], None
        for start, end in ((0, prompt), *((i, i + 1) for i in range(prompt, N))):
            new = query[:, :, start:end], key[:, :, start:end], modality[:, start:end], modality[:, start:end]
            views, state = self.aligner(*new, state, return_state=True)
            seen = key[:, :, :end], value[:, :, :end], modality[:, :end]
            results.append(modular_attention(views, *seen, is_causal=True))
        return torch.cat(results, dim=2)


# Parity


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_keys_equal_those_of_the_release(device, dtype):
    _, key, value, modality = inputs(device, dtype)
    modality[1, :2] = -1
    aligner = ReleaseAligner(D).to(device, dtype)
    for ratio in (aligner.ratio_v, aligner.ratio_t):
        torch.nn.init.normal_(ratio)
    aligned = aligner(key, value, modality)
    assert_close(aligned, release_loop(aligner, key, value, modality))
    assert torch.equal(aligned[:, :, modality[0] == TEXT], key[:, :, modality[0] == TEXT])
    grads = torch.autograd.grad(aligned.square().sum(), [aligner.ratio_v, aligner.pfuser_v.weight])
    assert all(grad.any() for grad in grads)


def test_checkpoint_splits_into_aligners_and_model():
    aligners = {layer: ReleaseAligner(D) for layer in (0, 11)}
    rest = {"model.embed_tokens.weight": torch.randn(4, 4), "model.layers.0.self_attn.q_proj.weight": torch.randn(4, 4)}
    checkpoint = dict(rest)
    for layer, aligner in aligners.items():
        checkpoint[f"model.layers.{layer}.self_attn.pnorm.weight"] = torch.ones(D)
        for name, tensor in aligner.state_dict().items():
            checkpoint[f"model.layers.{layer}.self_attn.{name}"] = tensor
    found, other = split_release_state_dict(checkpoint)
    assert other == rest
    assert found.keys() == aligners.keys()
    for layer, aligner in aligners.items():
        loaded = ReleaseAligner(D)
        loaded.load_state_dict(found[layer])
        assert all(map(torch.equal, loaded.parameters(), aligner.parameters()))
    del checkpoint["model.layers.11.self_attn.ratio_t"]
    with pytest.raises(ValueError, match="layer 11 lacks ratio_t"):
        split_release_state_dict(checkpoint)
    with pytest.raises(ValueError, match="no name like"):
        split_release_state_dict(rest)


# Faults


def answer_leaks(algorithm, device) -> bool:
    """Whether the last token of the answer changes what any token before it computes."""
    query, key, value, modality = inputs(device)
    before = algorithm(query, key, value, modality)
    key, value = key.clone(), value.clone()
    key[:, :, -1], value[:, :, -1] = -key[:, :, -1], 5.0
    after = algorithm(query, key, value, modality)
    return not torch.equal(before[:, :, :-1], after[:, :, :-1])


def test_fault_answer_tokens_leak_through_the_text_gram(device):
    assert answer_leaks(Release(device), device)
    assert not answer_leaks(Ours(device), device)


def decoding_disagrees(algorithm, device) -> bool:
    """Whether decoding the answer token by token gives something else than one pass over all of it."""
    problem = inputs(device)
    difference = algorithm.decode(*problem, PROMPT) - algorithm(*problem)
    return bool(difference.abs().max() > 1e-4)


@pytest.mark.parametrize("cache", ("raw", "aligned"))
def test_fault_alignment_is_skipped_while_decoding(device, cache):
    assert decoding_disagrees(Release(device, cache=cache), device)
    assert not decoding_disagrees(Ours(device), device)


def test_fault_the_cache_holds_raw_or_aligned_keys(device):
    """Two attention backends, two caches, two results; ours caches raw keys, whatever runs."""
    problem = inputs(device)
    raw, aligned = Release(device, cache="raw"), Release(device, cache="aligned")
    aligned.aligner = raw.aligner
    assert not torch.allclose(raw.decode(*problem, PROMPT), aligned.decode(*problem, PROMPT))
    ours = Ours(device)
    assert_close(ours.decode(*problem, PROMPT), ours.decode(*problem, 1))


def moves_at_the_start(algorithm, device) -> bool:
    """Whether attaching the new, untrained algorithm changes plain attention."""
    query, key, value, modality = inputs(device)
    plain = modular_attention(query, key, value, modality, is_causal=True)
    return not torch.allclose(algorithm(query, key, value, modality), plain, atol=1e-6)


def test_fault_a_new_aligner_is_not_the_identity(device):
    assert moves_at_the_start(Release(device, trained=False), device)
    assert not moves_at_the_start(Ours(device, trained=False), device)


def fails_without_text(algorithm, device) -> bool:
    query, key, value, modality = inputs(device)
    return bool(algorithm(query, key, value, torch.full_like(modality, VISION)).isnan().any())


def test_fault_nan_without_text_tokens(device):
    assert fails_without_text(Release(device), device)
    assert not fails_without_text(Ours(device), device)


def runs_sample_by_sample(algorithm, device) -> bool:
    """Whether a larger batch takes more operator calls."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.calls += 1
            return function(*arguments, **(keywords or {}))

    calls = []
    for batch in (2, 6):
        problem = inputs(device, batch=batch)
        with Count() as count:
            algorithm(*problem)
        calls.append(count.calls)
    return calls[0] != calls[1]


def needs_values_on_the_host(algorithm, device) -> bool:
    """Whether shapes depend on what tensors hold: on an accelerator, a synchronisation for every layer and sample."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        problem = inputs(device)
        try:
            algorithm(*problem)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True
    return False


def test_fault_python_loop_over_samples(device):
    assert runs_sample_by_sample(Release(device), device)
    assert not runs_sample_by_sample(Ours(device), device)


def test_fault_device_synchronisation(device):
    assert needs_values_on_the_host(Release(device), device)
    assert not needs_values_on_the_host(Ours(device), device)


def test_fault_no_modular_mask(device):
    """In the release every row's mass on the tokens is 1 and nothing can shift it between modalities."""
    query, key, value, modality = inputs(device)
    release = Release(device)
    keywords = {"is_causal": True, "return_mass": True}
    _, mass = modular_attention(query, release.aligner(key, value, modality), value, modality, **keywords)
    assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
    assert not any("prior" in name or "mask" in name for name, _ in release.aligner.named_parameters())

    layer = ModularDuplexAttention(16, 2).to(device)
    x = torch.randn(B, N, 16, device=device)
    _, before = layer(x, modality, return_mass=True)
    assert (before.sum(-1) < 1 - 1e-3).all()  # pseudo scores take a share
    layer.mask.prior.data[:, TEXT, VISION] = 2.0
    _, after = layer(x, modality, return_mass=True)
    text_rows = modality[0] == TEXT
    text_rows[:3] = False  # before the image
    assert (after[:, :, text_rows, VISION] > before[:, :, text_rows, VISION]).all()
