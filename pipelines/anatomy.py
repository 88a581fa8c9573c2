"""The upper abdomen as formulas, and a `Scene` into which they are painted.

The anatomy is written once, for a reference adult, in mm: x to the patient's right, y anterior, z superior,
origin on the midline between the kidneys (about L1/L2). `pipelines.phantom` scales and bends it.

A shape is an approximate signed distance in mm, negative inside. Its sign at the voxel centre gives the
label, a ramp one voxel wide the partial volume effect, its value the room left to what comes later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

Array = NDArray[np.floating]  # float32 in all that is as large as the image
Points = tuple[Array, Array, Array]  # x, y, z of every voxel, reference mm
Window = tuple[slice, slice, slice]
Number = int | float
Range = tuple[Number, Number]
Triple = tuple[Number, Number, Number]

# fmt: off
LABELS = {  # raw ids of BTCV / Synapse, "beyond the cranial vault"
    "spleen": 1, "right_kidney": 2, "left_kidney": 3, "gallbladder": 4, "oesophagus": 5, "liver": 6,
    "stomach": 7, "aorta": 8, "vena_cava": 9, "pancreas": 11,
}
# Centre lines: x, y, z, radius of each knot, reference mm; aorta and vena cava: radius over the aorta's.
TUBES: Mapping[str, Sequence[tuple[Number, Number, Number, Number]]] = {
    "aorta": ((-20, -26, 135, 1), (-15, -20, 60, 1), (-9, -17, 0, 1), (-4, -16, -120, 0.85)),
    "vena_cava": ((18, 12, 94, 1.1), (24, -4, 70, 1.1), (24, -12, 30, 1), (22, -16, -30, 1),
                  (18, -17, -120, 1)),
    "oesophagus": ((-8, -6, 135, 8), (-12, -3, 85, 8), (-24, 2, 64, 8)),
    "portal_vein": ((6, 12, -120, 5), (9, 11, -14, 6), (20, 6, 10, 7), (38, 8, 26, 7)),
    "splenic_vein": ((12, 8, 2, 5), (-30, 2, 10, 4), (-72, -10, 30, 4)),
    "mesenteric_artery": ((-9, -8, 6, 4), (-4, 4, -10, 4), (-3, 10, -120, 3)),
    "gallbladder": ((40, 22, -4, 5), (46, 33, -14, 10), (54, 48, -28, 14), (57, 54, -34, 13)),
    "pancreas": ((26, 0, -38, 10), (30, 9, -22, 15), (16, 18, -6, 12), (-6, 20, 4, 10), (-34, 12, 12, 11),
                 (-62, 2, 22, 10), (-80, -8, 30, 8)),
    "stomach": ((-54, 0, 58, 28), (-60, 14, 40, 30), (-56, 34, 14, 25), (-36, 50, -8, 21), (-6, 52, -14, 17),
                (22, 42, -4, 10)),
    "duodenum": ((28, 38, -4, 11), (48, 20, -12, 12), (50, 4, -42, 13), (20, 0, -56, 11), (-16, 10, -52, 11)),
    "right_colon": ((92, -8, -120, 22), (94, 2, -78, 22), (82, 30, -56, 20), (48, 58, -62, 18)),
    "transverse_colon": ((48, 58, -62, 18), (0, 66, -66, 17), (-52, 58, -46, 17), (-92, 22, -16, 17)),
    "left_colon": ((-94, 18, -14, 17), (-102, -14, -40, 15), (-100, -18, -120, 14)),
}
LIVER_VESSELS = (  # three hepatic veins that meet at the vena cava, three branches of the portal vein
    ((26, 0, 68, 6), (60, -8, 58, 4), (95, -20, 40, 2)), ((24, 4, 68, 6), (44, 30, 55, 4), (64, 55, 30, 2)),
    ((20, 6, 68, 5), (2, 30, 60, 3), (-20, 48, 52, 2)), ((38, 8, 26, 7), (66, 0, 16, 5), (100, -18, 0, 2)),
    ((38, 8, 26, 6), (66, 26, 12, 4), (90, 48, -10, 2)), ((38, 8, 26, 6), (14, 34, 36, 4), (-24, 52, 48, 2)),
)
# fmt: on


@dataclass
class Scene:
    """A patient while being built: bent coordinates, HU, labels; arrays of voxels are [x, y, z]."""

    rng: np.random.Generator
    tissue: Mapping[str, Number]  # HU of this patient
    volume_ml: Mapping[str, Range]
    aorta_mm: Range  # diameter
    no_gallbladder: Number  # probability
    fat_mm: Number  # subcutaneous
    build: Number  # 0 the smallest body of its world, 1 the largest
    shift_mm: Number  # SD of an organ's position along each axis
    size_mm: Triple  # of a voxel
    edge_mm: Number  # width of an edge
    axes: Sequence[Array]  # the planes of voxels before bending, in reference mm
    points: Points  # bent
    reach_mm: Number  # bending moves no point farther than this along an axis
    texture: Array  # HU
    relief: Array  # mm added to an organ's surface
    hu: Array  # painted
    label: NDArray[np.uint8]  # painted
    free: Array  # mm to the nearest placed structure

    def window(self, low: Triple | Array, high: Triple | Array) -> Window:
        """The voxels that can hold a shape lying between two corners (reference mm), however it is bent."""
        spans = zip(self.axes, np.asarray(low) - self.reach_mm, np.asarray(high) + self.reach_mm, strict=True)
        i, j, k = (slice(*np.searchsorted(axis, span).tolist()) for axis, *span in spans)
        return i, j, k

    def at(self, window: Window) -> Points:
        x, y, z = self.points
        return x[window], y[window], z[window]

    def shifted(self, x: Number, y: Number, z: Number) -> Triple:
        dx, dy, dz = self.rng.normal(0, self.shift_mm, 3).tolist()
        return x + dx, y + dy, z + dz

    def grow(self, window: Window, shape: Array, gap_mm: Number, organ: str = "", out: Number | Array = -99) -> Array:
        """Give a shape its relief and its organ's volume, `gap_mm` from those before and outside `out`."""
        shape = shape + self.relief[window]
        taken = np.maximum(gap_mm - self.free[window], out)
        room = shape[taken < 0]
        if organ in self.volume_ml and room.size:
            low, high = self.volume_ml[organ]
            share = 0.5 * (self.build + self.rng.random())  # large people have large organs
            volume = low + (high - low) * share
            rank = min(int(1000 * volume / np.prod(self.size_mm)), room.size - 1)
            shape = shape - np.partition(room, rank)[rank]
        return np.maximum(shape, taken)

    def paint(
        self, window: Window, shape: Array, tissue: str, organ: str = "", clear_mm: Number = -np.inf, grain: Number = 1
    ) -> None:
        """Blend a tissue in, its texture times `grain`; label it `organ`, keep later ones `clear_mm` away."""
        share = np.clip(0.5 - shape / self.edge_mm, 0, 1)
        self.hu[window] += share * (self.tissue[tissue] + grain * self.texture[window] - self.hu[window])
        if organ in LABELS:
            self.label[window][shape < 0] = LABELS[organ]
        if np.isfinite(clear_mm):
            np.minimum(self.free[window], shape - clear_mm, out=self.free[window])


def ellipsoid(points: Points, centre: Triple, radii: Triple, tilt_deg: Number = 0) -> Array:
    """Distance to first order (f / |grad f|); `tilt_deg` turns the upper pole towards +x."""
    x, y, z = (p - c for p, c in zip(points, centre, strict=True))
    cos, sin = np.cos(np.radians(tilt_deg)).item(), np.sin(np.radians(tilt_deg)).item()
    scaled = [(x * cos - z * sin) / radii[0], y / radii[1], (x * sin + z * cos) / radii[2]]
    k0 = np.sqrt(sum(s * s for s in scaled))
    k1 = np.sqrt(sum((s / r) ** 2 for s, r in zip(scaled, radii, strict=True)))
    return k0 * (k0 - 1) / np.maximum(k1, 1e-6)


def box(points: Points, centre: Triple, half: Triple) -> Array:
    return np.maximum.reduce([np.abs(p - c) - h for p, c, h in zip(points, centre, half, strict=True)])


def smooth_max(a: Array, b: Array, width_mm: Number) -> Array:
    """Intersection with a rounded edge."""
    return np.maximum(a, b) + np.maximum(width_mm - np.abs(a - b), 0) ** 2 / (4 * width_mm)


def tube(scene: Scene, knots: Sequence[Sequence[Number]] | Array, margin_mm: Number = 15) -> tuple[Window, Array]:
    """Distance to the smooth tube through knots (x, y, z, radius): right within `margin_mm`, large beyond."""
    ends = np.asarray(knots, dtype=np.float64)
    path = CubicSpline(np.arange(len(ends)), ends)(np.linspace(0, len(ends) - 1, 4 * len(ends) - 3))
    distance = np.full(scene.hu.shape, 4 * margin_mm, dtype=np.float32)
    for a, step in zip(path[:-1].astype(np.float32), np.diff(path, axis=0).astype(np.float32), strict=True):
        pad = max(a[3], a[3] + step[3]) + margin_mm
        near = scene.window(a[:3] + np.minimum(step[:3], 0) - pad, a[:3] + np.maximum(step[:3], 0) + pad)
        offsets = [p - c for p, c in zip(scene.at(near), a[:3], strict=True)]
        along = sum(o * s for o, s in zip(offsets, step[:3], strict=True)) / (np.square(step[:3]).sum() + 1e-6)
        along = np.clip(along, 0, 1)
        across = np.sqrt(sum((o - along * s) ** 2 for o, s in zip(offsets, step[:3], strict=True)))
        np.minimum(distance[near], across - a[3] - along * step[3], out=distance[near])
    pad = path[:, 3].max() + margin_mm
    window = scene.window(path[:, :3].min(0) - pad, path[:, :3].max(0) + pad)
    return window, distance[window]


def course(scene: Scene, name: str) -> NDArray[np.float64]:
    """The knots of a tube in this patient."""
    knots = np.array(TUBES[name], dtype=np.float64)
    knots[:, :3] += scene.rng.normal(0, 0.5 * scene.shift_mm, (len(knots), 3)) + scene.shifted(0, 0, 0)
    return knots


def trunk(scene: Scene) -> None:
    """Skin, fat, muscle wall and ribs; the abdominal fat in which all the rest lies."""
    x, y, z = scene.points
    everywhere = scene.window((-999, -999, -999), (999, 999, 999))
    waist = 1 - 0.0006 * np.maximum(-z - 20, 0)
    rho = (np.abs(x / (141 * waist)) ** 2.4 + np.abs((y + 3) / 95) ** 2.4) ** (1 / 2.4)
    wall = (rho - 1) / np.maximum(rho, 1e-3) * np.hypot(x, y + 3)  # distance to the outside of the muscles
    skin = wall - scene.fat_mm * (1 + 0.25 * np.sin(y / 50) ** 2)
    scene.free = -(wall + 11)
    for shape, tissue in ((skin, "skin"), (skin + 2, "fat"), (wall, "muscle"), (wall + 11, "fat")):
        scene.paint(everywhere, shape, tissue)
    # Ribs spiral down inside the wall, 30 mm apart, from the spine (turn 0) towards the sternum (turn pi).
    turn = np.arctan2(np.abs(x), -y - 3)
    order, across = np.divmod(z + 34 * turn - 12, 30)  # order 0 is the twelfth rib
    rib = (np.hypot((wall + 6.5) / 4.5, (across - 15) / 7.5) - 1) * 4.5
    absent = (order < 0) | (turn < 0.4) | (turn > np.minimum(1 + 0.55 * order, 2.8))
    scene.paint(everywhere, np.where(absent | (turn > 2), np.float32(20), rib), "bone")
    scene.paint(everywhere, np.where(absent | (turn <= 2), np.float32(20), rib), "cartilage")


def chest(scene: Scene) -> None:
    """Lungs, mediastinal fat and heart: the room above three merged domes, the diaphragm."""
    window = scene.window((-300, -300, -20), (300, 300, 300))
    points = scene.at(window)
    right = ellipsoid(points, scene.shifted(60, 0, 16), (76, 86, 80))
    left = ellipsoid(points, scene.shifted(-60, 0, 10), (72, 84, 68))
    middle = ellipsoid(points, (0, 8, 12), (64, 76, 63))
    recess = 26 + 0.3 * points[1] - points[2]  # the lungs reach lowest at the back
    lungs = np.maximum.reduce([-scene.free[window], -right, -left, -middle, recess])
    scene.paint(window, lungs, "lung", clear_mm=1, grain=15)
    scene.paint(window, np.maximum(ellipsoid(points, (0, -12, 0), (22, 42, 9000)), lungs), "fat")
    heart = ellipsoid(points, scene.shifted(-24, 32, 119), (62, 48, 46))
    scene.paint(window, heart - 3, "fat")
    scene.paint(window, heart, "heart", clear_mm=2)


def back(scene: Scene) -> None:
    """Paraspinal, psoas and quadratus muscles; one vertebra and its disc, repeated every 35 mm."""
    window = scene.window((-110, -120, -300), (110, -10, 300))
    x, y, z = scene.at(window)
    height = np.mod(z + scene.rng.uniform(0, 35), 35) - 17.5
    side: Points = (np.abs(x), y, height)
    lumbar = np.clip(-z / 90, 0, 1)  # psoas and quadratus grow downwards
    psoas = np.hypot(side[0] - 32 - 8 * lumbar, (y + 46) / 1.3) - 3 - 17 * lumbar
    quadratus = np.hypot((side[0] - 68) / 1.6, y + 75) - 12 * lumbar
    for muscle in (ellipsoid(side, (32, -78, 0), (30, 19, 9000)), psoas, quadratus):
        scene.paint(window, muscle, "muscle", clear_mm=1)
    body = ellipsoid(side, (0, -46, 0), (22, 17, 9000)) + 2 * (1 - (height / 17.5) ** 2)
    scene.paint(window, body, "disc", clear_mm=1)
    scene.paint(window, np.maximum(body, np.abs(height) - 13.5), "bone")
    scene.paint(window, np.maximum(body, np.abs(height) - 13.5) + 2.5, "marrow", grain=4)
    arch = np.maximum(ellipsoid(side, (0, -69, 0), (16, 14, 9000)), np.abs(height) - 12)
    spinous, transverse = box(side, (0, -88, -4), (3.5, 11, 9)), box(side, (0, -68, 0), (36, 4, 5))
    scene.paint(window, np.minimum.reduce([arch, spinous, transverse]), "bone")
    scene.paint(window, ellipsoid(side, (0, -69, 0), (10, 8, 9000)), "canal")


def vessels(scene: Scene) -> None:
    radius = 0.5 * scene.rng.uniform(*scene.aorta_mm)
    window, shape = tube(scene, course(scene, "oesophagus"))
    scene.paint(window, shape, "oesophagus", "oesophagus", clear_mm=1)
    for name, tissue in (("aorta", "aorta"), ("vena_cava", "vein")):
        window, shape = tube(scene, course(scene, name) * (1, 1, 1, radius))
        scene.paint(window, shape, tissue, name, clear_mm=1)
    for name, tissue in (("portal_vein", "vein"), ("splenic_vein", "vein"), ("mesenteric_artery", "aorta")):
        window, shape = tube(scene, course(scene, name))
        scene.paint(window, scene.grow(window, shape, 1), tissue, clear_mm=0)


def kidney(scene: Scene, organ: str, middle: Triple, tilt_deg: Number) -> None:
    """A bean whose sinus, full of fat, opens towards the midline; a cortex of 6 mm."""
    x, y, z = scene.shifted(*middle)
    window = scene.window((x - 55, y - 55, z - 85), (x + 55, y + 55, z + 85))
    points = scene.at(window)
    sinus = ellipsoid(points, (x - float(np.copysign(21, x)), y + 5, z), (20, 9, 22), tilt_deg)
    hull = ellipsoid(points, (x, y, z), (29, 25, 55), tilt_deg)
    bean = scene.grow(window, smooth_max(hull, -sinus, 4), 2, organ)
    np.minimum(scene.free[window], hull - 4, out=scene.free[window])  # nothing else enters the sinus
    scene.paint(window, bean, "cortex", organ, clear_mm=6)
    scene.paint(window, bean + 6, "kidney")


def spleen(scene: Scene) -> None:
    """A crescent between the wall and the stomach."""
    x, y, z = scene.shifted(-90, -28, 36)
    window = scene.window((x - 65, y - 75, z - 85), (x + 65, y + 75, z + 85))
    hilum = ellipsoid(scene.at(window), (x + 34, y + 24, z), (32, 42, 70))
    shape = smooth_max(ellipsoid(scene.at(window), (x, y, z), (38, 50, 55), -12), -hilum, 8)
    scene.paint(window, scene.grow(window, shape, 1.5, "spleen"), "spleen", "spleen", clear_mm=1)


def liver(scene: Scene) -> None:
    """What lies above the visceral surface, before the spine, right of the stomach, under the lungs."""
    window = scene.window((-110, -90, -100), (150, 110, 120))
    points = scene.at(window)
    x, y, z = (p - d for p, d in zip(points, scene.shifted(0, 0, 0), strict=True))
    visceral = 0.8 * (0.72 * (108 - x) - 58 - 0.35 * y + 0.002 * (y - 10) ** 2 - z)
    dorsal = -0.7 * (x - 40) - 0.71 * (y + 58)
    retroperitoneum = np.minimum(-0.775 * (x - 26) - 0.632 * (y + 12), 6 - y)
    shape = smooth_max(smooth_max(visceral, dorsal, 25), -x - 70, 30)
    shape = smooth_max(shape, -z - 72, 10)
    shape = scene.grow(window, shape, 1, "liver", out=retroperitoneum)
    scene.paint(window, shape, "liver", "liver", clear_mm=1)
    for knots in LIVER_VESSELS:
        window, shape = tube(scene, knots)
        scene.paint(window, np.where(scene.label[window] == LABELS["liver"], shape, np.float32(20)), "vein")


def viscus(scene: Scene, knots: NDArray[np.float64], content: str, organ: str = "", grain: Number = 1) -> None:
    """A tube with a wall of 3 mm; its gas lies in front of its content, level as in a supine patient."""
    window, shape = tube(scene, knots)
    shape = scene.grow(window, shape, 1, organ)
    scene.paint(window, shape, "bowel", organ, clear_mm=1)
    scene.paint(window, shape + 3, content, grain=grain)
    front = (knots[:, 1] + knots[:, 3]).max()
    level = float(front - scene.rng.uniform(0, 1) * (front - np.median(knots[:, 1])))
    scene.paint(window, np.maximum(shape + 3, level - scene.points[1][window]), "gas")


def organs(scene: Scene) -> None:
    """In the order in which they take room: each is shaped by those before it."""
    vessels(scene)
    kidney(scene, "right_kidney", (60, -42, -14), -10)
    kidney(scene, "left_kidney", (-58, -41, -2), 10)
    spleen(scene)
    absent = scene.rng.random() < scene.no_gallbladder
    for name in ["pancreas"] if absent else ["gallbladder", "pancreas"]:
        window, shape = tube(scene, course(scene, name))
        scene.paint(window, scene.grow(window, shape, 0.5, name), name, name, clear_mm=1)
    viscus(scene, course(scene, "stomach"), "stomach", "stomach", grain=2)
    liver(scene)
    for name, grain in (("duodenum", 1), ("right_colon", 8), ("transverse_colon", 8), ("left_colon", 8)):
        viscus(scene, course(scene, name), "stool", grain=grain)
    for _ in range(14):  # loops of small bowel, wherever room is left
        start = scene.rng.uniform((-70, 0, -110), (70, 60, -45))
        steps = scene.rng.normal(0, (28, 16, 10), (5, 3))
        path = np.clip(start + steps.cumsum(0), (-85, -5, -130), (85, 68, -40))
        viscus(scene, np.c_[path, scene.rng.uniform(9, 13, 5)], "stool")
