"""Configuration: layers of files and overrides, and one line for the user about everything that cannot work."""

from pathlib import Path

import pytest
import yaml

from ouroboros3d.build import build_models
from ouroboros3d.config.loading import as_kwargs, as_override, config_from_dict, load_config, save_config
from ouroboros3d.config.schema import Config
from ouroboros3d.errors import ConfigError


def refusal(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def default(key: str):
    value = Config()
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.fixture
def files(tmp_path):
    """files({"a.yaml": {...}}) writes them and returns their folder."""

    def write(contents: dict[str, object]) -> Path:
        for name, content in contents.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return tmp_path

    return write


class TestLayers:
    def test_without_a_file_everything_is_the_releases(self):
        assert load_config() == Config()

    def test_a_file_names_what_differs(self, files):
        config = load_config(files({"a.yaml": {"sampler": {"steps": 7}}}) / "a.yaml")
        assert config.sampler.steps == 7
        config.sampler.steps = 25
        assert config == Config()

    def test_bases_come_first_and_are_relative_to_the_file(self, files):
        folder = files(
            {
                "base.yaml": {"sampler": {"steps": 5, "guidance": [1, 4]}},
                "deep/middle.yaml": {"base": "../base.yaml", "sampler": {"steps": 6}},
                "deep/top.yaml": {"base": "middle.yaml", "train": {"seed": 3}},
            }
        )
        config = load_config(folder / "deep" / "top.yaml")
        assert (config.sampler.steps, config.sampler.guidance, config.train.seed) == (6, [1, 4], 3)

    def test_overrides_come_last_and_are_yaml(self, files):
        folder = files({"a.yaml": {"sampler": {"steps": 5}}})
        overrides = ["sampler.steps=9", "sampler.feedback=[rgb]", "sampler.feedback_to=null", "data.mirror=true"]
        config = load_config(folder / "a.yaml", overrides)
        assert (config.sampler.steps, config.sampler.feedback) == (9, ["rgb"])
        assert config.sampler.feedback_to is None and config.data.mirror is True

    def test_what_is_saved_is_what_is_loaded(self, tmp_path):
        config = load_config(None, ["sampler.steps=9", "model.pretrained.lgm=some/file"])
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config

    def test_keyword_arguments_are_plain(self):
        kwargs = as_kwargs(Config().model.vae)
        assert type(kwargs["block_out_channels"]) is list and kwargs["latent_channels"] == 4


class TestFiles:
    def test_missing(self, tmp_path):
        assert refusal(path=tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such config file"

    def test_missing_base(self, files):
        folder = files({"a.yaml": {"base": "none.yaml"}})
        assert refusal(path=folder / "a.yaml").endswith("none.yaml: no such config file")

    def test_circle(self, files):
        folder = files({"a.yaml": {"base": "b.yaml"}, "b.yaml": {"base": "a.yaml"}})
        assert "circle" in refusal(path=folder / "a.yaml")

    @pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "\tx"])
    def test_no_mapping(self, files, content):
        folder = files({"a.yaml": content})
        text = refusal(path=folder / "a.yaml")
        assert text.startswith(f"{folder}/a.yaml: not a YAML mapping")

    def test_an_empty_file_changes_nothing(self, files):
        assert load_config(files({"a.yaml": ""}) / "a.yaml") == Config()

    def test_an_error_in_a_base_names_the_base(self, files):
        folder = files({"b.yaml": {"sampler": {"stepps": 3}}, "a.yaml": {"base": "b.yaml"}})
        text = refusal(path=folder / "a.yaml")
        assert text.startswith(f"{folder}/b.yaml") and "sampler.stepps" in text


class TestTypes:
    @pytest.mark.parametrize("key", ["sampler.stepps", "modell", "model.lgm.input_size.x"])
    def test_unknown_keys_are_named(self, key):
        assert key.split(".")[-1] in refusal(f"{key}=1")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("sampler.steps", "many"),
            ("sampler.steps", "2.5"),
            ("data.mirror", "perhaps"),
            ("sampler.guidance", "[a,b]"),
            ("train.learning_rate", "[1]"),
            ("model.lgm", "3"),
        ],
    )
    def test_wrong_types_name_key_and_value(self, key, value):
        text = refusal(f"{key}={value}")
        assert key in text and value.strip("[]").split(",")[0] in text

    @pytest.mark.parametrize("text", ["sampler.steps", "steps 3", ""])
    def test_overrides_need_an_equals_sign(self, text):
        assert refusal(text) == f"override {text!r} is not of the form key=value"

    def test_dictionaries_are_checked_too(self):
        with pytest.raises(ConfigError, match="stepps"):
            config_from_dict({"sampler": {"stepps": 3}})
        with pytest.raises(ConfigError, match="must be at least 1"):
            config_from_dict({"sampler": {"steps": 0}})

    @pytest.mark.parametrize(
        ("key", "right"),
        [
            ("model.multiview.unet.in_channels", 8),
            ("model.multiview.unet.out_channels", 4),
            ("model.multiview.unet.cross_attention_dim", 1024),
            ("model.multiview.unet.projection_class_embeddings_input_dim", 768),
            ("model.multiview.adapter.downscale", 8),
            ("model.lgm.splat_size", 128),
        ],
    )
    def test_keys_that_follow_from_others_may_say_the_same(self, key, right):
        """Configurations of older code set them."""
        assert load_config(None, [f"{key}={right}"]) == Config()
        assert refusal(f"{key}=9") == f"{key} = 9: follows from other keys, which give {right}; leave it out"


class TestValues:
    """Each message has the key, the value and what would be right."""

    @pytest.mark.parametrize(
        ("key", "value", "right"),
        [
            ("data.cache", "tape", "none, memory, disk"),
            ("data.background", "pink", "white, black, grey, random"),
            ("train.schedule", "sometimes", "constant, linear, cosine"),
            ("model.conventions.renderer", "textbook", "release, gsplat, exact"),
            ("objective.image_loss", "L1", "l1, mse"),
        ],
    )
    def test_choices(self, key, value, right):
        assert refusal(f"{key}={value}") == f"{key} = '{value}': must be one of {right}"

    @pytest.mark.parametrize(
        ("key", "value", "right"),
        [
            ("sampler.steps", "0", "must be at least 1"),
            ("sampler.feedback_to", "-1", "must be at least 0"),
            ("sampler.noise_augmentation", "-0.5", "must be at least 0"),
            ("sampler.seed", "-1", "must be at least 0 and less than 9.22337e+18"),
            ("train.seed", "5000000000", "must be at least 0 and less than 4.29497e+09"),
            ("data.max_damaged", "0.6", "must be at least 0 and at most 0.5"),
            ("data.color_jitter", "1.5", "must be at least 0 and at most 1"),
            ("objective.dropout", "0.4", "must be at least 0 and at most 0.333333"),
            ("train.learning_rate", "0.0", "must be more than 0"),
            ("cameras.distance", "-1.0", "must be more than 0"),
            ("cameras.fov", "180.0", "must be more than 0 and less than 180"),
            ("cameras.elevation", "-90.0", "must be more than -90 and less than 90"),
            ("turntable.fov", "0.0", "must be more than 0 and less than 180"),
            ("turntable.step", "400.0", "must be more than 0 and at most 360"),
            ("train.ema_decay", "1.0", "must be at least 0 and less than 1"),
        ],
    )
    def test_bounds(self, key, value, right):
        assert refusal(f"{key}={value}") == f"{key} = {value}: {right}"

    def test_bounds_hold_for_every_element_of_a_list(self):
        assert refusal("train.betas=[0.9,1]") == "train.betas = 1.0: must be at least 0 and less than 1"

    @pytest.mark.parametrize(
        ("override", "right"),
        [("sampler.guidance=3", "[1,3]"), ("train.betas=0.5", "[0.9,0.5]"), ("objective.freeze=lgm", "[lgm]")],
    )
    def test_a_number_for_a_list(self, override, right):
        assert refusal(override).endswith(f": is a list: write {right}")

    def test_nothing_is_empty_text_or_null(self):
        config = load_config(None, ["train.time_budget=", "model.pretrained.svd=", "sampler.feedback_to="])
        assert config.train.time_budget == ""
        assert config.model.pretrained.svd is None and config.sampler.feedback_to is None
        assert refusal("train.steps=").startswith("train.steps")

    @pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
    @pytest.mark.parametrize("key", ["sampler.noise_augmentation", "cameras.distance", "sampler.guidance"])
    def test_numbers_are_finite(self, key, value):
        text = refusal(
            f"{key}={f'[1,.{value}]' if key.endswith('guidance') else value}".replace("[1,.-inf", "[1,-.inf")
        )
        assert text == f"{key} = {value}: must be a finite number"

    @pytest.mark.parametrize(
        ("override", "value", "right"),
        [
            ("model.image_size=500", "500", "multiple of 64"),
            ("model.multiview.unet.num_attention_heads=[5,10]", "[5, 10]", "4 entries"),
            ("model.multiview.unet.num_attention_heads=[5,10,20,7]", "[5, 10, 20, 7]", "divide block_out_channels"),
            ("model.multiview.unet.down_block_types=[a,b,c,d]", "'a'", "CrossAttnDownBlockSpatioTemporal"),
            ("model.multiview.unet.up_block_types=[a,b,c,d]", "'a'", "CrossAttnUpBlockSpatioTemporal"),
            ("model.multiview.unet.block_out_channels=[320,640,1280,1290]", "1290", "multiples of 32"),
            ("model.multiview.norm_groups=7", "640", "multiples of 7"),
            ("model.multiview.micro_conditions=[6]", "[6.0]", "2 numbers"),
            ("model.multiview.feedback=[rgb,depth]", "depth", "['rgb', 'ccm']"),
            ("model.multiview.feedback=[rgb,rgb]", "['rgb', 'rgb']", "without repetition"),
            ("model.image_encoder.num_attention_heads=7", "7", "hidden_size = 1280"),
            ("model.image_encoder.patch_size=300", "300", "image_size = 224"),
            ("model.lgm.down_attention=[true]", "[True]", "6 entries"),
            ("model.lgm.up_attention=[true]", "[True]", "5 entries"),
            ("model.lgm.up_channels=[]", "[]", "at least one level"),
            ("model.lgm.groups=48", "64", "groups = 48"),
            ("model.lgm.heads=48", "512", "heads = 48"),
            ("model.lgm.time_channels=7", "7", "even"),
            ("model.lgm.input_size=250", "250", "multiple of 32"),
            ("model.lgm.num_input_views=9", "8", "num_input_views = 9"),
            ("cameras.num_views=17", "17", "orbit_frames = 16"),
            ("cameras.num_views=0", "0", "1 .. "),
            ("sampler.guidance=[1]", "[1.0]", "2 numbers"),
            ("sampler.feedback_from=25", "25", "nothing would be fed back in 25 steps"),
            ("sampler.offload=true sampler.compile=true", "True", "false with sampler.compile"),
            ("sampler.scheduler.sigma_min=900", "900.0", "sigma_max = 700.0"),
            ("objective.reconstruction=none objective.diffusion=false", "False", "nothing would be trained"),
            ("objective.diffusion=false", "both", "must be clean"),
            ("objective.position_weight=0.1", "0.1", "data.depth=true"),
            ("objective.freeze=[unet,unet]", "['unet', 'unet']", "without repetition"),
            ("objective.freeze=[unet,adapters,rays,lgm]", "'lgm'", "nothing would be trained"),
            ("objective.freeze=[lgm]", "both", "must be none, or predicted with objective.decode_gradient=true"),
            ("objective.freeze=[lgm] objective.reconstruction=predicted", "predicted", "decode_gradient=true"),
            (
                "objective.freeze=[unet,adapters,rays] objective.reconstruction=clean objective.detach_feedback=true",
                "'rays'",
                "set objective.diffusion=false",
            ),
            ("objective.decode_gradient=true objective.reconstruction=none", "True", "predicted or both"),
            ("objective.decode_gradient=true objective.freeze=[unet,adapters,rays]", "True", "part of the U-Net"),
            ("objective.feedback=[] sampler.feedback=[]", "0.5", "repeat the first: must be 0"),
            ("objective.feedback=[rgb]", "['rgb', 'ccm']", "objective.feedback = ['rgb'] alone"),
            ("objective.extra_views=9", "9", "orbit_frames = 16"),
            ("objective.extra_views=4 objective.reconstruction=none", "4", "nothing is rendered"),
            ("objective.lpips_warmup_steps=5 objective.lpips_weight=0", "5", "objective.lpips_weight is 0"),
            ("train.betas=[0.9]", "[0.9]", "2 numbers"),
        ],
    )
    def test_together(self, override, value, right):
        text = refusal(*override.split())
        key, _, explanation = text.partition(" = ")
        assert key and default(key.split(",")[0]) is not None
        assert value in explanation and right in explanation

    def test_feedback_that_the_model_has_no_adapter_for(self):
        text = refusal("model.multiview.feedback=[rgb]", "sampler.feedback=[rgb,ccm]")
        assert text.startswith("sampler.feedback = ['rgb', 'ccm']") and "['rgb']" in text

    def test_valid_extremes_are_accepted(self):
        extremes = "sampler.steps=1 sampler.feedback=[] objective.dropout=0 objective.feedback_probability=1"
        extremes += " objective.extra_views=0 objective.freeze=[unet,rays] model.conventions.decode_chunk=0"
        extremes += " train.ema_decay=0 cameras.num_views=16 turntable.step=360"
        assert load_config(None, extremes.split()).sampler.feedback == []


def test_a_small_valid_config_can_be_built(make_config):
    """What the checks let pass, the networks can do."""
    lean = make_config(
        {
            "model": {
                "multiview": {"unet": {"layers_per_block": 1}, "adapter": {"res_blocks": 1}, "norm_groups": 8},
                "vae": {"norm_groups": 4},
                "lgm": {"groups": 8, "heads": 2, "layers_per_block": 1},
            }
        }
    )
    models = build_models(lean.model)
    assert models.unet.unet.config.in_channels == 2 * lean.model.vae.latent_channels
    assert models.unet.unet.config.cross_attention_dim == lean.model.image_encoder.projection_dim


@pytest.mark.parametrize(("size", "most"), [(512, 7), (64, 511)])
def test_a_batch_fits_the_grid_of_cudas_attention(size, most):
    """Eight guided samples of 64 x 64 latents would be 65,536 rows, one too many."""
    model = Config().model
    assert model.batch_size(1000) == 1  # the release's conventions mix samples
    model.image_size, model.conventions.temporal_context, model.conventions.decode_chunk = size, "textbook", 0
    assert [model.batch_size(n) for n in (0, 1, most, most + 1)] == [1, 1, most, most]


@pytest.mark.parametrize(
    ("key", "name", "own"),
    [
        ("sampler.dtype", "fp32", "float32"),
        ("sampler.dtype", "bfloat16", "bf16"),
        ("train.mixed_precision", "float32", "fp32"),
        ("train.mixed_precision", "float16", "fp16"),
    ],
)
def test_a_precision_answers_to_all_its_names_in_every_key(key, name, own):
    section, field = key.split(".")
    assert getattr(getattr(load_config(None, [f"{key}={name}"]), section), field) == own


def test_an_unknown_precision_is_refused_as_it_was_written():
    assert "int8" in refusal("train.mixed_precision=int8")


def test_a_precision_may_refer_to_a_key_that_another_layer_sets(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {mixed_precision: '${sampler.dtype}'}")
    assert load_config(file, ["sampler.dtype=float16"]).train.mixed_precision == "fp16"


@pytest.mark.parametrize("section", ["sampler", "model", "train"])
def test_a_list_for_a_section_is_refused_with_its_file(tmp_path, section):
    file = tmp_path / "c.yaml"
    file.write_text(f"{section}: [1]")
    assert str(file) in refusal(path=file)


def test_a_reference_that_leads_nowhere_is_refused_with_its_key():
    assert refusal("train.mixed_precision=${no.key}").startswith("train.mixed_precision: ")


@pytest.mark.parametrize("part", ["unet", "lgm", "vae", "image_encoder"])
def test_a_file_for_a_part_that_the_checkpoint_brings_is_refused(part, tmp_path):
    """It would not be read; a YAML file may name what its run started from."""
    small, key = Path(__file__).parents[1] / "configs" / "small.yaml", f"model.pretrained.{part}"
    text = refusal(f"{key}=some/file", path=small)
    assert text.startswith(f"{key} = 'some/file': is not read") and "checkpoints/small" in text
    assert load_config(small, [f"{key}=null"]).model.pretrained.checkpoint == "checkpoints/small"
    assert getattr(load_config(small, [f"{key}=some/file", "model.pretrained.checkpoint=null"]).model.pretrained, part)
    (tmp_path / "run.yaml").write_text(f"model: {{pretrained: {{{part}: some/file}}}}")
    assert load_config(tmp_path / "run.yaml", ["model.pretrained.checkpoint=checkpoints/small"])


@pytest.mark.parametrize("place", ["vae.safetensors", "vae.pth", "export/vae.safetensors", "vae/model.safetensors"])
def test_a_checkpoint_brings_a_part_in_any_layout(place, tmp_path):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    text = refusal(f"model.pretrained.checkpoint={tmp_path}", "model.pretrained.vae=some/file")
    assert text.startswith("model.pretrained.vae = 'some/file': is not read")


def test_a_part_that_the_checkpoint_lacks_may_be_named(tmp_path):
    overrides = [f"model.pretrained.checkpoint={tmp_path}", "model.pretrained.vae=some/file"]
    assert load_config(None, overrides).model.pretrained.vae == "some/file"


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, 1), (5, 5)])
def test_a_schedule_that_feeds_nothing_is_refused(start, end):
    overrides = [f"sampler.feedback_from={start}", f"sampler.feedback_to={end}"]
    expected = f"sampler.feedback_to = {end}: nothing would be fed back from step {max(start, 1)} on"
    assert refusal(*overrides).startswith(expected)
    assert load_config(None, [*overrides, "sampler.feedback=[]"]).sampler.feedback_to == end


@pytest.mark.parametrize("name", ["\U0001f600", "a${b}", "c # d", "e='f'", "\\g", "{h}", "[i]"])
def test_a_path_of_any_name_is_read_back_from_an_override(name):
    key = "model.pretrained.checkpoint"
    assert load_config(None, [as_override(key, Path(name))]).model.pretrained.checkpoint == name
    assert load_config(None, [as_override(key, None)]).model.pretrained.checkpoint is None
