from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
import torch
from fontTools.ttLib import TTFont  # matplotlib depends on it

from fusion.data import glyphs, label_space
from fusion.data.glyphs import SCRIPTS, _drawn
from fusion.errors import UserError


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_face_of_a_script_has_all_its_characters(script: str) -> None:
    characters, faces = SCRIPTS[script]
    assert len(set(characters)) >= 10
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for face in faces:
        known = TTFont(folder / f"{face}.ttf", lazy=True).getBestCmap()
        assert {character for character in characters if ord(character) not in known} == set()


def test_no_character_belongs_to_two_scripts() -> None:
    together = "".join(characters for characters, _ in SCRIPTS.values())
    assert len(set(together)) == len(together)
    spaces = [label_space(glyphs(script, "test", per_class=1)) for script in SCRIPTS]
    labels = [label for space in spaces for label in space.labels]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_characters_can_be_told_apart(script: str) -> None:
    train, test = glyphs(script, per_class=60), glyphs(script, "test")
    pixels = train.images.float().flatten(1)
    assert pixels.std(1).min() > 10  # of 255: no blank image
    means = torch.stack([pixels[train.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(test.images.float().flatten(1), means).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.2  # chance is 0.1; without any alignment


def test_the_same_call_gives_the_same_images_whatever_was_drawn_before() -> None:
    first = glyphs("greek", per_class=3, seed=5).images
    kept = glyphs("greek", per_class=3, seed=5).images
    kept.zero_()  # whoever changes the images changes no others
    _drawn.cache_clear()
    glyphs("hebrew", "val", per_class=2)
    assert torch.equal(glyphs("greek", per_class=3, seed=5).images, first)


def test_more_images_of_a_class_extend_fewer() -> None:
    few, more = glyphs("arabic", per_class=2), glyphs("arabic", per_class=5)
    assert torch.equal(few.images, more.images.view(10, 5, 1, 28, 28)[:, :2].flatten(0, 1))


def test_seeds_and_splits_share_no_image() -> None:
    sets = [
        glyphs("digits", split, seed=seed, per_class=20)
        for split in ("train", "val", "test")
        for seed in (0, 1)
    ]
    images = torch.cat([each.images.flatten(1) for each in sets])
    assert len(torch.unique(images, dim=0)) == len(images)


def test_default_sizes() -> None:
    assert len(glyphs("arrows")) == 5000
    assert len(glyphs("arrows", "val")) == 500
    assert len(glyphs("arrows", "test")) == 250


def test_a_misspelt_script_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'hebrew'"):
        glyphs("hebrev")  # type: ignore[arg-type]
