"""Models with MODA in vLLM generate the tokens that they generate in Transformers, whatever vLLM does with their pages.

Ten requests at once in every test: text alone, one image, two, at the end, long prompts that share most of them.
"""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: python3 tools/dev.py serving")

FAMILIES = ("llava", "qwen2_5_vl")
everywhere = pytest.mark.parametrize("family", FAMILIES)


@everywhere
@pytest.mark.parametrize("block", (16, 32, 128))
def test_blocks_of_any_size(serve, family, block):
    with serve(family, "full", block_size=block) as served:
        assert served.llm.llm_engine.vllm_config.cache_config.block_size == block
        assert all(served.agreeing())


@everywhere
@pytest.mark.parametrize("settings", ("fix", "inf", "learned", "layers", "hidden"))
def test_settings(serve, family, settings):
    """Masks "fix", "inf" and "learned" ("attn" is that of the other tests), split softmax and fusion "add" ("learned"),
    some of the layers, heads with a hidden modality and without a sink; no aligner ("fix", "hidden")."""
    with serve(family, settings) as served:
        assert all(served.agreeing())


@everywhere
def test_without_moda_the_tokens_are_others(serve, family):
    """The same weights but for those of MODA: what the other tests compare is not decided by the rest of the model."""
    with serve(family, "plain") as served:
        assert all(served.agreeing())  # plain vLLM, plain Transformers
        plain = served.generate()
    with serve(family, "full") as served:
        tokens = [want["tokens"] for want in served.expected]
        assert sum(a[: len(b)] != b for a, b in zip(plain, tokens, strict=True)) == len(tokens)


@everywhere
def test_prompts_in_chunks(serve, family):
    with serve(family, "full", max_num_batched_tokens=40, max_num_seqs=4) as served:
        scheduler, steps = served.llm.llm_engine.engine_core.engine_core.scheduler, []
        schedule = scheduler.schedule

        def watched(*args, **kwargs):
            steps.append(schedule(*args, **kwargs))
            return steps[-1]

        scheduler.schedule = watched
        assert all(served.agreeing())
        longest = max(len(want["prompt"]) for want in served.expected)
        assert longest > 4 * 40 >= 4 * max(step.total_num_scheduled_tokens for step in steps) > 0


@everywhere
def test_shared_prefixes(serve, family):
    """Blocks of other requests, of this round and of the one before, with the modalities in them."""
    with serve(family, "full", block_size=16) as served:
        assert all(served.agreeing())
        assert served.counter("prefix_cache_hits") >= 128  # the long prompts share this many tokens
        before = served.counter("prefix_cache_hits")
        assert all(served.agreeing())
        assert served.counter("prefix_cache_hits") - before >= 400


@everywhere
def test_preempted_requests(serve, family):
    with serve(family, "full", block_size=16, num_gpu_blocks_override=34) as served:
        assert all(served.agreeing())
        assert served.counter("num_preemptions") > 0


@everywhere
def test_drafts_are_taken_back(serve, family, monkeypatch):
    """Speculation by n-grams; some drafts are right, others are not and leave keys in the pages that do not count."""
    # In a process of its own: no other engine of vLLM 0.32 starts in one that has Numba.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    ngrams = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    with serve(family, "full", speculative_config=ngrams) as served:
        assert all(served.agreeing())
        drafted, accepted = (served.counter(f"spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted"))
        assert 0 < accepted < drafted


@everywhere
def test_compiled(serve, family):
    from vllm.compilation.counter import compilation_counter

    before = compilation_counter.num_aot_compiles
    with serve(family, "full", enforce_eager=False) as served:
        assert compilation_counter.num_aot_compiles > before
        assert all(served.agreeing())


def heads(model) -> list[tuple[int, ...]]:
    """Of the tables of this rank."""
    return [tuple(layer.mask.prior.shape) for layer in model.moda_layers.values()]


@pytest.mark.parametrize(("family", "settings"), ((*((family, "full") for family in FAMILIES), ("llava", "hidden"))))
def test_two_ranks(serve, family, settings, monkeypatch):
    """Tensor parallelism; "hidden" has settings for each of all heads."""
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")  # two ranks on the cores of one node
    with serve(family, settings, tensor_parallel_size=2) as served:
        assert served.llm.apply_model(heads) == [[(2, 2, 2)] * 3] * 2
        assert all(served.agreeing())


@everywhere
def test_on_the_transformers_backend(serve, family):
    """Of vLLM, which serves any family without a class of its own."""
    name = "TransformersMODAForConditionalGeneration"
    with serve(family, "full", hf_overrides={"architectures": [name]}) as served:
        assert served.llm.apply_model(lambda model: type(model).__name__) == [name]
        assert all(served.agreeing())


OTHERS = ("llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm")


@pytest.mark.parametrize("family", OTHERS)
def test_text_stacks_of_the_other_families(serve, family):
    """Without their towers: prompts are token ids, and images the embeddings of their placeholders."""
    from vllm import SamplingParams

    options = {
        "skip_tokenizer_init": True,
        "language_model_only": True,
        "max_model_len": 128,
        "limit_mm_per_prompt": {},
    }
    with serve("stacks", family, **options) as served:
        greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": want["prompt"]} for want in served.expected]
        outputs = served.llm.generate(prompts, greedy, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        assert [got[: len(want["tokens"])] for got, want in zip(tokens, served.expected, strict=True)] == [
            want["tokens"] for want in served.expected
        ]


@everywhere
def test_bfloat16(serve, family):
    """Rounding decides between tokens that are as good, so most first tokens are compared and no more."""
    with serve(family, "full", dtype="bfloat16") as served:
        tokens = served.generate(1)
        assert sum(got[0] == want["tokens"][0] for got, want in zip(tokens, served.expected, strict=True)) >= 6
