"""Any architecture of the library becomes two branches, at any image size, with the random weights that a seed says."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save, save_file
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from raysal.archive.uris import write_bytes
from raysal.config import ModelConfig
from raysal.errors import CheckpointError, ConfigError
from raysal.model.branch import ARCHITECTURES
from raysal.model.network import TwoBranch, dropouts, prepare

ENCODER = "tu-mobilenetv3_small_050"
N = 5

# What H is divided by before the last upsampling; decoders of the first row end at full size.
DECODER_STRIDE = {
    "Unet": 1, "UnetPlusPlus": 1, "MAnet": 1, "Linknet": 1, "DPT": 2,
    "FPN": 4, "PAN": 4, "UPerNet": 4, "Segformer": 4, "DeepLabV3Plus": 4, "DeepLabV3": 8, "PSPNet": 8,
}  # fmt: skip
each_architecture = pytest.mark.parametrize("arch", DECODER_STRIDE)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(arch: str = "DeepLabV3Plus", **more: object) -> ModelConfig:
    encoder = "tu-vit_tiny_patch16_224" if arch == "DPT" else ENCODER
    return ModelConfig.model_validate({"arch": arch, "encoder": encoder} | more)


def images(*size: int, n: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point() and v.ndim > 1}


def test_every_architecture_of_the_library_is_tested() -> None:
    assert set(DECODER_STRIDE) == set(ARCHITECTURES)


@each_architecture
def test_logits_have_the_images_size_and_a_fraction_of_it_before_the_last_upsampling(arch: str) -> None:
    model = TwoBranch(config(arch), N, seed=0).eval()
    stride = DECODER_STRIDE[arch]
    with torch.no_grad():
        for height, width in ((37, 53), (64, 96)):
            x = images(height, width)
            full, small = model(x), model(x, "decoder")
            for k in (0, 1):
                assert full[k].shape == (2, N, height, width)
                assert small[k].shape == (2, N, math.ceil(height / stride), math.ceil(width / stride))
                assert full[k].dtype == small[k].dtype == torch.float32
                assert full[k].isfinite().all() and small[k].isfinite().all()
                assert torch.equal(model.answers(x, (k,))[0], full[k])
            assert not torch.allclose(full[0], full[1])


@each_architecture
def test_logits_are_the_librarys_own(arch: str) -> None:
    """Ending the head early and upsampling here changes nothing: equal to smp's model with the same weights."""
    cfg = config(arch, dropout=0.0, mean=(0.6, 0.5, 0.4), std=(0.1, 0.2, 0.3))
    model = TwoBranch(cfg, N, seed=3).eval()
    options = {"dynamic_img_size": True} if arch == "DPT" else {}
    library = smp.create_model(arch, cfg.encoder, encoder_weights=None, classes=N, **options).eval()
    library.load_state_dict(model.branches[1].state_dict())
    x = images(128, 160)
    normalised = (x - 255 * torch.tensor(cfg.mean).view(3, 1, 1)) / (255 * torch.tensor(cfg.std).view(3, 1, 1))
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1], library(normalised), rtol=1e-4, atol=1e-5)


def test_dpt_takes_patches_of_14_pixels() -> None:
    model = TwoBranch(ModelConfig(arch="DPT", encoder="tu-vit_small_patch14_dinov2"), N, seed=0).eval()
    with torch.no_grad():
        z1, z2 = model(images(61, 33, n=1))
    assert z1.shape == z2.shape == (1, N, 61, 33)


@each_architecture
def test_every_architecture_has_dropout_in_both_branches(arch: str) -> None:
    model = TwoBranch(config(arch, dropout=0.4), N, seed=0)
    assert all(dropouts(branch) for branch in model.branches)
    model.eval()
    x = images(64, 64)
    with torch.no_grad():
        fixed = model(x)
        for dropout in dropouts(model):
            dropout.train()
        drawn = model(x)
    assert all(not torch.allclose(a, b) for a, b in zip(fixed, drawn, strict=True))


def test_dropout_is_added_only_where_the_architecture_has_none() -> None:
    assert [d.p for d in dropouts(TwoBranch(config("Unet", dropout=0.3), N, 0))] == [0.3, 0.3]
    assert [d.p for d in dropouts(TwoBranch(config("DeepLabV3Plus", dropout=0.3), N, 0))] == [0.5, 0.5]
    assert not dropouts(TwoBranch(config("Unet", dropout=0.0), N, 0))


def test_a_seed_decides_every_weight_and_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    a = TwoBranch(config("Unet"), N, seed=7).state_dict()
    assert torch.equal(torch.rand(3), expected)
    b = TwoBranch(config("Unet"), N, seed=7).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    c = weights(TwoBranch(config("Unet"), N, seed=8))
    assert all(not torch.equal(a[k], c[k]) for k in c)


def test_without_encoder_weights_the_branches_differ_everywhere() -> None:
    first, second = (weights(branch) for branch in TwoBranch(config(), N, seed=0).branches)
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[k], second[k]) for k in first)


def encoder_file(path: str | Path, rename: str = "encoder", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights of another random encoder, under the names that smp, timm or one of our checkpoints gives them."""
    encoder = TwoBranch(config(), N, seed=99).branches[0].encoder
    prefix = {"encoder": "", "smp": "encoder.", "checkpoint": "branches.0.encoder."}.get(rename, "")
    tensors = {prefix + k: v.to(dtype) for k, v in encoder.state_dict().items() if "num_batches" not in k}
    if rename == "timm":
        tensors = {k.removeprefix("model."): v for k, v in tensors.items()} | {"classifier.weight": torch.zeros(10, 8)}
    write_bytes(str(path), save(tensors))
    return {k: v.to(dtype).float() for k, v in encoder.state_dict().items() if "num_batches" not in k}


@pytest.mark.parametrize("rename", ["encoder", "timm", "smp", "checkpoint"])
def test_an_encoder_file_goes_into_both_branches_and_heads_still_differ(tmp_path: Path, rename: str) -> None:
    file = tmp_path / "encoder.safetensors"
    expected = encoder_file(file, rename)
    model = TwoBranch(config(encoder_weights=str(file)), N, seed=0)
    first, second = model.branches
    for branch in (first, second):
        own = branch.encoder.state_dict()
        assert all(torch.equal(own[k], v) for k, v in expected.items())
    heads = [weights(nn.ModuleList([b.decoder, b.segmentation_head])) for b in (first, second)]
    assert heads[0] and all(not torch.equal(heads[0][k], heads[1][k]) for k in heads[0])
    assert model.encoder_weights is not None
    assert model.encoder_weights.matched == len(expected) and not model.encoder_weights.missing
    assert model.encoder_weights.unused == (("classifier.weight",) if rename == "timm" else ())


def test_encoder_weights_come_from_any_uri_in_any_float_type() -> None:
    uri = f"memory://{uuid.uuid4().hex}/encoder.safetensors"
    expected = encoder_file(uri, "timm", torch.float16)
    model = TwoBranch(config(encoder_weights=uri), N, seed=0)
    own = model.branches[1].encoder.state_dict()
    assert all(torch.equal(own[k], v) and own[k].dtype == torch.float32 for k, v in expected.items())


def test_names_of_flattened_stages_are_matched(tmp_path: Path) -> None:
    """timm's feature extractor of ConvNeXt calls stages_0 what its weights call stages.0."""
    cfg = config("Unet", encoder="tu-convnext_atto")
    encoder = TwoBranch(cfg, N, seed=1).branches[0].encoder.state_dict()
    assert any("stages_0" in k for k in encoder)
    save_file({k.removeprefix("model.").replace("stages_", "stages."): v for k, v in encoder.items()}, tmp_path / "w.safetensors")
    model = TwoBranch(cfg.model_copy(update={"encoder_weights": str(tmp_path / "w.safetensors")}), N, seed=0)
    assert all(torch.equal(v, encoder[k]) for k, v in model.branches[0].encoder.state_dict().items())


def test_tensors_that_a_file_lacks_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "w.safetensors"
    encoder_file(file)
    tensors = load_file(file)
    dropped = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != dropped}, file)
    report = TwoBranch(config(encoder_weights=str(file)), N, seed=0).encoder_weights
    assert report is not None and report.missing == (dropped,) and report.matched == len(tensors) - 1
    assert dropped in caplog.text and str(file) in caplog.text


def test_another_encoders_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    encoder_file(file)
    with pytest.raises(CheckpointError, match=r"w\.safetensors: only \d+ of the encoder's \d+ tensors.*model\.encoder"):
        TwoBranch(config("Unet", encoder="resnet18", encoder_weights=str(file)), N, seed=0)


def test_damaged_and_missing_encoder_files_say_so(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    encoder_file(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"w\.safetensors: not a whole safetensors file"):
        TwoBranch(config(encoder_weights=str(file)), N, seed=0)
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        TwoBranch(config(encoder_weights=str(tmp_path / "none.safetensors")), N, seed=0)
    with pytest.raises(CheckpointError, match=r"nowhere://w\.safetensors"):
        TwoBranch(config(encoder_weights="nowhere://w.safetensors"), N, seed=0)


@pytest.mark.data
def test_real_imagenet_weights_of_efficientnet_lite0_match_all_but_the_classifier(shared: Path) -> None:
    file = shared / "weights" / "tf_efficientnet_lite0.safetensors"
    model = TwoBranch(ModelConfig(encoder="tu-tf_efficientnet_lite0", encoder_weights=str(file)), 9, seed=0).eval()
    report = model.encoder_weights
    assert report is not None and not report.missing and report.matched == 240
    assert {name.split(".")[0] for name in report.unused} == {"conv_head", "bn2", "classifier"}
    tensors = load_file(file)
    for branch in model.branches:
        assert torch.equal(branch.encoder.model.conv_stem.weight, tensors["conv_stem.weight"])
    with torch.no_grad():
        a, b = model.answers(images(128, 128, n=2))[-1]
    assert 0 < a @ b < 1


@pytest.mark.data
def test_real_dinov2_weights_in_half_precision_match_all(shared: Path) -> None:
    file = shared / "weights" / "vit_small_patch14.fp16.safetensors"
    report = TwoBranch(ModelConfig(arch="DPT", encoder="tu-vit_small_patch14_dinov2", encoder_weights=str(file)), 9, seed=0).encoder_weights
    assert report is not None and report.matched == 174 and not report.missing and not report.unused


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"arch": "DeepLab3Plus"}, "model.arch: 'DeepLab3Plus' is not known; did you mean DeepLabV3Plus"),
        ({"encoder": "resnet-50"}, "did you mean .*resnet50"),
        ({"encoder": "tu-efficientnet_lite_0"}, "did you mean .*tu-efficientnet_lite0"),
        ({"encoder": "zzzz"}, "model.encoder: 'zzzz' is not known; known: "),
        ({"arch": "Unet", "output_stride": 8}, "model.output_stride: Unet has no such setting"),
        ({"arch": "Unet", "atrous_rates": (1, 2, 3)}, "model.atrous_rates: Unet has no such setting"),
        ({"atrous_rates": (1, 2)}, "DeepLabV3Plus with encoder .* can't be built"),
        ({"output_stride": 32}, "DeepLabV3Plus with encoder .* can't be built .*output stride 8 or 16"),
        ({"arch": "DPT"}, "DPT with encoder .* can't be built"),
        ({"encoder": "resnet18", "encoder_weights": "imagenet22k"}, "encoder weights 'imagenet22k' can't be built .*imagenet"),
    ],
)
def test_what_cannot_be_built_says_what_to_change(wrong: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TwoBranch(ModelConfig.model_validate({"encoder": ENCODER} | wrong), N, seed=0)


def test_architectures_are_found_in_any_case() -> None:
    assert isinstance(TwoBranch(config("deeplabv3plus"), N, 0).branches[0], smp.DeepLabV3Plus)


def test_atrous_rates_are_those_of_the_pyramid() -> None:
    model = TwoBranch(config(atrous_rates=(1, 2, 3)), N, seed=0)
    for branch in model.branches:
        dilations = {m.dilation[0] for m in branch.decoder.modules() if isinstance(m, torch.nn.Conv2d)}
        assert dilations == {1, 2, 3}


def test_output_stride_sets_the_encoders_last_map() -> None:
    sizes = {}
    for stride in (8, 16):
        model = TwoBranch(config(output_stride=stride), N, seed=0).eval()
        with torch.no_grad():
            sizes[stride] = model.branches[0].encoder(torch.zeros(1, 3, 64, 64))[-1].shape[-1]
            assert model(images(50, 70))[0].shape == (2, N, 50, 70)
    assert sizes == {8: 8, 16: 4}


def test_bytes_and_floats_of_the_same_image_give_the_same_logits() -> None:
    model = TwoBranch(config(), N, seed=0).eval()
    x = images(40, 40)
    with torch.no_grad():
        assert torch.equal(model(x)[0], model(x.float())[0])


def test_padding_continues_the_border() -> None:
    """An image that is cut off where its border repeats gives the same logits there as the whole one."""
    model = TwoBranch(config(), N, seed=0).eval()
    whole = images(64, 64)
    whole[..., 50:, :] = whole[..., 49:50, :]
    whole[..., :, 57:] = whole[..., :, 56:57]
    with torch.no_grad():
        torch.testing.assert_close(model(whole[..., :50, :57])[0], model(whole)[0][..., :50, :57])


def test_features_are_unit_vectors_and_come_with_the_logits() -> None:
    model = TwoBranch(config(), N, seed=0).eval()
    x = images(45, 64, n=3)
    with torch.no_grad():
        features = model.answers(x, (0,))[-1]
        z1, z2, same = model.answers(x, resolution="decoder")
        assert torch.equal(torch.stack([z1, z2]), torch.stack(model(x, "decoder")))
    assert torch.equal(features, same)
    assert features.shape == (3, model.branches[0].encoder.out_channels[-1]) and features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_logits_are_float32_under_autocast() -> None:
    model = TwoBranch(config(), N, seed=0).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {z.dtype for z in model.answers(images(32, 32))} == {torch.float32}


def test_channels_last_changes_speed_not_logits() -> None:
    model = TwoBranch(config(), N, seed=0).eval()
    x = images(64, 64)
    with torch.no_grad():
        before = model(x)[0]
        prepare(model, config(channels_last=True), "cpu")
        assert model.branches[0].segmentation_head[0].weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x)[0], before, rtol=1e-4, atol=1e-5)


def test_preparing_changes_no_weight_statistic_or_mode() -> None:
    model = TwoBranch(config("Unet"), N, seed=0).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prepare(model, config("Unet", compile=True), "cpu")
    assert model.training and all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("arch", ["PSPNet", "DPT", "DeepLabV3Plus"])
def test_after_preparing_every_trainable_parameter_gets_a_gradient(arch: str) -> None:
    """DDP waits for the gradient of each; PSPNet uses half its encoder, DPT no final norm."""
    model = prepare(TwoBranch(config(arch), N, seed=0), config(arch), "cpu").train()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert bool(frozen) == (arch != "DeepLabV3Plus")
    assert all(".encoder." in name for name in frozen)
    sum(z.square().sum() for z in model(images(64, 64))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.fixture
def two_fake_workers() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_sync_bn_keeps_the_activation_of_fused_norms(two_fake_workers: None) -> None:
    cfg = config(sync_bn=True)
    model = TwoBranch(cfg, N, seed=0)
    fused = [name for name, m in model.named_modules() if type(m).__name__ == "BatchNormAct2d"]
    prepare(model, cfg, "meta")
    modules = dict(model.named_modules())
    assert fused and all(isinstance(modules[name], SyncBatchNormAct) for name in fused)  # torch's own forgets to call act
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())


def test_sync_bn_on_several_cpu_workers_is_refused(two_fake_workers: None) -> None:
    with pytest.raises(ConfigError, match=r"model\.sync_bn"):
        prepare(TwoBranch(config(), N, seed=0), config(sync_bn=True), "cpu")
