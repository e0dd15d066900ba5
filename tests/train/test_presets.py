"""Presets have the sizes they are named for, travel through JSON, and wrong ones are one clear error."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from autoglm.cli import train as command
from autoglm.errors import ConfigError
from autoglm.train.model import PRESETS, AutoGLMPhone, PhoneConfig, preset
from autoglm.train.model.vision import VisionProjector
from autoglm.train.sizes import parameter_counts
from autoglm.train.stages import chosen_layers, concatenating, pick_layers, widen_projector

PUBLISHED_TEXT_PARAMETERS = 9_400_279_040


def test_phone_9b_has_the_published_decoder() -> None:
    with torch.device("meta"):
        model = AutoGLMPhone(preset("phone-9b"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.text.parameters()) == PUBLISHED_TEXT_PARAMETERS
    assert model.num_parameters() == parameter_counts(preset("phone-9b"))["all"]


def test_the_list_prints_exact_sizes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    command.list_presets()
    out = capsys.readouterr().out
    for name in PRESETS:
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert f"{parameter_counts(preset(name))['all']:,}" in line


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    for config in (preset(name), preset(name).with_text(pruned_ffn=(1,), attention_mode="turn")):
        again = PhoneConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config and hash(again) == hash(config)
    assert preset(name).name == name
    deaf = replace(preset(name), audio=None)
    assert PhoneConfig.from_dict(json.loads(json.dumps(deaf.to_dict()))) == deaf


def test_a_model_without_ears_has_none() -> None:
    with torch.device("meta"):
        names = [name for name, _ in AutoGLMPhone(replace(preset("smoke"), audio=None)).named_parameters()]
    assert names and not any(name.startswith("audio") for name in names)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="there is no preset 'nano2'; the presets are nano, nano-teacher, smoke"):
        preset("nano2")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text", {"rope_sections": (4, 6, 7)}, "must sum to half of rope_dim 32"),
        ("text", {"num_kv_heads": 3}, "4 heads cannot share 3 key-value heads"),
        ("text", {"attention_mode": "both"}, "attention mode 'both' is not one of causal, media, turn"),
        ("vision", {"num_heads": 5}, "5 vision heads do not divide a width of 64"),
        ("audio", {"num_heads": 3}, "3 audio heads do not divide a width of 64"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(part: str, change: dict[str, Any], message: str) -> None:
    config = preset("smoke")
    with pytest.raises(ConfigError, match=f"smoke: .*{message}"):
        replace(config, **{part: replace(getattr(config, part), **change)})
    values = json.loads(json.dumps(config.to_dict()))
    values[part].update(change)
    with pytest.raises(ConfigError, match=message):
        PhoneConfig.from_dict(values)


def test_a_config_of_another_version_is_refused() -> None:
    whole = preset("smoke").to_dict()
    for part in ("vision", "audio", "fusion", "text"):
        lacking = {name: value for name, value in whole.items() if name != part}
        with pytest.raises(ConfigError, match="was it written by another version"):
            PhoneConfig.from_dict(lacking)
        with pytest.raises(ConfigError, match="surprise"):
            PhoneConfig.from_dict({**whole, part: {**whole[part], "surprise": 1}})
    text = {name: value for name, value in whole["text"].items() if name != "hidden_size"}
    with pytest.raises(ConfigError, match="hidden_size"):
        PhoneConfig.from_dict({**whole, "text": text})


def test_norms_folded_away_are_said_so() -> None:
    config = preset("nano").without_stem_norms()
    assert not config.vision.stem_norms and config.audio is not None and not config.audio.stem_norms
    assert config.without_stem_norms() == config
    assert preset("phone-9b").without_stem_norms() == preset("phone-9b"), "no stem, nothing to fold"


# --- what the stages make of a config --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nano", "smoke"])
def test_concatenation_weighs_what_fusion_weighs(name: str) -> None:
    config = preset(name)
    plain = concatenating(config)
    with_fusion, without = parameter_counts(config), parameter_counts(plain)
    assert without["fusion"] == 0 < with_fusion["fusion"]
    assert without["all"] == pytest.approx(with_fusion["all"], rel=0.01)


def test_layers_are_chosen_evenly_with_both_ends() -> None:
    assert chosen_layers(5, 4) in ([0, 1, 3, 4], [0, 1, 2, 4])
    assert chosen_layers(6, 4) == [0, 2, 3, 5] and chosen_layers(4, 4) == [0, 1, 2, 3] and chosen_layers(5, 1) == [4]
    for have in range(2, 9):
        for want in range(2, have + 1):
            layers = chosen_layers(have, want)
            assert layers == sorted(set(layers)) and layers[0] == 0 and layers[-1] == have - 1


def test_picked_layers_are_the_deeper_models_own() -> None:
    torch.manual_seed(0)
    deep, shallow = AutoGLMPhone(preset("smoke-teacher")), AutoGLMPhone(preset("smoke"))
    pick_layers(shallow, "text", deep.text.state_dict(), 2)
    for place, layer in enumerate((0, 2)):
        wanted = deep.text.layers[layer].state_dict()
        assert all(torch.equal(wanted[k], value) for k, value in shallow.text.layers[place].state_dict().items())
    assert torch.equal(shallow.text.embed_tokens.weight, deep.text.embed_tokens.weight)


def test_a_widened_projector_is_the_same_function_and_can_learn_more() -> None:
    vision, features = preset("smoke").vision, torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1))
    narrow, wide = VisionProjector(vision, 16, 10), VisionProjector(vision, 40, 10)
    widen_projector(wide, narrow.state_dict())
    torch.testing.assert_close(wide(features, 4, 6), narrow(features, 4, 6))
    wide(features, 4, 6).pow(2).sum().backward()
    assert wide.fc2.weight.grad is not None and bool(wide.fc2.weight.grad[:, 16:].any())
