import io
import json
import os
import pickle
import re
import stat
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from weat_nb.checkpoints import load_checkpoint, save_checkpoint
from weat_nb.models import create_model
from weat_nb.pretrained import load_weights
from weat_nb.tensors import CheckpointError, file_sha256, load_tensors, save_tensors


def small(arch="resnet8", *args, seed=0, **kwargs):
    return create_model(arch, *(args or (10,)), seed=seed, **kwargs).eval()


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16,
                                   torch.int64, torch.uint8, torch.bool])
def test_types_and_shapes_come_back(tmp_path, dtype):
    tensors = {"a": torch.arange(12).view(3, 4).to(dtype).T, "scalar": torch.tensor(1).to(dtype),
               "empty": torch.empty(2, 0, dtype=dtype), "": torch.ones(1).to(dtype)}
    tensors["shared"] = tensors["a"] # one storage under two names
    back, _ = load_tensors(save_tensors(tmp_path/"x.safetensors", tensors))
    assert same(tensors, back)
    back["a"].zero_() # what was read is writable and its own
    assert back["shared"].any()


def test_metadata_comes_back(tmp_path):
    metadata = {"nested": {"b": [1, 2.5, None, True], "a": "ε = 8/255"},
                "loss": 1e-17, "order": 1, "first": 0}
    _, back = load_tensors(save_tensors(tmp_path/"x.safetensors", {}, metadata))
    assert back == metadata and list(back) == list(metadata)
    assert load_tensors(save_tensors(tmp_path/"x.safetensors", {}))[1] == {}


def test_any_flipped_bit_is_found_or_harmless(tmp_path, survived):
    tensors = {"w": torch.arange(4.), "n": torch.tensor(3)}
    path = save_tensors(tmp_path/"x.safetensors", tensors, {"epoch": 3})
    good, found = path.read_bytes(), 0
    for i in range(len(good)):
        for bit in (0, 3, 6):
            path.write_bytes(good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1:])
            try:
                back, metadata = load_tensors(path)
            except CheckpointError as e:
                assert str(path) in str(e)
                found += 1
            else: # spaces that fill up the header mean nothing
                assert same(back, tensors) and metadata == {"epoch": 3}
    assert found > 2.9 * len(good)
    survived('3 damaged files', 'checkpoint: each byte, three bits flipped one by one',
             3 * len(good), 'named, or harmless (a space that fills up the header)')


def test_any_truncation_is_found(tmp_path, survived):
    path = save_tensors(tmp_path/"x.safetensors", {"w": torch.arange(4.)})
    good = path.read_bytes()
    for n in range(len(good)):
        path.write_bytes(good[:n])
        with pytest.raises(CheckpointError, match="cut short"):
            load_tensors(path)
    survived('3 damaged files', 'checkpoint: cut at each byte', len(good), 'named, with what to do')


def test_pickles_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path/"ran"),))
    zipped, bare = io.BytesIO(), pickle.dumps(Bomb())
    torch.save({"x": Bomb()}, zipped)
    for i, data in enumerate((zipped.getvalue(), bare)):
        path = tmp_path/f"{i}.safetensors"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="is a pickle"):
            load_checkpoint(path)
    assert not (tmp_path/"ran").exists()


def test_files_of_others(tmp_path):
    path = tmp_path/"x.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="safetensors.torch.load_file"):
        load_tensors(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load_tensors(path)
    with pytest.raises(CheckpointError, match="is a folder"):
        load_tensors(tmp_path)
    save_tensors(path, {"w": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="holds tensors but no model"):
        load_checkpoint(path)


def test_other_peoples_files_are_read_as_the_error_says(tmp_path):
    torch.save(small().state_dict(), tmp_path/"x.pth")
    safetensors.torch.save_file(small().state_dict(), tmp_path/"x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        with pytest.raises(CheckpointError, match=r"weat_nb.pretrained.load_weights\(path, arch\)"):
            load_checkpoint(tmp_path/name)
        assert same(load_weights(tmp_path/name, "resnet8").state_dict(), small().state_dict())


@pytest.mark.parametrize("data, message", [
    (b"", "is empty, cut short"), (b"<html>", "a page of HTML"), (b'{"weight_map": {}}', "is text"),
    (b"\x08\0\0\0\0\0\0\0" + b'{"a": 1}', "cut short, damaged"),
    (b"\x90\x1f\0\0\0\0\0\0" + b"[" * 8080, "cut short, damaged")])
def test_damaged_files(tmp_path, data, message):
    (tmp_path/"x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as e:
        load_tensors(tmp_path/"x.safetensors")
    assert str(tmp_path/"x.safetensors") in str(e.value)


def test_a_note_of_another_shape(tmp_path):
    "Signed, and yet no model's"
    for metadata in ({}, {"config": 3}, {"config": {}}, {"config": {"arch": 3}}):
        path = save_tensors(tmp_path/"x.safetensors", {"w": torch.ones(2)}, metadata)
        with pytest.raises(CheckpointError): load_checkpoint(path)


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert save_checkpoint("~/x.safetensors", small()) == tmp_path/"x.safetensors"
    assert same(load_checkpoint("~/x.safetensors")[0].state_dict(), small().state_dict())


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no .safetensors file"):
        load_tensors(tmp_path/"best.safetensors")
    save_tensors(tmp_path/"best.safetensors", {})
    with pytest.raises(FileNotFoundError, match="did you mean 'best.safetensors'"):
        load_checkpoint(tmp_path/"bets.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_tensors(tmp_path/"no"/"best.safetensors")


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "safetensors.torch.save"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = save_tensors(tmp_path/"x.safetensors", {"w": torch.ones(3)}, {"epoch": 1})
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise error("injected")
    monkeypatch.setattr(step, fail)
    with pytest.raises(error):
        save_tensors(path, {"w": torch.zeros(3)}, {"epoch": 2})
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def test_the_file_appears_whole(tmp_path, monkeypatch):
    "Flushed before it gets its name, and the folder after"
    path, calls = tmp_path/"x.safetensors", []
    replace = os.replace

    def note_fsync(fd):
        calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")

    def note_replace(old, new):
        load_tensors(old)
        calls.append("rename")
        replace(old, new)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save_tensors(path, {"w": torch.ones(3)})
    assert calls == (["file", "rename"] if os.name == "nt" else ["file", "rename", "folder"])


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError("Invalid argument")
        fsync(fd)
    monkeypatch.setattr(os, "fsync", refuse)
    assert load_tensors(save_tensors(tmp_path/"x.safetensors", {"w": torch.ones(1)}))[0]["w"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_others_may_read_what_the_umask_allows(tmp_path):
    path = save_tensors(tmp_path/"x.safetensors", {})
    (tmp_path/"plain").touch()
    assert path.stat().st_mode == (tmp_path/"plain").stat().st_mode


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match="'lr' is float"):
        save_tensors(tmp_path/"x.safetensors", {"lr": .1})
    with pytest.raises(TypeError, match="what JSON can hold"):
        save_tensors(tmp_path/"x.safetensors", {}, {"where": tmp_path})
    with pytest.raises(ValueError, match="Linear has no config"):
        save_checkpoint(tmp_path/"x.safetensors", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        save_checkpoint(tmp_path/"x.safetensors", small(), dtype=torch.int8)
    assert os.listdir(tmp_path) == []


def test_a_model_comes_back(tmp_path):
    model = small("resnet8", 7, 1, 28, mean=[.3], std=[.4]).train()
    x = torch.rand(4, 1, 28, 28)
    model(x)
    back, metadata = load_checkpoint(
        save_checkpoint(tmp_path/"x.safetensors", model, metadata={"epoch": 2}))
    assert metadata == {"epoch": 2} and not back.training and back.config == model.config
    assert same(model.state_dict(), back.state_dict()) and torch.equal(back(x), model.eval()(x))


def test_filling_a_model_keeps_its_mode_and_type(tmp_path):
    path = save_checkpoint(tmp_path/"x.safetensors", small(seed=0))
    model = small(seed=1).double().train()
    weight = model.conv1.weight
    back, _ = load_checkpoint(path, model)
    assert back is model and model.training and model.conv1.weight is weight
    assert torch.equal(weight.float(), small(seed=0).conv1.weight)


def test_wrapped_models(tmp_path):
    model = small()
    compiled = torch.compile(nn.DataParallel(model), backend="eager")
    path = save_checkpoint(tmp_path/"x.safetensors", compiled)
    assert same(load_tensors(path)[0], model.state_dict())
    averaged = AveragedModel(nn.DataParallel(small(seed=1)))
    assert load_checkpoint(path, averaged)[0] is averaged
    assert torch.equal(averaged.module.module.conv1.weight, model.conv1.weight)
    averaged = save_checkpoint(tmp_path/"average.safetensors", averaged)
    assert same(load_tensors(averaged)[0], model.state_dict())
    target = nn.DataParallel(torch.compile(small(seed=1), backend="eager"))
    assert load_checkpoint(path, target)[0] is target
    assert torch.equal(target.module._orig_mod.conv1.weight, model.conv1.weight)


def test_a_distributed_model(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(small())
        assert same(load_tensors(save_checkpoint(tmp_path/"x.safetensors", model))[0],
                    model.module.state_dict())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("other, message", [
    (("resnet20", 10), "the model given is resnet20 for 10 classes, 3 channels, 32 pixels"),
    (("resnet8", 100), "the model given is resnet8 for 100 classes"),
    (("resnet8", 10, 1), "10 classes, 1 channel, "),
    (("resnet8", 10, 3, 64), "3 channels, 64 pixels"),
])
def test_another_architecture_is_refused_untouched(tmp_path, other, message):
    path = save_checkpoint(tmp_path/"best.safetensors", small())
    model = small(*other, seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="best.safetensors holds resnet8 for 10 classes, "
                                              "3 channels, 32") as e:
        load_checkpoint(path, model)
    assert message in str(e.value) and same(model.state_dict(), before)


def test_another_normalisation_is_refused(tmp_path):
    path = save_checkpoint(tmp_path/"x.safetensors", small(mean=(.5, .5, .5), std=(.2, .2, .2)))
    with pytest.raises(CheckpointError,
                       match=re.escape("std [0.2, 0.2, 0.2]; the model given is resnet8")):
        load_checkpoint(path, small())


def test_models_without_a_config_are_compared_by_names_and_shapes(tmp_path):
    path = save_checkpoint(tmp_path/"x.safetensors", small())
    model, wide = small(seed=1), small("resnet8", 11, seed=1)
    del model.config, wide.config
    assert torch.equal(load_checkpoint(path, model)[0].conv1.weight, small().conv1.weight)
    before = wide.conv1.weight.clone()
    with pytest.raises(CheckpointError,
                       match=re.escape("linear.bias is (10,) in the file, (11,) in the model")):
        load_checkpoint(path, wide)
    with pytest.raises(CheckpointError, match="weight is absent in the file, .* and 43 more"):
        load_checkpoint(path, nn.Linear(2, 2))
    assert torch.equal(wide.conv1.weight, before)


def test_half_precision(tmp_path):
    model = small()
    for dtype in (torch.float16, torch.bfloat16):
        path = save_checkpoint(tmp_path/"x.safetensors", model, dtype=dtype)
        stored = load_tensors(path)[0]
        assert (stored["conv1.weight"].dtype == dtype
                and stored["bn1.num_batches_tracked"].dtype == torch.int64)
        back, _ = load_checkpoint(path)
        assert {p.dtype for p in back.parameters()} == {torch.float32}
        assert torch.equal(back.conv1.weight, model.conv1.weight.to(dtype).float())
    model.bn1.running_var[3] = 1e5
    with pytest.raises(ValueError, match=re.escape(
            "'bn1.running_var' holds 1e+05, beyond the range of torch.float16")):
        save_checkpoint(tmp_path/"y.safetensors", model, dtype=torch.float16)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_an_architecture_of_a_later_version(tmp_path):
    stored = {"config": {**small().config, "arch": "resnet9000"}, "metadata": {}}
    path = save_tensors(tmp_path/"x.safetensors", small().state_dict(), stored)
    with pytest.raises(CheckpointError, match="cannot build .*'resnet9000'"):
        load_checkpoint(path)


def test_building_from_a_file_spares_the_global_generator(tmp_path):
    path = save_checkpoint(tmp_path/"x.safetensors", small())
    state = torch.get_rng_state()
    load_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_sha256_of_a_file(tmp_path):
    (tmp_path/"abc").write_bytes(b"abc")
    assert (file_sha256(tmp_path/"abc")
            == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


def test_other_software_can_read_the_file(tmp_path):
    "One JSON string under one key: the format is public"
    path = save_tensors(tmp_path/"x.safetensors", {"w": torch.ones(2)}, {"epoch": 1})
    with safetensors.safe_open(path, "pt") as f:
        assert f.metadata().keys() == {"weat_nb"} and f.get_tensor("w").tolist() == [1, 1]
        note = json.loads(f.metadata()["weat_nb"])
    assert note["metadata"] == {"epoch": 1} and len(note["sha256"]) == 64
