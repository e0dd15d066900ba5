"""The image encoder against its equations in plain NumPy: patches, resampled positions, merge order, folded stems."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoglm.train.model.presets import ENCODERS, NANO_VISION, VisionConfig
from autoglm.train.model.stem import StemLayer, VisionStem
from autoglm.train.model.vision import VisionEncoder, VisionProjector
from tests.train.phones import make_phone
from tests.train.random_weights import randomize

Array = NDArray[Any]
CONFIG = VisionConfig(hidden_size=24, num_layers=2, num_heads=3, mlp_size=40, position_grid=(5, 4), max_pixels=1 << 20)


def make_encoder(config: VisionConfig = CONFIG) -> VisionEncoder:
    encoder = randomize(VisionEncoder(config))
    assert isinstance(encoder, VisionEncoder)
    return encoder


def cubic(x: float) -> float:
    """The cubic convolution kernel of Keys 1981 with a = -0.75."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resampling(old: int, new: int) -> Array:
    """[new, old] weights: source (i + 0.5) * old / new - 0.5, four taps, each kept inside the grid on its own."""
    weights = np.zeros((new, old))
    for i in range(new):
        source = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            weights[i, min(max(tap, 0), old - 1)] += cubic(source - tap)
    return weights


@pytest.mark.parametrize("grid", [(5, 4), (10, 8), (3, 7), (2, 2), (30, 14), (1, 9)])
def test_positions_resampled_to_other_grids(grid: tuple[int, int]) -> None:
    encoder = make_encoder()
    learned = encoder.position_embedding.detach().double().numpy().reshape(5, 4, -1)
    wanted = np.einsum("yi,xj,ijd->yxd", resampling(5, grid[0]), resampling(4, grid[1]), learned)
    found = encoder.positions(*grid).detach().numpy()
    np.testing.assert_allclose(found, wanted.reshape(grid[0] * grid[1], -1), atol=2e-6)


def layer_norm(x: Array, module: Any) -> Array:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + module.eps) * numbers(module.weight) + numbers(module.bias)


def numbers(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def linear(x: Array, module: Any) -> Array:
    return x @ numbers(module.weight).T + numbers(module.bias)


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def encoded_by_hand(encoder: VisionEncoder, image: Array) -> Array:
    """Equations 1 to 4 of Dosovitskiy et al., one patch and one head at a time."""
    config, size = encoder.config, encoder.config.patch_size
    rows, columns = image.shape[1] // size, image.shape[2] // size
    patches = [
        image[:, y * size : (y + 1) * size, x * size : (x + 1) * size].reshape(-1)
        for y in range(rows)
        for x in range(columns)
    ]
    z = linear(np.stack(patches), encoder.patch_embed) + numbers(encoder.positions(rows, columns))
    head_dim = config.hidden_size // config.num_heads
    for block in encoder.blocks:
        q, k, v = np.split(linear(layer_norm(z, block.norm1), block.attn_qkv), 3, axis=1)
        heads = []
        for head in range(config.num_heads):
            at = slice(head * head_dim, (head + 1) * head_dim)
            scores = np.exp(q[:, at] @ k[:, at].T / math.sqrt(head_dim))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, at])
        z = z + linear(np.concatenate(heads, axis=1), block.attn_out)
        z = z + linear(gelu(linear(layer_norm(z, block.norm2), block.mlp_up)), block.mlp_down)
    return layer_norm(z, encoder.post_norm)


def test_encoder_equals_its_equations() -> None:
    encoder = make_encoder()
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        found = encoder(images).numpy()
    for index in range(2):
        wanted = encoded_by_hand(encoder, images[index].double().numpy())
        np.testing.assert_allclose(found[index], wanted, atol=2e-5)


def test_merge_takes_each_square_in_reading_order() -> None:
    rows, columns = 4, 6
    projector = randomize(VisionProjector(CONFIG, 16, 10))
    features = torch.randn(2, rows * columns, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = projector(features, rows, columns).numpy()
    grid = features.double().numpy().reshape(2, rows, columns, 24)
    for y in range(rows // 2):
        for x in range(columns // 2):
            square = [grid[:, 2 * y + dy, 2 * x + dx] for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1))]
            merged = layer_norm(np.concatenate(square, axis=-1), projector.norm)
            wanted = linear(gelu(linear(merged, projector.fc1)), projector.fc2)
            np.testing.assert_allclose(found[:, y * (columns // 2) + x], wanted, atol=1e-5)


def test_a_phone_merges_a_wide_picture_by_its_own_rows() -> None:
    model, images = make_phone(), torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        patches, tokens = model.see(images)
        torch.testing.assert_close(patches, model.vision(images))
        torch.testing.assert_close(tokens, model.vision_projector(patches, 4, 6))
        assert not torch.allclose(tokens, model.vision_projector(patches, 6, 4))


# --- the convolutional stem ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
def test_a_folded_stem_layer_is_the_same_function(residual: bool, dimensions: int) -> None:
    """In float64, so that nothing but rounding is forgiven."""
    kernel = 3 if dimensions == 2 else 5
    layer = StemLayer(6, 6, dimensions=dimensions, kernel=kernel, residual=residual, norm=True)
    layer = randomize(layer).double()  # type: ignore[assignment]
    x = torch.randn(2, 6, *[8] * dimensions, generator=torch.Generator().manual_seed(4)).double()
    with torch.no_grad():
        before = layer(x)
        layer.fold_norm()
        after = layer(x)
    assert {name for name, _ in layer.named_parameters()} == {"conv.weight", "conv.bias"}
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert float(before.max()) > 0.1


def test_stem_gives_one_vector_a_patch_in_place() -> None:
    """A patch's vector reads its own pixels and those around it, nothing far away; rows and columns are not swapped."""
    config = replace(CONFIG, stem_channels=(4, 6, 8))
    encoder = make_encoder(config)
    assert isinstance(encoder.stem, VisionStem)
    image = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(5))
    touched = image.clone()
    touched[:, :, 40, 88] += 0.5  # in patch row 2, column 5
    with torch.no_grad():
        one, two = encoder.embed_patches(image), encoder.embed_patches(touched)
    assert one.shape == (1, 6 * 10, 24)
    changed = {divmod(int(i), 10) for i in torch.nonzero((one != two).any(-1)[0])[:, 0]}
    assert (2, 5) in changed
    assert all(abs(row - 2) <= 3 and abs(column - 5) <= 3 for row, column in changed)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    encoder = make_encoder(replace(CONFIG, stem_channels=(4, 6, 8)))
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        together, alone = encoder(images)[1], encoder(images[1:2])[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# --- sizes ---------------------------------------------------------------------------------------------------


def encoder_parameters(config: VisionConfig) -> int:
    """Counted by hand, for an encoder with a linear patch embedding."""
    width, mlp = config.hidden_size, config.mlp_size
    embedding = 3 * config.patch_size**2 * width + width + math.prod(config.position_grid) * width
    attention = width * 3 * width + 3 * width + width * width + width
    block = 2 * (2 * width) + attention + width * mlp + mlp + mlp * width + width
    return embedding + config.num_layers * block + 2 * width


def count(config: VisionConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VisionEncoder(config).parameters())


def test_vit_b16_has_the_published_size() -> None:
    """The 85.8 million of ViT-B/16 at 224 pixels, less the class token, its position and the classifier."""
    config = ENCODERS["vit-b16"]
    assert isinstance(config, VisionConfig)
    published_without_head, class_token_and_position = 85_798_656, 2 * 768
    assert count(config) == encoder_parameters(config) == published_without_head - class_token_and_position
    assert count(config) == 85_797_120
    assert (config.hidden_size, config.num_layers, config.num_heads, config.patch_size) == (768, 12, 12, 16)


def test_nano_eyes_look_at_a_screen_in_105_tokens() -> None:
    assert ENCODERS["vit-nano"] is NANO_VISION
    rows, columns = NANO_VISION.position_grid
    assert rows * columns // NANO_VISION.merge_size**2 == 105
    assert rows * columns * NANO_VISION.patch_size**2 == NANO_VISION.max_pixels
