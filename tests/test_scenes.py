"""The world of the nano model: images against truth maps, truth maps against geometry, captions against both."""
import itertools
import math
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import scenes

WORDS = set(re.findall(r"\w+", """a above an and angle another ball behind between big blue box coming cone cube cyan
    cylinder floor from front green ground high image in is large left light lit little low medium object objects of on
    orange photo picture purple red rendering right scene seen shapes small solids sphere standing the there three to
    two white with yellow"""))
PLAIN = {new: old for old, new in scenes.SYNONYMS.items()}


@pytest.fixture(scope="module")
def drawn():
    """Scenes with their renders."""
    return [(scene, scenes.render(scene)) for scene in map(scenes.sample, range(40))]


@pytest.fixture(scope="module")
def alone():
    """Scenes of one solid with their renders."""
    return [(s, scenes.render(s, 96)) for s in (scenes.sample(seed, objects=1) for seed in range(80))]


def points(scene, depth):
    """World points [H, W, 3] seen at the pixel centres, from the depth map and the camera alone."""
    size, camera = len(depth), scene.camera
    across, down = np.meshgrid(*[(np.arange(size) + 0.5) / size - 0.5] * 2)
    s, c = math.sin(camera.elevation), math.cos(camera.elevation)
    axes = np.array([[1, 0, 0], [0, s, c], [0, c, -s]])
    rays = np.stack([across / camera.focal, -down / camera.focal, np.ones_like(across)], -1) @ axes
    return np.array(camera.target) - camera.distance * axes[2] + depth[..., None] * rays


def outside(solid, p):
    """A function of points [..., 3] that is 0 on the solid's surface, negative inside of it and positive outside."""
    x, y, z = np.moveaxis(p - solid.position, -1, 0)
    r, h = solid.half_width, solid.height
    if solid.shape == "sphere":
        return np.sqrt(x**2 + y**2 + (z - r) ** 2) - r
    if solid.shape == "cube":
        c, s = math.cos(solid.yaw), math.sin(solid.yaw)
        return np.max([abs(c * x + s * y) - r, abs(c * y - s * x) - r, abs(z - h / 2) - h / 2], 0)
    radius = r if solid.shape == "cylinder" else r * (1 - z / h)
    return np.max([np.hypot(x, y) - radius, z - h, -z], 0)


def named(scene, noun):
    """Indices of the solids that a noun fits."""
    words = [PLAIN.get(word, word) for word in noun.split()[1:] if word != "object"]
    return [i for i, s in enumerate(scene.solids) if set(words) <= {s.shape, s.color, s.size}]


def test_a_seed_is_a_scene_an_image_and_a_caption(drawn):
    for seed in (31, 2, 17):
        scene, image = drawn[seed]
        assert scenes.sample(seed) == scene
        assert all((a == b).all() for a, b in zip(scenes.render(scene), image))
    assert len({image.image.tobytes() for _, image in drawn}) == len({scene[1:] for scene, _ in drawn}) == len(drawn)
    seeds = [3, 1, 4, 1, 5, 35, *range(40, 70)]
    one, two = scenes.batch(seeds, 40), scenes.batch(np.array(seeds), 40, workers=2)
    assert one.images.shape == (36, 40, 40, 3) and (one.images == two.images).all() and one.captions == two.captions
    assert (one.images[2] == scenes.render(scenes.sample(4), 40).image).all()
    assert one.captions[2] == scenes.caption(scenes.sample(4))


def test_import_is_silent_and_needs_numpy_alone():
    code = "import sys; import scenes; print([m for m in ('PIL', 'jax', 'torch') if m in sys.modules])"
    folder = scenes.__file__.rpartition("/")[0]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n" and run.stderr == ""


def test_arrays(drawn):
    for scene, image in drawn[:5]:
        dtypes = [(v.dtype, v.shape) for v in image]
        assert dtypes == [("uint8", (128, 128, 3)), ("int8", (128, 128)), ("float32", (128, 128)),
                          ("float32", (128, 128, 3)), ("bool", (128, 128))]
        assert np.isfinite(image.depth).all() and set(np.unique(image.object)) >= set(range(len(scene.solids)))


def test_depth_lies_on_the_surfaces(drawn):
    for scene, image in drawn:
        p = points(scene, image.depth.astype(float))
        assert np.abs(p[image.object == scenes.GROUND][:, 2]).max() < 1e-4
        wall = p[image.object == scenes.WALL]
        assert not len(wall) or np.abs(wall[:, 1] - scene.wall_y).max() < 1e-4
        for i, solid in enumerate(scene.solids):
            assert np.abs(outside(solid, p[image.object == i])).max() < 2e-3
            x, y, depth = scenes.project(scene.camera, p[image.object == i].T)
            rows, columns = np.nonzero(image.object == i)
            assert np.abs(x * 128 - columns - 0.5).max() < 1e-3 and np.abs(y * 128 - rows - 0.5).max() < 1e-3
            assert np.allclose(depth, image.depth[image.object == i])


def test_no_surface_is_seen_through_another_one(drawn):
    """Along each ray nothing is entered before the depth given: 24 points between the camera and the surface."""
    for scene, image in drawn[:12]:
        for part in np.linspace(0.6, 0.995, 24):
            p = points(scene, image.depth.astype(float) * part)
            assert min(outside(solid, p).min() for solid in scene.solids) > -1e-3 and p[..., 2].min() > -1e-3


def test_normals_are_unit_and_follow_the_depth(drawn):
    for scene, image in drawn:
        assert np.abs(np.linalg.norm(image.normal, axis=-1) - 1).max() < 1e-3
        p = points(scene, image.depth.astype(float))
        slope = np.cross(p[2:, 1:-1] - p[:-2, 1:-1], p[1:-1, 2:] - p[1:-1, :-2])
        slope /= np.linalg.norm(slope, axis=-1, keepdims=True)
        inner = np.all([image.object[1:-1, 1:-1] == image.object[1 + a : 127 + a, 1 + b : 127 + b]
                        for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0))], 0)
        cosine = (slope * image.normal[1:-1, 1:-1]).sum(-1)[inner]
        assert (cosine > 0.95).mean() > 0.97             # the rest straddle an edge between two faces


def test_lit_is_what_a_walk_to_the_light_finds(drawn):
    for scene, image in drawn[:15]:
        p = points(scene, image.depth.astype(float)) + 0.02 * image.normal
        free = image.normal @ np.array(scene.light) > 0
        for step in np.linspace(0.01, 5, 120):
            free &= np.all([outside(solid, p + step * np.array(scene.light)) > 0 for solid in scene.solids], 0)
        seen = image.object != scenes.WALL
        assert (free == image.lit)[seen].mean() > 0.994  # the rest lies on the rims of shadows
        shadow = (~image.lit)[image.object == scenes.GROUND].mean()
        assert scene.side not in ("left", "right", "behind") or 0.01 < shadow < 0.4


def test_culling_changes_no_pixel(drawn, monkeypatch):
    monkeypatch.setattr(scenes, "_box", lambda *_: (-1, -1, 2, 2))
    for scene, image in drawn[:12]:
        assert all((a == b).all() for a, b in zip(scenes.render(scene), image))


def test_the_order_of_solids_does_not_matter(drawn):
    hidden = 0
    for scene, image in drawn:
        turned, last = scenes.render(scene._replace(solids=scene.solids[::-1])), len(scene.solids) - 1
        assert (image.image == turned.image).all() and (image.depth == turned.depth).all()
        assert (np.where(image.object < 0, image.object, last - image.object) == turned.object).all()
        hidden += min(found.visible for found in scenes.truth(scene, image)) < 1
    assert hidden > 3


def test_ground_and_backdrop_have_their_tints(drawn):
    for scene, image in drawn:
        for which, tint in ((scenes.GROUND, scene.ground), (scenes.WALL, scene.wall)):
            seen = image.image[image.object == which]
            if len(seen) > 50:                           # whatever the light: as shares of red, green and blue
                color = np.median(seen, 0)
                assert np.allclose(color / color.sum(), np.array(tint) / sum(tint), atol=0.005)


def test_colors_are_told_apart_by_one_pixel_median(drawn):
    names = list(scenes.COLORS)
    table = np.array(list(scenes.COLORS.values()))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    assert (table @ table.T - np.eye(8)).max() < 0.97
    for scene, image in drawn:
        for i, solid in enumerate(scene.solids):
            color = np.median(image.image[image.object == i], 0)
            assert names[(table @ color).argmax()] == solid.color


def test_solids_stand_clear_and_inside_the_frame(drawn):
    for scene, image in drawn:
        for i, found in enumerate(scenes.truth(scene, image)):
            assert found.visible >= 0.5 and found.solid is scene.solids[i]
            assert min(found.box) > 0 and max(found.box) < 1 and found.pixels == (image.object == i).sum() > 150
            x, y, _ = scenes.project(scene.camera, found.solid.center)
            assert found.image_position == (x, y)
            if found.visible == 1:
                assert found.box[0] < x < found.box[2] and found.box[1] < y < found.box[3]
        for a, b in itertools.combinations(scene.solids, 2):
            assert outside(a, np.array(b.center)) > 0 and (a.shape, a.color) != (b.shape, b.color)
            assert math.dist(a.position, b.position) > a.half_width + b.half_width


def test_sizes_can_be_told_apart(alone):
    wide = {size: [] for size in scenes.SIZES}
    for scene, image in alone:
        wide[scene.solids[0].size].append(np.any(image.object == 0, 0).sum() * 128 / 96)
    assert min(wide["small"]) >= 20
    assert np.mean(wide["small"]) * 1.25 < np.mean(wide["medium"]) < np.mean(wide["large"]) / 1.25


def test_light_comes_from_the_side_named(alone):
    """Shading brightens the near side of each solid, and its shadow falls to the far one."""
    seen = Counter()
    for scene, image in alone:
        seen[scene.side] += 1
        solid, side = scene.solids[0], {"left": -1, "right": 1}.get(scene.side)
        if scene.side == "above":
            assert scene.light[2] > 0.9
            continue
        p = points(scene, image.depth.astype(float))
        shadow = p[(image.object == scenes.GROUND) & ~image.lit][:, :2] - solid.position[:2]
        shadow = shadow.sum(0) / max(len(shadow), 1)     # one that falls behind its solid may be hidden altogether
        mask, columns = image.object == 0, np.nonzero(image.object == 0)[1]
        gray = image.image[mask].astype(float).mean(1)
        if side:
            near = (columns - np.median(columns)) * side > 0
            assert gray[near].mean() > gray[~near].mean() and shadow[0] * side < -abs(shadow[1]) * 0.5
        else:
            near = -1 if scene.side == "front" else 1
            assert (image.lit[mask].mean() - 0.57) * near < 0 and shadow[1] * near < 0.2
    assert set(seen) == set(scenes.SIDES) and min(seen.values()) >= 5


def test_relations_are_true_in_the_image(drawn):
    words = Counter()
    for scene, image in drawn:
        for i, word, j in scenes.relations(scene):
            words[word] += 1
            at_i, at_j = np.nonzero(image.object == i), np.nonzero(image.object == j)
            xi, xj, di, dj = at_i[1].mean(), at_j[1].mean(), image.depth[at_i].min(), image.depth[at_j].min()
            assert {"left": xj - xi > 8, "right": xi - xj > 8, "front": di < dj, "behind": di > dj}[word]
    assert set(words) == {"left", "right", "front", "behind"} and words["left"] == words["right"] > 10


def test_captions_state_only_true_relations():
    """Captions parsed from the text: "a ... left of a ..." must hold for some pair that fits the nouns."""
    noun = rf"(an? (?:\w+ ){{0,2}}(?:{'|'.join(scenes.SHAPES)}|ball|box|object))"
    form = re.compile(rf"\b{noun} (?:to the )?(left of|right of|in front of|behind) {noun}(?:$|,| and| with)")
    count = Counter()
    for seed in range(800):
        scene = scenes.sample(seed, objects=2)
        text = re.sub(r"^(a photo of|an image of|a picture of|a rendering of|a scene with|there is) ", "",
                      scenes.caption(scene))
        for a, word, b in form.findall(text):
            count[word] += 1
            pairs = [(scene.solids[i].position, scene.solids[j].position)
                     for i, j in itertools.product(named(scene, a), named(scene, b)) if i != j]
            assert any({"left of": p[0] < q[0], "right of": p[0] > q[0], "in front of": p[1] < q[1],
                        "behind": p[1] > q[1]}[word] for p, q in pairs), text
    assert min(count.values()) > 20 and len(count) == 4


def test_captions_state_only_true_words():
    for seed in range(1000):
        scene = scenes.sample(seed)
        text = scenes.caption(scene, seed % 3)
        words = [PLAIN.get(word, word) for word in re.findall(r"\w+", text)]
        for kind, names in (("shape", scenes.SHAPES), ("color", scenes.COLORS), ("size", scenes.SIZES)):
            stated = Counter(word for word in words if word in names)
            assert not stated - Counter(getattr(solid, kind) for solid in scene.solids), text
        light = re.search(r"(?:lit|light|coming) from (?:the )?(\w+)", text)
        assert light is None or light[1] == scene.side, text
        angle = re.search(r"(\w+) angle", text)
        assert angle is None or (scene.camera.elevation > 0.45) == (angle[1] == "high")
        total = re.search(r"(two|three) \w+:", text)
        assert total is None or {"two": 2, "three": 3}[total[1]] == len(scene.solids)


def test_vocabulary_is_closed_and_captions_are_short():
    texts = list(itertools.islice(scenes.captions(), 3000))
    words = Counter(word for text in texts for word in re.findall(r"[^\s,:]+", text))
    assert set(words) == WORDS and min(words.values()) >= 10
    assert max(len(text.split()) for text in texts) <= 28
    assert len(set(texts)) > 2200
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |^ | $| ,", "\n".join(texts))
    assert texts[7] == scenes.caption(scenes.sample(7)) == next(scenes.captions(7))
    assert len({scenes.caption(scenes.sample(7), seed) for seed in range(20)}) > 8


def test_what_captions_state():
    single = [scenes.caption(scene) for scene in (scenes.sample(seed, objects=1) for seed in range(2000))]
    kinds = "|".join([*scenes.SHAPES, "ball", "box"]), "|".join(scenes.COLORS)
    both = np.mean([all(re.search(rf"\b({kind})\b", text) for kind in kinds) for text in single])
    assert 0.93 < both < 0.97
    assert 0.4 < np.mean(["from" in text.replace("seen from", "") for text in single]) < 0.6
    assert 0.5 < np.mean([bool(re.search(r"\b(small|little|medium|large|big)\b", text)) for text in single]) < 0.8
    several = [scenes.caption(scenes.sample(seed, objects=3)) for seed in range(500)]
    named_all = [len(re.findall(rf"\b({kinds[0]}|object)\b", text)) == 3 for text in several]
    assert all(named_all) and np.mean(["another object" in text for text in several]) < 0.1


def test_distribution():
    drawn = [scenes.sample(seed) for seed in range(1500)]
    counts = np.bincount([len(scene.solids) for scene in drawn]) / 1500
    assert np.allclose(counts, [0, 0.40, 0.35, 0.25], atol=0.05)
    solids = [solid for scene in drawn for solid in scene.solids]
    for kind, names in (("shape", scenes.SHAPES), ("color", scenes.COLORS)):
        share = np.array([sum(getattr(solid, kind) == name for solid in solids) for name in names]) / len(solids)
        assert np.abs(share * len(names) - 1).max() < 0.2
    sizes = Counter(solid.size for solid in solids)
    assert min(sizes.values()) > 0.18 * len(solids)       # large ones are rarer where three must fit
    sides = Counter(scene.side for scene in drawn)
    assert set(sides) == set(scenes.SIDES) and min(sides.values()) > 240
    assert [len(scenes.sample(5, objects=n).solids) for n in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize("objects", [0, 4, -1])
def test_wrong_counts_are_refused(objects):
    with pytest.raises(ValueError, match=str(objects)):
        scenes.sample(0, objects=objects)


def test_sizes_sample_the_same_picture(drawn):
    """At a third of the size, pixel centres fall on those of the full one."""
    for scene, _ in drawn[:6]:
        small, big = scenes.render(scene, 40), scenes.render(scene, 120)
        same = small.object == big.object[1::3, 1::3]
        assert same.mean() > 0.998
        assert np.allclose(small.depth[same], big.depth[1::3, 1::3][same], atol=1e-3)


def test_edges_are_antialiased(drawn, monkeypatch):
    """Against the mean of 4 × 4 pixels, edges are at least twice as close as single rays, and nothing else changes."""
    fine = [scenes.render(scene, 512).image.reshape(128, 4, 128, 4, 3).mean((1, 3)) for scene, _ in drawn[:3]]
    monkeypatch.setattr(scenes, "_edges", lambda *_: np.zeros(0, int))
    for (scene, image), fine_image in zip(drawn, fine):
        raw = scenes.render(scene)
        assert all((a == b).all() for a, b in zip(raw[1:], image[1:]))
        edge = image.object[:, 1:] != image.object[:, :-1]
        smooth, rough = (np.std((v - fine_image)[:, 1:][edge]) for v in (image.image, raw.image))
        assert smooth < 0.5 * rough
