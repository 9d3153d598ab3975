"""What cannot be served is refused with its reason while vLLM starts, before the first token."""

import json
import shutil

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: python3 tools/dev.py serving")

from torch import nn  # noqa: E402  vLLM may be missing


@pytest.fixture
def changed(checkpoints, tmp_path):
    """A copy of a checkpoint whose text config, and settings of MODA in it, are updated."""

    def make(text: dict | None = None, moda: dict | None = None, **top):
        path = tmp_path / "changed"
        shutil.copytree(checkpoints / "llava" / "full", path)
        config = json.loads((path / "config.json").read_text())
        config["text_config"].update(text or {})
        config["text_config"]["moda"].update(moda or {})
        config.update(top)
        (path / "config.json").write_text(json.dumps(config))
        return path

    return make


def configure(path, **options):
    """What vLLM does before it starts any process."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(path), **{"dtype": "float32", "max_model_len": 512, **options}).create_engine_config()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pipeline_parallel_size": 2}, "with pipeline parallelism the later ranks get no token ids"),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "context parallelism splits the keys"),
        ({"kv_cache_dtype": "fp8"}, "the KV cache holds keys in the model's dtype float32, not as fp8"),
        ({"kv_cache_dtype": "bfloat16"}, "the KV cache holds keys in the model's dtype float32, not as bfloat16"),
        ({"enable_prompt_embeds": True}, "prompt_embeds have no token ids"),
        ({"block_size": 24}, "blocks hold a multiple of 16 tokens, not 24"),
        ({"enable_lora": True}, "LoRA adapters .* merge them"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "carry pages elsewhere"),
        ({"kv_offloading_size": 1.0}, "carry pages elsewhere"),
        ({"compilation_config": {"mode": 1}}, "a graph of the whole model would write the modalities of a step after"),
        ({"additional_config": {"moda_metrics": True}}, "moda_metrics needs PROMETHEUS_MULTIPROC_DIR"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_of_the_engine(checkpoints, options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        configure(checkpoints / "llava" / "full", **options)


def test_speculation_by_a_model(checkpoints):
    draft = {"method": "draft_model", "model": str(checkpoints / "llava" / "plain"), "num_speculative_tokens": 2}
    with pytest.raises(NotImplementedError, match="ngram is tested, not draft_model"):
        configure(checkpoints / "llava" / "full", speculative_config=draft)


def test_all_reasons_are_given_at_once(checkpoints):
    with pytest.raises(NotImplementedError, match="MODA cannot be served here: prompt_embeds .*; the KV cache holds"):
        configure(checkpoints / "llava" / "full", enable_prompt_embeds=True, kv_cache_dtype="fp8")


@pytest.mark.parametrize(
    ("text", "moda", "reason"),
    [
        ({}, {"mode": "release", "aligner": None, "mask": None}, "mode='release' aligns a prompt as a whole"),
        ({}, {"aligner": {"rank": 200}}, "the aligner has rank 200, and the operators take up to 128"),
        ({"head_dim": 256}, {"aligner": {"fusion": "add"}}, "fusion 'add' has the rank of the head size, 256"),
        ({"head_dim": 36}, {}, "head sizes in multiples of 8 up to 256, this is 36"),
    ],
    ids=["release", "rank", "fusion add", "head size"],
)
def test_settings_of_the_model(changed, text, moda, reason):
    with pytest.raises(NotImplementedError, match=reason):
        configure(changed(text, moda))


def test_images_that_see_each_other(tmp_path, checkpoints):
    """Gemma 3, whose vLLM model would be causal without a word."""
    from moda_ext.integrations.settings import MODAConfig
    from moda_ext.integrations.vllm.configs import CONFIGS

    shutil.copytree(checkpoints / "llava" / "plain", tmp_path, dirs_exist_ok=True)
    config = CONFIGS["gemma3_moda"](architectures=["Gemma3MODAForConditionalGeneration"])
    config.text_config.moda = MODAConfig().values()
    config.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="the image tokens of Gemma 3 see each other in both directions"):
        configure(tmp_path)


def test_a_config_without_settings(changed):
    path = changed()
    config = json.loads((path / "config.json").read_text())
    del config["text_config"]["moda"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match="the config of this llava_moda has no settings"):
        configure(path)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("attn_type", "encoder_only", "no plain attention of a decoder"),
        ("sliding_window", 64, "has a sliding window"),
        ("impl.alibi_slopes", [0.5], "has ALiBi"),
        ("impl.logits_soft_cap", 30.0, "has a soft cap"),
        ("has_sink", True, "has sinks of its own"),
        ("kv_sharing_target_layer_name", "layers.0.attn", "has no keys of its own but those of layers.0.attn"),
        ("head_size_v", 64, "has values of size 64 and keys of size 32"),
        ("kv_cache_torch_dtype", "int8", "has its keys in"),
    ],
)
def test_layers(attribute, value, reason):
    from types import SimpleNamespace

    from vllm.model_executor.layers.attention import Attention

    from moda_ext.integrations.vllm.refusals import check_layer

    layer = Attention.__new__(Attention)
    nn.Module.__init__(layer)
    plain = {"attn_type": "decoder", "sliding_window": None, "has_sink": False, "kv_sharing_target_layer_name": None}
    sizes = {"head_size": 32, "head_size_v": 32, "kv_cache_torch_dtype": "float32", "dtype": "float32"}
    impl = SimpleNamespace(alibi_slopes=None, logits_soft_cap=0)
    for name, default in {**plain, **sizes, "kv_cache_dtype": "auto", "impl": impl}.items():
        setattr(layer, name, default)
    check_layer(layer, 3)
    setattr(impl if attribute.startswith("impl.") else layer, attribute.removeprefix("impl."), value)
    with pytest.raises(NotImplementedError, match=f"layer 3 {reason}" if attribute != "attn_type" else reason):
        check_layer(layer, 3)


def rewrite(path, change) -> None:
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("what", ("a layer", "a tensor", "settings", "pseudo scores"))
def test_weights_that_do_not_fit(changed, serve, what):
    """A layer without its weights, one tensor less, weights for a layer that the settings leave out, and a base of
    pseudo scores that the settings switch off."""
    path = changed(moda={"layers": [0, 2]} if what == "settings" else {})
    if what == "pseudo scores":
        path = switched_off(path)
    part = {"a layer": "layers.1.self_attn.moda.", "a tensor": "layers.1.self_attn.moda.aligner.a1"}.get(what)
    if part is not None:
        rewrite(path, lambda tensors: {name: t for name, t in tensors.items() if part not in name})
    reason = {
        "a layer": r"lacks those of layers \['1'\]",
        "a tensor": 'Missing key.*"aligner.a1"',
        "settings": r"has weights for layers \['1'\] that the settings leave out",
        "pseudo scores": "has a base of pseudo scores|have a base of pseudo scores",
    }[what]
    with pytest.raises((ValueError, RuntimeError), match=reason), serve(path):
        pass


def switched_off(path):
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["moda"]["mask"] |= {"base": None, "learn_base": False}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_weights_cannot_be_reloaded_in_place(changed, serve):
    """vLLM moves parameters to the meta device for it, loads by ways that are not ours, and puts the old ones back."""
    path = changed()
    with serve(path) as served, pytest.raises(Exception, match="cannot be reloaded in place"):
        served.llm.collective_rpc("reload_weights")


def test_layers_that_the_model_lacks(changed, serve):
    path = changed(moda={"layers": [0, 7]})
    reason = r"layers \[0, 7\] should have it, and this model has layers"
    with pytest.raises(NotImplementedError, match=reason), serve(path):
        pass
