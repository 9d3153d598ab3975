"""What measuring costs in time and memory."""

import contextlib
import itertools
import time

import pytest
import torch

from moda_ext.diagnostics import AttentionMeter
from moda_ext.diagnostics.attach import recorded


class TestCost:
    @staticmethod
    def make_model(width, intermediate):
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        torch.manual_seed(0)
        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=intermediate,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=8192,
        )
        vision = transformers.CLIPVisionConfig(**small, image_size=64, patch_size=8)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
        return transformers.LlavaForConditionalGeneration(config).eval()

    @staticmethod
    def inputs(length):
        ids = torch.randint(1, 60, (1, length), generator=torch.Generator().manual_seed(1))
        ids[:, 10:74] = 60
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 64, 64), "use_cache": False, "logits_to_keep": 1}

    @pytest.mark.parametrize("prompt_length", [768, 640], ids=["no generated rows", "128 generated rows"])
    def test_measuring_costs_at_most_5_percent_of_a_forward(self, prompt_length):
        """The meter's own time beside a forward pass with sdpa; mass and lse cost the kernel nothing.

        In a text stack 1024 wide: the share falls with the width. On one thread, in processor time and the least of
        several runs, as other processes share the machine.
        """

        def processor_time(call, *arguments, **keywords):
            start = time.process_time()
            call(*arguments, **keywords)
            return time.process_time() - start

        model, inputs, threads = self.make_model(1024, 2816), self.inputs(768), torch.get_num_threads()
        forward, measuring = [], []
        torch.set_num_threads(1)
        try:
            for _ in range(14):
                meter, of_layers = AttentionMeter(model), []
                with torch.no_grad():
                    forward.append(processor_time(model, **inputs))
                    with (
                        meter.generated_after(prompt_length),
                        recorded(model, lambda record, m=meter, t=of_layers: t.append(processor_time(m, record))),
                    ):
                        model(**inputs)
                measuring.append(sum(of_layers))
        finally:
            torch.set_num_threads(threads)
        assert meter.result().tokens == {"text": 704, "vision": 64}
        assert meter.result().generated_tokens == 768 - prompt_length
        assert min(measuring) <= 0.05 * min(forward), (min(measuring), min(forward))

    @pytest.mark.parametrize("prompt_length", [4096, 100], ids=["no generated rows", "3996 generated rows"])
    def test_4096_tokens_need_no_matrix_of_all_pairs(self, prompt_length):
        """The largest allocation of a measured forward pass: a boolean matrix of all pairs would take N * N bytes."""
        model = self.make_model(512, 512)
        length, meter = 4096, AttentionMeter(model, similarity=True)
        stated, profiled = meter.generated_after(prompt_length), torch.profiler.profile(profile_memory=True)
        with torch.no_grad(), meter, stated, profiled as profile:
            model(**self.inputs(length))
        sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert max(sizes) >= length * 512 * 4  # the hidden states are seen
        assert max(sizes) < length * length
        assert meter.result().tokens == {"text": 4032, "vision": 64}

    def test_peak_memory_of_4096_tokens(self):
        """Of all tensors at once, over the same forward pass unmeasured; a float matrix of all pairs of one head would
        take 64 MB. What the process takes beside them varies with what ran before."""

        def peak(*contexts):
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context)
                profile = stack.enter_context(torch.profiler.profile(profile_memory=True))
                model(**inputs)
            events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
            changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
            assert min(changes) < 0 < max(changes)
            return max(itertools.accumulate(changes)) / 2**20

        model, inputs = self.make_model(512, 512), self.inputs(4096)
        plain = peak(recorded(model, lambda record: None))
        assert peak(recorded(model, lambda record: torch.ones(4096, 4096))) - plain > 32  # one would be seen
        assert peak(AttentionMeter(model)) - plain < 16
        meter = AttentionMeter(model)
        assert peak(meter.generated_after(100), meter) - plain < 16
