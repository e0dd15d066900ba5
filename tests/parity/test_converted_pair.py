"""A tiny random GLM-4.1V of transformers, through our converter, loaded as a pair: features, then a whole conversation.

Two pictures of different aspect with a text turn between, 64 greedy tokens: the same as transformers writes in float32.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Glm4vForConditionalGeneration

from autoglm.cli.loading import LoadedModel, ModelOptions, load_model
from autoglm.engine.sampling import SamplingParams
from autoglm.engine.sequence import Sequence
from autoglm.media.glm4v_pixels import patch_grid, pixel_values
from autoglm.media.limits import MediaLimits
from autoglm.media.pictures import Picture, decode_picture
from autoglm.model.encoder import finish
from autoglm.pack.convert import Converted
from autoglm.pack.type_plan import FileType
from tests.pack.test_convert import checkpoint, converted, oracle  # noqa: F401 - fixtures

SIZES = ((140, 112), (84, 196))


def picture(width: int, height: int) -> Picture:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return decode_picture(file.getvalue(), limits=MediaLimits(), param="image")


@pytest.fixture(scope="module", params=[FileType.F32, FileType.F16], ids=["f32", "f16"])
def loaded(request: pytest.FixtureRequest, converted: Callable[[FileType], list[Converted]]) -> LoadedModel:  # noqa: F811
    text, mmproj = (made.path for made in converted(request.param))
    options = ModelOptions(mmproj=Path(mmproj), threads=1, ctx_size=512, cache_type_k="f32", cache_type_v="f32")
    return load_model(Path(text), options, lambda what, done, total: None)


def hf_pixels(one: Picture) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' pixel_values (each frame twice) and grid, from our patches, which equal its processor's."""
    grid = patch_grid(one.width, one.height)
    frames = pixel_values(one.rgb, grid).reshape(-1, 3, 1, 196).repeat(2, axis=2)
    return torch.from_numpy(frames.reshape(len(frames), -1)), torch.tensor([grid.image_grid_thw])


@pytest.mark.parametrize("size", SIZES)
def test_features(loaded: LoadedModel, oracle: Glm4vForConditionalGeneration, size: tuple[int, int]) -> None:  # noqa: F811
    assert loaded.multimodal is not None
    one = picture(*size)
    pixels, grid = hf_pixels(one)
    with torch.no_grad():
        (wanted,) = oracle.model.get_image_features(pixels, grid).pooler_output
    _, media = loaded.multimodal.plan([loaded.multimodal.tokens.image or 0], [one], [])
    ours = finish(media.jobs[0].encode(1.0)).embeddings
    assert np.abs(ours - wanted.numpy()).max() < 2e-3 * wanted.abs().max()


def test_a_conversation_with_two_pictures(loaded: LoadedModel, oracle: Glm4vForConditionalGeneration) -> None:  # noqa: F811
    assert loaded.multimodal is not None
    pictures = [picture(*size) for size in SIZES]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the first"}]},
        {"role": "assistant", "content": "a text turn"},
        {"role": "user", "content": "and then"},
        {"role": "assistant", "content": "more"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the second"}]},
    ]
    ids, media = loaded.multimodal.plan(loaded.template.render_tokens(loaded.tokenizer, messages), pictures, [])
    loaded.engine.add(
        Sequence("one", ids, SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True), media=media)
    )
    ours: list[int] = []
    while loaded.engine.has_work():
        for output in loaded.engine.step():
            ours += output.token_ids

    pixels, grids = zip(*(hf_pixels(one) for one in pictures), strict=True)
    tokens = torch.tensor([ids])
    is_image = (tokens == loaded.multimodal.tokens.image).int()
    with torch.no_grad():
        written = oracle.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=torch.cat(pixels),
            image_grid_thw=torch.cat(grids),
            mm_token_type_ids=is_image,
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
        )
    assert ours == written[0, len(ids) :].tolist()
