import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weat_nb.models import ARCHS, create_model

SMALL = ["resnet8", "resnet20"]
BIG = ["resnet18", "preact_resnet18", "wrn_28_10"]


def images(size=16, channels=3, n=2):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def make(arch, *args, **kwargs):
    "A model in eval mode whose batch normalisation is not the identity"
    model = create_model(arch, *(args or (10,)), seed=0, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            g = torch.Generator().manual_seed(1)
            for t in (m.weight.data, m.bias.data, m.running_mean, m.running_var):
                t.copy_(torch.rand(t.shape, generator=g) + .5)
    return model.eval()


def assert_near(a, b):
    "Equal but for the order of float32 sums"
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("arch", ARCHS)
def test_shapes_for_every_size_and_channel_count(arch):
    for channels, classes in ((1, 100), (3, 200)):
        for size in (28, 32, 64):
            if size == 28 or ARCHS[arch].sized: # no values there, so that nothing may read any
                model = create_model(arch, classes, channels, size, seed=0).to("meta")
            assert model(torch.empty(5, channels, size, size, device="meta")).shape == (5, classes)


@pytest.mark.parametrize("arch", SMALL + BIG)
def test_every_parameter_and_pixel_takes_part(arch):
    model, x = make(arch), images().requires_grad_()
    model(x).square().sum().backward()
    assert (x.grad.abs().sum((0, 1)) > 0).all()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("arch", SMALL + BIG)
def test_channels_last_and_deep_copies_agree(arch):
    model, x = make(arch), images()
    z = model(x)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert_near(twin(x.to(memory_format=torch.channels_last)), z)
    twin.get_submodule("conv1").weight.data.zero_()
    assert twin.config == model.config and torch.equal(model(x), z)


def test_resnet18_is_torchvisions_with_another_stem():
    torchvision = pytest.importorskip("torchvision")
    other = torchvision.models.resnet18(num_classes=10)
    other.conv1, other.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model = make("resnet18")
    theirs = {k.replace("shortcut", "downsample").replace("linear", "fc"): v
              for k, v in model.state_dict().items()}
    other.load_state_dict(theirs)
    assert_near(other.eval()(images(32)), model(images(32)))


def functional_preact(s, x, blocks, projection, last_norm, head):
    "A pre-activation network from its state dict alone: blocks as (prefix, stride)"
    def norm_relu(h, key):
        return F.relu(F.batch_norm(
            h, *(s[f"{key}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))))

    h = F.conv2d(x, s["conv1.weight"], padding=1)
    for prefix, stride in blocks:
        a = norm_relu(h, prefix + "bn1")
        skip = F.conv2d(a, s[prefix + projection], stride=stride) if prefix + projection in s else h
        a = norm_relu(
            F.conv2d(a, s[prefix + "conv1.weight"], stride=stride, padding=1), prefix + "bn2")
        h = skip + F.conv2d(a, s[prefix + "conv2.weight"], padding=1)
    return F.linear(norm_relu(h, last_norm).mean((2, 3)), s[head + ".weight"], s[head + ".bias"])


def test_preactivation_networks_from_the_published_names():
    x = images()
    model = make("preact_resnet18")
    blocks = [(f"layer{i}.{j}.", 2 if i > 1 and j == 0 else 1)
              for i in (1, 2, 3, 4) for j in (0, 1)]
    assert_near(model(x), functional_preact(
        model.state_dict(), x, blocks, "shortcut.0.weight", "bn", "linear"))

    model = make("wrn_28_10")
    blocks = [(f"block{i}.layer.{j}.", 2 if i > 1 and j == 0 else 1)
              for i in (1, 2, 3) for j in range(4)]
    assert_near(model(x), functional_preact(
        model.state_dict(), x, blocks, "convShortcut.weight", "bn1", "fc"))


@pytest.mark.parametrize("arch, pattern, tensors", [
    ("resnet20", r"(conv1|linear|bn1|layer[123]\.[012]\.(conv|bn)[12])", 116),
    ("resnet56", r"(conv1|linear|bn1|layer[123]\.[0-8]\.(conv|bn)[12])", 332),
    ("resnet18", r"(conv1|linear|bn1|layer[1234]\.[01]\.(conv|bn)[12]"
                 r"|layer[234]\.0\.shortcut\.[01])", 122),
    ("preact_resnet18", r"(conv1|linear|bn|layer[1234]\.[01]\.(conv|bn)[12]"
                        r"|layer[234]\.0\.shortcut\.0)", 107),
    ("wrn_28_10", r"(conv1|fc|bn1|block[123]\.layer\.[0-3]\.(conv|bn)[12]"
                  r"|block[123]\.layer\.0\.convShortcut)", 155),
])
def test_state_dict_has_the_names_of_public_checkpoints(arch, pattern, tensors):
    model = create_model(arch, 10, mean=(.5, .5, .5), std=(.2, .2, .2), seed=0)
    leaf = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    assert [k for k in model.state_dict() if not re.fullmatch(pattern + leaf, k)] == []
    assert len(model.state_dict()) == tensors


def test_weights_before_batch_counters_load():
    "Public CIFAR ResNets were saved before batch normalisation counted batches"
    model = make("resnet20")
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    other = create_model("resnet20", 10, seed=1).eval()
    other.load_state_dict(old, strict=True)
    assert torch.equal(other(images()), model(images()))


def test_option_a_shortcut_pads_both_sides_with_zeros():
    block = make("resnet8").get_submodule("layer2.0")
    for p in (block.bn2.weight, block.bn2.bias, block.bn2.running_mean):
        p.data.zero_() # leaves relu(shortcut(x))
    x = images(7, 16)
    h = block(x)
    assert h.shape == (2, 32, 4, 4) and torch.equal(h[:, 8:24], x[:, :, ::2, ::2])
    assert h[:, :8].abs().max() == 0 and h[:, 24:].abs().max() == 0


def test_normalisation_is_inside():
    mean, std = (.4, .5, .6), (.2, .25, .3)
    bare, inside = make("resnet8"), make("resnet8", mean=mean, std=std)
    x = images()
    outside = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(inside(x), bare(outside))
    assert bare.state_dict().keys() == inside.state_dict().keys()
    assert next(inside.children()) is inside.normalize
    assert copy.deepcopy(inside).double()(x.double()).dtype == torch.float64


def test_config_is_plain_and_rebuilds():
    model = create_model("resnet8", 7, 1, 28, mean=torch.tensor([.5]), std=[1], seed=3)
    assert json.loads(json.dumps(model.config)) == model.config
    again = create_model(**model.config, seed=3)
    assert again.config == model.config and again.config["mean"] == [.5]
    assert all(torch.equal(a, b)
               for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_seed_fixes_the_weights_and_spares_the_global_generator():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a = create_model("resnet8", 10, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    with torch.device("meta"): # a default device of the caller's does not change what is drawn
        b = create_model("resnet8", 10, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    c, d = create_model("resnet8", 10), create_model("resnet8", 10)
    assert not torch.equal(c.conv1.weight, d.conv1.weight)


@pytest.mark.cuda
def test_seed_spares_the_gpu_generator():
    torch.cuda.manual_seed_all(5)
    state = torch.cuda.get_rng_state()
    create_model("resnet8", 10, seed=0)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_initial_scale():
    model = create_model("wrn_28_10", 10, seed=0)
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            want = (2 / (m.out_channels * m.kernel_size[0] ** 2)) ** .5
            assert m.weight.std().item() == pytest.approx(want, rel=.1), name
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and (m.bias == 0).all()
    assert (model.fc.bias == 0).all()


@pytest.mark.parametrize("arch", ["resnet8", "resnet18", "wrn_28_10"])
def test_initial_scale_of_pytorch(arch):
    "The default of every layer, drawn as if nothing here touched it"
    model = create_model(arch, 10, seed=0, init="pytorch")
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            bound = (m.in_channels * m.kernel_size[0] ** 2) ** -.5
            assert .9 * bound < m.weight.abs().max() <= bound, name
            assert m.weight.std().item() == pytest.approx(bound / 3 ** .5, rel=.1), name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untouched = ARCHS[arch].build(10, 3)
    assert all(torch.equal(a, b)
               for a, b in zip(model.state_dict().values(), untouched.state_dict().values()))
    assert model.config == create_model(arch, 10, seed=0).config


@pytest.mark.parametrize("kwargs, error, message", [
    (dict(arch="resnet19"), ValueError, "did you mean 'resnet18'"),
    (dict(arch="WRN-28-10"), ValueError, "did you mean 'wrn_28_10'"),
    (dict(arch=None), ValueError, "it must be one of resnet8, resnet20"),
    (dict(init="xavier"), ValueError, "init = 'xavier' is not allowed"),
    (dict(num_classes=1), ValueError, "num_classes = 1 is not allowed"),
    (dict(num_classes=10.5), ValueError, "num_classes = 10.5 is not allowed"),
    (dict(in_channels=0), ValueError, "in_channels = 0 is not allowed"),
    (dict(image_size=4), ValueError, "image_size = 4 is not allowed"),
    (dict(mean=[.5] * 3), ValueError, "mean and std go together"),
    (dict(mean=[.5] * 3, std=[.5]), ValueError, "std needs one value per channel: 3, given 1"),
    (dict(mean=[.5] * 3, std=[.5, 0, .5]), ValueError, "std = 0 is not allowed"),
    (dict(mean=[.5, float("nan"), .5], std=[.5] * 3), ValueError, "mean = nan is not allowed"),
])
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        create_model(**{"arch": "resnet8", "num_classes": 10, **kwargs})


@pytest.mark.parametrize("x, error, message", [
    (torch.zeros(2, 1, 8, 8), ValueError, "(B, 3, H, W), given float32 (2, 1, 8, 8)"),
    (torch.zeros(3, 8, 8), ValueError, "x[None]"),
    (torch.zeros(2, 8, 8, 3), ValueError, "given float32 (2, 8, 8, 3)"),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "given uint8"),
    (torch.zeros(2, 3, 8, 8, dtype=torch.bool), TypeError, "given bool"),
])
def test_bad_images(x, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make("resnet8")(x)


@pytest.mark.parametrize("images_are", [torch.float64, torch.float16, torch.bfloat16])
def test_images_in_another_type_than_the_weights(images_are):
    model, x = make("resnet8"), images().to(images_are)
    name = str(images_are)[6:]
    with pytest.raises(TypeError, match=f"images are {name} and the network's weights float32: "
                                        "use x.to.torch.float32., .* or torch.autocast"): model(x)
    assert model.to(images_are)(x).dtype == images_are # a network computes in any type
    if images_are == torch.bfloat16:
        with torch.autocast("cpu", torch.bfloat16): make("resnet8")(x)


def test_numbers_of_other_kinds():
    "NumPy's, tensors without dimensions, fractions in words; one number is that of one channel"
    np = pytest.importorskip("numpy")
    expected = create_model("resnet8", 10, 1, 8, seed=0, mean=[.5], std=[.25]).config
    for one, eight, half, quarter in (
            (np.int64(1), np.float64(8), np.float32([.5]), "1/4"),
            (torch.tensor(1), "8", torch.tensor(.5), np.array(.25)), (1., 8., (.5,), [.25])):
        model = create_model("resnet8", 10, one, eight, mean=half, std=quarter)
        assert model.config == expected and json.loads(json.dumps(model.config)) == expected


def test_float32_whatever_new_tensors_are():
    plain = make("resnet8", mean=(.5,) * 3, std=(.2,) * 3)
    torch.set_default_dtype(torch.float64)
    try: other = create_model("resnet8", 10, seed=0, mean=(.5,) * 3, std=(.2,) * 3)
    finally: torch.set_default_dtype(torch.float32)
    assert other.normalize.mean.dtype == other.conv1.weight.dtype == torch.float32
    assert torch.equal(other.conv1.weight, plain.conv1.weight)


def test_compiles_in_one_graph():
    model = make("resnet8", mean=(.5, .5, .5), std=(.2, .2, .2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images()), model(images()))
