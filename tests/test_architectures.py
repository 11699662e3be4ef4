"""Tiny random models of many types of Transformers: each is right in all that this project does with it, or refused at
load. `python -m tests.test_architectures` writes the table of docs/models.md."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from common.data import InputError, pack
from common.rollout import EmbeddedSampler, Sampling, cache_size, make_sampler
from common.trainer import (
    ValueModel,
    export,
    layer_widths,
    layers_to_keep,
    load_policy,
    predictor_states,
    set_context,
)
from tests.conftest import ROOT, run_script

SMALL = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip
WINDOW = dict(sliding_window=8)
BOTH = dict(WINDOW, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_k=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, n_shared_experts=1, n_group=1, topk_group=1,
    first_k_dense_replace=1, decoder_sparse_step=1,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4
)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
SOFT = dict(final_logit_softcapping=2.0, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
FOUR = dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
SHARED = dict(num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=61)
SHORTCUT = dict(head_dim=8, ffn_hidden_size=48, num_layers=2, expert_ffn_hidden_size=16, zero_expert_num=2, moe_topk=2)
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28,
             patch_size=14)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=8)
MAMBA = dict(mamba_d_state=8, mamba_n_groups=1, mamba_n_heads=4, mamba_d_head=16)



def kinds_of(groups: dict) -> dict:
    return {kind: key for key, kinds in groups.items() for kind in kinds.split()}


# what is tested of each type beside full attention, in the words of the table
PLAIN, SLIDING, CAPPED, SINKS, MOE, MLA = (
    "full attention", "sliding window", "soft cap of attention's scores", "attention sinks", "mixture of experts",
    "latent attention",
)  # fmt: skip
RIGHT = kinds_of(
    {
        (SLIDING, MOE): "afmoe beam cohere2_moe dots1 exaone_moe flint kolibri1 laguna mellum mixtral phimoe",
        (PLAIN,): (
            "apertus apertus1p5_text arcee biogpt bitnet cohere diffllama ernie4_5 exaone gemma glm glm4 gpt2 "
            "gpt_bigcode gpt_neox granite helium hrm_text hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2 "
            "llama nanochat nemotron olmo olmo2 opt persimmon qwen3 seed_oss smollm3 stablelm"
        ),
        (MLA, MOE): "axk1 deepseek_v2 deepseek_v3 glm4_moe_lite longcat_flash sarvam_mla",
        (SLIDING,): (
            "cohere2 cwm exaone4 gemma3 gemma3_text gemma3n_text gemma4_text ministral ministral3 mistral olmo3 phi3 "
            "qwen2 starcoder2"
        ),
        (MOE,): (
            "aria_text dbrx ernie4_5_moe flex_olmo glm4_moe granitemoe granitemoeshared hunyuan_v1_moe hy_v3 jetmoe "
            "minimax_m2 olmoe qwen2_moe qwen3_moe sarvam_moe solar_open"
        ),
        (SLIDING, CAPPED): "gemma2 vaultgemma",
        (SLIDING, SINKS, MOE): "gpt_oss granitemoe_swa mimo_v2_flash",
        (SLIDING, SINKS): "granite_swa",
        (MLA,): "minicpm3 youtu",
    }
)
RECURRENT, OWN, HEAD, LAYERS, MASK, ROWS, LOGITS = (
    "packed sequences see each other", "does not go through Transformers' interfaces", "an output layer with a bias",
    "layers of a kind that is not supported", "a mask that is neither causal nor a window",
    "no decoder in it, or rows in and out differ", "it changes its logits after the output layer",
)  # fmt: skip
REFUSED = kinds_of(
    {
        LAYERS: (
            "bailing_hybrid bamba deepseek_v32 deepseek_v4 falcon_h1 falcon_mamba jamba kimi_linear lara_mini lfm2 "
            "lfm3 mamba minimax nemotron_h olmo_hybrid qwen3_5_text qwen3_next recurrent_gemma"
        ),
        RECURRENT: "openai-gpt rwkv",
        OWN: "bloom doge falcon gpt_neo mpt xglm",
        HEAD: "bert ctrl gptj modernbert-decoder phi",
        LOGITS: "dory",
        MASK: "bart",
        ROWS: "llama4_text moshi",
    }
)
NEWER = {  # than Transformers 5.19
    "apertus1p5_text", "bailing_hybrid", "beam", "dory", "exaone", "flint", "internlm3", "iquestcoder", "kolibri1",
    "lara_mini", "lfm3", "sarvam_mla", "sarvam_moe",
}  # fmt: skip
FORMERLY = {"recurrent_gemma": RECURRENT, "gptj": OWN} if Version(transformers.__version__) < Version("5.24") else {}
SETTINGS = {
    "beam": BOTH | dict(mlp_layer_types=["dense", "sparse"], final_logit_softcapping=2.0), "flint": BOTH,
    "kolibri1": BOTH, "afmoe": BOTH, "bamba": MAMBA | {"attn_layer_indices": [1]}, "cohere": {"logit_scale": 0.5},
    "cohere2": BOTH | {"logit_scale": 0.5}, "cohere2_moe": BOTH,
    "granite": {"logits_scaling": 4.0}, "dots1": BOTH, "exaone4": BOTH, "exaone_moe": BOTH,
    "dbrx": dict(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2, hidden_size=32),
    ),
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}, "gemma2": BOTH | SOFT,
    "vaultgemma": BOTH | SOFT,
    "gemma3": dict(text_config=SMALL | BOTH, vision_config=TOWER, mm_tokens_per_image=4),
    "gemma3_text": BOTH | {"query_pre_attn_scalar": 8},
    "gemma3n_text": FOUR | SHARED | dict(altup_num_inputs=2, laurel_rank=4, activation_sparsity_pattern=[0.5] * 4),
    "gemma4_text": FOUR | SHARED | {"global_head_dim": 16},
    "gpt2": GPT | {"resid_pdrop": 0.2}, "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]]),
    "gptj": GPT | {"rotary_dim": 4}, "hyperclovax": {"logits_scaling": 0.5},
    "hrm_text": {"prefix_lm": False},
    "jamba": MAMBA | dict(attn_layer_offset=1, attn_layer_period=2, num_experts=2),
    "laguna": BOTH, "lfm2": {"layer_types": ["conv", "full_attention"]}, "longcat_flash": SHORTCUT, "mellum": BOTH,
    "ministral": BOTH, "ministral3": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}},
    "nanochat": {"final_logit_softcapping": 2.0}, "olmo3": BOTH, "openai-gpt": GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5},
    "qwen2": WINDOW | dict(use_sliding_window=True, max_window_layers=1), "seed_oss": {"residual_dropout": 0.2},
}  # fmt: skip
WITHOUT_HEAD_DIM = {"falcon", "jamba", "bamba", "mpt", "rwkv"}
BIASED = ("e_score_correction_bias", "layer_scalar", "beta", "eps")


def make(kind: str, folder: Path, **changes) -> Path:
    """A folder with a model whose every weight, bias, norm, sink and saved buffer is random."""
    if kind in NEWER and kind not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {kind}")
    settings = SMALL | (EXPERTS if MOE in RIGHT.get(kind, ()) else {}) | (LATENT if MLA in RIGHT.get(kind, ()) else {})
    settings |= (WINDOW if SLIDING in RIGHT.get(kind, ()) else {}) | SETTINGS.get(kind, {}) | changes
    if kind in WITHOUT_HEAD_DIM:
        del settings["head_dim"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith(BIASED):
                buffer.add_(0.1 * torch.rand_like(buffer))
    model.save_pretrained(folder)
    return folder


def plain_model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def plain_logps(model, sequences) -> torch.Tensor:
    """Log-probs of all responses, one sequence at a time, by Transformers alone."""
    found = []
    for prompt, response in sequences:
        logps = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        found.append(logps[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def ids(n: int, seed: int) -> list[int]:
    return torch.randint(3, 61, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


SEQUENCES = [(ids(7, 1), ids(20, 2)), (ids(7, 1), ids(5, 3)), (ids(3, 4), ids(30, 5)), (ids(4, 6), ids(1, 7))]


def gradients(model, logp) -> dict[str, torch.Tensor]:
    (logp * torch.linspace(0.5, 1.5, len(logp))).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


class NoTokenizer:
    eos_token_id = 1

    def save_pretrained(self, folder):
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


@pytest.mark.parametrize("kind", RIGHT)
def test_a_type_is_right_in_all_six_respects(kind, world, tmp_path):
    folder = make(kind, tmp_path / "model")
    policy, plain = load_policy(str(folder), world), plain_model(folder)
    logp, expected = policy(pack(SEQUENCES)), plain_logps(plain, SEQUENCES)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-4)
    alone = torch.cat([policy(pack([sequence])) for sequence in SEQUENCES])
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-4)

    policies = [(policy, logp)]
    if policy.lm.supports_gradient_checkpointing:
        again = load_policy(str(folder), world, gradient_checkpointing=True)
        policies.append((again, again(pack(SEQUENCES))))
    else:
        with pytest.raises(InputError, match="has no checkpointing: use --gradient_checkpointing none"):
            load_policy(str(folder), world, gradient_checkpointing="all")
    wanted = gradients(plain, expected)
    largest = max(x.abs().max() for x in wanted.values())
    for model, logps in policies:
        found = gradients(model.lm, logps)
        for name, gradient in wanted.items():
            assert (found.get(name, torch.zeros(())) - gradient).abs().max() < 1e-3 * largest, name

    sampler = EmbeddedSampler(policy, stop_ids=[1])
    sampler.sync(policy, version=0)
    prompts = [ids(3, 8), ids(12, 9)]
    answers = sampler.generate(prompts, n=1, keys=[0, 1], seed=0, sampling=Sampling(16, temperature=0.0))
    rows = [(prompt, c.ids) for prompt, [c] in zip(prompts, answers, strict=True)]
    sampled = torch.tensor([x for [c] in answers for x in c.logps])
    with torch.no_grad():
        torch.testing.assert_close(sampled, plain_logps(plain, rows), rtol=0, atol=1e-3)
        for prompt, answer in rows:  # greedy: no token is likelier than the one drawn
            logits = plain(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            assert (logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0] < 1e-3).all()

        for p in policy.parameters():
            p.mul_(1.01)
        export(policy, NoTokenizer(), tmp_path / "export", world)
        trained = policy(pack(SEQUENCES))
        exported = plain_logps(plain_model(tmp_path / "export"), SEQUENCES)
        torch.testing.assert_close(exported, trained, rtol=0, atol=1e-4)
        assert torch.equal(load_policy(str(tmp_path / "export"), world)(pack(SEQUENCES)), trained)


def test_the_sampler_does_not_ignore_a_soft_cap_of_scores_that_the_proof_cannot_see(world, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.Gemma2PreTrainedModel, "_supports_sdpa", True)  # as in Transformers 5.19
    policy = load_policy(str(make("gemma2", tmp_path, attn_logit_softcapping=50.0)), world)
    sampler = EmbeddedSampler(policy, stop_ids=[1])
    sampler.sync(policy, version=0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p.mul_(4 if "q_proj" in name or "k_proj" in name else 1)  # then scores reach the cap
    sampler.sync(policy, version=1)
    [[answer]] = sampler.generate([ids(30, 8)], n=1, keys=[0], seed=0, sampling=Sampling(30))
    expected = policy(pack([(ids(30, 8), answer.ids)])).detach()
    torch.testing.assert_close(torch.tensor(answer.logps), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_type_is_refused_at_load_in_one_line(kind, world, tmp_path):
    folder = make(kind, tmp_path / "model")
    with pytest.raises(InputError, match=f"{REFUSED[kind]}|{FORMERLY.get(kind, REFUSED[kind])}") as error:
        load_policy(str(folder), world)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"--model {folder}: ")


def table() -> str:
    """docs/models.md's: every type that is tested."""
    lines = []
    for title, found in (("tested with", RIGHT), ("refused: what the message says", REFUSED)):
        lines += ["", f"| {title} | types |", "| --- | --- |"]
        for key in sorted(set(found.values())):
            kinds = ", ".join(f"`{kind}`" for kind in sorted(found) if found[kind] == key)
            lines.append(f"| {key if isinstance(key, str) else ', '.join(key)} | {kinds} |")
    return "\n".join(lines).strip()


PAGE, MARK = ROOT / "docs" / "models.md", "<!-- table -->\n"


def test_the_page_lists_what_is_tested():
    assert len(RIGHT) >= 40 and f"{len(RIGHT)} types are tested" in (ROOT / "README.md").read_text()
    assert PAGE.read_text().split(MARK)[1].strip() == table()


# ------------------------------------------------------------------------------------- what a load refuses


def edit(folder: Path, **changes) -> None:
    """Set values of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})


def without(part: str):
    return lambda weights: {name: x for name, x in weights.items() if part not in name}


def compiled(weights):
    return {f"_orig_mod.{name}": x for name, x in weights.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(".layers.1."), "missing are model.layers.1.input_layernorm.weight, .* and [0-9]+ more"),
        (without("lm_head"), "missing are lm_head.weight$"),
        (compiled, "missing are lm_head.weight, model.embed_tokens.weight, "),
        (lambda weights: weights | {"model.extra.weight": torch.ones(2)}, "unexpected are model.extra.weight$"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantised weights cannot be trained"),
        (dict(dtype="float8_e4m3fn"), "quantised weights cannot be trained"),
        (dict(hidden_size=16), "mismatched are lm_head.weight, .* and [0-9]+ more"),
        (dict(tie_word_embeddings=True), "untied are lm_head.weight$"),
        (dict(prefix_lm=True), "its prompts are read in both directions .prefix_lm., which is not supported"),
        (dict(hidden_act="swiglu"), "cannot be loaded .'swiglu' is not known.$"),
        (dict(rms_norm_eps=0), "cannot be loaded .*'rms_norm_eps'.* expected float, got int"),
    ],
)
def test_a_folder_whose_weights_or_settings_do_not_fit_is_refused(damage, message, world, tmp_path):
    folder = make("llama", tmp_path / "model")
    if isinstance(damage, dict):
        edit(folder, **damage)
    else:
        edit_weights(folder, damage)
    with pytest.raises(InputError, match=message):
        load_policy(str(folder), world)


def test_dbrx_has_the_rope_base_of_its_published_configuration(world, tmp_path):
    folder = make("dbrx", tmp_path / "model", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    expected = plain_logps(plain_model(folder), SEQUENCES)
    published = json.loads((folder / "config.json").read_text())
    del published["rope_parameters"]
    published["attn_config"]["rope_theta"] = 500000  # its place there
    (folder / "config.json").write_text(json.dumps(published))
    policy = load_policy(str(folder), world)
    torch.testing.assert_close(policy(pack(SEQUENCES)), expected, rtol=0, atol=1e-4)
    export(policy, NoTokenizer(), tmp_path / "export", world)
    torch.testing.assert_close(plain_logps(plain_model(tmp_path / "export"), SEQUENCES), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_layers_of_several_widths_are_counted(kind, world, tmp_path):
    policy = load_policy(str(make(kind, tmp_path, num_kv_shared_layers=0)), world)
    config = policy.lm.config
    sizes = {name: x.shape[0] for name, x in policy.lm.named_parameters() if "k_proj" in name or "up_proj" in name}
    keys = [size for name, size in sizes.items() if "k_proj" in name]
    assert layer_widths(config) == (keys, max(sizes[name] for name in sizes if "up_proj" in name))
    assert cache_size(config) == 2 * sum(keys)
    assert [layers_to_keep(config, 1000, free) for free in (0, 1e12)] == [0, 4]


def test_the_mlp_of_layers_that_share_keys_may_be_twice_as_wide(world, tmp_path):
    lm = load_policy(str(make("gemma4_text", tmp_path, use_double_wide_mlp=True)), world).lm
    assert layer_widths(lm.config)[1] == max(x.shape[0] for name, x in lm.named_parameters() if "up_proj" in name) == 96


@pytest.mark.parametrize("kind", ["granite_swa", "granitemoe_swa"])
def test_a_rope_base_reaches_layers_that_have_a_list_of_their_own(kind, world, tmp_path):
    args = SimpleNamespace(model="MODEL", rope_theta=50.0, max_positions=0)
    edit_config = functools.partial(set_context, args)
    policy = load_policy(str(make(kind, tmp_path / "model")), world, edit_config=edit_config)
    expected = plain_logps(plain_model(make(kind, tmp_path / "other", rope_theta=50.0)), SEQUENCES)
    torch.testing.assert_close(policy(pack(SEQUENCES)), expected, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="--model MODEL has no single RoPE base"):
        load_policy(str(make(kind, tmp_path / "third", layer_rope_theta=[0, 1e4])), world, edit_config=edit_config)


def test_an_adapter_beside_a_model_is_to_be_merged(world, tmp_path):
    folder = make("llama", tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter_config.json is there: merge the adapter"):
        load_policy(str(folder), world)


@pytest.mark.parametrize("kind", ["llama", "biogpt", "gpt_neox"])
def test_a_value_models_head_is_new_only_where_it_is_asked_for(kind, world, tmp_path):
    folder = make(kind, tmp_path / "model")
    with pytest.raises(InputError, match="^--value [^ ]*: no trained value head there"):
        load_policy(str(folder), world, kind=ValueModel)
    value = load_policy(str(folder), world, kind=ValueModel, new_head=True)
    assert not value.lm.score.weight.any()
    with torch.no_grad():
        value.lm.score.weight.fill_(0.5)
    export(value, NoTokenizer(), tmp_path / "value", world)
    again = load_policy(str(tmp_path / "value"), world, kind=ValueModel)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value", num_labels=1).eval()
    hidden = [plain.get_decoder()(torch.tensor([p + r])).last_hidden_state[0, len(p) - 1 : -1] for p, r in SEQUENCES]
    torch.testing.assert_close(again(pack(SEQUENCES)), plain.score(torch.cat(hidden))[:, 0], rtol=0, atol=1e-4)


def masked_bias(folder):
    edit_weights(folder, lambda weights: weights | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})


def tuples(folder):
    edit(folder, return_dict=False)


def negative_pad(folder):
    edit(folder, pad_token_id=-1)


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("oddity", [masked_bias, tuples, negative_pad, pickled])
def test_what_is_odd_in_a_folder_and_changes_nothing_is_read_and_exported(oddity, world, tmp_path):
    folder = make("gpt2", tmp_path / "model")
    expected = plain_logps(plain_model(folder), SEQUENCES)
    oddity(folder)
    policy = load_policy(str(folder), world)
    torch.testing.assert_close(policy(pack(SEQUENCES)), expected, rtol=0, atol=1e-4)
    EmbeddedSampler(policy, stop_ids=[1]).sync(policy, version=0)
    export(policy, NoTokenizer(), tmp_path / "export", world)
    torch.testing.assert_close(plain_logps(plain_model(tmp_path / "export"), SEQUENCES), expected, rtol=0, atol=1e-4)


def test_logits_that_are_changed_in_code_are_found_by_the_proof(world, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def halved(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits / 2
        return out

    folder = make("llama", tmp_path / "model")
    monkeypatch.setattr(LlamaForCausalLM, "forward", halved)
    with pytest.raises(InputError, match="changes its logits after the output layer .log-probs are off by"):
        load_policy(str(folder), world)


def test_noise_in_training_is_found_by_the_proof(world, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def noisy(self, hidden_states, *args, **kwargs):
        return torch.dropout(forward(self, hidden_states, *args, **kwargs), 0.1, self.training)

    folder = make("llama", tmp_path / "model")
    monkeypatch.setattr(LlamaDecoderLayer, "forward", noisy)
    with pytest.raises(InputError, match="it computes with noise in training, or"):
        load_policy(str(folder), world)


def test_what_a_layer_hands_to_attention_beyond_what_it_knows_is_an_error(world, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs, position_bias=1.0)
    )
    with pytest.raises(InputError, match="LlamaAttention hands position_bias to attention"):
        load_policy(str(make("llama", tmp_path / "model")), world)


LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4,
                original_max_position_embeddings=32)  # fmt: skip


def test_sequences_longer_than_the_positions_of_a_model_are_refused(world, tmp_path):
    folder = make("phi3", tmp_path / "model", rope_parameters=LONGROPE, original_max_position_embeddings=32)
    policy, plain = load_policy(str(folder), world), plain_model(folder)
    torch.testing.assert_close(policy(pack(SEQUENCES[:2])), plain_logps(plain, SEQUENCES[:2]), rtol=0, atol=1e-4)
    longer = (ids(20, 1), ids(20, 2))  # the long factors would be used for the short sequence too
    with pytest.raises(InputError, match="a sequence of 39 tokens exceeds the 32 positions of the model"):
        predictor_states(policy.lm, pack([longer, SEQUENCES[1]]))
    with pytest.raises(InputError, match="answers of up to 40 tokens exceed the 32 positions .*--max_response_tokens"):
        make_sampler("embedded", policy, world, stop_ids=[1], max_tokens=40)


def test_two_ranks_load_sample_and_export_as_one_does(world, tmp_path):
    """Layers are sharded whatever a model calls them, and buffers travel with weights."""
    kinds = ("gpt2", "deepseek_v3", "gpt_oss")
    for kind in kinds:
        make(kind, tmp_path / kind / "model", tie_word_embeddings=kind == "gpt2")
    run_script("tests/architecture_ranks.py", *(tmp_path / kind for kind in kinds), ranks=2)
    for kind in kinds:
        logp, drawn, logps = torch.load(tmp_path / kind / "ranks.pt")
        plain = plain_model(tmp_path / kind / "ranks")
        before = load_file(tmp_path / kind / "model" / "model.safetensors")
        after = load_file(tmp_path / kind / "ranks" / "model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        torch.testing.assert_close(logp, plain_logps(plain, SEQUENCES).detach(), rtol=0, atol=1e-4)
        expected = plain_logps(plain, [(ids(12, 9), drawn)]).detach()
        torch.testing.assert_close(torch.tensor(logps), expected, rtol=0, atol=1e-3)


def test_an_export_has_the_names_of_the_folder_that_was_loaded(world, tmp_path):
    folder = make("gemma3", tmp_path / "model")
    old, published = "vision_tower.", "vision_tower.vision_model."  # a prefix that Transformers takes off and puts back
    edit_weights(folder, lambda weights: {name.replace(old, published): x for name, x in weights.items()})
    export(load_policy(str(folder), world), NoTokenizer(), tmp_path / "export", world)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "export"))
    assert before.keys() == after.keys() and any(published in name for name in after)


@pytest.mark.parametrize("kind", ["llama", "olmo3", "gemma3", "gemma4_text", "glm", "gpt_neox"])
def test_an_export_has_rope_also_under_the_names_of_transformers_4(kind, world, tmp_path):
    """Its classes computed the same log-probs from such exports (4.57.1; docs/models.md)."""
    full, local = YARN | {"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 3e4}
    rope = full if kind == "llama" else {"full_attention": full, "sliding_attention": local}
    changes = {"text_config": SMALL | BOTH | {"rope_parameters": rope}} if kind == "gemma3" else {}
    if kind in ("glm", "gpt_neox"):
        rope = local | {"partial_rotary_factor": 0.5}
    policy = load_policy(str(make(kind, tmp_path / "model", **changes or {"rope_parameters": rope})), world)
    export(policy, NoTokenizer(), tmp_path / "export", world)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    names = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
    names += ("rotary_emb_base", "rotary_pct")
    old = {name: value for name, value in (config.get("text_config") or config).items() if name in names}
    assert old == {
        "llama": {"rope_theta": 5e5, "rope_scaling": full},
        "olmo3": {"rope_theta": 5e5, "rope_scaling": full, "rope_local_base_freq": 3e4},
        "gemma3": {"rope_theta": 5e5, "rope_scaling": full, "rope_local_base_freq": 3e4},
        "gemma4_text": {},  # Transformers 4 has no such class
        "glm": {"rope_theta": 3e4, "partial_rotary_factor": 0.5},
        "gpt_neox": {"rope_theta": 3e4, "partial_rotary_factor": 0.5, "rotary_emb_base": 3e4, "rotary_pct": 0.5},
    }[kind]
    again = load_policy(str(tmp_path / "export"), world)
    theirs, ours = (x.lm.config.get_text_config().rope_parameters for x in (again, policy))
    assert theirs == ours
    assert torch.equal(again(pack(SEQUENCES)), policy(pack(SEQUENCES)))


@pytest.mark.parametrize("kind", ["deepseek_v3", "afmoe", "ernie4_5_moe", "hrm_text", "laguna"])
def test_buffers_and_what_a_models_class_freezes_are_not_trained_and_never_rounded(kind, world, tmp_path):
    folder = make(kind, tmp_path / "model")
    policy = load_policy(str(folder), world)
    trained = {name for name, _ in policy.lm.named_parameters()}  # FSDP2 computes with them in bf16
    policy.lm.saved_dtype = torch.bfloat16
    export(policy, NoTokenizer(), tmp_path / "export", world)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "export"))
    biases = [name for name in after if name.endswith((*BIASED, "expert_bias", "z_L_init"))]
    assert biases and before.keys() == after.keys() and not trained & {*biases}
    assert all(torch.equal(after[name], before[name]) for name in biases)
    assert {x.dtype for name, x in after.items() if name not in biases} == {torch.bfloat16}


def test_a_generation_config_that_transformers_refuses_to_write_is_kept(world, tmp_path):
    folder = make("llama", tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [1, 5]}))
    export(load_policy(str(folder), world), NoTokenizer(), tmp_path / "export", world)
    kept = GenerationConfig.from_pretrained(tmp_path / "export")
    assert kept.temperature == 0.6 and kept.eos_token_id == [1, 5] and not kept.do_sample


def test_lora_is_refused_where_it_would_leave_weights_out(world, tmp_path):
    pytest.importorskip("peft")
    for kind in ("mixtral", "gpt2", "deepseek_v2"):
        folder = make(kind, tmp_path / kind)
        with pytest.raises(InputError, match="LoRA adapts linear layers, and .* has other weight matrices"):
            load_policy(str(folder), world, lora=2)


def test_attention_that_is_written_out_is_the_same_in_pieces_of_any_size(world, tmp_path, monkeypatch):
    policy = load_policy(str(make("gpt_oss", tmp_path / "model")), world)
    whole = policy(pack(SEQUENCES))
    gradient = gradients(policy.lm, whole)
    monkeypatch.setattr("common.data.QUERIES", 5)
    pieces = policy(pack(SEQUENCES))
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
    for name, found in gradients(policy.lm, pieces).items():
        torch.testing.assert_close(found, gradient[name], rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    head = PAGE.read_text().split(MARK)[0]
    PAGE.write_text(f"{head}{MARK}{table()}\n")
