"""Hugging Face models, built from small random configs: grow, generate, bake, save.

Nothing is downloaded.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from growth_cycle import attach, committed, grow, outputs_of

transformers = pytest.importorskip("transformers", reason="needs esper-lite[hf]")

VOCABULARY, WIDTH, TOKENS = 60, 32, 10


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=WIDTH,
            n_layer=3,
            n_head=4,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
            loss_type="ForCausalLM",
        )
    )


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
            num_labels=5,
        )
    )


Host = tuple[Callable[[], nn.Module], str, str]
DECODERS: dict[str, Host] = {
    "gpt2": (gpt2, "transformer.h.*", "transformer.h.1"),
    "llama": (llama, "model.layers.[0-2]", "model.layers.2"),
}
HOSTS: dict[str, Host] = {
    **DECODERS,
    "bert": (bert, "bert.encoder.layer.[01]", "bert.encoder.layer.2"),
}
every_host = pytest.mark.parametrize("name", HOSTS)
every_decoder = pytest.mark.parametrize("name", DECODERS)


@pytest.fixture(autouse=True)
def _fixed_random_stream() -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


def padded_batch() -> dict[str, Tensor]:
    """Return a batch whose second row begins with padding, so that masks matter."""
    mask = torch.ones(4, TOKENS, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": torch.randint(1, VOCABULARY, (4, TOKENS)), "attention_mask": mask}


def wanted(name: str, batch: dict[str, Tensor]) -> Tensor:
    return torch.tensor([0, 1, 2, 3]) if name == "bert" else batch["input_ids"].roll(-1, 1)


@every_host
@pytest.mark.parametrize("blueprint", ["lora", "block", "copy"])
def test_a_model_grows_bakes_and_comes_back_from_disk(name: str, blueprint: str, tmp_path: Path):
    make, pattern, source = HOSTS[name]
    options = {"source": source} if blueprint == "copy" else {}
    kind = "block" if blueprint == "copy" else blueprint
    model, batch = make(), padded_batch()
    before = outputs_of(model, batch)
    keys = set(model.state_dict())
    slots = attach(model, pattern, batch)
    assert len(slots) == 2 + (name != "bert")
    assert torch.equal(outputs_of(model, batch), before)
    for slot in slots.values():
        slot.germinate(kind, **options)
        slot.advance(force=True)
        slot.advance(force=True)
        slot.set_alpha_target(1.0, 0)
    assert torch.equal(outputs_of(model, batch), before)
    for slot in slots.values():
        slot.prune()
        while slot.stage is not esper.SeedStage.DORMANT:
            slot.advance(force=True)

    losses = grow(slots, batch, wanted(name, batch), kind, **options)
    assert losses[-1] < losses[0]
    assert committed(slots) == {path: [kind] for path in slots}
    grown = outputs_of(model, batch)

    plain = esper.bake(model)
    assert torch.equal(outputs_of(plain, batch), grown)
    assert not any("esper_slot" in key for key in plain.state_dict())
    assert len(plain.state_dict()) > len(keys)

    esper.save_pretrained(slots, tmp_path / "grown")
    fresh = make()
    again = esper.from_pretrained(fresh, tmp_path / "grown", example=batch)
    assert committed(again) == committed(slots)
    assert torch.equal(outputs_of(fresh, batch), grown)
    assert torch.equal(outputs_of(esper.bake(fresh), batch), grown)


@every_decoder
def test_padding_reaches_a_copied_block(name: str):
    """The copy gets the masks and positions of the call: what is masked out cannot matter."""
    make, pattern, source = DECODERS[name]
    model, batch = make().eval(), padded_batch()
    slots = attach(model, pattern, batch)
    for slot in slots.values():
        slot.germinate("block", source=source)
        slot.advance(force=True)
        slot.advance(force=True)
        slot.set_alpha_target(1.0, 0)
        torch.nn.init.ones_(slot.seed.output_layers[0].weight)
    first = outputs_of(model, batch)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][1, :3] = 7
    assert torch.equal(outputs_of(model, other)[1, 3:], first[1, 3:])
    assert not torch.equal(outputs_of(model, {**batch, "attention_mask": None})[1], first[1])


@every_decoder
@pytest.mark.parametrize("blueprint", ["lora", "block"])
def test_generation_with_slots_and_after_baking(name: str, blueprint: str):
    make, pattern, _ = DECODERS[name]
    model, batch = make(), padded_batch()
    slots = attach(model, pattern, batch)
    grow(slots, batch, wanted(name, batch), blueprint)
    model.eval()
    plain = esper.bake(model)
    prompt = {key: value[:2, :6] for key, value in batch.items()}

    def generate(which: nn.Module, **settings: Any) -> Tensor:
        return which.generate(**prompt, max_new_tokens=6, do_sample=False, **settings)

    exact = generate(model, use_cache=False)
    assert exact.shape == (2, 12)
    assert torch.equal(generate(plain, use_cache=False), exact)
    for which, cache in itertools.product((model, plain), ({}, {"cache_implementation": "static"})):
        if blueprint == "lora":
            assert torch.equal(generate(which, **cache), exact)
        else:
            # What attends has no key-value cache of its own, and must not guess.
            with pytest.raises(RuntimeError, match="use_cache=False"):
                generate(which, **cache)


def test_a_living_seed_out_of_the_forward_path_does_not_disturb_generation():
    model, batch = gpt2().eval(), padded_batch()
    prompt = {key: value[:2, :6] for key, value in batch.items()}
    expected = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    slots = attach(model, "transformer.h.*", batch)
    for slot in slots.values():
        slot.germinate("block")
        slot.advance(force=True)
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), expected)


def test_lora_behind_a_conv1d_is_folded_into_its_weight():
    model, batch = gpt2(), padded_batch()
    slots = attach(model, "transformer.h.*.mlp.c_proj", batch)
    grow(slots, batch, wanted("gpt2", batch), "lora")
    for slot in slots.values():
        torch.nn.init.normal_(slot.branches[0].seed.up.weight, std=0.1)
    folded = esper.bake(model, fold=True)
    assert set(folded.state_dict()) == set(gpt2().state_dict())
    torch.testing.assert_close(
        outputs_of(folded, batch), outputs_of(model, batch), rtol=1e-4, atol=1e-5
    )


@every_host
def test_a_baked_model_is_exported(name: str):
    make, pattern, _ = HOSTS[name]
    model, batch = make(), padded_batch()
    if name != "bert":
        model.config.use_cache = False
    slots = attach(model, pattern, batch)
    grow(slots, batch, wanted(name, batch), "block")
    plain = esper.bake(model).eval()
    program = torch.export.export(plain, (), batch, strict=False)
    logits = program.module()(**batch).logits
    torch.testing.assert_close(logits, outputs_of(model, batch))


@pytest.mark.parametrize(
    ("make", "inner", "pattern", "paths"),
    [
        (gpt2, "transformer", "h.*", ["h.0", "h.1", "h.2"]),
        (llama, "model", "layers.[0-3]", [f"layers.{index}" for index in range(4)]),
    ],
)
def test_patterns_on_a_model_without_its_head(
    make: Callable[[], nn.Module], inner: str, pattern: str, paths: list[str]
):
    model, batch = make().get_submodule(inner).eval(), padded_batch()
    with torch.no_grad():
        before = model(**batch).last_hidden_state
    slots = attach(model, pattern, batch)
    assert list(slots) == paths
    for path, slot in slots.items():
        slot.germinate("block", source=path)
        while slot.stage is not esper.SeedStage.PROBATIONARY:
            slot.advance(force=True)
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, before)


@every_decoder
def test_a_gated_seed_sees_no_later_token_and_generates_from_the_cache(name: str):
    make, pattern, _ = DECODERS[name]
    model, batch = make().eval(), padded_batch()
    slots = attach(model, pattern, batch)
    for slot in slots.values():
        slot.germinate("lora", blend_operator="gate")
        while slot.stage is not esper.SeedStage.FOSSILIZED:
            slot.advance(force=True)
        for parameter in slot.branches.parameters():
            torch.nn.init.normal_(parameter)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -1] = 3
    assert torch.equal(outputs_of(model, batch)[:, :-1], outputs_of(model, other)[:, :-1])
    prompt = {key: value[:2, :6] for key, value in batch.items()}
    cached, exact = (
        model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, exact)


@every_decoder
def test_a_copy_follows_when_the_model_changes_its_attention(name: str):
    make, pattern, source = DECODERS[name]
    model, batch = make().eval(), padded_batch()
    model.set_attn_implementation("eager")
    slots = attach(model, pattern, batch)
    for slot in slots.values():
        slot.germinate("block", source=source)
        while slot.stage is not esper.SeedStage.FOSSILIZED:
            slot.advance(force=True)
        torch.nn.init.ones_(slot.branches[0].seed.output_layers[0].weight)
    plain = esper.bake(model)
    seen = batch["attention_mask"].bool()  # what is computed for padding is anyone's affair
    before = outputs_of(model, batch)[seen]
    for which in (model, plain):
        which.set_attn_implementation("sdpa")
        torch.testing.assert_close(outputs_of(which, batch)[seen], before, rtol=1e-4, atol=1e-5)


def test_a_copy_of_attention_that_is_called_by_name():
    model, batch = llama().eval(), padded_batch()
    before = outputs_of(model, batch)
    slots = attach(model, "model.layers.1.self_attn", batch)
    slots["model.layers.1.self_attn"].germinate("block", source="model.layers.2.self_attn")
    while slots["model.layers.1.self_attn"].stage is not esper.SeedStage.PROBATIONARY:
        slots["model.layers.1.self_attn"].advance(force=True)
    assert torch.equal(outputs_of(model, batch), before)


@pytest.mark.parametrize("target", ["model.layers.1", "model.layers.1.mlp"])
@pytest.mark.parametrize("blueprint", ["mlp", "attention"])
def test_a_model_that_recomputes_its_activations_keeps_its_seeds(target: str, blueprint: str):
    model, batch = llama(), padded_batch()
    model.activation_checkpointing_enable()
    slot = attach(model, target, batch)[target]
    slot.germinate(blueprint)
    while slot.stage is not esper.SeedStage.PROBATIONARY:
        slot.advance(force=True)
        model.train()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        assert slot.tick() == []
    assert slot.seed is not None


@every_host
def test_a_copy_germinates_in_a_model_that_became_half_precision(name: str):
    make, pattern, source = HOSTS[name]
    model, batch = make().eval(), padded_batch()
    slots = attach(model, pattern, batch)
    model.to(torch.bfloat16)
    before = outputs_of(model, batch)
    for slot in slots.values():
        slot.germinate("block", source=source)
        while slot.stage is not esper.SeedStage.PROBATIONARY:
            slot.advance(force=True)
    assert torch.equal(outputs_of(model, batch), before)
