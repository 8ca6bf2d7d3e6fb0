"""The world that the nano model draws: solids on a ground plane under a light, with captions and the truth per pixel.

Copy this file alone; it needs numpy, and pillow for the contact sheet of `python scenes.py --n 16 --out sheet.png`.

World frame, in world units: x to the camera's right, y away from the camera along the ground, z up; the ground is z = 0
and a backdrop closes the view at y = `Scene.wall_y`. Walking around a scene is the same as turning solids and light, so
the camera needs no azimuth, and left, right, front and behind are signs of x and y.
Image frame, in fractions of the image: x to the right and y down, (0, 0) the top left corner, (1, 1) the bottom right.
Letters: N images, H = W = `size` pixels, P rays (pixels or subsamples, flat), K solids of a scene.
"""
import argparse
import functools
import importlib.util
import itertools
import math
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

SHAPES = {"sphere": (0.50, 1.00), "cube": (0.42, 0.84), "cylinder": (0.45, 1.00),   # half width and height in units of
          "cone": (0.54, 1.12)}                                                     # the solid's scale
# Seven hues far apart and one without hue: shading scales all channels alike, so hue and saturation survive it.
COLORS = {"red": (0.88, 0.10, 0.12), "orange": (0.98, 0.46, 0.04), "yellow": (0.97, 0.88, 0.12),
          "green": (0.14, 0.64, 0.18), "cyan": (0.16, 0.84, 0.90), "blue": (0.13, 0.26, 0.92),
          "purple": (0.60, 0.18, 0.80), "white": (0.97, 0.97, 0.97)}
SIZES = {"small": 1.00, "medium": 1.42, "large": 2.00}  # scale in world units; some 4.7 units are in view
SIDES = {"left": 180.0, "right": 0.0, "front": -90.0, "behind": 90.0, "above": 0.0}  # the light's azimuth in degrees
SYNONYMS = {"sphere": "ball", "cube": "box", "small": "little", "large": "big"}
HEADS = "a photo of ", "an image of ", "a picture of ", "a rendering of ", "a scene with ", "there is "
LIGHTING = ", lit from ", ", lit from ", ", light from ", " with light from ", ", light coming from "
GROUND, WALL = -1, -2                                   # ids in `Render.object` where no solid is seen
AMBIENT, SKY, FILL, SUN, GLOSS = 0.37, 0.04, 0.18, 0.48, 0.22  # a face towards sky, viewer and sun just saturates


class Solid(NamedTuple):
    """One solid: three words, then numbers. `position` is the centre of its base, on the ground."""
    shape: str
    color: str
    size: str
    position: tuple[float, float, float]
    scale: float                                        # world units: the size's, varied by 4 %
    yaw: float                                          # radians about z; 0 on round solids
    rgb: tuple[float, float, float]                     # albedo: the colour's, darkened by up to 8 %

    half_width = property(lambda self: SHAPES[self.shape][0] * self.scale, doc="radius, or half the side of a cube")
    height = property(lambda self: SHAPES[self.shape][1] * self.scale, doc="of its top above the ground")
    reach = property(lambda self: self.half_width * (1.42 if self.shape == "cube" else 1), doc="radius around it")
    center = property(lambda self: (*self.position[:2], self.height / 2), doc="middle of its axis, world frame")


class Camera(NamedTuple):
    """A pinhole `distance` units from `target`, looking `elevation` radians down on it; `width` units are in view."""
    elevation: float
    distance: float
    width: float
    target: tuple[float, float, float]

    focal = property(lambda self: self.distance / self.width, doc="focal length in image widths")
    back = property(lambda self: (0.0, -math.cos(self.elevation), math.sin(self.elevation)), doc="unit, target to eye")
    eye = property(lambda self: tuple(t + self.distance * b for t, b in zip(self.target, self.back)), doc="world frame")


class Scene(NamedTuple):
    """All that `render` and `caption` need, in plain numbers."""
    seed: int
    solids: tuple[Solid, ...]
    camera: Camera
    light: tuple[float, float, float]                   # unit vector towards the light
    side: str                                           # where it comes from as the camera sees it: a key of SIDES
    ground: tuple[float, float, float]                  # rgb
    wall: tuple[float, float, float]                    # rgb
    wall_y: float


class Render(NamedTuple):
    """An image, its edges antialiased, and the truth at its pixel centres."""
    image: np.ndarray                                   # uint8 [H, W, 3]
    object: np.ndarray                                  # int8 [H, W]: index into `Scene.solids`, GROUND or WALL
    depth: np.ndarray                                   # float32 [H, W]: world units along the viewing axis
    normal: np.ndarray                                  # float32 [H, W, 3]: unit, world frame
    lit: np.ndarray                                     # bool [H, W]: the light reaches it; False on the backdrop


class Truth(NamedTuple):
    """What the image shows of one solid."""
    solid: Solid
    image_position: tuple[float, float]                 # image frame, of the solid's centre
    depth: float                                        # of the centre, world units
    box: tuple[float, float, float, float]              # image frame: left, top, right, bottom of the visible pixels
    pixels: int                                         # visible pixels
    visible: float                                      # visible pixels ÷ the pixels that it would have alone


class Batch(NamedTuple):
    """Images uint8 [N, H, W, 3] and their captions, in the order of the seeds."""
    images: np.ndarray
    captions: list[str]


# ---- scenes


def sample(seed: int, *, objects: int | None = None) -> Scene:
    """The scene of a seed, with one to three solids or exactly `objects`, all inside the frame and well in view."""
    if objects not in (None, 1, 2, 3):
        raise ValueError(f"objects={objects}: a scene holds 1, 2 or 3")
    rng = random.Random(f"scene {seed}")                # ten times faster than numpy's for single numbers
    count = objects or rng.choices((1, 2, 3), (40, 35, 25))[0]
    side = rng.choice(list(SIDES))
    light, ground, wall, wall_y = _light(rng, side), _tint(rng), _tint(rng), rng.uniform(3.2, 5.5)
    # No two solids share shape and colour, or captions could not tell them apart; too much bulk finds no room.
    kinds = rng.sample([*itertools.product(SHAPES, COLORS)], count)
    sizes = rng.choices(list(SIZES), k=count)
    while sum(SIZES[size] for size in sizes) > (2.0, 3.5, 4.5)[count - 1]:
        sizes = rng.choices(list(SIZES), k=count)
    while not (placed := _arrange(rng, [(*kind, size) for kind, size in zip(kinds, sizes)])):
        pass
    return Scene(int(seed), *placed, light, side, ground, wall, wall_y)


def _arrange(rng, kinds):
    """(solids, camera), or None where one solid finds no room.

    Nearer solids may hide 24 % of a solid's box in the image. Its silhouette fills about half of that box, so half of
    the solid or more stays in view.
    """
    span_x, span_y, hidden, wider = ((1.2, 0.8, 0, 0), (2.0, 1.7, 0.24, 0), (2.1, 1.9, 0.12, 0.5))[len(kinds) - 1]
    camera = Camera(math.radians(rng.uniform(13, 37)), rng.uniform(8.5, 11), rng.uniform(4.4, 4.9) + wider,
                    (rng.uniform(-0.2, 0.2), 0.0, rng.uniform(0.4, 0.7)))
    placed = []
    for shape, color, size in sorted(kinds, key=lambda kind: -SIZES[kind[2]]):  # large ones find room first
        shade, scale = rng.uniform(0.92, 1), SIZES[size] * rng.uniform(0.96, 1.04)
        # A cube seen square on hides its sides and could be taken for a cylinder.
        yaw = math.radians(rng.uniform(14, 76)) if shape == "cube" else 0.0
        rgb = tuple(shade * c for c in COLORS[color])
        for _ in range(12):
            position = span_x * rng.uniform(-1, 1), span_y * rng.uniform(-1, 1), 0.0
            new = Solid(shape, color, size, position, scale, yaw, rgb)
            if any(math.dist(position, other.position) < new.reach + other.reach + 0.12 for other, _ in placed):
                continue
            box = _box(camera, new)
            if min(box) > 0.03 and max(box) < 0.97 and all(_clear(new, box, *other, hidden) for other in placed):
                placed.append((new, box))
                break
        else:
            return None
    return tuple(solid for solid, _ in placed), camera


def _clear(a, box_a, b, box_b, hidden):
    """Whether the nearer of two solids hides at most a share `hidden` of the other one's box."""
    left, top, right, bottom = box_a if a.position[1] > b.position[1] else box_b
    wide = min(box_a[2], box_b[2]) - max(box_a[0], box_b[0])
    high = min(box_a[3], box_b[3]) - max(box_a[1], box_b[1])
    return max(wide, 0) * max(high, 0) <= hidden * (right - left) * (bottom - top)


def project(camera: Camera, point) -> tuple:
    """World x, y, z (numbers or arrays) → image x, image y, depth in world units."""
    s, c = math.sin(camera.elevation), math.cos(camera.elevation)
    x, y, z = (p - t for p, t in zip(point, camera.target))
    depth = camera.distance + c * y - s * z
    return 0.5 + camera.focal * x / depth, 0.5 - camera.focal * (s * y + c * z) / depth, depth


def _box(camera, solid, shadow=(0.0, 0.0)):
    """Image left, top, right, bottom of an upright box around a solid and its shadow, `shadow` units long in x, y."""
    (x, y, _), r = solid.position, solid.reach
    corners = itertools.product((x - r + min(shadow[0], 0), x + r + max(shadow[0], 0)),
                                (y - r + min(shadow[1], 0), y + r + max(shadow[1], 0)), (0.0, solid.height))
    xs, ys, _ = zip(*(project(camera, corner) for corner in corners))
    return min(xs), min(ys), max(xs), max(ys)


def _light(rng, side):
    """Unit vector to the light. Gaps between the sectors keep each side unmistakable."""
    turn, lift = (180, (68, 80)) if side == "above" else (28, (30, 52))
    a, e = math.radians(SIDES[side] + rng.uniform(-turn, turn)), math.radians(rng.uniform(*lift))
    return math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)


def _tint(rng):
    """A pale rgb of middle brightness: white is brighter, and every other colour more saturated."""
    base, warm, green = rng.uniform(0.48, 0.74), rng.uniform(-0.05, 0.05), rng.uniform(-0.03, 0.03)
    return base + warm, base + green, base - warm


# ---- rays


def _slab(o, d, low, high):
    """The interval of t in which low ≤ o + t·d ≤ high."""
    d = np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)
    a, b = (low - o) / d, (high - o) / d
    return np.minimum(a, b), np.maximum(a, b)


def _quadric(a, b, c):
    """The interval of t in which a·t² + 2b·t + c ≤ 0: (inf, -inf) where it is empty.

    a ≤ 0 only occurs for rays steeper than a cone's flank, those to a high light, and from outside they miss the cone.
    """
    disc = b * b - a * c
    hit = (disc > 0) & (a > 0)
    root, a = np.sqrt(np.maximum(disc, 0)), np.where(a > 0, a, np.float32(1))
    return np.where(hit, (-b - root) / a, np.inf), np.where(hit, (root - b) / a, -np.inf)


def _turn(x, y, yaw):
    """World → the frame of a solid that is turned by `yaw`."""
    s, c = np.float32(math.sin(yaw)), np.float32(math.cos(yaw))
    return c * x + s * y, c * y - s * x


def _enter(solid, o, d):
    """t at which rays o + t·d enter a solid, o relative to its base; inf where they miss. o or d may be scalars.

    Each solid is an intersection of slabs and quadrics, so a ray is inside from its last entry to its first exit.
    """
    (ox, oy, oz), (dx, dy, dz), r, h = o, d, np.float32(solid.half_width), np.float32(solid.height)
    if solid.shape == "sphere":
        oz = oz - r
        b, c = ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - r * r
        spans = [_quadric(dx * dx + dy * dy + dz * dz, b, c)]
    elif solid.shape == "cube":
        (ox, oy), (dx, dy) = _turn(ox, oy, solid.yaw), _turn(dx, dy, solid.yaw)
        spans = [_slab(ox, dx, -r, r), _slab(oy, dy, -r, r), _slab(oz, dz, 0, h)]
    else:                                               # radius² is r² on a cylinder, k·(h - z)² on a cone
        k, up = (r / h) ** 2 * (solid.shape == "cone"), h - oz
        radius2 = k * up * up if solid.shape == "cone" else r * r
        around = _quadric(dx * dx + dy * dy - k * dz * dz, ox * dx + oy * dy + k * up * dz, ox * ox + oy * oy - radius2)
        spans = [around, _slab(oz, dz, 0, h)]
    near = functools.reduce(np.maximum, [span[0] for span in spans])
    far = functools.reduce(np.minimum, [span[1] for span in spans])
    return np.where((near < far) & (far > 0), near, np.inf)


def _normal(solid, x, y, z):
    """Unit outward normals at surface points relative to the solid's base."""
    r, h = np.float32(solid.half_width), np.float32(solid.height)
    if solid.shape == "sphere":
        return x / r, y / r, (z - r) / r
    if solid.shape == "cube":
        local = np.stack([*_turn(x, y, solid.yaw), z - h / 2])
        nx, ny, nz = np.where(np.arange(3)[:, None] == np.abs(local).argmax(0), np.sign(local), 0)
        return *_turn(nx, ny, -solid.yaw), nz
    rho = np.maximum(np.hypot(x, y), np.float32(1e-6))
    if solid.shape == "cylinder":
        top = z > np.float32(0.999) * h
        return np.where(top, 0, x / rho), np.where(top, 0, y / rho), top
    flank = 1 / np.hypot(1, r / h)
    return x / rho * flank, y / rho * flank, r / h * flank


def _within(box, x, y):
    """Indices of the image points inside of a box."""
    left, top, right, bottom = (np.float32(v) for v in box)
    return np.flatnonzero((x >= left) & (x <= right) & (y >= top) & (y <= bottom))


def _trace(scene, x, y):
    """Follow rays through image points x, y (float32 [P]) to the first surface, and from there to the light.

    Returns depth [P], ids int8 [P], normal and point as three arrays [P] each, and whether the light gets there [P].
    """
    camera, eye = scene.camera, tuple(np.float32(v) for v in scene.camera.eye)
    _, c, s = (np.float32(v) for v in np.abs(camera.back))
    right, up = (x - np.float32(0.5)) / np.float32(camera.focal), (np.float32(0.5) - y) / np.float32(camera.focal)
    d = right, c + s * up, c * up - s                   # one unit along the viewing axis: t is the depth
    ground, wall = -eye[2] / np.minimum(d[2], np.float32(-1e-6)), (np.float32(scene.wall_y) - eye[1]) / d[1]
    depth, floor = np.minimum(ground, wall), ground < wall
    ids = np.where(floor, np.int8(GROUND), np.int8(WALL))
    normal = np.zeros_like(x), floor.astype(np.float32) - 1, floor.astype(np.float32)
    for i, solid in enumerate(scene.solids):
        at = _within(_box(camera, solid), x, y)
        o = tuple(e - np.float32(p) for e, p in zip(eye, solid.position))
        t = _enter(solid, o, [v[at] for v in d])
        first = t < depth[at]
        at, t = at[first], t[first]
        depth[at], ids[at] = t, i
        for out, n in zip(normal, _normal(solid, *(p + t * v[at] for p, v in zip(o, d)))):
            out[at] = n
    point = tuple(e + depth * v for e, v in zip(eye, d))
    return depth, ids, normal, point, _lit(scene, x, y, ids, normal, point)


def _lit(scene, x, y, ids, normal, point):
    """bool [P]: whether the light reaches a point. A convex solid shades itself only where it faces away."""
    light = tuple(np.float32(v) for v in scene.light)
    lit = (sum(n * v for n, v in zip(normal, light)) > 0) & (ids != WALL)
    for i, solid in enumerate(scene.solids):
        # All that a solid shades lies between itself and its shadow on the ground.
        shadow = [-solid.height / scene.light[2] * v for v in scene.light[:2]]
        at = _within(_box(scene.camera, solid, shadow), x, y)
        at = at[lit[at] & (ids[at] != i)]
        lit[at] = np.isinf(_enter(solid, [v[at] - np.float32(p) for v, p in zip(point, solid.position)], light))
    return lit


def _shade(scene, ids, normal, point, lit):
    """float32 [P, 3], 1 is white: ambient light, more from above, a fill light at the camera, the sun and its gloss."""
    dot = lambda n, v: sum(a * np.float32(b) for a, b in zip(n, v))
    viewer = scene.camera.back                          # taken as far away
    level = dot(normal, scene.light) * lit * np.float32(SUN)
    level += AMBIENT + dot(normal, (0, 0, SKY)) + np.maximum(dot(normal, viewer), 0) * np.float32(FILL)
    x, y, _ = point
    level[ids == WALL] = 0.85                           # a backdrop with a light of its own
    level *= np.where(ids == GROUND, 1 - np.minimum(x * x + y * y, 30) * np.float32(0.006), 1)
    albedo = np.array([*(solid.rgb for solid in scene.solids), scene.wall, scene.ground], np.float32)  # WALL is -2
    color = albedo[ids] * level[:, None]
    shiny = np.flatnonzero((ids >= 0) & lit)
    half = np.add(scene.light, viewer)
    cosine = dot([n[shiny] for n in normal], half / np.linalg.norm(half))
    color[shiny] += (np.maximum(cosine, 0) ** 32 * np.float32(GLOSS))[:, None]
    return np.minimum(color, 1)


def _edges(ids, normal, lit, size):
    """Flat indices of the pixels where solid, shadow or face differs from a neighbour's."""
    key, nx, nz = (v.reshape(size, size) for v in (ids * 2 + lit, normal[0], normal[2]))
    edge = np.zeros((size, size), bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        change = (key[a] != key[b]) | (np.abs(nx[a] - nx[b]) + np.abs(nz[a] - nz[b]) > 0.4)
        edge[a] |= change
        edge[b] |= change
    return np.flatnonzero(edge)


def render(scene: Scene, size: int = 128) -> Render:
    """Draw a scene. Edge pixels average four rays on a rotated grid; the maps belong to the pixel centres."""
    y, x = ((np.indices((size, size)).reshape(2, -1) + 0.5) / size).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # rays that miss have no finite t
        depth, ids, normal, point, lit = _trace(scene, x, y)
        color, at = _shade(scene, ids, normal, point, lit), _edges(ids, normal, lit, size)
        dx, dy = np.array([[-3, 1, 3, -1], [-1, -3, 1, 3]], np.float32)[:, :, None] / (8 * size)
        _, *fine = _trace(scene, (x[at] + dx).ravel(), (y[at] + dy).ravel())
        color[at] = _shade(scene, *fine).reshape(4, -1, 3).mean(0)
    maps = (color * 255 + 0.5).astype(np.uint8), ids, depth, np.stack(normal, -1), lit
    return Render(*(v.reshape(size, size, *v.shape[1:]) for v in maps))


def truth(scene: Scene, rendered: Render | None = None) -> list[Truth]:
    """What the image shows of each solid, in the order of `scene.solids`; draws the scene unless that is given."""
    rendered, out = rendered or render(scene), []
    size = len(rendered.object)
    for i, solid in enumerate(scene.solids):
        rows, columns = np.nonzero(rendered.object == i)
        box = tuple(float(v) / size for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        alone = int((render(scene._replace(solids=(solid,)), size).object == 0).sum())
        *position, depth = project(scene.camera, solid.center)
        out.append(Truth(solid, tuple(position), depth, box, len(rows), len(rows) / alone))
    return out


# ---- captions


def relations(scene: Scene) -> list[tuple[int, str, int]]:
    """All (i, word, j), word one of left, right, front, behind, where solid i is unmistakably on that side of j."""
    out, xs = [], [project(scene.camera, solid.center)[0] for solid in scene.solids]
    for i, j in itertools.permutations(range(len(xs)), 2):
        across, away = xs[i] - xs[j], scene.solids[i].position[1] - scene.solids[j].position[1]
        # A world unit is about 0.2 of the image: each side counts if it is not much less than the other one.
        if abs(across) > max(0.15, 0.14 * abs(away)):
            out.append((i, "left" if across < 0 else "right", j))
        if abs(away) > max(0.9, 4 * abs(across)):
            out.append((i, "front" if away < 0 else "behind", j))
    return out


def caption(scene: Scene, seed: int = 0) -> str:
    """One of many true captions, the same for the same scene and seed."""
    rng = random.Random(f"caption {scene.seed} {seed}")
    if len(scene.solids) == 1:
        place = rng.choice(("", "", "", "", " on the ground", " standing on the floor"))
        text = _noun(rng, scene.solids[0], 0.65, 0.975, 0.975) + place
    else:
        text = _several(rng, scene)
    head = rng.choice(HEADS) if rng.random() < 0.5 else ""
    source = scene.side if scene.side in ("above", "behind") else f"the {scene.side}"
    clauses = [rng.choice(LIGHTING) + source] if rng.random() < 0.5 else []
    degrees = math.degrees(scene.camera.elevation)
    if not 18 < degrees < 32 and rng.random() < 0.25:
        clauses.append(f", seen from a {'low' if degrees <= 18 else 'high'} angle")
    return head + text + "".join(clauses[: 1 if len(scene.solids) == 3 else 2])  # at most 28 words


def _noun(rng, solid, size=0.5, color=0.95, shape=0.96):
    """"a small red cube", each word stated at its odds, colour or shape always."""
    name = lambda word: SYNONYMS[word] if word in SYNONYMS and rng.random() < 0.25 else word
    words = [name(solid.size)] if rng.random() < size else []
    colored = rng.random() < color
    words += [solid.color] if colored else []
    words += [name(solid.shape) if not colored or rng.random() < shape else "object"]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _several(rng, scene):
    """Two or three solids, listed or related; now and then one is only "another object"."""
    nouns, facts = [_noun(rng, solid) for solid in scene.solids], relations(scene)
    order = rng.sample(range(len(nouns)), len(nouns))
    a, b, *c = order
    if c and {(a, "left"), (a, "right")} <= {fact[:2] for fact in facts} and rng.random() < 0.5:
        return f"{nouns[a]} between {nouns[b]} and {nouns[c[0]]}"
    about = [(word, j) for i, word, j in facts if i == a]
    if about and rng.random() < 0.65:
        return _related(rng, nouns, a, about)
    names = [nouns[i] for i in order[:-1]] + ["another object" if rng.random() < 0.07 else nouns[order[-1]]]
    count = f"{('two', 'three')[len(c)]} {rng.choice(('objects', 'solids', 'shapes'))}: "
    return rng.choice(("", "", count)) + ", ".join(names[:-1]) + " and " + names[-1]


def _related(rng, nouns, first, about):
    """The place of one solid against another, or against both where both are clear; a third is named in any case."""
    word, other = rng.choice(about)
    text = f"{nouns[first]} {_preposition(rng, word)} {nouns[other]}"
    for third in set(range(len(nouns))) - {first, other}:
        words = [word for word, j in about if j == third]
        if words and rng.random() < 0.6:
            return f"{text} and {_preposition(rng, rng.choice(words))} {nouns[third]}"
        text += f", with {nouns[third]}"
    return text


def _preposition(rng, word):
    return {"front": "in front of", "behind": "behind"}.get(word) or rng.choice((f"{word} of", f"to the {word} of"))


def captions(start: int = 0, objects: int | None = None):
    """Endless captions of the scenes start, start + 1, …; nothing is rendered."""
    for seed in itertools.count(start):
        yield caption(sample(seed, objects=objects))


# ---- batches


@functools.lru_cache(1)
def _pool(workers):
    """Kept, since starting it takes a second; spawned, since forking a process with JAX's threads may deadlock."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def batch(seeds, size: int = 128, workers: int | None = None) -> Batch:
    """Images and captions of scenes; from 256 on over two processes, for which scripts need a `__main__` guard."""
    seeds = [int(seed) for seed in seeds]
    workers = workers or (2 if len(seeds) >= 256 else 1)
    # A worker imports this module by name, which cannot work if it was loaded from a path under another name.
    if workers == 1 or (__name__ != "__main__" and importlib.util.find_spec(__name__) is None):
        drawn = [sample(seed) for seed in seeds]
        images = np.array([render(scene, size).image for scene in drawn], np.uint8).reshape(-1, size, size, 3)
        return Batch(images, [caption(scene) for scene in drawn])
    parts = [seeds[i : i + 32] for i in range(0, len(seeds), 32)]
    images, texts = zip(*_pool(workers).map(batch, parts, itertools.repeat(size), itertools.repeat(1)))
    return Batch(np.concatenate(images), list(itertools.chain(*texts)))


def _sheet(images, texts, path):
    """Write a contact sheet, six images to a row, each over its caption."""
    import textwrap

    from PIL import Image, ImageDraw
    size, wide, high = len(images[0]), max(len(images[0]) + 8, 200), len(images[0]) + 72
    sheet = Image.new("RGB", (6 * wide, -(-len(images) // 6) * high), "white")
    for i, (image, text) in enumerate(zip(images, texts)):
        x, y = i % 6 * wide + 4, i // 6 * high + 4
        sheet.paste(Image.fromarray(image), (x, y))
        ImageDraw.Draw(sheet).text((x, y + size + 2), "\n".join(textwrap.wrap(text, wide // 7)), fill="black")
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"n": 16, "seed": 0, "size": 128, "workers": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", default="sheet.png")
    args = parser.parse_args()
    start = time.perf_counter()
    drawn = batch(range(args.seed, args.seed + args.n), args.size, args.workers)
    print(f"{args.n / (time.perf_counter() - start):.0f} images/s")
    _sheet(*drawn, args.out)


if __name__ == "__main__":
    main()
