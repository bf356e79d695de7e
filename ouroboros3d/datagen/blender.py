"""Renders assets with Blender's path tracer Cycles, through the wheel `bpy` (`pip install ".[blender]"` in the clone).

The wheel needs one Python version (bpy 4.5: 3.11) and, on Debian and Ubuntu, the packages libx11-6 libxrender1
libxfixes3 libxi6 libxext6 libxkbcommon0 libsm6 libice6 libgl1, though no display. World, cameras and normalisation are
those of raycast.py: Blender imports the asset, make_surface fits its triangles, and Cycles sees them where they
then are. The sky is as bright towards each side as the light backend's, but here objects shade themselves and shine.
Blender has one scene per process: opening a BlenderScene ends the previous one.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from ouroboros3d.camera_defaults import FOV
from ouroboros3d.errors import UserError, one_line

from .assets import AssetError, Findings
from .meshes import READERS, Z_UP
from .pictures import Pictures, find_texture
from .raycast import SKY_DIRECTION, Raycaster
from .surface import OBJECT_RADIUS, Part, make_surface, to_linear

_SHARED = {"missing material files", "missing materials", "free-form geometry", "points", "lines"}  # with Blender
# What this package's readers know and Blender passes over.
_MISREAD = {"hidden nodes", "byte order mark", "several names in one mtllib", "diffuse_ colours"}
_PLAIN = 0.7  # sRGB grey of what has no material, as in raycast.py
# Radiance of the sky towards d is _SKY (1 + d . SKY_DIRECTION): a diffuse surface with normal n then shows about
# _SKY (1 + 2/3 n . SKY_DIRECTION) of its colour, which in sRGB is close to the light backend's shading.
_SKY = 0.58


def require_bpy() -> None:
    """Raises UserError where the wheel is not installed."""
    if importlib.util.find_spec("bpy") is None:
        raise UserError(
            'the Blender backend needs the wheel bpy (4.5 is for Python 3.11): pip install ".[blender]" in the clone,'
            " or choose --backend light"
        )


class BlenderScene:
    """One asset, normalised, under a soft sky. `surface` holds its triangles."""

    def __init__(
        self,
        path: Path,
        up: str = "y",
        radius: float = OBJECT_RADIUS,
        max_faces: int | None = None,
        device: str = "cpu",
        denoise: bool = False,
        threads: int = 0,
        seed: int = 0,
        findings: Findings | None = None,
    ):
        """
        path: .glb, .gltf, .obj, .ply, .stl or .fbx; of several glTF scenes the default one counts, or the first.
        up: the file's up axis, "y" or "z"; an .fbx file says its own.
        device: "cpu" or "gpu"; denoise: by OpenImageDenoise; threads: 0 is all; seed: of Cycles' noise;
        findings: takes the warnings.
        The same seed gives the same picture on one machine and version; GPUs differ from CPUs by rounding.
        Raises AssetError for the asset, UserError when there is no such device.
        """
        require_bpy()
        import bpy

        if not path.is_file():
            raise AssetError(f"{path}: no such file")
        findings = Findings() if findings is None else findings
        _read_along(path, findings)
        self.version = f"Blender {bpy.app.version_string}"
        with _quiet():
            bpy.ops.wm.read_factory_settings(use_empty=True)
            _import(path, up)
        _repair_materials(path, findings)
        try:
            self.surface = _normalise(radius, max_faces)
        except AssetError as error:
            raise AssetError(f"{path}: {error}") from error
        self._camera = _add_camera()
        _add_sky()
        _set_up_cycles(device, denoise, threads, seed)
        self._caster: Raycaster | None = None

    def render(self, c2w: np.ndarray, size: int, samples: int = 64, fov: float = FOV) -> np.ndarray:
        """One picture, [size, size, 4] uint8 RGBA (colour not multiplied by alpha, empty = 0).

        c2w: [4, 4] OpenGL camera-to-world; samples: paths per pixel; fov: horizontal, degrees.
        """
        import bpy

        scene = bpy.context.scene
        self._camera.matrix_world = c2w.T.tolist()  # Blender takes columns
        self._camera.data.angle = np.radians(fov)
        scene.render.resolution_x = scene.render.resolution_y = size
        scene.cycles.samples = samples
        with tempfile.TemporaryDirectory(prefix="blender-") as folder:
            scene.render.filepath = os.path.join(folder, "view.png")
            with _quiet():
                bpy.ops.render.render(write_still=True)
            with Image.open(scene.render.filepath) as picture:
                rgba = np.array(picture.convert("RGBA"))
        rgba[rgba[..., 3] == 0] = 0
        return rgba

    def depth(self, c2w: np.ndarray, size: int, fov: float = FOV) -> np.ndarray:
        """As Raycaster.depth, of the same triangles (holes cut by a texture's alpha are closed)."""
        self._caster = self._caster or Raycaster(self.surface)
        return self._caster.depth(c2w, size, fov)


@contextmanager
def _quiet() -> Iterator[None]:
    """Blender reports every file and frame on the process's own output, below Python's."""
    saved = os.dup(1), os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            for output in (1, 2):
                os.dup2(null.fileno(), output)
        yield
    finally:
        for output, own in zip((1, 2), saved, strict=True):
            os.dup2(own, output)
            os.close(own)


def _read_along(path: Path, findings: Findings) -> None:
    """What this package's own readers have to say of a file: Blender drops vertices that are no numbers, material
    files that are missing and the like without a word. Raises AssetError."""
    own, parts = Findings(), []
    with suppress(Exception):  # whatever it is, Blender may take it
        parts = READERS[path.suffix.lower()](path, Pictures(path, 16), own, None)
    if not all(np.isfinite(part.vertices[np.unique(part.faces)]).all() for part in parts):
        raise AssetError(f"{path}: a vertex is not a finite number")
    for text, feature in own.warnings.items():
        if feature in _SHARED:
            findings.warn(text, feature)
    for feature in own.features.keys() & _MISREAD:
        findings.warn(f"{feature}: not read by Blender", feature)


def _import(path: Path, up: str) -> None:
    """Import a file and turn it to Blender's z up."""
    import bpy
    from mathutils import Matrix

    file = str(path.resolve())
    turn = Z_UP[up]
    try:
        match path.suffix.lower():
            case ".glb" | ".gltf":
                bpy.ops.import_scene.gltf(filepath=file)
                _keep_default_scene()
                turn = turn @ Z_UP["y"].T  # which the importer has applied
            case ".obj" | ".ply" | ".stl" as suffix:
                getattr(bpy.ops.wm, f"{suffix[1:]}_import")(filepath=file, forward_axis="Y", up_axis="Z")
            case ".fbx":
                bpy.ops.import_scene.fbx(filepath=file, use_anim=False)
                turn = np.eye(3)
            case suffix:
                raise AssetError(f"{path}: Blender reads no {suffix or 'file without a suffix'}; try --backend light")
    except RuntimeError as error:
        raise AssetError(f"{path}: cannot be read ({one_line(error)})") from error
    matrix = Matrix(turn.tolist()).to_4x4()
    for thing in bpy.context.scene.objects:
        if thing.parent is None:
            thing.matrix_world = matrix @ thing.matrix_world


def _keep_default_scene() -> None:
    """The glTF importer makes a collection a scene, and excludes all but the default one if the file names it."""
    import bpy

    scenes = bpy.context.view_layer.layer_collection.children
    if not any(scene.exclude for scene in scenes):
        for scene in scenes[1:]:
            scene.exclude = True


def _repair_materials(path: Path, findings: Findings) -> None:
    """Find pictures where other programs find them, drop and report those that are not there, and paint what has no
    material."""
    import bpy

    for material in bpy.data.materials:
        for node in list(material.node_tree.nodes) if material.use_nodes else ():
            image = getattr(node, "image", None)
            if image is None or image.size[0]:
                continue
            name = os.path.basename(image.filepath.replace("\\", "/"))
            found = find_texture(path, name) if name else None
            if found:
                # A new one: what Blender 5 made of a missing file stays empty when reloaded from another.
                node.image = image = bpy.data.images.load(str(found.resolve()), check_existing=True)
            if not image.size[0]:
                text = f"material '{material.name}': texture '{name or image.name}' is missing or broken"
                findings.warn(text, "missing textures")
                material.node_tree.nodes.remove(node)  # its sockets fall back to plain values, not to Blender's pink
    if path.suffix.lower() == ".obj":
        for material in bpy.data.materials:
            _follow_mtl(material)
    grey = 1.0 if path.suffix.lower() in (".glb", ".gltf") else _PLAIN
    for mesh in bpy.data.meshes:
        if not any(mesh.materials):
            mesh.materials.clear()
            mesh.materials.append(_plain_material(mesh.color_attributes.active_color_name, grey))


def _follow_mtl(material) -> None:
    """Read Kd and a colour texture's alpha as most programs, and the light backend, do; the format does not say."""
    for node in material.node_tree.nodes if material.use_nodes else ():
        if node.type == "BSDF_PRINCIPLED":
            colour, alpha = node.inputs["Base Color"], node.inputs["Alpha"]
            colour.default_value = (*to_linear(np.array(colour.default_value[:3])), 1.0)
            mask = alpha.links[0].from_node if alpha.is_linked else None
            if mask and mask.type == "TEX_IMAGE" and min(mask.image.pixels[:][3::4], default=0) == 1:
                mask.image.colorspace_settings.name = "Non-Color"  # map_d without alpha: its grey is the opacity
                material.node_tree.links.new(mask.outputs["Color"], alpha)
            texture = colour.links[0].from_node if colour.is_linked else None
            if texture and texture.type == "TEX_IMAGE" and texture.image.channels == 4 and not alpha.is_linked:
                material.node_tree.links.new(texture.outputs["Alpha"], alpha)


def _plain_material(colours: str | None, grey: float):
    """Matt grey, or the mesh's own colours."""
    import bpy

    material = bpy.data.materials.new("plain")
    material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    shader = nodes["Principled BSDF"]
    shader.inputs["Base Color"].default_value = (*[float(to_linear(np.array(grey)))] * 3, 1)
    shader.inputs["Roughness"].default_value, shader.inputs["Specular IOR Level"].default_value = 1, 0
    if colours:
        attribute = nodes.new("ShaderNodeVertexColor")
        attribute.layer_name = colours
        links.new(attribute.outputs["Color"], shader.inputs["Base Color"])
        links.new(attribute.outputs["Alpha"], shader.inputs["Alpha"])
    return material


def _normalise(radius: float, max_faces: int | None):
    """Replace everything in the scene by plain meshes that make_surface's rule fits into the sphere; the Surface."""
    import bpy
    from mathutils import Matrix

    graph = bpy.context.evaluated_depsgraph_get()
    parts, meshes = [], []
    for instance in graph.object_instances:  # also what modifiers and collections make
        if instance.object.type == "MESH" and instance.show_self:
            world = np.array(instance.matrix_world, float)
            # As evaluated: the original has neither morph weights nor the pose of a skin.
            mesh = bpy.data.meshes.new_from_object(instance.object, preserve_all_data_layers=True, depsgraph=graph)
            vertices, faces = _triangles(mesh)
            parts.append(Part(vertices @ world[:3, :3].T + world[:3, 3], faces))
            meshes.append((mesh, world))
    surface = make_surface(parts, radius, max_faces)
    for thing in list(bpy.data.objects):
        bpy.data.objects.remove(thing)
    fit = np.diag([surface.scale, surface.scale, surface.scale, 1.0])
    fit[:3, 3] = -surface.scale * surface.centre
    for mesh, world in meshes:
        mesh.transform(Matrix((fit @ world).tolist()))
        bpy.context.scene.collection.objects.link(bpy.data.objects.new("asset", mesh))
    return surface


def _triangles(mesh) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [n, 3] and triangles [t, 3] of a Blender mesh, in its own coordinates."""
    mesh.calc_loop_triangles()
    vertices = np.empty(3 * len(mesh.vertices), np.float32)
    faces = np.empty(3 * len(mesh.loop_triangles), np.int32)
    mesh.vertices.foreach_get("co", vertices)
    mesh.loop_triangles.foreach_get("vertices", faces)
    return vertices.reshape(-1, 3).astype(float), faces.reshape(-1, 3)


def _add_camera():
    import bpy

    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.data.sensor_fit = "HORIZONTAL"
    camera.data.clip_start = 0.01
    bpy.context.scene.collection.objects.link(camera)
    bpy.context.scene.camera = camera
    return camera


def _add_sky() -> None:
    import bpy

    world = bpy.data.worlds.new("sky")
    world.use_nodes = True
    nodes, links = world.node_tree.nodes, world.node_tree.links
    direction = nodes.new("ShaderNodeTexCoord")
    toward, strength = nodes.new("ShaderNodeVectorMath"), nodes.new("ShaderNodeMath")
    toward.operation, strength.operation = "DOT_PRODUCT", "MULTIPLY_ADD"
    toward.inputs[1].default_value = SKY_DIRECTION.tolist()
    strength.inputs[1].default_value = strength.inputs[2].default_value = _SKY
    links.new(direction.outputs["Generated"], toward.inputs[0])
    links.new(toward.outputs["Value"], strength.inputs[0])
    links.new(strength.outputs["Value"], nodes["Background"].inputs["Strength"])
    nodes["Background"].inputs["Color"].default_value = (1, 1, 1, 1)
    bpy.context.scene.world = world


def _set_up_cycles(device: str, denoise: bool, threads: int, seed: int) -> None:
    import bpy

    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.cycles.device = "GPU" if device == "gpu" else "CPU"
    if device == "gpu":
        _enable_gpu()
    scene.cycles.seed = seed % 2**31
    scene.cycles.use_adaptive_sampling = False
    scene.cycles.use_denoising = denoise
    scene.cycles.transparent_max_bounces = 64  # leaves and wickerwork; what is behind the last layer is black
    scene.cycles.pixel_filter_type = "BOX"  # as the light backend averages its rays
    scene.render.film_transparent = True
    scene.render.use_persistent_data = True  # sixteen views of one scene
    scene.render.dither_intensity = 0
    scene.render.resolution_percentage = 100
    scene.render.image_settings.file_format = "PNG"
    scene.render.image_settings.color_mode = "RGBA"
    scene.render.image_settings.color_depth = "8"
    scene.view_settings.view_transform = "Standard"
    scene.display_settings.display_device = "sRGB"
    if threads:
        scene.render.threads_mode, scene.render.threads = "FIXED", threads


def _enable_gpu() -> None:
    import bpy

    preferences = bpy.context.preferences.addons["cycles"].preferences
    for kind in ("OPTIX", "CUDA", "HIP", "METAL", "ONEAPI"):
        try:
            preferences.compute_device_type = kind
        except TypeError:  # not in this build
            continue
        preferences.get_devices()
        for device in preferences.devices:
            device.use = device.type == kind
        if any(device.use for device in preferences.devices):
            return
    raise UserError("Cycles finds no GPU here; choose --device cpu")
