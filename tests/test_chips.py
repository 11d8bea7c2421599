"""Which launch configurations a GPU uses, and the precision of its float32 products. No GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from cwdpo_kernels.triton import configs


@pytest.fixture
def device(monkeypatch):
    """A function that makes the current device one of the given architecture."""

    def use(architecture):
        amd = architecture.startswith("gfx")
        monkeypatch.setattr(configs, "interpreted", lambda: False)
        monkeypatch.setattr(torch.version, "hip", "7.0" if amd else None)
        properties = SimpleNamespace(gcnArchName=f"{architecture}:sramecc+:xnack-")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        capability = None if amd else (int(architecture[3:-1]), int(architecture[-1]))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        configs.architecture.cache_clear()
        configs.chip.cache_clear()
        return torch.device("cuda", 0)

    yield use
    configs.architecture.cache_clear()
    configs.chip.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "chip"),
    [
        ("sm_80", "sm_80"), ("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_90", "sm_90"), ("sm_100", "sm_100"),
        ("sm_103", "sm_100"), ("sm_120", "sm_80"), ("sm_121", "sm_80"),
        ("gfx90a", "gfx942"), ("gfx942", "gfx942"), ("gfx950", "gfx942"),
    ],
)  # fmt: skip
def test_every_gpu_has_launch_configurations(device, architecture, chip):
    here = device(architecture)
    assert configs.architecture(here) == architecture
    assert configs.chip(here) == chip
    assert any(key[0] == chip for key in configs.TILES)


def test_an_old_gpu_is_refused(device):
    with pytest.raises(NotImplementedError, match=r"expected compute capability 8.0 or newer, got 7.5"):
        configs.chip(device("sm_75"))


@pytest.mark.parametrize(
    ("architecture", "precision"), [("sm_89", "tf32"), ("gfx942", "tf32"), ("gfx90a", "ieee"), ("gfx950", "ieee")]
)
def test_tf32_where_the_chip_has_it(device, allow_tf32, architecture, precision):
    device(architecture)
    assert configs.precision() == "ieee"
    allow_tf32()
    assert configs.precision() == precision


@pytest.mark.skipif(not configs.ROUNDS_TO_TF32, reason="Triton rounds from 3.7 on")
def test_loads_round_to_tf32(device, allow_tf32):
    device("sm_90")
    matrix = torch.randn(16, 8)

    def rounds(x):
        given, descriptors = configs.operands(x, x, 16, 16, 8, True)
        assert descriptors
        return given["hidden"].round_f32_to_tf32

    assert not rounds(matrix)
    allow_tf32()
    assert rounds(matrix)
    assert not rounds(matrix.bfloat16())
