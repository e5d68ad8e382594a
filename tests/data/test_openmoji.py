import numpy as np
import pytest
import torch

from ldm.data import openmoji
from ldm.data.builtin import OpenMoji
from ldm.util import UserError


@pytest.fixture(autouse=True, scope="module")
def drawn_once(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_DATA", str(tmp_path_factory.mktemp("data")))
        yield


def test_every_emoji_without_skin_tone_has_a_drawing_and_a_caption_of_its_own():
    from emoji import EMOJI_DATA

    listed = [e for group in openmoji.catalogue()["groups"].values() for e in group]
    assert len(listed) == len(set(listed)) > 1900
    tones = set("🏻🏼🏽🏾🏿")
    known = {e for e, about in EMOJI_DATA.items() if about["status"] == 2 and not tones & set(e)}
    assert set(listed) <= known and len(known - set(listed)) < 15
    names = openmoji.captions()
    all_names = [c for e in listed for c in names[e]]
    assert len(all_names) == len(set(all_names)) > 2800 and all(names[e] for e in listed)


def test_captions_are_words_and_a_name_goes_before_an_alias():
    names = openmoji.captions()
    assert names["🍎"] == ["red apple", "apple"]
    assert names["🇨🇮"][0] == "côte divoire"
    assert names["🦃"] == ["turkey"] and "turkey" not in names["🇹🇷"]  # both are called so
    assert "japan" in names["🇯🇵"] and "japan" not in names["🗾"]  # an alias of the map of Japan


def test_format_and_groups():
    data = OpenMoji(groups=["animals", "food"], size=32)
    assert data.class_names == ["animals", "food"] and len(data) == 291
    batch = data.get_batch(range(0, 291, 10))
    assert batch["image"].shape == (30, 32, 32, 3) and batch["image"].dtype == torch.float32
    assert batch["image"].min() >= -1 and batch["image"].max() == 1
    assert (batch["image"][:, 0, 0] == 1).all()  # white background
    assert batch["class_label"].tolist() == [0] * 16 + [1] * 14
    assert OpenMoji(groups="faces", size=[32, 48], channels=1)[0]["image"].shape == (32, 48, 1)


def test_a_drawing_shows_all_its_captions_in_training_and_its_name_otherwise():
    data = OpenMoji(groups="food")
    apple = data.emoji.index("🍎")
    seen = {data.get_batch([apple], stream=s)["caption"][0] for s in range(40)}
    assert seen == {"red apple", "apple"}
    assert OpenMoji("all", groups="food").get_batch([apple], stream=3)["caption"] == ["red apple"]
    assert {"red", "apple", "banana"} <= set(data.words) and data.words == sorted(set(data.words))


def test_kept_drawings_are_the_drawings(monkeypatch):
    pixels = (24, 24)
    first = openmoji.drawings(pixels)
    monkeypatch.setattr(openmoji, "draw", None)  # would raise if it drew again
    again = openmoji.drawings(pixels)
    assert all(np.array_equal(first[e], again[e]) for e in first)
    file = next((openmoji.data_dir() / "openmoji").glob("*-24x24-*.npy"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(TypeError):  # a broken file is drawn anew
        openmoji.drawings(pixels)


def test_recoloured_objects_have_the_colour_that_their_caption_says():
    data = OpenMoji("all", groups="food", colors=True)
    plain = OpenMoji("all", groups="food")
    assert len(data) > len(plain) + 100
    for i in range(len(plain), len(data)):
        hue = openmoji.main_hue(data.images[i].numpy())[0]
        color = data.captions[i][0].split()[0]
        assert openmoji.apart(hue, openmoji.COLORS[color]) < 5, data.captions[i]
    # black outlines and white background stay
    i = data.captions.index(["blue apple"])
    original, blue = plain.images[plain.emoji.index("🍎")].numpy(), data.images[i].numpy()
    for tone in (0, 255):
        kept = (original == tone).all(-1)
        assert kept.mean() > 0.03 and (blue[kept] == tone).all()


def test_a_tenth_of_the_pairs_is_never_trained_on():
    train, held_out = OpenMoji(colors=True), OpenMoji("validation", colors=True)
    pairs, plain = len(OpenMoji("all", colors=True)) - len(OpenMoji()), len(OpenMoji())
    assert len(held_out) == round(pairs / 10) == len(openmoji.catalogue()["held_out"])
    assert len(train) == plain + pairs - len(held_out)
    asked = {c[0] for c in held_out.captions}
    assert asked == set(openmoji.catalogue()["held_out"])
    assert not asked & {c for names in train.captions for c in names}
    assert {w for c in asked for w in c.split()} <= set(train.words)


def test_every_drawing_can_be_a_class_of_its_own():
    train, held_out = (
        OpenMoji(s, groups="food", colors=True, classes="drawing", size=32) for s in ("train", "validation")
    )
    plain = OpenMoji(groups="food", size=32)
    assert train.class_names == held_out.class_names == [c[0] for c in plain.captions]
    assert train.class_names[train.labels[train.captions.index(["banana"])]] == "banana"
    assert [c[0].partition(" ")[2] for c in held_out.captions] == [held_out.class_names[i] for i in held_out.labels]
    assert len(set(train.class_names)) == len(plain) == len(set(train.labels.tolist()))


def test_wrong_names_are_told():
    with pytest.raises(UserError, match=r"groups: got 'animal' \(did you mean animals\?\)"):
        OpenMoji(groups="animal")
    with pytest.raises(
        UserError, match=r"classes must be one of group, drawing, got 'drawings' \(did you mean drawing"
    ):
        OpenMoji(classes="drawings")
    with pytest.raises(UserError, match="set colors: true"):
        OpenMoji("validation")
    with pytest.raises(UserError, match="split must be one of train, validation, all, got 'test'"):
        OpenMoji("test")
